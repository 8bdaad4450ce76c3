"""Whole runs with privacy budgets, in one process."""

import json

import numpy as np
import pytest

from fedmmkt.client_app.privacy.ledger import PrivacyLedger, create_ledger
from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.common.partitioning import partition_rows
from fedmmkt.common.payloads import ClientReport, DistillationPayload
from fedmmkt.common.privacy import Budget, epsilon_of, most_precision, plan_of
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.deploy.partition import write_partitions
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.loop import RunError
from fedmmkt.server_app.strategy import FedMMKT, strategies
from tests.conftest import registered

PLAN = plan_of(most_precision(8, 1e-5), 2)


class PowerCutError(Exception):
    """The server dies."""


class DiesIn2(FedMMKT):
    """The server dies in round 2, when all clients have answered."""

    def adapt_generator(self, server_round, pool):
        if server_round == 2:
            raise PowerCutError
        return super().adapt_generator(server_round, pool)


def run(run_config, grid, run_id=1):
    strategy = build_strategy(RunConfig.from_flower(run_config), run_id)
    strategy.start(grid)
    return strategy, strategy.recorder.run_folder.read_metrics()


def replies_of(grid):
    """Return a list that gets all replies of the nodes."""
    sent, pull = [], grid.pull_messages
    grid.pull_messages = lambda ids: [sent.append(reply) or reply for reply in pull(ids)]
    return sent


def test_a_simulation_with_a_budget(tiny_run, make_grid, tmp_path):
    run_config = tiny_run(client__epsilon=8.0, client__models="cnn,text", local_only_control=True)
    grid = make_grid(run_config, nodes=2)
    sent = replies_of(grid)

    strategy, lines = run(run_config, grid)

    told = [client["privacy"] for line in lines for client in [line["clients"]["per_client"]["cnn-0"]]]
    assert [one["epsilon"] for one in told] == pytest.approx(
        [epsilon_of([PLAN.counts, *[PLAN.votes] * rounds], 1e-5) for rounds in range(3)]
    )
    assert told[-1]["epsilon"] == pytest.approx(8)
    noises = {"counts_noise": PLAN.counts, "votes_noise": PLAN.votes * 3**0.5}
    assert {key: told[-1][key] for key in noises} == pytest.approx(noises)
    text = lines[-1]["clients"]["per_client"]["text-1"]["privacy"]
    assert text["epsilon"] == pytest.approx(epsilon_of([PLAN.counts], 1e-5))
    assert text["votes_noise"] is None
    payloads = [
        DistillationPayload.from_records(reply.content, "payload") for reply in sent if "payload" in reply.content
    ]
    assert len(payloads) == 4
    assert all(payload.logits_NC is None for payload in payloads)
    reports = [ClientReport.from_records(reply.content, "report") for reply in sent]
    for client in ("cnn-0", "text-1"):  # Counts are answered once, and then the same.
        assert len({report.examples for report in reports if report.client == client}) == 1
    assert all(0 <= report.accuracy <= 1 for report in reports)  # Of the common test part.
    assert lines[-1]["generator"]["loss"] is not None
    ((_, targets), _) = strategy.ledger.history
    assert set(np.unique(targets.distinct[0].probabilities_NC)) == {0, 1}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Privacy budgets" in page
    assert "Each of the 2 clients has a budget." in page
    card = (tmp_path / "run" / "lora" / "README.md").read_text()
    assert "2 of 2 clients had a privacy budget" in card
    assert "epsilon of at most 8 at delta 1e-05" in card


@pytest.fixture
def mixed(tiny_run, tmp_path):
    """Return a run-config, and the node-configs of one node with a budget of its own and one without."""
    run_config = tiny_run(local_only_control=False)
    folders = write_partitions(RunConfig.from_flower(run_config).data, 2, 0, tmp_path / "data")
    own = [
        {"data-path": str(folder), "state-dir": str(tmp_path / folder.name), "model": model, "name": model}
        for folder, model in zip(folders, ("cnn", "mlp"), strict=True)
    ]
    own[0]["privacy-ledger"] = str(tmp_path / "ledger.jsonl")
    create_ledger(tmp_path / "ledger.jsonl", Budget(8.0))
    return run_config, own


def grid_of(mixed):
    run_config, own = mixed
    return InProcessGrid("fedmmkt.client_app.app:app", run_config, own)


def test_a_node_with_a_budget_beside_one_without(mixed, tmp_path):
    grid = grid_of(mixed)
    sent = replies_of(grid)

    _, lines = run(mixed[0], grid)

    private, other = (lines[-1]["clients"]["per_client"][name] for name in ("cnn", "mlp"))
    assert (private["accuracy"], private["loss"]) == (None, None)
    assert private["privacy"]["epsilon"] == pytest.approx(8)
    assert "privacy" not in other
    assert lines[-1]["clients"]["accuracy"] == other["accuracy"]
    assert list(lines[-1]["evaluation"]["per_client"]) == ["mlp"]
    assert not any(line["replies"]["reasons"] for line in lines)
    rows = partition_rows(RunConfig.from_flower(mixed[0]).data, 2, 0)
    assert abs(private["examples"] - len(rows[0])) < 10 * 8 * PLAN.counts
    payloads = [
        DistillationPayload.from_records(reply.content, "payload") for reply in sent if "payload" in reply.content
    ]
    # It votes without `share-votes`, since its votes are covered; the other one does not.
    assert [(one.logits_NC is None, one.votes_N is None) for one in payloads] == [(True, False), (False, True)] * 2
    card = (tmp_path / "run" / "lora" / "README.md").read_text()
    assert "1 of 2 clients had a privacy budget" in card
    assert "Nothing is differentially private" in card
    assert "1 of 2 clients have no budget" in (tmp_path / "run" / "report.html").read_text()
    own = next((tmp_path / "node-0").rglob("final/README.md")).read_text()
    assert "1 of 1 clients had a privacy budget" in own


