"""A client's memory: what comes back from disk, and what does not mix."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedmmkt.client_app.learning.training import AlignedModel
from fedmmkt.client_app.memory import ClientMemory
from fedmmkt.client_app.models.building import build_task_model
from fedmmkt.common.payloads import PayloadError, SoftTargets, SyntheticBatch


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


def save(memory, round_, keep_batches=10, keep_rounds=10):
    memory.save(round_, *learner(), {"model": "mlp"}, keep_batches, keep_rounds)


def content(memory):
    return [(item.batch.batch_id, item.targets is not None) for item in memory.batches()]


def test_model_and_optimizer_come_back(tmp_path):
    memory = ClientMemory(tmp_path, "run", "mlp-0")
    model, optimizer = learner()
    assert not memory.load_model(*learner())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    memory.save(3, model, optimizer, {"model": "mlp"}, keep_batches=1, keep_rounds=1)

    other, other_optimizer = learner()
    assert ClientMemory(tmp_path, "run", "mlp-0").load_model(other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert str(optimizer.state_dict()) == str(other_optimizer.state_dict())
    assert "task_model.head.weight" in load_file(memory.folder / "round-00003" / "model.safetensors")


def test_batches_meet_their_targets_and_old_ones_go(tmp_path):
    memory = ClientMemory(tmp_path, "run", "mlp-0")
    for number in (1, 2, 3):
        memory.add_batch(batch(number))
    assert memory.add_targets(targets(2))
    assert not memory.add_targets(targets(9))
    save(memory, 3, keep_batches=2)

    kept = ClientMemory(tmp_path, "run", "mlp-0").batches()

    assert [item.batch.batch_id for item in kept] == ["run-2", "run-3"]
    assert kept[0].batch.prompts == ("a", "b")
    assert kept[0].batch.images is None
    assert np.array_equal(kept[0].targets.probabilities_NC, targets(2).probabilities_NC)
    assert kept[1].targets is None


def test_old_rounds_go_and_a_batch_lies_on_disk_once(tmp_path):
    memory = ClientMemory(tmp_path, "run", "mlp-0")
    memory.add_batch(batch(1))
    for round_ in (1, 2, 3):
        save(memory, round_, keep_rounds=2)
    rounds = sorted(memory.folder.iterdir())
    assert [path.name for path in rounds] == ["round-00002", "round-00003"]
    files = [path / "batch-00001.npz" for path in rounds]
    assert files[0].samefile(files[1])


def test_what_is_not_saved_is_as_if_it_never_came(tmp_path):
    ClientMemory(tmp_path, "run", "mlp-0").add_batch(batch(1))
    assert not ClientMemory(tmp_path, "run", "mlp-0").batches()


def test_runs_and_clients_do_not_mix(tmp_path):
    memory = ClientMemory(tmp_path, "run", "mlp-0")
    memory.add_batch(batch(1))
    save(memory, 1)
    assert not ClientMemory(tmp_path, "other", "mlp-0").batches()
    assert not ClientMemory(tmp_path, "run", "mlp-1").batches()
    assert ClientMemory(tmp_path, "run", "mlp-0").batches()


def test_names_cannot_leave_the_state_folder(tmp_path):
    with pytest.raises(PayloadError, match="is no plain name"):
        ClientMemory(tmp_path, "../other", "mlp-0")
    assert ClientMemory(tmp_path, "run", "../../x").folder.parent == tmp_path / "run"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(1, 4)), st.sets(st.integers(1, 4))), min_size=1, max_size=5), st.data())
def test_a_resumed_run_finds_the_client_as_it_was_after_any_round(rounds, data):
    """Whatever came in which round, and whichever rounds the client missed."""
    with TemporaryDirectory() as root:
        before = {0: []}
        for round_, (batches, soft) in enumerate(rounds, start=1):
            memory = ClientMemory(Path(root), "old", "mlp-0")
            for number in batches:
                memory.add_batch(batch(number))
            for number in soft:
                memory.add_targets(targets(number))
            if batches:
                save(memory, round_)
            before[round_] = content(ClientMemory(Path(root), "old", "mlp-0"))
        last = data.draw(st.integers(0, len(rounds)))

        ancestors = [("older", 9), ("old", last), ("between", 9)]
        resumed = ClientMemory(Path(root) / "new place", "new", "mlp-0", ancestors, [Path(root)])
        again = ClientMemory(Path(root) / "new place", "new", "mlp-0", ancestors, [Path(root)])

        assert content(resumed) == content(again) == before[last]
        assert resumed.load_model(*learner()) == any(batches for batches, _ in rounds[:last])
        assert content(ClientMemory(Path(root), "old", "mlp-0")) == before[len(rounds)]
