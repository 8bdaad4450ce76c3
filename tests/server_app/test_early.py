"""Clients that learn while the T2I learns and makes the next batch: the same results, by a second message a round."""

from functools import partial
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict

from fedmmkt.client_app.client import Client
from fedmmkt.client_app.memory import ClientMemory
from fedmmkt.common.config import RunConfig
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.requests import make_requests
from fedmmkt.server_app.strategy import FedMMKT

SETTINGS = {
    "rounds": 2,
    "min_available_nodes": 1,
    "client__models": "mlp,text",
    "client__distillation_steps": 2,
    "t2i__samples_per_round": 20,
}


@pytest.fixture
def both(tiny_run):
    """Return the run-configs of two equal runs, of which in the second clients learn early."""

    def make(**changes):
        settings = SETTINGS | changes
        return tiny_run("usual", **settings), tiny_run("early", learn_early=True, **settings)

    return make


def run(run_config, grid, run_id=1):
    strategy = build_strategy(RunConfig.from_flower(run_config), run_id)
    strategy.start(grid)
    return strategy


def results_of(strategy):
    """Return what metrics say of the rounds, without seconds and bytes, and the T2I's adapter."""
    lines = strategy.recorder.run_folder.read_metrics()
    numbers = [{key: value for key, value in line.items() if key not in ("seconds", "bytes")} for line in lines]
    return numbers, {name: tensor.tolist() for name, tensor in strategy.generator.adapter.state().items()}


def noted_trainings(monkeypatch):
    """Return a list to which each training adds its client and round."""
    trained, learn = [], Client.learn

    def noting(self):
        before = self.memory.newest
        learn(self)
        if self.memory.newest != before:
            trained.append((self.name, self.instructions.round))

    monkeypatch.setattr(Client, "learn", noting)
    return trained


def change_replies(grid, monkeypatch, change):
    """Have a function see, and perhaps change, the content of each reply to a request to learn early."""
    pull = grid.pull_messages

    def changing(ids):
        replies = list(pull(ids))
        for reply in replies:
            if reply.metadata.message_type == "train.early":
                change(reply.content)
        return replies

    monkeypatch.setattr(grid, "pull_messages", changing)


def ask_everybody(strategy, server_round, grid):
    """Return requests to learn early to all clients, in place of `FedMMKT.configure_early`."""
    instructions = partial(strategy._instructions, server_round)
    return make_requests(strategy.ledger.reports, strategy.ledger, instructions, "train.early")


def test_results_are_the_same_each_client_learns_once_a_round_and_targets_travel_once(both, make_grid, monkeypatch):
    usual, early = both()
    expected = results_of(run(usual, make_grid(usual, nodes=2)))
    trained, requests = noted_trainings(monkeypatch), []
    grid = make_grid(early, nodes=2)
    push = grid.push_messages

    def noting(messages):
        messages = list(messages)
        with_targets = any(key.startswith("targets") for key in messages[0].content)
        requests.append((messages[0].metadata.message_type, with_targets))
        return push(messages)

    monkeypatch.setattr(grid, "push_messages", noting)

    strategy = run(early, grid)

    assert results_of(strategy) == expected
    assert sorted(trained) == [(client, number) for client in ("mlp-0", "text-1") for number in (1, 2, 3)]
    assert requests == [
        ("evaluate", False),
        ("train", False),
        ("train.early", True),
        ("train", False),
        ("train.early", True),
        ("train.distill", False),
        ("evaluate.final", False),
    ]
    assert [(len(report.kept), report.awaiting) for report in strategy.ledger.known_clients()] == [(2, ())] * 2
    spans = [line["seconds"]["timeline"]["clients"] for line in strategy.recorder.run_folder.read_metrics()]
    assert [len(of_round) for of_round in spans] == [2, 2, 8]  # Of the last: early, the batch, early, the last one.


def test_a_request_to_learn_early_that_flower_does_not_take_changes_nothing(both, make_grid, monkeypatch):
    usual, early = both()
    expected = results_of(run(usual, make_grid(usual, nodes=2)))
    grid = make_grid(early, nodes=2)
    push = grid.push_messages

    def losing(messages):
        messages = list(messages)
        is_early = messages[0].metadata.message_type == "train.early"
        return ["", *push(messages[1:])] if is_early else push(messages)

    monkeypatch.setattr(grid, "push_messages", losing)

    assert results_of(run(early, grid)) == expected


@pytest.mark.parametrize("said", [{}, {"report": ConfigRecord({"client": "another"})}, {"else": ConfigRecord()}])
def test_a_reply_to_it_that_does_not_fit_changes_nothing(said, both, make_grid, monkeypatch):
    usual, early = both(client__models="mlp")
    expected = results_of(run(usual, make_grid(usual, nodes=1)))
    grid, seen = make_grid(early, nodes=1), []

    def change(content):
        seen.append(sorted(content))
        content.clear()
        content.update(RecordDict(said))

    change_replies(grid, monkeypatch, change)

    assert results_of(run(early, grid)) == expected
    assert seen == [["report", "report.metrics"]] * 2


