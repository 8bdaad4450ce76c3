"""The whole round with the real starter model and real clients, in one process."""

import json
import shutil
from logging import INFO
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from PIL import Image

from fedmmkt.client_app import app as honest
from fedmmkt.client_app.memory import ClientMemory
from fedmmkt.client_app.models.small import mlp
from fedmmkt.client_app.models.task_model import task_models
from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.common.failures import RunError
from fedmmkt.common.payloads import ClientReport, DistillationPayload, PayloadError, Request
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.exchange import Answer
from fedmmkt.server_app.prompts import Prompt
from fedmmkt.server_app.record.checkpoint import checkpoints, read_checkpoint
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.rules.aggregation import aggregations
from fedmmkt.server_app.strategy import FedMMKT, strategies
from fedmmkt.server_app.t2i.samples import Samples
from tests.conftest import registered


def run(run_config, grid, run_id=1):
    strategy = build_strategy(RunConfig.from_flower(run_config), run_id)
    result = strategy.start(grid)
    return strategy, result, strategy.recorder.run_folder.read_metrics()


def clients_of(line):
    return sorted(line["clients"]["per_client"])


def without_seconds(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_run_leaves_what_it_promises(tiny_run, make_grid, tmp_path):
    run_config = tiny_run(tracker="tensorboard", judge=True, local_only_control=True)

    strategy, result, lines = run(run_config, make_grid(run_config))

    assert [line["round"] for line in lines] == [0, 1, 2]
    last = lines[-1]
    assert set(last) == {"round", "clients", "generator", "bytes", "seconds", "replies", "reliability", "evaluation"}
    assert all("evaluation" not in line for line in lines[:-1])
    clients = ["cnn-0", "dual-5", "mlp-1", "resnet-3", "text-4", "vit-2"]
    counts = {"received": 6, "rejected": 0, "missing": 0, "reasons": {}}
    late = {"late": [], "late_counted": [], "busy": []}
    assert last["replies"] == counts | {"asked": clients, "answered": clients, "gone": []} | late
    assert set(last["seconds"]) == {
        "generate",
        "clients",
        "aggregate",
        "adapt",
        "evaluate",
        "measure",
        "total",
        "timeline",
    }
    second = {name: times for name, *times in lines[2]["seconds"]["timeline"]["server"]}
    (measured,) = (times for name, *times in lines[1]["seconds"]["timeline"]["beside"] if name == "measure")
    # Round 1 is measured while the clients work on round 2, after its images were made and before the T2I learns.
    assert second["generate"][1] <= measured[0] < measured[1] <= second["adapt"][0]
    assert sorted({name for name, *_ in lines[2]["seconds"]["timeline"]["clients"]}) == clients_of(lines[2])
    assert len(last["clients"]["per_client"]) == 6
    accuracies = [client["accuracy"] for client in last["clients"]["per_client"].values()]
    assert last["clients"]["accuracy"] == pytest.approx(np.mean(accuracies))
    final = last["evaluation"]["per_client"]
    assert [final[name]["accuracy"] for name in clients] == pytest.approx(accuracies)
    assert all(sum(client["tested"]) == 359 and len(client["alone_correct"]) == 10 for client in final.values())
    assert 0 <= last["generator"]["alignment"] <= 1
    assert last["generator"]["frechet"] > 0
    assert last["bytes"]["down"] > last["bytes"]["up"] > 0
    folder = tmp_path / "run"
    pictures = {f"round-{i:03d}.png" for i in range(3)}
    assert {path.name for path in (folder / "images").iterdir()} == pictures | {"prompts.json"}
    assert (folder / "report.html").stat().st_size > 10_000
    described = json.loads((folder / "config.json").read_text())
    assert described["config"]["rounds"] == 2
    assert 0.9 < described["judge"]["accuracy"] <= 1
    assert described["versions"]["torch"] == torch.__version__
    assert described["hardware"]["cores"] >= 1
    assert list(folder.rglob("events.out.tfevents*"))
    state = strategy.generator.adapter.state()
    assert set(result.arrays) == set(state)
    assert all(torch.equal(torch.from_numpy(result.arrays[name].numpy()), tensor) for name, tensor in state.items())
    assert sorted(result.train_metrics_clientapp) == [1, 2]


def test_the_smallest_settings_run(tiny_run, make_grid):
    run_config = tiny_run(
        judge=True, min_available_nodes=1, client__models="mlp", t2i__inference_steps=1, t2i__evaluation_samples=1
    )

    _, _, lines = run(run_config, make_grid(run_config, nodes=1))

    assert [line["generator"]["frechet"] for line in lines] == [None] * 3  # One image has no spread.


def test_a_page_that_cannot_be_drawn_costs_itself_and_not_the_run(tiny_run, make_grid, monkeypatch, caplog):
    run_config = tiny_run(min_available_nodes=1, client__models="mlp", rounds=1)

    def write_report(folder, history):
        raise ValueError("a fault in a chart")

    monkeypatch.setattr("fedmmkt.server_app.recorder.write_report", write_report)
    _, _, lines = run(run_config, make_grid(run_config, nodes=1))

    assert [line["round"] for line in lines] == [0, 1]
    assert "write report failed, and the run goes on: ValueError('a fault in a chart')" in caplog.text


def test_without_a_judge_only_the_images_that_are_shown_are_made(tiny_run, make_grid, monkeypatch):
    run_config = tiny_run(min_available_nodes=1, client__models="mlp", judge=False)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    monkeypatch.setattr("fedmmkt.server_app.record.evaluation_images.GRID_ROWS", 2)
    made, generate = [], strategy.generator.generate
    strategy.generator.generate = lambda prompts, *rest, **more: (
        made.append(prompts) or generate(prompts, *rest, **more)
    )

    strategy.start(make_grid(run_config, nodes=1))

    assert len(made[0]) == 2 * 6
    with Image.open(strategy.recorder.run_folder.path / "images" / "round-000.png") as grid:
        assert grid.size == (6 * 32 + 5 * 2, 2 * 32 + 2)  # 16 pixels, shown twice as large, with gaps of 2.


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(tiny_run, make_grid):
    first, second, other = (tiny_run(name=name, client__models="cnn,dual") for name in ("first", "second", "other"))
    other["seed"] = 1
    lines = [
        without_seconds(run(config, make_grid(config, nodes=2), run_id)[2])
        for run_id, config in ((7, first), (2**63, second), (7, other))
    ]
    assert lines[0] == lines[1]
    assert lines[0] != lines[2]


def test_the_control_equals_a_run_without_transfer_and_changes_no_other_number(tiny_run, make_grid):
    common = {"client__models": "cnn,mlp", "client__local_epochs": 2}
    isolated = {f"client__{name}_weight": 0.0 for name in ("distillation", "prompt", "alignment")}
    configs = [
        tiny_run(name="with", local_only_control=True, **common),
        tiny_run(name="without", **common),
        tiny_run(name="isolated", t2i__scores="none", **isolated, **common),
    ]

    with_control, without, alone = (without_seconds(run(config, make_grid(config, nodes=2))[2]) for config in configs)

    final = with_control[-1].pop("evaluation")["per_client"]
    assert {name: client["alone"] for name, client in final.items()} == {
        name: client["accuracy"] for name, client in alone[-1]["clients"]["per_client"].items()
    }
    assert all("alone" not in client for client in without[-1].pop("evaluation")["per_client"].values())
    assert with_control == without


@pytest.mark.parametrize("feedback", ["logits", "logits+votes"])
def test_nothing_but_the_named_payload_leaves_a_client(tiny_run, make_grid, feedback):
    run_config = tiny_run(feedback=feedback, local_only_control=True)
    grid = make_grid(run_config, nodes=7)
    models = ["cnn", "mlp", "vit", "resnet", "text", "text-transformer", "dual"]
    for context, model in zip(grid.contexts.values(), models, strict=True):
        context.node_config["model"] = model
    sent = []
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: [sent.append(reply) or reply for reply in pull(ids)]

    run(run_config, grid)

    assert len(sent) == 7 * (1 + 2 * 2 + 1 + 1)
    for reply in sent:
        kind, content = reply.metadata.message_type, reply.content
        added = {"train": "payload", "evaluate.final": "evaluation"}.get(kind)
        assert set(content) == {"report", "report.metrics"} | ({added, f"{added}.arrays"} if added else set())
        report, numbers = content["report"], content["report.metrics"]
        assert set(report) == {"client", "model", "modality", "kept", "awaiting"}
        assert set(numbers) == ({"examples"} if kind == "train.early" else {"examples", "accuracy", "loss"})
        assert all(isinstance(value, int | float) for value in numbers.values())
        if kind == "evaluate.final":
            assert dict(content["evaluation"]) == {}
            shapes = {name: (array.dtype, tuple(array.shape)) for name, array in content["evaluation.arrays"].items()}
            counts = ("examples_C", "tested_C", "correct_C", "alone_correct_C")
            assert shapes == dict.fromkeys(counts, ("int64", (10,)))
        if kind != "train":
            continue
        assert set(content["payload"]) == {"batch_id"}
        shapes = {name: (array.dtype, tuple(array.shape)) for name, array in content["payload.arrays"].items()}
        votes = feedback == "logits+votes" and "image" in report["modality"]
        assert shapes == {"logits_NC": ("float16", (30, 10)), "class_counts_C": ("int64", (10,))} | (
            {"votes_N": ("float32", (30,))} if votes else {}
        )


def test_text_clients_are_sent_no_images_once_they_are_known(tiny_run, make_grid):
    run_config = tiny_run(client__models="cnn,text", rounds=1)
    grid = make_grid(run_config, nodes=2)
    sent = {}
    push = grid.push_messages

    def spy(messages):
        for message in messages:
            if message.metadata.message_type == "train":
                sent[message.metadata.dst_node_id] = set(message.content["batch-0.arrays"])
        return push(messages)

    grid.push_messages = spy
    run(run_config, grid)
    assert "images" in sent[1]
    assert "images" not in sent[2]


def test_the_order_in_which_replies_arrive_changes_nothing(tiny_run, make_grid):
    """Nor which of the clients a strategy is told of first."""
    seen = []

    class Watching(FedMMKT):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            seen.append([reply.content["report"]["client"] for reply in replies])
            return super().aggregate_train(server_round, replies)

    def lines_of(name, order):
        run_config = tiny_run(name=name, client__models="mlp", rounds=1, strategy="watching", learn_early=False)
        grid = make_grid(run_config, nodes=3)
        pull = grid.pull_messages
        # A reply is there once all that are to come before it were pulled.
        grid.pull_messages = lambda ids: pull([name for name in ids if name == order(list(grid.pending))[0]])
        return without_seconds(run(run_config, grid)[2])

    with registered(strategies, "watching", Watching):
        forwards, backwards = lines_of("forwards", list), lines_of("backwards", lambda replies: replies[::-1])

    assert seen == [["mlp-0", "mlp-1", "mlp-2"]] * 2
    assert forwards == backwards


# ---------------------------------------------------------------------- clients that go wrong

hostile = ClientApp()


@hostile.evaluate()
def _evaluate(message: Message, context):
    return honest.evaluate_model(message, context)


@hostile.train("distill")
def _distill(message: Message, context):
    return honest.distill(message, context)


@hostile.train()
def _train(message: Message, context):
    """Client 0 is honest; each other client goes wrong in its own way."""
    reply = honest.train_round(message, context)
    arrays, partition = reply.content["payload.arrays"], context.node_config["partition-id"]
    logits_NC = arrays["logits_NC"].numpy()
    if partition == 1:
        raise RuntimeError("the disk of this hospital is on fire")
    if partition == 2:
        arrays["logits_NC"] = Array(np.full_like(logits_NC, np.nan))
    if partition == 3:
        arrays["logits_NC"], arrays["votes_N"] = Array(logits_NC[:-1]), Array(arrays["votes_N"].numpy()[:-1])
    if partition == 4:
        reply.content["payload"]["batch_id"] = "another"
    if partition == 5:
        arrays["logits_NC"] = Array(np.zeros((len(logits_NC), 7), np.float16))
        arrays["class_counts_C"] = Array(np.ones(7, np.int64))
    if partition == 6:
        arrays["logits_NC"] = Array("float16", logits_NC.shape, "numpy.ndarray", b"random bytes")
    if partition == 7:
        arrays["votes_N"] = Array(np.full(len(logits_NC), 3.4e38, np.float32))
    if partition == 8:
        reply.content["payload.notes"] = ConfigRecord({"a": "b"})
    if partition == 9:
        reply.content["report"]["client"] = "mlp-0"
    return Message(RecordDict(dict(reply.content)), reply_to=message)


liar = ClientApp()


@liar.evaluate()
def _evaluate_liar(message: Message, context):
    return honest.evaluate_model(message, context)


@liar.train("distill")
def _distill_liar(message: Message, context):
    return honest.distill(message, context)


@liar.train()
def _lie(message: Message, context):
    """In round 1, client 2 names a wrong class for each sample, and says that it holds all classes."""
    reply = honest.train_round(message, context)
    request = Request.from_content(message.content)
    if context.node_config["partition-id"] != 2 or request.instructions.round > 1:
        return reply
    payload = DistillationPayload.from_records(reply.content, "payload")
    logits_NC = np.eye(10)[(request.batches[-1].prompted_N + 1) % 10] * 20
    changes = {"logits_NC": logits_NC.astype(np.float16), "class_counts_C": np.full(10, 10**6)}
    lie = payload.model_copy(update=changes)
    report = ClientReport.from_records(reply.content, "report").model_copy(update={"examples": 10**7})
    return Message(RecordDict({**report.to_records("report"), **lie.to_records("payload")}), reply_to=message)


def test_a_client_that_contradicts_the_prompts_has_no_voice_until_it_is_trusted_again(tiny_run, make_grid, caplog):
    run_config = tiny_run(client__models="mlp", t2i__samples_per_round=200, client__warmup_epochs=4)
    grid = make_grid(run_config, nodes=3, app="tests.server_app.test_strategy:liar")

    strategy, _, lines = run(run_config, grid)

    assert ["reliability" in line for line in lines] == [False, True, True]
    told = lines[1]["reliability"]
    assert list(told) == ["mlp-2"]
    assert (told["mlp-2"]["weight"], told["mlp-2"]["reason"][:35]) == (0, "its answers contradict the prompts ")
    assert "mlp-2 counts for 0.00: its answers contradict the prompts" in caplog.text
    assert lines[2]["reliability"]["mlp-2"]["weight"] < 1
    state = read_checkpoint(checkpoints(strategy.recorder.run_folder.checkpoints)[-1])
    assert state.standings == strategy.ledger.standings
    assert state.standings["mlp-2"].trust <= 0.25


def test_the_voice_of_a_liar_is_heard_where_robust_is_off(tiny_run, make_grid):
    run_config = tiny_run(client__models="mlp", rounds=1, robust=False)
    grid = make_grid(run_config, nodes=3, app="tests.server_app.test_strategy:liar")

    strategy, _, lines = run(run_config, grid)

    assert "reliability" not in lines[1]
    assert strategy.ledger.standings == {}


def test_bad_clients_are_named_and_change_nothing_for_the_others(tiny_run, make_grid):
    run_config = tiny_run(client__models="mlp", min_available_nodes=1)
    _, _, lines = run(run_config, make_grid(run_config, nodes=10, app="tests.server_app.test_strategy:hostile"))
    replies = lines[1]["replies"]
    assert replies["received"] == 1
    assert replies["rejected"] == 9
    assert "evaluation" not in lines[-1]  # None of them knows the message, as a client of an earlier version.
    expected = {
        "mlp-1": "the disk of this hospital is on fire",
        "mlp-2": "300 of 300 values are not finite",
        "mlp-3": "logits have shape (29, 10); expected (30, 10)",
        "mlp-4": "answers batch 'another'; expected '00000000000000000001-1'",
        "mlp-5": "logits have shape (30, 7); expected (30, 10)",
        "mlp-6": "cannot be read",
        "mlp-7": "30 of 30 samples have more votes than images that may vote",
        "mlp-8": "records that nobody asked for: payload.notes",
        "mlp-9": "client name 'mlp-0' belongs to another node",
    }
    assert set(replies["reasons"]) == set(expected)
    assert all(reason in replies["reasons"][client] for client, reason in expected.items())

    # The T2I and the honest client are what they are without the others, digit for digit.
    alone = tiny_run(name="alone", client__models="mlp", min_available_nodes=1)
    grid = make_grid(alone, nodes=10)
    for node_id in list(grid.contexts)[1:]:
        del grid.contexts[node_id]
    _, _, honest = run(alone, grid)
    for line, other in zip(lines, honest, strict=True):
        assert line["generator"] == other["generator"]
        assert line["clients"]["per_client"]["mlp-0"] == other["clients"]["per_client"]["mlp-0"]


def test_a_run_ends_in_a_clear_error_when_no_valid_reply_is_left(tiny_run, make_grid):
    run_config = tiny_run(client__models="no-such-model")
    problem = "'client.models' is 'no-such-model', but no task model"
    with pytest.raises(RunError, match=f"round 0: none of 2 nodes gave a valid reply\n2 of 2 clients: .*{problem}"):
        run(run_config, make_grid(run_config, nodes=2))
    folder = RunFolder(Path(run_config["output-dir"]))
    assert folder.read_failure().startswith("round 0: none of 2 nodes gave a valid reply 2 of 2 clients: ")
    assert "Failed before the end of round 0" in folder.report.read_text()


def test_too_few_nodes_end_the_run_before_anything_is_generated(tiny_run, make_grid):
    run_config = tiny_run(min_available_nodes=3, node_timeout=0.1)
    with pytest.raises(ConfigError, match=r"'min-available-nodes' is 3, but 2 node\(s\) connected within 0.1 s"):
        run(run_config, make_grid(run_config, nodes=2))


def test_a_client_that_joins_late_or_loses_its_disk_gets_what_it_missed(tiny_run, make_grid):
    run_config = tiny_run(client__models="mlp", rounds=4, strategy="joining", learn_early=False)
    grid = make_grid(run_config, nodes=3)
    late = grid.contexts.pop(3)
    batches, push = {}, grid.push_messages
    state = tiny_run()["client.state-dir"]

    def spy(messages):
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train":
                key = (message.content["instructions"]["round"], message.metadata.dst_node_id)
                batches[key] = sum(name.startswith("batch-") and "." not in name for name in message.content)
        if messages[0].content["instructions"]["round"] == 2:
            shutil.rmtree(ClientMemory(Path(state), f"{1:020d}", "mlp-0").folder)
        return push(messages)

    class Joining(FedMMKT):
        def configure_train(self, server_round, arrays, config, grid):
            if server_round == 3:
                grid.contexts[3] = late
            return super().configure_train(server_round, arrays, config, grid)

    grid.push_messages = spy
    with registered(strategies, "joining", Joining):
        _, _, lines = run(run_config, grid)

    # Node 1 lost batch 1 before round 2 and says so in its reply; node 3 joins in round 3 and gets both.
    assert [batches[round_, 2] for round_ in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert [batches[round_, 1] for round_ in (1, 2, 3, 4)] == [1, 1, 2, 1]
    assert [batches[round_, 3] for round_ in (3, 4)] == [3, 1]
    assert [line["replies"]["received"] for line in lines] == [2, 2, 2, 3, 3]


# ---------------------------------------------------------------------- extending


class LoudPrompts(FedMMKT):
    """A strategy whose prompts are upper case."""

    def make_prompts(self, server_round):
        return [Prompt(prompt.text.upper(), prompt.class_index) for prompt in super().make_prompts(server_round)]


def test_run_config_names_a_strategy_of_the_users_own(tiny_run, make_grid):
    run_config = tiny_run(rounds=1, client__models="mlp", strategy=f"{__name__}:LoudPrompts")
    strategy, _, _ = run(run_config, make_grid(run_config, nodes=2))
    ((batch, _),) = strategy.ledger.history
    assert all(prompt.isupper() for prompt in batch.prompts)


def test_registered_functions_are_chosen_by_run_config(tiny_run, make_grid):
    called = []

    def spy(logits_KNC, class_counts_KC, prompted_N):
        called.append(tuple(logits_KNC.shape))
        return logits_KNC.softmax(-1).mean(0)

    run_config = tiny_run(rounds=1, client__models="my-mlp", t2i__aggregation="spy")
    with registered(aggregations, "spy", spy), registered(task_models, "my-mlp", mlp):
        _, _, lines = run(run_config, make_grid(run_config, nodes=2))
    assert called == [(2, 30, 10)]  # The same answers are aggregated once a round.
    assert set(lines[-1]["clients"]["per_client"]) == {"my-mlp-0", "my-mlp-1"}


@pytest.mark.parametrize("update", ["reward", "negative-aware"])
def test_update_rules_change_the_adapter(tiny_run, make_grid, update):
    run_config = tiny_run(rounds=1, client__models="mlp", t2i__update=update)
    strategy, _, lines = run(run_config, make_grid(run_config, nodes=2))
    moved = [tensor for name, tensor in strategy.generator.adapter.state().items() if "lora_B" in name]
    assert any(tensor.any() for tensor in moved)
    assert lines[-1]["generator"]["loss"] is not None


def test_a_frozen_t2i_stays_as_it_is(tiny_run, make_grid):
    run_config = tiny_run(client__models="mlp", t2i__scores="none", t2i__aggregation="mean", judge=True)
    strategy, _, lines = run(run_config, make_grid(run_config, nodes=2))
    moved = [tensor for name, tensor in strategy.generator.adapter.state().items() if "lora_B" in name]
    assert not any(tensor.any() for tensor in moved)
    assert lines[0]["generator"] == lines[-1]["generator"]


def test_prompts_without_classes_work(tiny_run, make_grid, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"the digit {name}"}) for name in ("one", "two", "six")))
    run_config = tiny_run(t2i__prompts=str(file), judge=True, client__models="mlp,dual", rounds=1)

    _, _, lines = run(run_config, make_grid(run_config, nodes=2))
    assert lines[-1]["generator"]["alignment"] is None
    assert lines[-1]["generator"]["frechet"] > 0
    assert lines[-1]["replies"]["rejected"] == 0


