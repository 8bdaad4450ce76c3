"""A run with a client that takes two rounds for each answer, in a process of its own."""

import pytest

from fedmmkt.common.config import RunConfig
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.strategy import FedMMKT


class Impatient(FedMMKT):
    """A strategy whose rounds close when two of three have answered: they wait for both others of a straggler."""

    def configure_train(self, server_round, arrays, config, grid):
        self.recorder.config = self.recorder.config.model_copy(update={"quorum": 0.6})
        return super().configure_train(server_round, arrays, config, grid)


@pytest.fixture
def grid(tiny_run):
    run_config = tiny_run(
        rounds=7,
        client__models="mlp",
        round_deadline=0.01,
        quorum=1.0,
        client__pool_rounds=3,
        strategy=f"{__name__}:Impatient",
    )
    nodes = [{"partition-id": index, "num-partitions": 3} for index in range(3)]
    grid = InProcessGrid("tests.whole.straggler:app", run_config, nodes, workers=3)
    yield grid
    grid.close()


def test_a_straggler_is_counted_in_every_second_round_and_its_work_does_not_pile_up(grid):
    waiting, slow, sent, push = [], [], {}, grid.push_messages

    def spy(messages):
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train":
                key = (message.content["instructions"]["round"], message.metadata.dst_node_id)
                sent[key] = {message.content[name]["batch_id"] for name in message.content if is_targets(name)}
                waiting.append(sum(not grid.pending[one].done() for one in slow if one in grid.pending))
        pushed = push(messages)
        slow.extend(one for one, message in zip(pushed, messages, strict=True) if message.metadata.dst_node_id == 3)
        return pushed

    def is_targets(name):
        return name.startswith("targets-") and "." not in name

    grid.push_messages = spy
    strategy = build_strategy(RunConfig.from_flower(grid.contexts[1].run_config), 1)
    strategy.start(grid)

    replies = [line["replies"] for line in strategy.recorder.run_folder.read_metrics()]
    # Asked in rounds 1, 3, 5, 7; it answers when the next round is over. The last answer comes after the run's end.
    assert [line["late_counted"] for line in replies] == [[], [], [], ["mlp-2"], [], ["mlp-2"], [], ["mlp-2"]]
    assert [line["busy"] for line in replies] == [[], [], ["mlp-2"], [], ["mlp-2"], [], ["mlp-2"], []]
    # In the last round it need not wait for another, and may answer before one of them.
    assert all({"mlp-0", "mlp-1"} <= set(line["answered"]) for line in replies[1:-1])
    assert max(waiting) <= 1  # Never more than one message at the straggler.
    assert sorted(round_ for round_, node_id in sent if node_id == 3) == [1, 3, 5, 7]
    # What it said of batch 1 came in round 3, and with it batch 1 was taught again, in round 4, to the others too.
    first = f"{1:020d}-1"
    assert [first in sent[round_, 1] for round_ in (2, 3, 4, 5)] == [True, False, True, False]
