"""A client's memory: what comes back from disk, and what does not mix."""

import errno
import fcntl
import os
import stat
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedmmkt.client_app import memory as memory_module
from fedmmkt.client_app.learning.training import AlignedModel
from fedmmkt.client_app.memory import ClientMemory, plain_name, remove_old_runs
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


@given(st.lists(st.text(min_size=1, max_size=200), min_size=2, max_size=2, unique=True))
def test_different_names_have_different_folders(names):
    assume(not any("\ud800" <= letter <= "\udfff" for name in names for letter in name))  # refused as names
    first, second = map(plain_name, names)
    assert first != second
    assert all(len(name) <= 150 and "/" not in name and not name.startswith(".") for name in (first, second))


@pytest.mark.parametrize(
    ("name", "folder"),
    [("cnn-0_A", "cnn-0_A"), ("clinic a", "clinic%20a"), ("clinic.a", "clinic%2Ea"), ("医院", "%E5%8C%BB%E9%99%A2")],
)
def test_plain_names_are_folders_as_they_are(name, folder):
    assert plain_name(name) == folder


# ---------------------------------------------------------------------- a disk that fails


@pytest.fixture
def three_rounds(tmp_path):
    """Return the folder of a client that learned in three rounds and holds a batch of each."""
    for number in (1, 2, 3):
        memory = ClientMemory(tmp_path, "run", "mlp-0")
        memory.add_batch(batch(number))
        memory.add_targets(targets(number))
        save(memory, number)
    return memory.folder


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [zeroed, truncated, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "model.json", "manifest.json"])
def test_a_client_whose_last_model_is_damaged_goes_on_from_the_round_before(three_rounds, caplog, damage, file):
    damage(three_rounds / "round-00003" / file)

    memory = ClientMemory(three_rounds.parent.parent, "run", "mlp-0")

    assert memory.load_model(*learner())
    assert memory.newest.name == "round-00002"
    assert content(memory) == [("run-1", True), ("run-2", True)]
    named = "manifest.json" if file == "manifest.json" else file
    assert f"{three_rounds / 'round-00003' / named}" in caplog.text
    save(memory, 4, keep_rounds=2)
    assert sorted(path.name for path in three_rounds.iterdir()) == ["round-00002", "round-00004"]


@pytest.mark.parametrize("damage", [zeroed, truncated, Path.unlink])
def test_a_damaged_batch_is_as_if_it_never_came_and_can_come_again(three_rounds, damage):
    root = three_rounds.parent.parent
    damage(three_rounds / "round-00003" / "batch-00002.npz")
    damage(three_rounds / "round-00003" / "targets-00003.npz")

    memory = ClientMemory(root, "run", "mlp-0")

    assert memory.load_model(*learner())
    assert memory.newest.name == "round-00003"
    assert content(memory) == [("run-1", True), ("run-3", False)]
    memory.add_batch(batch(2))
    memory.add_targets(targets(3))
    save(memory, 4)
    assert content(ClientMemory(root, "run", "mlp-0")) == [("run-1", True), ("run-2", False), ("run-3", True)]


def test_a_run_that_goes_on_begins_with_the_last_round_that_is_whole(three_rounds):
    root = three_rounds.parent.parent
    zeroed(three_rounds / "round-00003" / "model.safetensors")

    resumed = ClientMemory(root, "later", "mlp-0", [("run", 3)])

    assert resumed.newest.name == "round-00002"


def test_a_disk_that_is_full_costs_the_round_on_disk_and_no_answer(three_rounds, monkeypatch, caplog):
    memory = ClientMemory(three_rounds.parent.parent, "run", "mlp-0")
    memory.add_batch(batch(4))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(memory_module, "save_file", full)
    saved = memory.save(4, *learner(), {"model": "mlp"}, 10, 10)

    assert not saved
    assert f"Round 4 could not be saved in {three_rounds}" in caplog.text
    assert content(memory) == [("run-1", True), ("run-2", True), ("run-3", True)]
    assert sorted(path.name for path in three_rounds.iterdir()) == ["round-00001", "round-00002", "round-00003"]


