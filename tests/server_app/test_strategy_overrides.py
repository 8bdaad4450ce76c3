"""Each public method of the strategy can be overridden, and what a subclass does in it has its effect on the run."""

import logging
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Result

from fedmmkt.common.config import ConfigError, RunConfig, to_flower
from fedmmkt.common.images import decode_images
from fedmmkt.common.payloads import PayloadError
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.exchange import Answer
from fedmmkt.server_app.prompts import Prompt
from fedmmkt.server_app.strategy import FedMMKT, strategies
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.t2i.samples import sample_seeds
from tests.conftest import TINY, registered

PUBLIC = [name for name, part in vars(FedMMKT).items() if callable(part) and not name.startswith("_")]
CLIENTS = ["mlp-0", "text-1", "mlp-2"]  # Of the nodes 1, 2 and 3.
SETTINGS = {
    "rounds": 1,
    "client.models": "mlp,text,mlp",
    "client.distillation-steps": 2,
    "data.alpha": 1.0,
    "t2i.samples-per-round": 20,
    "t2i.inference-steps": 2,
}


@dataclass
class Run:
    """A run that has ended."""

    strategy: FedMMKT
    result: Result
    lines: list
    log: str

    @property
    def history(self):
        """The batches, and the soft targets of all clients, by name."""
        return [
            (batch, {report.client: targets.for_client(report) for report in self.strategy.ledger.known_clients()})
            for batch, targets in self.strategy.ledger.history
        ]

    @property
    def taught(self):
        """The only batch, and its soft targets by client."""
        (only,) = self.history
        return only

    @property
    def adapter(self):
        return self.strategy.generator.adapter.state()

    @property
    def has_learned(self):
        """Whether the T2I has; its adapter begins with zeros."""
        return any(bool(tensor.any()) for name, tensor in self.adapter.items() if "lora_B" in name)


class LateGrid(InProcessGrid):
    """The last node's answer of the first round comes in the second."""

    def push_messages(self, messages):
        messages = list(messages)
        pushed = super().push_messages(messages)
        for message_id, message in zip(pushed, messages, strict=True):
            if message.metadata.message_type == "train":
                first = message.content["instructions"]["round"] == 1
                self.withheld = message_id if first and message.metadata.dst_node_id == 3 else None
        return pushed

    def pull_messages(self, message_ids):
        return super().pull_messages(one for one in message_ids if one != getattr(self, "withheld", None))


LATE = {"rounds": 2, "quorum": 0.6, "round-deadline": 0.01}


