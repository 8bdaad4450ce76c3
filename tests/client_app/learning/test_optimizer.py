"""The clients' optimizer is torch's, but for what starts slowly."""

import torch

from fedmmkt.client_app.learning.optimizer import AdamW


def test_the_clients_optimizer_is_torchs():
    """Steps, state and state read back are equal to the last bit."""
    weights = []
    for kind in (torch.optim.AdamW, AdamW):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = kind([parameter], 0.1, weight_decay=1e-3)
        for step in range(4):
            if step == 2:
                state = optimizer.state_dict()
                optimizer = kind([parameter], 0.5)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()
        weights.append(parameter.detach())
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(*weights)