def answer_of(modality, logits_NC, counts_C, votes_N=None):
    report = ClientReport(client=modality, model="any", modality=modality, examples=1, accuracy=0, loss=0)
    logits_NC, counts_C = np.array(logits_NC, dtype=np.float16), np.array(counts_C)
    votes_N = None if votes_N is None else np.array(votes_N, dtype=np.float32)
    payload = DistillationPayload(batch_id="b", logits_NC=logits_NC, class_counts_C=counts_C, votes_N=votes_N)
    return Answer(report, payload)


def reply_of(client, accuracy, probabilities_NC, batch_id, each=1):
    """Make the message of an image client whose logits have these probabilities, with ``each`` examples a class."""
    told = ClientReport(client=client, model="any", modality="image", examples=2 * each, accuracy=accuracy, loss=0)
    logits_NC, counts_C = np.log(probabilities_NC).astype(np.float16), np.array([each, each])
    payload = DistillationPayload(batch_id=batch_id, logits_NC=logits_NC, class_counts_C=counts_C)
    records = {**told.to_records("report"), **payload.to_records("payload")}
    return Message(RecordDict(records), dst_node_id=1, message_type="train")


@pytest.fixture
def served(tiny_run, make_grid):
    """Return a strategy that has served two samples of its own, and nothing else, and the batch."""
    run_config = tiny_run(data__classes="no,yes", t2i__aggregation="mean", t2i__scores="consensus")
    make_grid(run_config, nodes=0)  # Flower's messages belong to a run.
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    latents_NCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = Samples(("no", "yes"), torch.tensor([0, 1]), np.zeros((2, 32, 32, 3), np.uint8), latents_NCHW)
    batch = strategy.make_batch(1, samples)
    strategy.ledger.serve(batch, samples)
    return strategy, batch