def test_batches_that_come_after_a_round_was_saved_are_added_to_it(three_rounds):
    memory = ClientMemory(three_rounds.parent.parent, "run", "mlp-0")
    assert [memory.has_learned_in(number) for number in (2, 3, 4)] == [False, True, False]
    weights = memory.newest / "model.safetensors"
    inode = weights.stat().st_ino
    memory.add_batch(batch(4))

    assert memory.save_batches(3, keep_batches=3)

    again = ClientMemory(three_rounds.parent.parent, "run", "mlp-0")
    assert again.newest.name == "round-00003"
    assert content(memory) == content(again) == [("run-2", True), ("run-3", True), ("run-4", False)]
    assert weights.stat().st_ino == inode  # Linked, not written again.
    assert again.load_model(*learner())


def test_a_full_disk_costs_the_batches_that_came_and_not_the_round(three_rounds, monkeypatch, caplog):
    memory = ClientMemory(three_rounds.parent.parent, "run", "mlp-0")
    memory.add_batch(batch(4))
    monkeypatch.setattr(memory_module, "_write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))

    assert not memory.save_batches(3, keep_batches=3)

    assert f"Round 3 could not be saved in {three_rounds}" in caplog.text
    assert content(memory) == [("run-1", True), ("run-2", True), ("run-3", True)]
    assert ClientMemory(three_rounds.parent.parent, "run", "mlp-0").newest.name == "round-00003"


def test_a_process_waits_for_another_that_works_on_the_memory_and_reads_what_it_saved(three_rounds):
    memory, other = (ClientMemory(three_rounds.parent.parent, "run", "mlp-0") for _ in range(2))
    order = []

    def wait():
        with memory.alone() as has_changed:
            order.append(("second", has_changed, memory.newest.name))

    thread = threading.Thread(target=wait)
    with other.alone() as has_changed:
        thread.start()
        thread.join(0.3)
        order.append(("first", has_changed))
        save(other, 4)
    thread.join(10)

    assert order == [("first", False), ("second", True, "round-00004")]


def test_a_disk_without_locks_is_worked_on_without_waiting(three_rounds, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    memory = ClientMemory(three_rounds.parent.parent, "run", "mlp-0")

    with memory.alone() as has_changed:
        save(memory, 4)

    assert not has_changed
    assert memory.newest.name == "round-00004"


def test_what_a_killed_process_left_is_removed_at_the_next_start(three_rounds):
    left = three_rounds / ".round-00004.abc_12x9"
    (left / "deep").mkdir(parents=True)
    fresh, foreign = three_rounds / ".round-00005.abc_12x9", three_rounds / ".mine"
    fresh.mkdir()
    foreign.mkdir()
    for old in (left, foreign):
        os.utime(old, (0, 0))

    ClientMemory(three_rounds.parent.parent, "run", "mlp-0")

    assert not left.exists()
    assert fresh.exists()
    assert foreign.exists()


def test_state_folders_and_their_parents_are_for_their_owner_only(tmp_path):
    memory = ClientMemory(tmp_path / "new" / "state", "run", "mlp-0")
    assert not list(tmp_path.iterdir())  # A run that keeps nothing, such as one that is refused, leaves nothing.
    save(memory, 1)

    folders = [memory.folder, *memory.folder.parents]
    made = folders[: folders.index(tmp_path)]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in made] == [0o700] * 4


def test_old_runs_are_removed_by_number_and_by_age(tmp_path):
    for day, run in enumerate(("a", "b", "c", "d")):
        for client in ("mlp-0", "mlp-1"):
            folder = ClientMemory(tmp_path, run, client).folder
            (folder / "round-00001").mkdir(parents=True)
            os.utime(folder, (0, time.time() - (4 - day) * 86_400))
    (tmp_path / "data" / "mlp-0").mkdir(parents=True)

    def left(client="mlp-0"):
        return sorted(path.parent.name for path in tmp_path.glob(f"*/{client}"))

    remove_old_runs(tmp_path, ("e",), "mlp-0", keep_runs=0, keep_days=0)
    assert left() == ["a", "b", "c", "d", "data"]
    remove_old_runs(tmp_path, ("e",), "mlp-0", keep_runs=4, keep_days=0)
    assert left() == ["b", "c", "d", "data"]
    remove_old_runs(tmp_path, ("e", "b"), "mlp-0", keep_runs=0, keep_days=1.5)
    assert left() == ["b", "d", "data"]
    assert left("mlp-1") == ["a", "b", "c", "d"]


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