def run_with(strategy, folder, grid=InProcessGrid, **changes):
    """Run a strategy in a tiny federation of two image clients and a text client."""
    settings = to_flower(RunConfig()) | TINY | SETTINGS | {"output-dir": str(folder), "strategy": "tested"} | changes
    grid = grid("fedmmkt.client_app.app:app", settings, [{"partition-id": i, "num-partitions": 3} for i in range(3)])
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("flwr").addHandler(handler)
    try:
        with registered(strategies, "tested", strategy):
            built = build_strategy(RunConfig.from_flower(settings), 1)
        result = built.start(grid)
    finally:
        logging.getLogger("flwr").removeHandler(handler)
    return Run(built, result, built.recorder.run_folder.read_metrics(), "\n".join(said))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Run the strategy as it is."""
    return run_with(FedMMKT, tmp_path_factory.mktemp("plain") / "run")


class Changed(FedMMKT):
    """A strategy with one step of its own, and what must then be seen that is not in the plain run."""

    grid = InProcessGrid
    settings: ClassVar = {}  # Of its run, where they are not those of the plain run.

    @staticmethod
    @abstractmethod
    def check(run, plain):
        """Assert what must be seen; each strategy says it, or cannot be built."""


# ---------------------------------------------------------------------- the steps of a round


class LoudPrompts(Changed):
    def make_prompts(self, server_round):
        return [Prompt(prompt.text.upper(), prompt.class_index) for prompt in super().make_prompts(server_round)]

    @staticmethod
    def check(run, plain):
        (loud, _), (quiet, _) = run.taught, plain.taught
        assert loud.prompts == tuple(prompt.upper() for prompt in quiet.prompts)


class StrongGuidance(Changed):
    def guidance(self, server_round):
        return 4.0

    @staticmethod
    def check(run, plain):
        batch, _ = run.taught
        generator = Generator(run.strategy.config.t2i, run.strategy.config.seed)
        expected = generator.generate(batch.prompts, sample_seeds(0, 1, 20), 4.0)
        assert "20 images, guidance 4 " in run.log
        assert np.array_equal(decode_images(batch.images, batch.offsets), expected.images_NHWC)
        assert not np.array_equal(plain.taught[0].images, batch.images)


class BlackImages(Changed):
    def generate(self, server_round, prompts, pool):
        samples = super().generate(server_round, prompts, pool)
        return replace(samples, images_NHWC=np.zeros_like(samples.images_NHWC))

    @staticmethod
    def check(run, plain):
        batches = [run.taught[0], plain.taught[0]]
        assert [decode_images(batch.images, batch.offsets).max() == 0 for batch in batches] == [True, False]


class NoAnchors(Changed):
    def make_batch(self, server_round, samples):
        batch = super().make_batch(server_round, samples)
        return batch.model_copy(update={"anchors_UD": None, "anchor_index_N": None})

    @staticmethod
    def check(run, plain):
        assert [one.taught[0].anchors_UD is None for one in (run, plain)] == [True, False]
        assert run.lines[1]["bytes"]["down"] < plain.lines[1]["bytes"]["down"]


class TextTeachesText(Changed):
    def teachers(self, client, answers):
        return [a for a in answers if a.report.modality == "text"] if client.modality == "text" else answers

    @staticmethod
    def check(run, plain):
        (_, targets), (_, same) = run.taught, plain.taught
        assert targets["mlp-0"] is targets["mlp-2"]
        assert same["mlp-0"] is same["text-1"]
        assert np.array_equal(targets["mlp-0"].probabilities_NC, same["mlp-0"].probabilities_NC)
        assert not np.array_equal(targets["text-1"].probabilities_NC, same["text-1"].probabilities_NC)
        ((_, by_client),) = run.strategy.ledger.history
        of_modality = {modality: by_client.distinct[index] for modality, index in by_client.of_modality.items()}
        assert of_modality == {"image": targets["mlp-0"], "text": targets["text-1"], "image+text": targets["mlp-0"]}


class Uniform(Changed):
    def aggregate_logits(self, answers, prompted_N):
        return torch.full((len(prompted_N), len(self.classes)), 1 / len(self.classes))

    @staticmethod
    def check(run, plain):
        targets = run.taught[1]["mlp-0"]
        assert targets.probabilities_NC == pytest.approx(np.full((20, 10), 0.1), abs=1e-3)
        assert targets.weights_N == pytest.approx(np.full(20, 0.1))
        assert plain.taught[1]["mlp-0"].probabilities_NC.max() > 0.2


class OwnWeights(Changed):
    def make_targets(self, batch, answers):
        return super().make_targets(batch, answers).model_copy(update={"weights_N": np.full(20, 0.25, np.float32)})

    @staticmethod
    def check(run, plain):
        (_, own), (_, other) = run.taught, plain.taught
        assert [set(targets.weights_N) for targets in own.values()] == [{0.25}] * 3
        assert np.array_equal(own["mlp-0"].probabilities_NC, other["mlp-0"].probabilities_NC)
        assert len(set(other["mlp-0"].weights_N)) > 1


class NoScores(Changed):
    def score_samples(self, answers, prompted_N):
        return torch.zeros(len(prompted_N))

    @staticmethod
    def check(run, plain):
        assert [one.lines[1]["generator"]["loss"] is None for one in (run, plain)] == [True, False]
        assert [one.has_learned for one in (run, plain)] == [False, True]
        assert not run.strategy.ledger.pool[-1].scores_N.any()


class OwnUpdate(Changed):
    def adapt_generator(self, server_round, pool):
        return 7.5 + len(pool)

    @staticmethod
    def check(run, plain):
        assert run.lines[1]["generator"]["loss"] == 8.5
        assert [one.has_learned for one in (run, plain)] == [False, True]


# ---------------------------------------------------------------------- Flower's hooks


class WithoutNode1(Changed):
    def configure_train(self, server_round, arrays, config, grid):
        messages = super().configure_train(server_round, arrays, config, grid)
        return [message for message in messages if message.metadata.dst_node_id != 1]

    @staticmethod
    def check(run, plain):
        assert [one.result.train_metrics_clientapp[1]["replies"] for one in (run, plain)] == [2, 3]
        assert run.strategy.ledger.reports[1].kept == run.strategy.ledger.reports[2].kept  # By the last message.
        assert not np.array_equal(run.taught[1]["mlp-0"].probabilities_NC, plain.taught[1]["mlp-0"].probabilities_NC)


class DeafToOne(Changed):
    def read_train_reply(self, reply):
        answer = super().read_train_reply(reply)
        if answer.report.client == "mlp-0":
            raise PayloadError("not heard")
        return answer

    @staticmethod
    def check(run, plain):
        assert run.lines[1]["replies"]["reasons"] == {"mlp-0": "not heard"}
        assert [one.result.train_metrics_clientapp[1]["replies"] for one in (run, plain)] == [2, 3]


class DoubledAdapter(Changed):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        metrics["own"] = 0.5
        return ArrayRecord({name: Array(2 * array.numpy()) for name, array in arrays.items()}), metrics

    @staticmethod
    def check(run, plain):
        metrics = plain.result.train_metrics_clientapp[1]
        assert run.result.train_metrics_clientapp == {1: MetricRecord({**metrics, "own": 0.5})}
        assert_adapter_is(run, {name: 2 * tensor for name, tensor in plain.adapter.items()})


class LastWordToNode1(Changed):
    settings: ClassVar = {"learn-early": False}  # Else `configure_early` brings the last soft targets.

    def configure_distill(self, server_round, grid):
        messages = super().configure_distill(server_round, grid)
        return [message for message in messages if message.metadata.dst_node_id == 1]

    @staticmethod
    def check(run, plain):
        """Those without the last message still wait for the soft targets of the last batch."""
        batch_id = run.taught[0].batch_id
        awaiting = [[one.strategy.ledger.reports[node].awaiting for node in (1, 2, 3)] for one in (run, plain)]
        assert awaiting == [[(), (batch_id,), (batch_id,)], [(), (), ()]]


class OnlyNode1LearnsEarly(Changed):
    def configure_early(self, server_round, grid):
        messages = super().configure_early(server_round, grid)
        return [message for message in messages if message.metadata.dst_node_id == 1]

    @staticmethod
    def check(run, plain):
        """The others work on one message less, and learn when the last one comes."""
        worked = [[name for name, _, _ in one.lines[-1]["seconds"]["timeline"]["clients"]] for one in (run, plain)]
        assert sorted([*worked[0], "text-1", "mlp-2"]) == sorted(worked[1])
        assert run.lines[-1]["clients"] == plain.lines[-1]["clients"]


class OnlyNode1MeasuredByClass(Changed):
    def configure_final_evaluation(self, server_round, grid):
        messages = super().configure_final_evaluation(server_round, grid)
        return [message for message in messages if message.metadata.dst_node_id == 1]

    @staticmethod
    def check(run, plain):
        measured = [one.lines[-1]["evaluation"]["per_client"] for one in (run, plain)]
        assert [sorted(clients) for clients in measured] == [["mlp-0"], sorted(CLIENTS)]
        assert measured[0]["mlp-0"] == measured[1]["mlp-0"]


class TextsUnmeasuredByClass(Changed):
    def read_final_evaluation(self, reply):
        answer = super().read_final_evaluation(reply)
        if answer.report.modality == "text":
            raise PayloadError("not measured")
        return answer

    @staticmethod
    def check(run, plain):
        assert sorted(run.lines[-1]["evaluation"]["per_client"]) == ["mlp-0", "mlp-2"]
        assert run.lines[-1]["replies"] == plain.lines[-1]["replies"]
        assert "text-1 gives no measures by class: not measured" in run.log


class NotAskedAtFirst(Changed):
    def configure_evaluate(self, server_round, arrays, config, grid):
        messages = super().configure_evaluate(server_round, arrays, config, grid)
        return [message for message in messages if message.metadata.dst_node_id != 1]

    @staticmethod
    def check(run, plain):
        assert run.lines[0]["replies"]["answered"] == ["mlp-2", "text-1"]
        assert set(run.lines[0]["clients"]["per_client"]) == {"mlp-2", "text-1"}
        assert plain.lines[0]["replies"]["answered"] == sorted(CLIENTS)


class Flattering(Changed):
    def read_evaluate_reply(self, reply):
        return Answer(super().read_evaluate_reply(reply).report.model_copy(update={"accuracy": 1.0}))

    @staticmethod
    def check(run, plain):
        assert [line["clients"]["accuracy"] for line in run.lines] == [1.0, 1.0]
        assert [metrics["accuracy"] for metrics in run.result.evaluate_metrics_clientapp.values()] == [1.0, 1.0]
        assert [one.result.train_metrics_clientapp[1]["accuracy"] == 1 for one in (run, plain)] == [True, False]
        assert all(line["clients"]["accuracy"] < 1 for line in plain.lines)


class LeastAccuracy(Changed):
    def aggregate_evaluate(self, server_round, replies):
        return MetricRecord({"least": min(self.read_evaluate_reply(reply).report.accuracy for reply in replies)})

    @staticmethod
    def check(run, plain):
        assert run.result.evaluate_metrics_clientapp == {
            number: MetricRecord({"least": min(told["accuracy"] for told in line["clients"]["per_client"].values())})
            for number, line in enumerate(plain.lines)
        }


# ---------------------------------------------------------------------- the adapter, and the run as a whole


class RoundedAdapter(Changed):
    def arrays(self):
        return ArrayRecord({name: Array(np.round(array.numpy(), 3)) for name, array in super().arrays().items()})

    @staticmethod
    def check(run, plain):
        rounded = {name: torch.from_numpy(np.round(tensor.numpy(), 3)) for name, tensor in plain.adapter.items()}
        assert_adapter_is(run, rounded)


class NegatedAdapter(Changed):
    def load_arrays(self, arrays):
        super().load_arrays(ArrayRecord({name: Array(-array.numpy()) for name, array in arrays.items()}))

    @staticmethod
    def check(run, plain):
        assert_adapter_is(run, {name: -tensor for name, tensor in plain.adapter.items()})


class WithoutTheLast(Changed):
    settings: ClassVar = {"rounds": 2}  # After the last round all are asked.

    def choose_nodes(self, server_round, node_ids):
        return sorted(node_ids)[:2]

    @staticmethod
    def check(run, plain):
        assert run.lines[1]["replies"]["asked"] == ["mlp-0", "text-1"]


class NothingLate(Changed):
    grid = LateGrid
    settings: ClassVar = LATE

    def read_late_reply(self, sent_in, reply):
        raise PayloadError(f"too late for round {sent_in}")

    @staticmethod
    def check(run, plain):
        assert "too late for round 1" in run.log
        assert [line["replies"]["late_counted"] for line in run.lines] == [[], [], []]


class LateIsOnlyCounted(Changed):
    grid = LateGrid
    settings: ClassVar = LATE

    def aggregate_late(self, server_round, sent_in, replies):
        (_, self.before), *_ = self.ledger.history
        logging.getLogger("flwr").info("%s late for round %s in round %s", len(list(replies)), sent_in, server_round)

    @staticmethod
    def check(run, plain):
        (_, after), *_ = run.strategy.ledger.history
        assert "1 late for round 1 in round 2" in run.log
        assert [line["replies"]["late_counted"] for line in run.lines] == [[], [], ["mlp-2"]]
        assert after is run.strategy.before


class ShortSummary(Changed):
    def summary(self):
        self.recorder.run_folder.write_config(self.recorder.run_folder.read_config() | {"summary": self.config.seed})
        logging.getLogger("flwr").info("As short as can be")

    @staticmethod
    def check(run, plain):
        assert "As short as can be" in run.log
        assert ["Classes: zero" in one.log for one in (run, plain)] == [False, True]
        assert run.strategy.recorder.run_folder.read_config()["summary"] == 0


class OneRoundMore(Changed):
    def start(self, grid, *args, **settings):
        result = super().start(grid, *args, **settings | {"num_rounds": self.config.rounds + 1})
        result.evaluate_metrics_serverapp[9] = MetricRecord({"end": 1})
        return result

    @staticmethod
    def check(run, plain):
        assert [[line["round"] for line in one.lines] for one in (run, plain)] == [[0, 1, 2], [0, 1]]
        assert run.result.evaluate_metrics_serverapp == {9: MetricRecord({"end": 1})}


def assert_adapter_is(run, expected):
    """Check the adapter in use, the run's result, and what is on disk."""
    state, folder = run.adapter, run.strategy.recorder.run_folder.lora
    saved = run.strategy.generator.family.load_adapter(folder)
    assert state.keys() == run.result.arrays.keys() == saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(torch.from_numpy(run.result.arrays[name].numpy()), tensor)
        assert torch.equal(saved[name], tensor)