def test_aggregate_train_needs_a_served_batch_and_replies_alone(served):
    """No hook needs another one to have been called before."""
    strategy, batch = served
    replies = [
        reply_of("second", 0.75, [[0.4, 0.6], [0.7, 0.3]], batch.batch_id),
        reply_of("first", 0.25, [[0.8, 0.2], [0.9, 0.1]], batch.batch_id),
    ]

    arrays, metrics = strategy.aggregate_train(1, replies)

    assert dict(metrics) == {"accuracy": 0.5, "replies": 2}
    ((taught, by_client),) = strategy.ledger.history
    (targets,) = by_client.distinct
    assert taught is batch
    assert by_client.of_modality == {"image": 0, "text": 0, "image+text": 0}
    assert targets.probabilities_NC == pytest.approx(np.array([[0.6, 0.4], [0.8, 0.2]]), abs=1e-3)
    assert targets.weights_N == pytest.approx([0.6, 0.2], abs=1e-3)  # The agreement on what was prompted.
    (scored,) = strategy.ledger.pool
    # Each is the only sample of its class; their agreements are .6 and .2.
    assert scored.scores_N.tolist() == pytest.approx([1.5, 0.5], abs=1e-4)
    assert len(scored.images_NHWC[0]) == 0
    assert any(bool(torch.tensor(array.numpy()).any()) for name, array in arrays.items() if "lora_B" in name)
    assert strategy.ledger.open_batch() is None


