"""Who is asked: the draw by itself, and in a run of six clients of which a round asks half."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmmkt.common.config import RunConfig
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.sampling import draw, draw_in_turns, sample_size


def named(count):
    return {node_id: f"client-{node_id}" for node_id in range(count)}


@pytest.mark.parametrize(
    ("connected", "fraction", "least", "expected"),
    [
        (1000, 0.1, 2, 100),
        (6, 0.5, 2, 3),
        (7, 0.5, 2, 3),  # Rounded down, as in Flower's strategies.
        (10, 0.1, 2, 2),  # At least so many,
        (1, 0.1, 2, 1),  # if they are there.
        (5, 1.0, 2, 5),
        (0, 0.5, 2, 0),
    ],
)
def test_the_size_of_a_sample(connected, fraction, least, expected):
    assert sample_size(connected, fraction, least) == expected


def test_the_order_of_the_nodes_changes_nothing_and_the_seed_does():
    names = named(50)

    drawn = draw(names, 10, "0/1")

    assert draw(dict(reversed(names.items())), 10, "0/1") == drawn
    assert draw(names, 10, "0/2") != drawn
    assert len(set(drawn)) == 10


def test_a_node_that_leaves_changes_the_draw_of_no_other():
    names = named(50)
    drawn = draw(names, 10, "0/1")
    del names[drawn[3]]

    assert draw(names, 9, "0/1") == [*drawn[:3], *drawn[4:]]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 20))
def test_each_node_has_its_turn_before_any_has_a_second(nodes, count, rounds):
    names, drawn, asked = named(nodes), frozenset(), Counter()
    for server_round in range(rounds):
        chosen, drawn = draw_in_turns(names, count, f"0/{server_round}", drawn)

        assert len(chosen) == len(set(chosen)) == min(count, nodes)
        asked.update(chosen)
        assert max(asked.values()) - min(asked[node_id] for node_id in names) <= 1


def test_half_of_six_clients_are_asked_in_turns_and_later_get_what_they_lack(tiny_run, make_grid):
    """Rounds 1 and 2 ask each client once, and so do rounds 3 and 4."""

    def run(name, listed):
        run_config = tiny_run(name, rounds=4, client__models="mlp", fraction_train=0.5, learn_early=False)
        grid = make_grid(run_config, nodes=6)
        sent, push = {}, grid.push_messages
        grid.get_node_ids = lambda: listed(list(grid.contexts))

        def spy(messages):
            messages = list(messages)
            for message in messages:
                if message.metadata.message_type == "train":
                    key = (message.content["instructions"]["round"], f"mlp-{message.metadata.dst_node_id - 1}")
                    sent[key] = sorted(name for name in message.content if name.startswith(("batch", "targets")))
            return push(messages)

        grid.push_messages = spy
        strategy = build_strategy(RunConfig.from_flower(run_config), 1)
        strategy.start(grid)
        return strategy.recorder.run_folder.read_metrics(), sent

    lines, sent = run("run", listed=list)
    others, _ = run("other", listed=lambda node_ids: node_ids[::-1])

    everybody = [f"mlp-{index}" for index in range(6)]
    asked = [line["replies"]["asked"] for line in lines]
    assert asked[0] == everybody
    assert [len(names) for names in asked[1:4]] == [3, 3, 3]
    assert sorted(asked[1] + asked[2]) == everybody
    assert asked[1] != asked[3]
    assert asked[4] == everybody  # Three in the round, and all for the last soft targets.
    assert [line["replies"]["answered"] for line in lines] == asked
    assert all(line["replies"]["gone"] == [] for line in lines)
    assert [line["replies"]["asked"] for line in others] == asked
    # Those of round 2 get the batch of round 1, which they have not seen, with its soft targets, and the new batch.
    for client in asked[2]:
        assert [name for name in sent[2, client] if "." not in name] == ["batch-0", "batch-1", "targets-0"]