CASES = {name: changed for changed in Changed.__subclasses__() for name in PUBLIC if name in vars(changed)}


@pytest.mark.parametrize("name", PUBLIC)
def test_an_overridden_method_has_its_effect(name, plain, tmp_path):
    assert name in CASES, f"FedMMKT.{name} is public, and no strategy of this file overrides it"
    changed = CASES[name]

    run = run_with(changed, tmp_path / "run", changed.grid, **changed.settings)

    changed.check(run, plain)


# ---------------------------------------------------------------------- steps do not depend on each other


def test_without_an_update_of_the_t2i_samples_are_varied_all_the_same(tmp_path, monkeypatch):
    """Exploration goes by the samples' scores, whatever `adapt_generator` makes of them."""
    varied, vary = [], Generator.vary_parts

    def spy(generator, parents, prompts, *rest):
        varied.append((parents, prompts))
        return vary(generator, parents, prompts, *rest)

    class Still(FedMMKT):
        def adapt_generator(self, server_round, pool):
            return None

    monkeypatch.setattr(Generator, "vary_parts", spy)
    run = run_with(Still, tmp_path / "run", rounds=2)

    ((parents, prompts),) = varied
    first, second = run.strategy.ledger.pool
    scored = zip(first.latents_NCHW, first.scores_N, strict=True)
    score_of = {latent.numpy().tobytes(): score for latent, score in scored}
    assert [line["generator"]["loss"] for line in run.lines] == [None, None, None]
    assert 0 < len(prompts) <= 10
    assert all(score_of[latent.numpy().tobytes()] > 0 for latent in parents)
    assert set(prompts) <= set(second.prompts)