# Two samples do not show whether a client is reliable, so that with `robust` it may not exceed the median client of 2.
@pytest.mark.parametrize(("robust", "counted"), [(False, 20), (True, 2)])
def test_a_client_that_says_very_many_examples_is_capped_by_the_median_client(served, caplog, robust, counted):
    caplog.set_level(INFO, "flwr")
    strategy, batch = served
    strategy.config = strategy.config.model_copy(update={"robust": robust})
    even = [[0.5, 0.5], [0.5, 0.5]]
    replies = [
        reply_of("honest", 0.5, even, batch.batch_id),
        reply_of("liar", 0.5, even, batch.batch_id, each=10**9),
    ]

    strategy.aggregate_train(1, replies)

    assert f"liar says 2000000000 examples, and counts as {counted}: " in caplog.text
    assert "honest says" not in caplog.text


def test_aggregate_train_without_replies_leaves_the_batch_open(served):
    strategy, batch = served

    assert strategy.aggregate_train(1, []) == (None, None)

    assert strategy.ledger.open_batch() is batch
    assert strategy.ledger.history == []


def test_aggregate_train_refuses_the_answer_to_another_batch(served):
    strategy, _ = served
    with pytest.raises(PayloadError, match="answers batch 'another'; expected '00000000000000000001-1'"):
        strategy.aggregate_train(1, [reply_of("first", 0.5, [[0.5, 0.5], [0.5, 0.5]], "another")])


