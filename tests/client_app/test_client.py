"""A client on a disk that fails: it answers, and goes on with what is whole."""

import errno

import numpy as np
import pytest
from flwr.app import Message

from fedmmkt.client_app import memory
from fedmmkt.common.config import RunConfig, to_flower
from fedmmkt.common.payloads import ClientReport, DistillationPayload, Instructions, Request, SyntheticBatch
from fedmmkt.deploy.in_process import InProcessGrid


@pytest.fixture
def answer(tmp_path):
    """Return a function that has a node with a table of its own answer the batch of a round."""
    table = tmp_path / "notes.csv"
    table.write_text("text,label\n" + "".join(f"note {row},{'ab'[row % 2]}\n" for row in range(20)))
    node = {"data-path": str(table), "model": "text", "name": "ann", "state-dir": str(tmp_path / "state")}
    quick = {"client.warmup-epochs": 0, "client.local-epochs": 0, "client.distillation-steps": 0}
    grid = InProcessGrid("fedmmkt.client_app.app:app", to_flower(RunConfig()) | quick, [node])

    def answer(round_):
        batch = SyntheticBatch(
            batch_id=f"run-{round_}", round=round_, prompts=("an a", "a b"), prompted_N=np.array([0, 1])
        )
        instructions = Instructions(run_key="run", round=round_, classes=("a", "b"), votes=True, anchor_size=0)
        content = Request(instructions, (batch,)).to_content()
        (message_id,) = grid.push_messages([Message(content, dst_node_id=1, message_type="train")])
        (reply,) = grid.pull_messages([message_id])
        payload = DistillationPayload.from_records(reply.content, "payload")
        return payload.batch_id, ClientReport.from_records(reply.content, "report").kept

    return answer


def test_a_full_disk_costs_no_answer_and_the_server_learns_what_is_not_kept(answer, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert answer(1) == ("run-1", ("run-1",))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "save_file", full)
        assert answer(2) == ("run-2", ("run-1",))
    assert answer(3) == ("run-3", ("run-1", "run-3"))


def test_a_damaged_model_costs_a_round_and_no_answer(answer, tmp_path):
    answer(1)
    answer(2)
    (damaged,) = (tmp_path / "state").rglob("round-00002/model.safetensors")
    damaged.write_bytes(bytes(damaged.stat().st_size))

    assert answer(3) == ("run-3", ("run-1", "run-3"))