@pytest.mark.parametrize("asked", [False, True])
def test_a_client_with_a_privacy_budget_is_not_asked_and_would_wait_for_the_batch(both, asked, make_grid, monkeypatch):
    _, early = both(client__epsilon=8.0, client__models="mlp")
    trained, replies = noted_trainings(monkeypatch), []
    grid = make_grid(early, nodes=1)
    change_replies(grid, monkeypatch, lambda content: replies.append(dict(content)))
    if asked:
        monkeypatch.setattr(FedMMKT, "configure_early", ask_everybody)

    run(early, grid)

    assert replies == [{}] * 2 * asked
    assert trained == [("mlp-0", number) for number in (1, 2, 3)]


def test_the_nodes_of_a_round_are_drawn_as_always(both, make_grid):
    usual, early = both(fraction_train=0.5, min_train_nodes=1, rounds=3, client__models="mlp")

    expected, told = (results_of(run(one, make_grid(one, nodes=3))) for one in (usual, early))

    assert told == expected


def test_a_batch_that_comes_while_the_client_still_learns_waits_for_it(both):
    usual, early = both(client__local_epochs=20, client__models="mlp", t2i__adaptation_steps=1)
    node = [{"partition-id": 0, "num-partitions": 2}]  # Half of the images.
    results = []
    for run_config in (usual, early):
        grid = InProcessGrid("fedmmkt.client_app.app:app", run_config, node, workers=2)
        results.append(results_of(run(run_config, grid)))
        grid.close()

    assert results[0] == results[1]


def test_a_run_that_ends_while_clients_learn_early_goes_on_as_if_it_had_not(both, make_grid):
    usual, early = both(checkpoints_kept=1, rounds=3, client__models="mlp")
    expected = results_of(run(usual, make_grid(usual, nodes=1)))

    class Ended(FedMMKT):
        def adapt_generator(self, server_round, pool):
            if server_round == 2:  # The client has learned for round 3; the checkpoint is that of round 1.
                raise KeyboardInterrupt
            return super().adapt_generator(server_round, pool)

    config = RunConfig.from_flower(early)
    strategy = build_strategy(config, 1)
    strategy.__class__ = Ended
    with pytest.raises(KeyboardInterrupt):
        strategy.start(make_grid(early, nodes=1))
    rounds = sorted(path.name for path in Path(early["client.state-dir"]).glob("*/mlp-0/round-*"))
    assert rounds == ["round-00001", "round-00002", "round-00003"]

    again = early | {"resume-from": early["output-dir"]}
    resumed = run(again, make_grid(again, nodes=1), run_id=2)

    lines, adapter = results_of(resumed)
    assert adapter == expected[1]
    assert [line["clients"] for line in lines] == [line["clients"] for line in expected[0]]


def test_batches_are_added_to_a_round_and_the_rest_of_it_is_linked(both, make_grid):
    _, early = both(client__models="mlp", rounds=1)

    strategy = run(early, make_grid(early, nodes=1))

    memory = ClientMemory(Path(early["client.state-dir"]), strategy.ledger.run_key, "mlp-0")
    newest, before = memory.newest, memory.folder / "round-00001"
    assert newest == memory.folder / "round-00002"
    assert (newest / "batch-00001.npz").samefile(before / "batch-00001.npz")
    assert [(item.batch.round, item.targets is not None) for item in memory.batches()] == [(1, True)]


def test_a_reply_that_is_heard_a_round_later_says_nothing_new(both, make_grid, monkeypatch):
    usual, early = both(rounds=3, client__models="mlp")
    expected = results_of(run(usual, make_grid(usual, nodes=1)))
    grid, early_ids, requests = make_grid(early, nodes=1), [], []
    push, pull = grid.push_messages, grid.pull_messages

    def noting(messages):
        messages = list(messages)
        kind, keys = messages[0].metadata.message_type, messages[0].content.keys()
        requests.append((kind, sorted(key for key in keys if key in ("batch-0", "batch-1", "targets-0", "targets-1"))))
        ids = list(push(messages))
        early_ids.extend(ids if kind == "train.early" else ())
        return ids

    def holding(ids):
        """Hold back the first early reply until the round after its own, and the others for good."""
        is_due = [kind for kind, _ in requests].count("train.early") == 2
        held = early_ids[1:] if is_due else early_ids
        return pull([one for one in ids if one not in held])

    monkeypatch.setattr(grid, "push_messages", noting)
    monkeypatch.setattr(grid, "pull_messages", holding)

    strategy = run(early, grid)

    assert results_of(strategy) == expected
    # The last batch is not sent a second time, though the reply from before it came does not name it.
    assert requests[5] == ("train", ["batch-0", "targets-0"])
