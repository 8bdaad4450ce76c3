from flwr.app import Message

from fedmmkt.client_app.privacy.ledger import create_ledger
from fedmmkt.common.config import RunConfig, to_flower
from fedmmkt.common.payloads import Instructions, Request
from fedmmkt.common.privacy import Budget
from fedmmkt.deploy.in_process import InProcessGrid
from tests.client_app.privacy.killed_node import batch_of, write_data


def test_a_round_beyond_the_budget_is_refused_before_anything_is_learned_or_written(tmp_path):
    """The run was planned for one round, and the server asks for a second one."""
    write_data(tmp_path / "data")
    create_ledger(tmp_path / "ledger.jsonl", Budget(8.0))
    quick = {"client.warmup-epochs": 0, "client.local-epochs": 0, "client.distillation-steps": 0, "data.image-size": 8}
    node = {
        "data-path": str(tmp_path / "data"),
        "privacy-ledger": str(tmp_path / "ledger.jsonl"),
        "state-dir": str(tmp_path / "state"),
        "model": "mlp",
        "name": "ann",
    }
    grid = InProcessGrid("fedmmkt.client_app.app:app", to_flower(RunConfig()) | quick, [node])

    def ask(round_):
        told = Instructions(run_key="run", round=round_, rounds=1, classes=("a", "b"), votes=True, anchor_size=0)
        message = Message(Request(told, (batch_of(round_),)).to_content(), dst_node_id=1, message_type="train")
        [reply] = grid.pull_messages(grid.push_messages([message]))
        return reply

    def written():
        return {
            path: path.stat().st_mtime_ns
            for path in tmp_path.rglob("*")
            if path.is_file() and "errors" not in path.parts
        }

    answered, before = ask(1), written()
    refused = ask(2)

    assert answered.has_content()
    reason = "the node refused: its privacy budget of epsilon 8 is spent"
    assert refused.error.reason == reason
    assert written() == before
    assert (tmp_path / "state" / "run" / "ann" / "round-00001" / "model.safetensors") in before
