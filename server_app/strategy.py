"""The FedMMKT strategy: the steps of a round.

The module `loop` calls these steps. The ledger and the recorder store their results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from logging import INFO
from typing import get_args

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore import log
from torch import Tensor

from fedmmkt.common.config import RunConfig
from fedmmkt.common.failures import RunError
from fedmmkt.common.images import encode_images, resize_images
from fedmmkt.common.payloads import (
    ClientReport,
    DistillationPayload,
    FinalEvaluation,
    Instructions,
    Modality,
    PayloadError,
    Request,
    SoftTargets,
    SyntheticBatch,
)
from fedmmkt.common.registry import Registry
from fedmmkt.server_app.ahead import Ahead, Made
from fedmmkt.server_app.consensus import Consensus, aggregate_payloads, covered_classes_C, with_logits
from fedmmkt.server_app.exchange import Answer
from fedmmkt.server_app.exploration import draw_parents, generate_or_vary
from fedmmkt.server_app.ledger import Ledger, TargetsByClient
from fedmmkt.server_app.loop import Loop
from fedmmkt.server_app.prompts import Prompt, PromptSource, classes_of_round
from fedmmkt.server_app.recorder import Recorder
from fedmmkt.server_app.requests import make_requests
from fedmmkt.server_app.rules.aggregation import aggregations
from fedmmkt.server_app.rules.checks import check_result
from fedmmkt.server_app.rules.noisy_votes import sum_of_votes
from fedmmkt.server_app.rules.scores import Feedback, scores
from fedmmkt.server_app.rules.updates import updates
from fedmmkt.server_app.rules.without_logits import check_prompts
from fedmmkt.server_app.sampling import draw, draw_in_turns, sample_size
from fedmmkt.server_app.standings import bound_answers, weigh_answers
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.t2i.samples import Samples, sample_seeds
from fedmmkt.server_app.trial import Guard

LEAST_WEIGHT = 0.02  # Smallest weight of a sample in distillation, however little the clients agree on it.
FEEDBACK_WITH_VOTES = "logits+votes"


class FedMMKT(Strategy):
    """Federated multi-modal knowledge transfer (arXiv 2510.12254), with one exchange with the clients per round.

    In each round, the T2I model generates a batch. Each client trains on the last soft targets and on its private data,
    and answers the new batch with logits. The server turns the answers into soft targets for the clients, and into
    scores for the fine-tuning of the T2I's LoRA adapter.

    A subclass changes a step by overriding it: `make_prompts`, `generate`, `make_batch`, `choose_nodes`, `teachers`,
    `aggregate_logits`, `make_targets`, `score_samples`, `adapt_generator`, or one of Flower's hooks: `configure_train`,
    `aggregate_train`, `configure_evaluate`, `aggregate_evaluate`. Each step gets its inputs as arguments and returns
    its result. The run-config chooses the rules that the steps use. With ``t2i.generate-ahead``, the first three are
    called while clients work on the round before, in another thread, and should depend on their arguments alone.

    Parameters
    ----------
    config : RunConfig
        The run's configuration. The user's own settings are in ``config.extra``.
    classes : tuple of str
        The class space.
    generator : Generator
        The T2I model.
    prompts : PromptSource
        Source of the prompts.
    ledger : Ledger
        Stores batches, soft targets and scored samples.
    recorder : Recorder
        Measures the time of the steps and records their results.

    Attributes
    ----------
    extra_records : frozenset of str
        Keys of the records that your own clients add to a reply; other records that nobody asked for are refused.

    Raises
    ------
    ConfigError
        If the configuration names an unknown rule.
    """

    extra_records: frozenset[str] = frozenset()

    def __init__(
        self,
        config: RunConfig,
        classes: tuple[str, ...],
        generator: Generator,
        prompts: PromptSource,
        ledger: Ledger,
        recorder: Recorder,
    ) -> None:
        self.config = config
        self.classes = classes
        self.generator = generator
        self.prompts = prompts
        self.ledger = ledger
        self.recorder = recorder
        extra = config.extra.as_dict()
        self.aggregation = aggregations.get(config.t2i.aggregation, extra)
        self.score = scores.get(config.t2i.scores, extra)
        self.update = updates.get(config.t2i.update, extra)()
        cross_modal = config.t2i.agreement == "cross-modal"
        self.consensus = Consensus(
            lambda answers, prompted_N: self.aggregate_logits(answers, prompted_N), len(classes), cross_modal
        )
        self.guard = Guard(config.t2i.guard, generator, ledger, config.t2i.explore, config.t2i.base_share)
        self.ahead = Ahead(generator, ledger, recorder, self._make)
        # Called with the round once its soft targets are made; a run lets clients learn from them early.
        self._let_learn: Callable[[int], object] = lambda server_round: None

    # ------------------------------------------------------------------ the steps of a round

    def make_prompts(self, server_round: int) -> list[Prompt]:
        """Return the prompts of a round, of all classes or, by ``t2i.classes-per-round``, of the next ones."""
        seed, t2i = self.config.seed, self.config.t2i
        rng = np.random.default_rng((seed, server_round))
        classes = classes_of_round(self.prompts.named_classes, t2i.classes_per_round, seed, server_round)
        return self.prompts(t2i.samples_per_round, rng, classes)

    def guidance(self, server_round: int) -> float:
        """Return the guidance scale of a round (from 1), by ``t2i.guidance``.

        The scale should decrease: with strong guidance, the samples of a fine-tuned model saturate.
        """
        return self.config.t2i.guidance_of(server_round)

    def generate(self, server_round: int, prompts: list[Prompt], pool: Sequence[Samples]) -> Samples:
        """Generate one image per prompt, with the round's guidance scale.

        It is called for each part of a batch: what the champion, the challenger and the unadapted T2I make, with the
        same seeds. For the first ``t2i.explore`` fraction of the prompts, the image is a variation of a well-scored
        sample of the last round with the same class, as in Private Evolution (arXiv 2305.15560). All other images are
        new; all are new until the guard lets the T2I explore (`Guard.explored_share`).

        Parameters
        ----------
        server_round : int
            The round, from 1.
        prompts : list of Prompt
            Prompts from `make_prompts`.
        pool : sequence of Samples
            The scored samples of earlier rounds, oldest first. Empty in the first round, and for the unadapted T2I.
        """
        seeds = sample_seeds(self.config.seed, server_round, len(prompts))
        guidance = self.guidance(server_round)
        parents: dict[int, Tensor] = {}
        explored = prompts[: int(len(prompts) * self.guard.explored_share)]
        if pool and self.generator.can_vary:
            parents = draw_parents(pool[-1], explored, seeds[0])
        progress, size = self.recorder.progress, self._image_size()
        return generate_or_vary(self.generator, prompts, seeds, guidance, parents, progress, size)

    def make_batch(self, server_round: int, samples: Samples) -> SyntheticBatch:
        """Make the message for clients: encoded images, prompts, and text embeddings for the alignment loss."""
        images_NHWC = resize_images(samples.images_NHWC, self._image_size())
        data, offsets = encode_images(images_NHWC)
        distinct = list(dict.fromkeys(samples.prompts))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        anchored = self._anchor_size() > 0
        return SyntheticBatch(
            batch_id=f"{self.ledger.run_key}-{server_round}",
            round=server_round,
            prompts=samples.prompts,
            prompted_N=samples.prompted_N.numpy(),
            images=data,
            offsets=offsets,
            anchors_UD=self.generator.encoder.text_embeddings(distinct) if anchored else None,
            anchor_index_N=np.array([row[prompt] for prompt in samples.prompts]) if anchored else None,
        )

    def choose_nodes(self, server_round: int, node_ids: Collection[int]) -> list[int]:
        """Choose the nodes that a round asks: by default ``fraction-train`` of those that are connected.

        They are drawn at random, and none for a second time before each had its turn. The draw depends on seed, round
        and names alone. A node that still owes an answer may be drawn; it is asked when it has answered.

        Parameters
        ----------
        server_round : int
            The round, from 1.
        node_ids : collection of int
            The connected nodes.
        """
        config, names = self.config, {node_id: self.ledger.name(node_id) for node_id in node_ids}
        count = sample_size(len(names), config.fraction_train, config.min_train_nodes)
        chosen, self.ledger.drawn = draw_in_turns(names, count, f"{config.seed}/{server_round}", self.ledger.drawn)
        return chosen

    def teachers(self, client: ClientReport, answers: list[Answer]) -> list[Answer]:
        """Choose the answers that become a client's soft targets; by default all answers.

        Parameters
        ----------
        client : ClientReport
            The client that gets the soft targets. For clients that join later, the method is also called once per
            modality, with a placeholder report of the name ``*``.
        answers : list of Answer
            All answers of the round, sorted by client name.

        Returns
        -------
        list of Answer
            The chosen answers. If there are none, the client gets no soft targets for this batch.
        """
        return answers

    def aggregate_logits(self, answers: list[Answer], prompted_N: Tensor) -> Tensor:
        """Aggregate the clients' logits into probabilities (samples x classes), with the rule ``t2i.aggregation``.

        It is called with answers that have logits, at least one.
        """
        payloads = [answer.required_payload for answer in answers]
        name = self.config.t2i.aggregation
        return aggregate_payloads(self.aggregation, name, payloads, prompted_N, self.config.robust)

    def make_targets(self, batch: SyntheticBatch, answers: list[Answer]) -> SoftTargets:
        """Make the soft targets of a batch from answers; samples are weighted by the agreement of these clients."""
        prompted_N = torch.from_numpy(batch.prompted_N)
        probabilities_NC = self.consensus.of(answers, answers, prompted_N)
        text_consensus_NC = self.consensus.read_in_prompts(answers, prompted_N)
        agreement_N = Feedback(probabilities_NC, prompted_N, None, text_consensus_NC).agreement_N()
        return SoftTargets(
            batch_id=batch.batch_id,
            probabilities_NC=probabilities_NC.clamp(0, 1).numpy().astype(np.float16),
            weights_N=agreement_N.clamp_min(LEAST_WEIGHT).numpy().astype(np.float32),
        )

    def score_samples(self, answers: list[Answer], prompted_N: Tensor) -> Tensor:
        """Return a weight for each sample in the T2I's update (samples,), not negative, with the rule ``t2i.scores``.

        Image clients judge the images, because they do not see the prompts. If there are no image clients, all clients
        judge. If no image client holds a class, image+text clients judge the samples of this class.
        """
        judges = [answer for answer in with_logits(answers) if answer.report.modality == "image"]
        judges = judges or with_logits(answers)
        consensus_NC = self.consensus.of(judges, answers, prompted_N)
        pairs = [answer for answer in with_logits(answers) if answer.report.modality == "image+text"]
        if pairs:
            unjudged_N = (prompted_N >= 0) & ~covered_classes_C(judges)[prompted_N]
            if bool(unjudged_N.any()):
                of_pairs_NC = self.consensus.of(pairs, answers, prompted_N)
                consensus_NC = torch.where(unjudged_N[:, None], of_pairs_NC, consensus_NC)
        text_consensus_NC = self.consensus.read_in_prompts(answers, prompted_N)
        votes_N = sum_of_votes([answer.required_payload for answer in answers], prompted_N)
        scores_N = self.score(Feedback(consensus_NC, prompted_N, votes_N, text_consensus_NC))
        return check_result(scores_N, (len(prompted_N),), scores.key, self.config.t2i.scores)

    def adapt_generator(self, server_round: int, pool: Sequence[Samples]) -> float | None:
        """Fine-tune the T2I on the scored samples of the last rounds.

        Returns the mean loss, or None without an update because all scores are zero.
        """
        scores = [samples.scores_N for samples in pool if samples.scores_N is not None]
        if not scores or len(scores) < len(pool) or not bool(torch.cat(scores).any()):
            return None
        seed = int(np.random.SeedSequence((self.config.seed, server_round, 1)).generate_state(1)[0])
        steps, factor = self.config.t2i.adaptation_steps, self.ledger.guard.step
        return self.generator.adapt(pool, torch.cat(scores), steps, seed, self.update, factor)

    # ------------------------------------------------------------------ Flower's hooks, which the loop calls

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        """Generate the round's batch; return one request per node, with this batch and what else the node lacks.

        With ``t2i.generate-ahead``, the batch may be there already, and the next one is begun. ``arrays`` is the
        adapter; the generator already has it.
        """
        with self.recorder.timed("generate"):
            made = self.ahead.batch(server_round, self.ledger.known_clients())
        batch = made.batch
        self.ledger.serve(batch, made.samples, made.arms)
        if self.config.t2i.generate_ahead:
            self.ahead.begin(server_round + 1)
        instructions = partial(self._instructions, server_round)
        node_ids = self.choose_nodes(server_round, list(grid.get_node_ids()))
        return make_requests(node_ids, self.ledger, instructions, MessageType.TRAIN, batch)

    def configure_early(self, server_round: int, grid: Grid) -> Iterable[Message]:
        """Return requests to learn in a round whose batch is not there yet, to the nodes that the round will ask.

        For this, `choose_nodes` is called once more. After the last round there is no batch, and the requests go to the
        nodes of `configure_distill`.
        """
        if server_round > self.recorder.config.rounds:
            chosen = self._measured(grid)
        else:
            drawn = self.ledger.drawn
            chosen = self.choose_nodes(server_round, list(grid.get_node_ids()))
            self.ledger.drawn = drawn  # The round itself draws them again.
        # A client with a privacy budget waits for the batch, so it is not asked.
        known = {node_id for node_id, report in self.ledger.reports.items() if not report.is_private}
        node_ids = (known & set(chosen)).difference(self.ledger.overdue.values())
        instructions = partial(self._instructions, server_round)
        return make_requests(node_ids, self.ledger, instructions, f"{MessageType.TRAIN}.early")

    def read_train_reply(self, reply: Message) -> Answer:
        """Parse a client's answer to the current batch.

        Raises
        ------
        PayloadError
            If any part is invalid.
        """
        return self._read_answer(reply, self.ledger.open_batch(), "when none is served")

    def read_late_reply(self, sent_in: int, reply: Message) -> Answer:
        """Parse a client's answer to the batch of an earlier round.

        Raises
        ------
        PayloadError
            If any part is invalid, or the batch is no longer taught.
        """
        return self._read_answer(reply, self.ledger.taught(sent_in), "which is no longer taught")

    def _read_answer(self, reply: Message, batch: SyntheticBatch | None, otherwise: str) -> Answer:
        payload = DistillationPayload.from_records(reply.content, "payload")
        if batch is None:
            raise PayloadError(f"answers batch {payload.batch_id!r}, {otherwise}")
        votes = self.config.feedback == FEEDBACK_WITH_VOTES
        payload.check_answers(batch.batch_id, len(batch), len(self.classes), votes)
        answer = replace(self.read_evaluate_reply(reply), payload=payload)
        payload.check_possible(answer.report, batch.prompted_N)
        return answer

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Learn from the round's valid replies: make soft targets for the clients, and update the adapter.

        Returns
        -------
        tuple
            The adapter, which the loop loads in case a subclass changed it, and the clients' mean accuracy.
        """
        answers = sorted(map(self.read_train_reply, replies), key=lambda answer: answer.report.client)
        if not answers:
            return None, None
        batch, samples = self.ledger.served(server_round)
        with self.recorder.timed("aggregate"), self.consensus.once():
            counted = self._counted(answers, batch, {answer.report.client for answer in answers})
            targets, scores_N = self._learn_from(batch, counted)
            self.ledger.teach(server_round, targets, samples.scored(scores_N))
            self.ledger.keep_answers(server_round, answers)
            text_consensus_NC = self.consensus.read_in_prompts(counted, samples.prompted_N)
            self.recorder.record_verdict(self.guard.judge(counted, samples.prompted_N, text_consensus_NC))
        self._let_learn(server_round)
        with self.recorder.timed("adapt"):
            loss = self.guard.update(lambda: self.adapt_generator(server_round, self.ledger.pool))
        self.recorder.record_update(loss)
        accuracy = mean_accuracy([answer.report for answer in answers])
        return self.arrays(), MetricRecord({**accuracy, "replies": len(answers)})

    def aggregate_late(self, server_round: int, sent_in: int, replies: Iterable[Message]) -> None:
        """Make the soft targets and scores of an earlier round's batch again, with valid replies that came late.

        Clients that lack soft targets of this batch, or have those from before, get the new ones with their next
        request.

        Parameters
        ----------
        server_round : int
            The present round.
        sent_in : int
            The round of the batch.
        replies : iterable of Message
            The late replies to it.
        """
        if (batch := self.ledger.taught(sent_in)) is None:
            return
        late = [self.read_late_reply(sent_in, reply) for reply in replies]
        answers = sorted([*self.ledger.answers(sent_in), *late], key=lambda answer: answer.report.client)
        with self.recorder.timed("aggregate"), self.consensus.once():
            counted = self._counted(answers, batch, {answer.report.client for answer in late})
            self.ledger.teach_again(server_round, sent_in, *self._learn_from(batch, counted))
            self.ledger.keep_answers(sent_in, answers)

    def configure_distill(self, server_round: int, grid: Grid) -> Iterable[Message]:
        """Return the requests after the last round: the last soft targets, without a new batch.

        They go to ``fraction-evaluate`` of the connected nodes: those that were measured before the first round, as far
        as they are still there.
        """
        # Round + 1, so that the random draws of a client differ from those of its last round.
        instructions = partial(self._instructions, server_round + 1)
        return make_requests(self._measured(grid), self.ledger, instructions, f"{MessageType.TRAIN}.distill")

    def configure_final_evaluation(self, server_round: int, grid: Grid) -> Iterable[Message]:
        """Return the requests for measures by class after the last distillation, to the clients that give measures."""
        # Round + 1: a client has learned once more in the last distillation.
        content = Request(self._instructions(server_round + 1, is_known=True)).to_content()
        told = {node_id for node_id, report in self.ledger.reports.items() if report.accuracy is not None}
        for node_id in sorted(set(self._measured(grid)) & told):
            yield Message(content, dst_node_id=node_id, message_type=f"{MessageType.EVALUATE}.final")

    def read_final_evaluation(self, reply: Message) -> Answer:
        """Parse the reply to such a request.

        Raises
        ------
        PayloadError
            If any part is invalid.
        """
        evaluation = FinalEvaluation.from_records(reply.content, "evaluation")
        evaluation.check_classes(len(self.classes))
        return replace(self.read_evaluate_reply(reply), evaluation=evaluation)

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        """Return one request for each of ``fraction-evaluate`` of the nodes, for a report on its current model."""
        content = Request(self._instructions(server_round, is_known=False)).to_content()
        for node_id in sorted(self._measured(grid)):
            yield Message(content, dst_node_id=node_id, message_type=MessageType.EVALUATE)

    def read_evaluate_reply(self, reply: Message) -> Answer:
        """Parse a client's report.

        Raises
        ------
        PayloadError
            If any part is invalid.
        """
        return Answer(ClientReport.from_records(reply.content, "report"))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the clients' accuracy."""
        reports = [self.read_evaluate_reply(reply).report for reply in replies]
        accuracy = mean_accuracy(reports)
        return MetricRecord(dict(accuracy)) if accuracy else None

    def arrays(self) -> ArrayRecord:
        """Return the T2I's adapter."""
        return ArrayRecord(self.generator.adapter.state())

    def load_arrays(self, arrays: ArrayRecord) -> None:
        """Load an adapter; nothing happens if it equals the current one.

        Raises
        ------
        ConfigError
            If the adapter belongs to another model.
        """
        state = {name: torch.tensor(array.numpy()) for name, array in arrays.items()}
        present = self.generator.adapter.state()
        if state.keys() != present.keys() or any(not torch.equal(present[name], state[name]) for name in state):
            self.generator.adapter.load_state(state, "what aggregate_train returned")

    def summary(self) -> None:
        """Log the main settings."""
        config, t2i, client = self.config, self.config.t2i, self.config.client
        parameters = sum(tensor.numel() for tensor in self.generator.adapter.state().values())
        log(INFO, "\t├──> Strategy: %s%s", config.strategy, self._overrides())
        log(INFO, "\t├──> Classes: %s", ", ".join(self.classes))
        log(INFO, "\t├──> T2I: %s, LoRA rank %s, %s parameters", t2i.model, t2i.lora_rank, parameters)
        log(INFO, "\t├──> Per round: %s images, guidance %s", t2i.samples_per_round, ", ".join(map(str, t2i.guidance)))
        log(INFO, "\t├──> Aggregation: %s; scores: %s; update: %s", t2i.aggregation, t2i.scores, t2i.update)
        log(INFO, "\t├──> Feedback: %s", config.feedback)
        log(INFO, "\t├──> Nodes: fraction %s, %s measured", config.fraction_train, config.fraction_evaluate)
        log(
            INFO,
            "\t└──> Clients: %s; distillation %s, prompts %s, alignment %s",
            ", ".join(client.models),
            client.distillation_weight,
            client.prompt_weight,
            client.alignment_weight,
        )

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds; if the run is resumed, run the remaining ones.

        Parameters
        ----------
        grid : Grid
            Flower's connection to the nodes.
        initial_arrays : ArrayRecord, optional
            An adapter to start from. Clients' weights are never sent.
        num_rounds, timeout : optional
            Override ``rounds`` and ``round-deadline`` of the configuration, in ``config.json`` too.
        train_config, evaluate_config : ConfigRecord, optional
            Passed to `configure_train` and `configure_evaluate`, for subclasses.
        evaluate_fn : callable, optional
            Called with the round and the adapter's arrays, before the first round and after each round.

        Returns
        -------
        Result
            ``arrays`` is the final adapter; metrics are by round.

        Raises
        ------
        ConfigError
            If too few nodes connect, or another run is writing to the run folder.
        RunError
            If no client gives a valid reply.
        """
        changes = {"rounds": num_rounds or self.config.rounds, "round_deadline": timeout or self.config.round_deadline}
        config = self.config.model_copy(update=changes)
        if initial_arrays is not None:
            self.load_arrays(initial_arrays)
        loop = Loop(
            self,
            grid,
            self.ledger,
            self.recorder,
            rounds=config.rounds,
            round_deadline=config.round_deadline,
            train_config=train_config or ConfigRecord(),
            evaluate_config=evaluate_config or ConfigRecord(),
            evaluate_fn=evaluate_fn,
        )
        self._let_learn = loop.let_learn
        with self.recorder.run(config):
            return loop.run()

    # ------------------------------------------------------------------ parts of the steps

    def _make(self, server_round: int, clients: Sequence[ClientReport]) -> Made:
        """Make the batch of a round, from whose prompts these clients must be able to learn."""
        start, prompts = time.perf_counter(), self.make_prompts(server_round)
        check_prompts(prompts, clients)
        seed = sample_seeds(self.config.seed, server_round, 1)[0]
        samples, arms = self.guard.generate(
            prompts, seed, lambda part, new: self.generate(server_round, part, () if new else self.ledger.pool)
        )
        seconds = time.perf_counter() - start
        self.recorder.log_generation(server_round, len(samples), self.guidance(server_round), seconds)
        return Made(prompts, samples, arms, self.make_batch(server_round, samples))

    def _overrides(self) -> str:
        """Name the methods that a subclass overrides, so that a misspelt one shows in the log."""
        public = [name for name, part in vars(FedMMKT).items() if callable(part) and not name.startswith("_")]
        changed = [name for name in public if getattr(type(self), name) is not getattr(FedMMKT, name)]
        return "" if type(self) is FedMMKT else f", overrides {', '.join(changed) or 'nothing'}"

    def _instructions(self, server_round: int, is_known: bool) -> Instructions:
        ancestors = () if is_known else self.ledger.ancestors
        return Instructions(
            run_key=self.ledger.run_key,
            round=server_round,
            classes=self.classes,
            votes=self.config.feedback == FEEDBACK_WITH_VOTES,
            rounds=self.recorder.config.rounds,
            anchor_size=self._anchor_size(),
            ancestors=tuple(run_key for run_key, _ in ancestors),
            ancestor_rounds=tuple(last for _, last in ancestors),
        )

    def _measured(self, grid: Grid) -> list[int]:
        """Draw the nodes that are measured: by their ids, so that they are the same before and after the run."""
        ids = {node_id: str(node_id) for node_id in grid.get_node_ids()}
        count = sample_size(len(ids), self.config.fraction_evaluate, self.config.min_evaluate_nodes)
        return draw(ids, count, f"{self.config.seed}/evaluate")

    def _learn_from(self, batch: SyntheticBatch, counted: list[Answer]) -> tuple[TargetsByClient, Tensor]:
        """Make soft targets for clients and scores for the T2I from answers to a batch, as `_counted` returns them."""
        scores_N = self.score_samples(counted, torch.from_numpy(batch.prompted_N))
        return self._targets_by_client(batch, counted), scores_N

    def _image_size(self) -> int:
        """Return the side of the images that clients get, in pixels."""
        return min(self.config.data.image_size, self.generator.image_size)

    def _counted(self, answers: list[Answer], batch: SyntheticBatch, new: Collection[str]) -> list[Answer]:
        """Return the answers to a batch as far as they count, and judge the clients whose answers are new, by name."""
        config, known = self.config, self.ledger.standings
        if not config.robust:
            return bound_answers(answers, [config.client_cap] * len(answers), new, config.client_cap)
        learns = config.client.distillation_weight or config.client.prompt_weight
        weighed, most, standings = weigh_answers(
            answers, batch.prompted_N, known if learns else {}, self.classes, config.client_cap
        )
        changed = {name: standing for name, standing in standings.items() if name in new}
        self.recorder.record_standings(known, changed)
        self.ledger.standings = known | changed
        return bound_answers(weighed, most, new, config.client_cap)

    def _anchor_size(self) -> int:
        return self.generator.encoder.embedding_size if self.config.client.alignment_weight else 0

    def _targets_by_client(self, batch: SyntheticBatch, answers: list[Answer]) -> TargetsByClient:
        """Make the soft targets of each client; clients with the same teachers share them."""
        distinct: list[SoftTargets] = []
        index_by_teachers: dict[tuple[int, ...], int] = {}
        kept: list[list[Answer]] = []  # Keeps the answers of a subclass alive: ids of deleted ones are reused.

        def index_of(client: ClientReport) -> int | None:
            chosen = self.teachers(client, answers)
            if not isinstance(chosen, list):
                raise RunError(f"teachers of {type(self).__name__} returned {chosen!r}; allowed: a list of answers")
            key = tuple(map(id, chosen))
            if chosen and key not in index_by_teachers:
                index_by_teachers[key] = len(distinct)
                distinct.append(self.make_targets(batch, chosen))
                kept.append(chosen)
            return index_by_teachers.get(key)

        of_client = {report.client: index_of(report) for report in self.ledger.known_clients()}
        of_modality = {modality: index_of(placeholder_report(modality)) for modality in get_args(Modality)}
        return TargetsByClient(tuple(distinct), of_client, of_modality)


strategies: Registry[type[FedMMKT]] = Registry(
    "strategy",
    "strategy",
    ("config", "classes", "generator", "prompts", "ledger", "recorder"),
    base=FedMMKT,
)
"""The strategies: `FedMMKT` and its subclasses."""
strategies.register("fedmmkt")(FedMMKT)


def mean_accuracy(reports: Sequence[ClientReport]) -> dict[str, float]:
    """Return the mean of the accuracies that clients report, as a metric; empty if all withhold theirs."""
    told = [report.accuracy for report in reports if report.accuracy is not None]
    return {"accuracy": float(np.mean(told))} if told else {}


def placeholder_report(modality: Modality) -> ClientReport:
    """Return a placeholder report for an unknown client of a modality."""
    return ClientReport(client="*", model="*", modality=modality, examples=1, accuracy=0.0, loss=0.0)