def test_a_second_run_on_a_spent_ledger_is_refused(mixed, tiny_run, tmp_path):
    run(mixed[0], grid_of(mixed))
    spent = PrivacyLedger(tmp_path / "ledger.jsonl").statement().epsilon
    before = set((tmp_path / "node-0").rglob("*"))
    again = {**mixed[0], "output-dir": str(tmp_path / "again")}

    _, lines = run(again, grid_of((again, mixed[1])), run_id=2)

    reason = "the node refused: its privacy budget of epsilon 8 is spent"
    assert [line["replies"]["reasons"].get("node 1", "")[-len(reason) :] for line in lines] == [reason] * 3
    assert list(lines[-1]["clients"]["per_client"]) == ["mlp"]
    assert PrivacyLedger(tmp_path / "ledger.jsonl").statement().epsilon == spent
    left = {path.relative_to(tmp_path / "node-0").parts[0] for path in set((tmp_path / "node-0").rglob("*")) - before}
    assert left == {"errors"}


def test_without_its_ledger_a_node_answers_nothing_and_tells_its_own_log(mixed, tmp_path, caplog):
    (tmp_path / "ledger.jsonl").unlink()

    with pytest.raises(RunError, match=r"none of 1 nodes gave a valid reply(.|\n)*the node refused: privacy ledger"):
        run({**mixed[0], "min-available-nodes": 1}, grid_of((mixed[0], mixed[1][:1])))

    assert "cannot be opened (No such file or directory); nothing is answered until there is a new one" in caplog.text


def test_prompts_without_a_class_need_logits(tiny_run, make_grid, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a zero"}\n')
    run_config = tiny_run(client__epsilon=8.0, client__models="mlp", t2i__prompts=str(tmp_path / "prompts.jsonl"))

    with pytest.raises(ConfigError, match="30 of 30 prompts name no class, and no client sends logits"):
        run(run_config, make_grid(run_config, nodes=2))


def test_a_run_that_goes_on_gets_the_same_answers_and_spends_once(tiny_run, make_grid, tmp_path):
    run_config = tiny_run(client__epsilon=8.0, client__models="mlp", rounds=1)
    _, first = run(run_config, make_grid(run_config, nodes=2))
    more = {**run_config, "resume-from": run_config["output-dir"], "rounds": 2}

    # The budget was planned for one round, and is spent.
    with pytest.raises(RunError, match="its privacy budget of epsilon 8 is spent"):
        run(more, make_grid(more, nodes=2), run_id=2)
    again = {**run_config, "resume-from": run_config["output-dir"], "output-dir": str(tmp_path / "again")}
    _, second = run(again, make_grid(again, nodes=2), run_id=3)

    assert [line["clients"] for line in first] == [line["clients"] for line in second]


def entries(ledger):
    return [json.loads(line)["entry"] for line in ledger.read_text().splitlines()]


def noisy_answers(sent):
    """Return the distinct answers with noise among replies, as they left the nodes: counts, and votes by batch."""
    payloads = [
        DistillationPayload.from_records(reply.content, "payload") for reply in sent if "payload" in reply.content
    ]
    private = [payload for payload in payloads if payload.votes_noise]
    counts = {tuple(payload.class_counts_C.tolist()) for payload in private}
    return counts, [(payload.batch_id, payload.votes_N.tolist()) for payload in private]


def test_a_run_that_is_cut_off_halfway_goes_on_with_its_plan(mixed, tmp_path):
    """Three rounds. The server dies when round 2 is answered, and goes on from the checkpoint of round 1."""
    run_config, ledger = mixed[0] | {"rounds": 3}, tmp_path / "ledger.jsonl"
    plan = plan_of(most_precision(8, 1e-5), 3)
    grid = grid_of((run_config, mixed[1]))
    before = replies_of(grid)
    with registered(strategies, "tested", DiesIn2), pytest.raises(PowerCutError):
        run(run_config | {"strategy": "tested"}, grid)
    halfway = [entry["noise"] for entry in entries(ledger) if "question" in entry]
    more = run_config | {"resume-from": run_config["output-dir"], "output-dir": str(tmp_path / "again")}
    grid = grid_of((more, mixed[1]))
    after = replies_of(grid)

    with registered(strategies, "tested", FedMMKT):
        _, lines = run(more | {"strategy": "tested"}, grid, run_id=2)

    assert halfway == [plan.counts, plan.votes, plan.votes]
    first, second = (entry for entry in entries(ledger) if "run" in entry)
    assert first["origin"] == second["origin"] == first["run"] != second["run"]
    assert [entry["noise"] for entry in entries(ledger) if "question" in entry] == [plan.counts, *[plan.votes] * 3]
    assert [line["clients"]["per_client"]["cnn"]["privacy"]["epsilon"] for line in lines] == pytest.approx(
        [epsilon_of([plan.counts, *[plan.votes] * rounds], 1e-5) for rounds in (0, 1, 2, 3)]
    )
    assert not any(line["replies"]["reasons"] for line in lines)
    (counts_before, votes_before), (counts_after, votes_after) = noisy_answers(before), noisy_answers(after)
    assert len(counts_before | counts_after) == 1
    assert votes_before[1][1] == votes_after[0][1]  # Round 2 was asked twice, and answered alike.
    answered = [entry["answer"] for entry in entries(ledger) if entry.get("question", "").startswith("votes")]
    assert [votes_N for _, votes_N in [*votes_before, *votes_after[1:]]] == answered
