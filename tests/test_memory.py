"""A client's memory: what comes back from disk, and what does not mix."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from client_app.learning import AlignedModel
from client_app.memory import ClientMemory
from client_app.task_models import build_task_model
from common.payloads import PayloadError, SoftTargets, SyntheticBatch


def batch(number):
    return SyntheticBatch(batch_id=f"run-{number}", round=number, prompts=("a", "b"), prompted_N=np.array([0, -1]))


def targets(number):
    return SoftTargets(
        batch_id=f"run-{number}",
        probabilities_NC=np.array([[1, 0], [0.5, 0.5]], np.float16),
        weights_N=np.ones(2, np.float32),
    )


def learner():
    model = AlignedModel(build_task_model("mlp", 2, 16), 4)
    return model, torch.optim.AdamW(model.parameters())


def test_model_and_optimizer_come_back(tmp_path):
    memory = ClientMemory(tmp_path, "run", "mlp-0")
    model, optimizer = learner()
    assert not memory.load_model(*learner())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    memory.save_model(3, model, optimizer, {"model": "mlp"})

    other, other_optimizer = learner()
    assert memory.load_model(other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert str(optimizer.state_dict()) == str(other_optimizer.state_dict())
    assert "task_model.head.weight" in load_file(memory.folder / "model-00003" / "model.safetensors")


def test_batches_meet_their_targets_and_old_ones_go(tmp_path):
    memory = ClientMemory(tmp_path, "run", "mlp-0")
    for number in (1, 2, 3):
        memory.add_batch(batch(number))
    assert memory.add_targets(targets(2))
    assert not memory.add_targets(targets(9))
    memory.prune(batches=2, models=1)

    kept = memory.batches()

    assert [item.batch.batch_id for item in kept] == ["run-2", "run-3"]
    assert kept[0].batch.prompts == ("a", "b")
    assert kept[0].batch.images is None
    assert np.array_equal(kept[0].targets.probabilities_NC, targets(2).probabilities_NC)
    assert kept[1].targets is None
    assert len(list(memory.folder.iterdir())) == 3


def test_runs_and_clients_do_not_mix(tmp_path):
    ClientMemory(tmp_path, "run", "mlp-0").add_batch(batch(1))
    assert not ClientMemory(tmp_path, "other", "mlp-0").batches()
    assert not ClientMemory(tmp_path, "run", "mlp-1").batches()
    ClientMemory(tmp_path, "other", "mlp-0").forget()
    assert ClientMemory(tmp_path, "run", "mlp-0").batches()


def test_names_cannot_leave_the_state_folder(tmp_path):
    with pytest.raises(PayloadError, match="is no plain name"):
        ClientMemory(tmp_path, "../other", "mlp-0")
    assert ClientMemory(tmp_path, "run", "../../x").folder.parent == tmp_path / "run"