def test_an_adapter_that_changes_without_an_update_is_measured_anew(tmp_path):
    class Replaced(FedMMKT):
        def adapt_generator(self, server_round, pool):
            return None

        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            shapes = {name: array.shape for name, array in arrays.items()}
            return ArrayRecord(
                {name: Array(np.full(shape, 0.3, np.float32)) for name, shape in shapes.items()}
            ), metrics

    before, after = run_with(Replaced, tmp_path / "run", judge=True).lines

    assert after["generator"]["loss"] is None
    assert after["generator"]["frechet"] != before["generator"]["frechet"]


def test_teachers_may_be_answers_that_a_strategy_makes_anew(tmp_path):
    """Each client is taught by a copy of its own answer alone."""

    class Alone(FedMMKT):
        def teachers(self, client, answers):
            return [replace(answer) for answer in answers if answer.report.client == client.client]

    run = run_with(Alone, tmp_path / "run")

    ((_, targets),) = run.strategy.ledger.history
    assert targets.of_client == {"mlp-0": 0, "mlp-2": 1, "text-1": 2}
    assert targets.of_modality == dict.fromkeys(("image", "text", "image+text"))


def test_what_start_is_told_reaches_the_steps(plain, tmp_path):
    """An adapter to begin with, settings for Flower's hooks, and a function that is told of each round."""
    begun = ArrayRecord(
        {name: Array(np.full(tensor.shape, 0.01, np.float32)) for name, tensor in plain.adapter.items()}
    )
    told, evaluated = [], {}

    class Told(FedMMKT):
        def configure_evaluate(self, server_round, arrays, config, grid):
            told.append((server_round, dict(config)))
            assert all(np.array_equal(array.numpy(), begun[name].numpy()) for name, array in arrays.items())
            return super().configure_evaluate(server_round, arrays, config, grid)

        def configure_train(self, server_round, arrays, config, grid):
            told.append((server_round, dict(config)))
            return super().configure_train(server_round, arrays, config, grid)

        def start(self, grid):
            return super().start(
                grid,
                initial_arrays=begun,
                train_config=ConfigRecord({"for": "train"}),
                evaluate_config=ConfigRecord({"for": "evaluate"}),
                evaluate_fn=self.measure,
            )

        def measure(self, server_round, arrays):
            evaluated[server_round] = arrays
            return MetricRecord({"round": server_round}) if server_round else None

    run = run_with(Told, tmp_path / "run")

    assert told == [(0, {"for": "evaluate"}), (1, {"for": "train"})]
    assert list(evaluated) == [0, 1]
    assert all(np.array_equal(array.numpy(), begun[name].numpy()) for name, array in evaluated[0].items())
    assert run.result.evaluate_metrics_serverapp == {1: MetricRecord({"round": 1})}
    assert_adapter_is(run, {name: torch.tensor(array.numpy()) for name, array in evaluated[1].items()})


def test_an_adapter_of_another_model_is_refused(tmp_path):
    class Foreign(FedMMKT):
        def aggregate_train(self, server_round, replies):
            _, metrics = super().aggregate_train(server_round, replies)
            return ArrayRecord({"no.such.layer": Array(np.zeros(3, np.float32))}), metrics

    with pytest.raises(ConfigError, match="what aggregate_train returned is an adapter of another model"):
        run_with(Foreign, tmp_path / "run")


def test_a_step_that_returns_no_arrays_and_no_metrics_leaves_both_as_they_are(plain, tmp_path):
    class Silent(FedMMKT):
        def aggregate_train(self, server_round, replies):
            super().aggregate_train(server_round, replies)
            return None, None

        def aggregate_evaluate(self, server_round, replies):
            return None

    run = run_with(Silent, tmp_path / "run")

    assert run.result.train_metrics_clientapp == run.result.evaluate_metrics_clientapp == {}
    assert_adapter_is(run, plain.adapter)
