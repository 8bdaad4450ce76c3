"""A checkpoint writes what is new; what it shares with others is checked, and removed with the last of them."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmmkt.server_app.guard import GuardState, Trial
from fedmmkt.server_app.ledger import Source
from fedmmkt.server_app.record.checkpoint import (
    Checkpoints,
    DamagedCheckpointError,
    ServerState,
    checkpoints,
    read_checkpoint,
)
from fedmmkt.server_app.record.resuming import kept_metrics
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.t2i.samples import Samples
from tests.memory import forget_peak, needs_peak, peak


def scored(number):
    latents = torch.full((4, 3, 8, 8), float(number))
    samples = Samples(("a", "b", "c", "d"), torch.arange(4), np.zeros((4, 8, 8, 3), np.uint8), latents)
    return samples.scored(torch.ones(4))


def state(run, number, pool):
    line = {"round": number}
    adapter = {"lora": torch.full((2, 2), float(number))}
    return ServerState(number, "run", (), {}, ("a", "b"), (), {}, adapter, pool, [], line, run.metrics_mark())


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def write_rounds(run, rounds, keep=2, pool_rounds=3):
    """Write a checkpoint and then the metrics of each round, as a run does."""
    written, pool = Checkpoints(run.checkpoints, keep), []
    for number in range(rounds):
        pool = [*pool, scored(number)][-pool_rounds:]
        written.write(state(run, number, pool))
        run.append_metrics({"round": number})
    return written, pool


def test_samples_of_earlier_rounds_are_not_written_again(run):
    written, pool = write_rounds(run, 2)
    before = {path: path.stat().st_mtime_ns for path in (run.checkpoints / "shared").iterdir()}

    written.write(state(run, 2, [*pool, scored(2)]))

    after = {path: path.stat().st_mtime_ns for path in (run.checkpoints / "shared").iterdir()}
    assert len(before) == 2
    assert len(after) == 3
    assert before.items() <= after.items()
    assert [samples.latents_NCHW[0, 0, 0, 0] for samples in read_checkpoint(checkpoints(run.checkpoints)[-1]).pool] == [
        0.0,
        1.0,
        2.0,
    ]


@needs_peak
def test_samples_are_written_without_a_copy_in_memory(run):
    written, latents_NCHW = Checkpoints(run.checkpoints, 1), torch.ones(100, 4, 128, 128)  # 26 MB.
    no_class_N, no_images = torch.full((100,), -1), np.empty((100, 0, 0, 3), np.uint8)
    samples = Samples(("a",) * 100, no_class_N, no_images, latents_NCHW).scored(torch.ones(100))
    written.write(state(run, 0, [scored(0)]))
    forget_peak()
    before = peak()

    written.write(state(run, 1, [samples]))

    assert peak() - before < 13e6
    assert read_checkpoint(checkpoints(run.checkpoints)[-1]).pool[0].latents_NCHW.equal(latents_NCHW)


def test_a_later_process_knows_what_is_there(run):
    write_rounds(run, 2)
    last = checkpoints(run.checkpoints)[-1]
    before = {path: path.stat().st_mtime_ns for path in (run.checkpoints / "shared").iterdir()}

    Checkpoints(run.checkpoints, 2).write(state(run, 2, read_checkpoint(last).pool))

    assert {path: path.stat().st_mtime_ns for path in (run.checkpoints / "shared").iterdir()} == before
    assert [path.name for path in checkpoints(run.checkpoints)] == [last.name, "round-00002"]


def test_what_no_checkpoint_shares_is_removed(run):
    write_rounds(run, 6, keep=2, pool_rounds=3)
    # Rounds 4 and 5 are kept, with the samples of rounds 2 to 5.
    kept = {
        read.latents_NCHW[0, 0, 0, 0].item()
        for path in checkpoints(run.checkpoints)
        for read in read_checkpoint(path).pool
    }
    assert kept == {2.0, 3.0, 4.0, 5.0}
    assert len(list((run.checkpoints / "shared").iterdir())) == 4


def test_damaged_shared_samples_are_named(run):
    write_rounds(run, 1)
    (shared,) = (run.checkpoints / "shared").iterdir()
    content = bytearray(shared.read_bytes())
    content[-1] ^= 1
    shared.write_bytes(content)

    with pytest.raises(DamagedCheckpointError, match=rf"{shared} is not what was written \(its SHA-256 is another\)"):
        read_checkpoint(checkpoints(run.checkpoints)[-1])

    Checkpoints(run.checkpoints, 2).write(state(run, 0, [scored(0)]))  # The round is repeated: the file is mended.
    assert read_checkpoint(checkpoints(run.checkpoints)[-1]).pool[0].latents_NCHW.sum() == 0


def test_metrics_that_are_not_those_of_the_checkpoint_are_named(run):
    write_rounds(run, 2)
    last = read_checkpoint(checkpoints(run.checkpoints)[-1])
    lines = run.metrics.read_bytes()
    assert last.earlier == (len(lines) // 2, hashlib.sha256(lines[: len(lines) // 2]).hexdigest())
    assert kept_metrics(run, last) == (len(lines), True)

    run.metrics.write_bytes(lines[:-1])  # The last line is not whole: the round was not measured yet.
    assert kept_metrics(run, last) == (len(lines) // 2, False)

    run.metrics.write_bytes(b" " + lines)
    with pytest.raises(DamagedCheckpointError, match=r"metrics\.jsonl is not what was written until round 1"):
        kept_metrics(run, last)


def test_what_the_next_batch_is_made_from_is_kept_and_shares_samples(run):
    pool = [scored(0), scored(1)]
    guard = GuardState(Trial({"lora": torch.zeros(2, 2)}, made=(torch.tensor([True, False]),)), 0.5, number=3)
    source = Source(3, {"lora": torch.full((2, 2), 7.0)}, tuple(pool), guard)
    present = replace(state(run, 2, [*pool[1:], scored(2)]), guard=guard, made_from=source)

    Checkpoints(run.checkpoints, 2).write(present)

    read = read_checkpoint(checkpoints(run.checkpoints)[-1])
    assert read.made_from.round == 3
    assert read.made_from.adapter["lora"].tolist() == [[7.0, 7.0]] * 2
    assert set(read.adapter) == set(read.made_from.adapter) == {"lora"}
    assert [samples.latents_NCHW[0, 0, 0, 0] for samples in read.made_from.pool] == [0.0, 1.0]
    assert read.made_from.guard.to_json() == guard.to_json()
    assert read.made_from.guard.trial.made[0].tolist() == [True, False]
    # Samples 0 to 2, and what the batch is made from.
    assert len(list((run.checkpoints / "shared").iterdir())) == 4
    Checkpoints(run.checkpoints, 1).write(state(run, 3, [scored(2)]))
    assert len(list((run.checkpoints / "shared").iterdir())) == 1