def test_a_reply_is_refused_when_nothing_is_served(tiny_run, make_grid):
    make_grid({}, nodes=0)
    strategy = build_strategy(RunConfig.from_flower(tiny_run(data__classes="no,yes")), 1)
    with pytest.raises(PayloadError, match="answers batch 'any', when none is served"):
        strategy.read_train_reply(reply_of("first", 0.5, [[0.5, 0.5]], "any"))


def test_a_class_that_only_pairs_know_is_judged_by_those_that_hold_them(tiny_run):
    """Two samples of class 0, which the image client holds, and two of class 1, which it does not."""
    strategy = build_strategy(RunConfig.from_flower(tiny_run(data__classes="no,yes")), 1)
    prompted_N = torch.tensor([0, 0, 1, 1])
    sure, other = [8.0, -8.0], [-8.0, 8.0]
    image = answer_of("image", [sure, other, sure, sure], [5, 0], votes_N=[1, 1, 0, 0])
    pairs = answer_of("image+text", [sure, sure, other, sure], [1, 3], votes_N=[0, 0, 1, 1])

    scores_N = strategy.score_samples([image, pairs], prompted_N)

    # Class 0 by the image client alone, which votes on no other class, and so never against it.
    # Class 1 by the pairs: they see it in the third sample, and not in the fourth.
    assert scores_N.tolist() == pytest.approx([1, 1, 1, 0.02**2], abs=1e-4)
