"""The FedMMKT strategy: rounds of mutual transfer between a T2I model and clients' task models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore import log
from PIL import Image
from torch import Tensor

from common.config import RunConfig
from common.images import encode_images, resize_images
from common.payloads import (
    ClientReport,
    DistillationPayload,
    Instructions,
    Request,
    SoftTargets,
    SyntheticBatch,
)
from server_app.adaptation import Feedback, get_scores, get_update
from server_app.aggregation import get_aggregation, normalised
from server_app.checkpoint import ServerState, write_checkpoint
from server_app.class_space import wait_for_nodes
from server_app.evaluation import Judge
from server_app.exchange import Answer, Replies, exchange
from server_app.generator import Generated, Generator
from server_app.prompts import Prompt, PromptSource
from server_app.report import write_report
from server_app.round_record import RoundRecord
from server_app.run_folder import RunFolder

GRID_ROWS, GRID_COLUMNS = 10, 6


class RunError(RuntimeError):
    """The run cannot go on; its text says why and what to do."""


@dataclass(frozen=True)
class Samples:
    """One round's samples: what the generator keeps of them, and what clients get."""

    generated: Generated
    batch: SyntheticBatch
    prompted_N: Tensor


class FedMMKT(Strategy):
    """Federated multi-modal knowledge transfer (arXiv 2510.12254), one message a round.

    Each round the T2I model generates a batch; each client distils the last soft targets, learns its private
    data and answers the new batch with logits; the answers become soft targets, and scores by which the
    T2I's LoRA adapter is fine-tuned. Override `make_prompts`, `generate`, `aggregate_logits`,
    `score_samples` or `adapt_generator` to change a step; rules registered by name change it by run-config.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    classes : tuple of str
        The class space.
    generator : Generator
        The T2I model.
    prompts : PromptSource
        Where prompts come from.
    run_folder : RunFolder
        Where the run leaves its results.
    run_key : str
        Names the run to its clients' memories.
    judge : Judge, optional
        Measures the generated images; measures only.

    Raises
    ------
    ConfigError
        If the configuration names a rule that is not registered.
    """

    def __init__(
        self,
        config: RunConfig,
        classes: tuple[str, ...],
        generator: Generator,
        prompts: PromptSource,
        run_folder: RunFolder,
        run_key: str,
        judge: Judge | None = None,
    ) -> None:
        self.config = config
        self.classes = classes
        self.generator = generator
        self.prompts = prompts
        self.run_folder = run_folder
        self.run_key = run_key
        self.judge = judge
        self.aggregation = get_aggregation(config.t2i.aggregation)
        self.scores = get_scores(config.t2i.scores)
        get_update(config.t2i.update)
        self.samples: Samples | None = None
        self.pool: list[tuple[Generated, Tensor]] = []
        self.history: list[tuple[SyntheticBatch, SoftTargets]] = []
        self.reports: dict[int, ClientReport] = {}
        self.clients: set[str] = set()
        self.overdue: dict[str, tuple[int, int]] = {}
        self.ancestors: tuple[tuple[str, int], ...] = ()
        self.last_round: int | None = None
        self.record = RoundRecord(0)
        self.measured: tuple[float | None, float | None] = (None, None)
        self.pictures: list[Image.Image] = []

    # ------------------------------------------------------------------ steps that a subclass may replace

    def make_prompts(self, server_round: int) -> list[Prompt]:
        """Choose the prompts of a round."""
        rng = np.random.default_rng((self.config.seed, server_round))
        return self.prompts(self.config.t2i.samples_per_round, rng)

    def generate(self, server_round: int, prompts: list[Prompt]) -> Generated:
        """Generate one image a prompt, at the round's guidance.

        For the first ``explore`` part of the prompts, a well-scored sample of the last round of the same class
        is varied, as in Private Evolution (arXiv 2305.15560); the others are new.
        """
        seeds = self._seeds(server_round, len(prompts))
        texts = [prompt.text for prompt in prompts]
        guidance = self.guidance(server_round)
        parents = self._parents(server_round, prompts[: int(len(prompts) * self.config.t2i.explore)])
        varied, new = list(parents), [index for index in range(len(prompts)) if index not in parents]
        made = np.argsort(varied + new)
        parts = []
        if varied:
            latents_NCHW = torch.stack([parents[index] for index in varied])
            strength = self.config.t2i.explore_strength
            parts.append(
                self.generator.vary(
                    latents_NCHW, [texts[i] for i in varied], [seeds[i] for i in varied], guidance, strength
                )
            )
        if new:
            progress = self._progress(len(new))
            parts.append(self.generator.generate([texts[i] for i in new], [seeds[i] for i in new], guidance, progress))
        return Generated.join(parts).select(made)

    def aggregate_logits(self, answers: list[Answer], prompted_N: Tensor) -> Tensor:
        """Turn the clients' logits into soft targets (samples x classes)."""
        logits_KNC = torch.stack([torch.from_numpy(_payload(answer).logits_NC).float() for answer in answers])
        counts_KC = torch.stack([torch.from_numpy(_payload(answer).class_counts_C) for answer in answers])
        return normalised(self.aggregation(logits_KNC, counts_KC, prompted_N))

    def score_samples(self, answers: list[Answer], prompted_N: Tensor) -> Tensor:
        """Weigh each sample for the T2I's update (not negative, samples).

        Only clients that see images without their prompts judge an image, or where there is none, all. A class that
        none of them holds is judged by those that see images beside prompts, since nobody else knows it.
        """
        judges = [answer for answer in answers if answer.report.modality == "image"] or answers
        votes = [torch.from_numpy(_payload(a).votes_N) for a in answers if _payload(a).votes_N is not None]
        consensus_NC = self.aggregate_logits(judges, prompted_N)
        unjudged_N = (prompted_N >= 0) & ~_held_C(judges)[prompted_N]
        pairs = [answer for answer in answers if answer.report.modality == "image+text"]
        if pairs and bool(unjudged_N.any()):
            consensus_NC = torch.where(unjudged_N[:, None], self.aggregate_logits(pairs, prompted_N), consensus_NC)
        read_NC = self._read_in_prompts(answers, prompted_N)
        return self.scores(Feedback(consensus_NC, prompted_N, torch.stack(votes).sum(0) if votes else None, read_NC))

    def adapt_generator(self, server_round: int, generated: Generated, scores_N: Tensor) -> float | None:
        """Fine-tune the T2I on the scored samples of the last rounds; the mean loss, None if none scored."""
        self.pool = [*self.pool, (generated.without_images(), scores_N)][-self.config.t2i.pool_rounds :]
        scores = torch.cat([scores for _, scores in self.pool])
        if not bool(scores.any()):
            return None
        pooled = Generated.join([samples for samples, _ in self.pool])
        seed = int(np.random.SeedSequence((self.config.seed, server_round, 1)).generate_state(1)[0])
        return self.generator.adapt(pooled, scores, self.config.t2i.adaptation_steps, seed)

    def guidance(self, server_round: int) -> float:
        """Guidance scale of a round, from 1; annealed, since guided samples of a tuned model saturate."""
        schedule = self.config.t2i.guidance
        return schedule[min(max(server_round, 1), len(schedule)) - 1]

    # ------------------------------------------------------------------ Flower's interface

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        """Generate a batch; make one request a node: the batch, the last soft targets, and what the node has missed."""
        self.samples = self._make_samples(server_round)
        contents: dict[tuple[Any, ...], Any] = {}
        for node_id in sorted(grid.get_node_ids()):
            batches, targets = self._due(node_id)
            sees_images, is_known = self._sees_images(node_id), node_id in self.reports
            # Equal requests share one content, which Flower stores and sends as one object.
            resent = tuple(batch.batch_id for batch in batches)
            key = (sees_images, is_known, resent, tuple(message.batch_id for message in targets))
            if key not in contents:
                sent = [*batches, self.samples.batch]
                shown = sent if sees_images else [batch.without_images() for batch in sent]
                instructions = self._instructions(server_round, is_known)
                contents[key] = Request(instructions, tuple(shown), targets).to_content()
            yield Message(contents[key], dst_node_id=node_id, message_type=MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Learn from replies: soft targets for the clients, an update of the adapter."""
        answers = sorted((self._parse_payload(reply) for reply in replies), key=lambda answer: answer.report.client)
        return self._learn(server_round, answers)

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        """Ask every node for a report on its model as it is."""
        content = Request(self._instructions(server_round, is_known=False)).to_content()
        for node_id in sorted(grid.get_node_ids()):
            yield Message(content, dst_node_id=node_id, message_type=MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the clients' accuracy."""
        reports = [self._parse_report(reply).report for reply in replies]
        return MetricRecord({"accuracy": float(np.mean([report.accuracy for report in reports]))}) if reports else None

    def summary(self) -> None:
        """Log the configuration that matters most."""
        config, t2i, client = self.config, self.config.t2i, self.config.client
        log(INFO, "\t├──> Classes: %s", ", ".join(self.classes))
        log(INFO, "\t├──> T2I: %s, LoRA rank %s, %s parameters", t2i.model, t2i.lora_rank, self._adapter_parameters())
        log(INFO, "\t├──> A round: %s images, guidance %s", t2i.samples_per_round, ", ".join(map(str, t2i.guidance)))
        log(INFO, "\t├──> Aggregation: %s; scores: %s; update: %s", t2i.aggregation, t2i.scores, t2i.update)
        log(INFO, "\t├──> Feedback: %s", config.feedback)
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
        """Run the rounds; after `resume`, those that are left.

        Parameters
        ----------
        grid : Grid
            Flower's connection to the nodes.
        initial_arrays : ArrayRecord, optional
            Not used: the adapter starts from the T2I model, and clients' weights never travel.
        num_rounds, timeout : optional
            Override ``rounds`` and ``round-deadline`` of the configuration, also in ``config.json``.
        train_config, evaluate_config : ConfigRecord, optional
            Handed to `configure_train` and `configure_evaluate` for subclasses.
        evaluate_fn : callable, optional
            Called with the round and the adapter's arrays before the first round and after each.

        Returns
        -------
        Result
            ``arrays`` is the final adapter; metrics by round.

        Raises
        ------
        ConfigError
            If too few nodes connect, or another run is writing in the run folder.
        RunError
            If no client gives a valid reply.
        """
        changes = {"rounds": num_rounds or self.config.rounds, "round_deadline": timeout or self.config.round_deadline}
        self.config = self.config.model_copy(update=changes)
        described = {"config": self.config.model_dump(mode="json", by_alias=True)}
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        with self.run_folder.in_use():
            try:
                self.run_folder.write_config(self.run_folder.read_config() | described)
                return self._run(grid, train_config, evaluate_config, evaluate_fn)
            finally:
                self.run_folder.close()

    # ------------------------------------------------------------------ a run, and going on with one

    def _run(
        self,
        grid: Grid,
        train_config: ConfigRecord,
        evaluate_config: ConfigRecord,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> Result:
        rounds, arrays, result = self.config.rounds, self._adapter_arrays(), Result()
        log(INFO, "Starting %s:", type(self).__name__)
        self.summary()
        if self.last_round is not None and self.last_round >= rounds:
            log(INFO, "All %s rounds are done; more of them ('rounds') would go on", rounds)
            result.arrays = arrays
            write_report(self.run_folder.path)
            self._log_end()
            return result
        wait_for_nodes(grid, self.config.min_nodes, self.config.node_timeout)
        log(INFO, "")
        if self.last_round is None:
            log(INFO, "[BEFORE] clients as they start")
            with self._round(0):
                self._ask(grid, self.configure_evaluate(0, arrays, evaluate_config, grid), self._parse_report)
            self._call(evaluate_fn, 0, arrays, result)
        else:
            log(INFO, "[RESUME] after round %s: clients tell what they hold", self.last_round)
            # Counted in no round, since the interrupted run had no such exchange.
            self.record = RoundRecord(self.last_round)
            messages = self.configure_evaluate(self.last_round, arrays, evaluate_config, grid)
            for answer in self._ask(grid, messages, self._parse_report).answers:
                if self.history and answer.report.client in self.clients and not answer.report.kept:
                    log(
                        WARNING,
                        "  clients   %s holds nothing of the earlier run, and begins anew",
                        answer.report.client,
                    )

        for server_round in range((self.last_round or 0) + 1, rounds + 1):
            log(INFO, "")
            log(INFO, "[ROUND %s/%s]", server_round, rounds)
            with self._round(server_round):
                messages = self.configure_train(server_round, arrays, train_config, grid)
                replies = self._ask(grid, messages, self._parse_payload)
                _, metrics = self._learn(server_round, replies.answers)
                if server_round == rounds:
                    self._ask(grid, self._configure_distill(server_round, grid), self._parse_report)
                arrays = self._adapter_arrays()
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            self._call(evaluate_fn, server_round, arrays, result)
        result.arrays = arrays
        self._log_end()
        return result

    def state(self) -> ServerState:
        """Return what a later run needs to go on from here.

        Raises
        ------
        RunError
            If no round is done, not even round 0.
        """
        if self.last_round is None:
            raise RunError("a run has no state before its round 0 is done")
        return ServerState(
            round=self.last_round,
            run_key=self.run_key,
            ancestors=self.ancestors,
            config=self.config.model_dump(mode="json", by_alias=True),
            classes=self.classes,
            clients=tuple(sorted(self.clients)),
            adapter=self.generator.adapter.state(),
            pool=self.pool,
            history=self.history,
            measured=self.measured,
            pictures=self.pictures,
            metrics=self.run_folder.read_metrics(),
        )

    def resume(self, state: ServerState) -> None:
        """Go on from a state in place of beginning; call it before `start`.

        The run keeps its own key: clients copy their memory of the earlier run as it was after the state's round,
        so that what they learned in a round that is done again does not count twice, and runs do not mix.

        Raises
        ------
        ConfigError
            If the adapter is another; `checkpoint.check_continues` checks the configuration.
        """
        self.generator.adapter.load_state(state.adapter, f"the checkpoint of round {state.round}")
        self.last_round, self.ancestors, self.clients = state.round, state.lineage(), set(state.clients)
        self.pool, self.history = state.pool, state.history
        self.measured, self.pictures = state.measured, state.pictures
        self.generator.adapter.save(self.run_folder.lora)

    # ------------------------------------------------------------------ one round's parts

    @contextmanager
    def _round(self, server_round: int) -> Iterator[None]:
        """Time a round, then leave its record, pictures, adapter, report and checkpoint in the run folder."""
        self.record = RoundRecord(server_round)
        with self.record.timed("total"):
            yield
            self._measure(server_round)
            self.generator.adapter.save(self.run_folder.lora)
        self.record.gone |= self.clients - self.record.asked
        self.clients |= {report.client for report in self.record.reports}
        self.run_folder.append_metrics(self.record.to_json())
        write_report(self.run_folder.path)
        self.last_round = server_round
        # Last, so that a run goes on from a round of which everything is there.
        write_checkpoint(self.run_folder.checkpoints, self.state(), self.config.checkpoints_kept)
        self._log_round()

    def _ask(self, grid: Grid, messages: Iterable[Message], parse: Callable[[Message], Answer]) -> Replies:
        outgoing = list(messages)
        start = time.perf_counter()

        def on_answer(answer: Answer, count: int) -> None:
            self.reports[answer.node_id] = answer.report
            log(
                INFO,
                "  clients   %s/%s  %-12s accuracy %.3f  (%.1f s)",
                count,
                len(outgoing),
                answer.report.client,
                answer.report.accuracy,
                time.perf_counter() - start,
            )

        def on_rejected(node: str, reason: str) -> None:
            log(WARNING, "  clients   %s is left out of this round: %s", node, reason)

        with self.record.timed("clients"):
            replies = exchange(
                grid,
                outgoing,
                parse,
                self._node_name,
                self.config.round_deadline,
                self.config.quorum,
                self.overdue,
                on_answer,
                on_rejected,
            )
        self.record.add(replies)
        self.record.asked |= {self._node_name(message.metadata.dst_node_id) for message in outgoing}
        self._note_late(replies)
        if replies.missing:
            log(WARNING, "  clients   closed without %s", ", ".join(replies.missing))
        if not replies.answers:
            without = replies.rejected | replies.missing
            nodes = {reason: [node for node in without if without[node] == reason] for reason in without.values()}
            reasons = "; ".join(f"{', '.join(named)}: {reason}" for reason, named in nodes.items()) or "none was asked"
            raise RunError(f"round {self.record.round}: none of {len(outgoing)} nodes gave a valid reply ({reasons})")
        return replies

    def _note_late(self, replies: Replies) -> None:
        """Name clients whose reply came after its round had closed; what it says is not used."""
        for reply in replies.late:
            node_id, asked_in = self.overdue.pop(reply.metadata.reply_to_message_id)
            if reply.has_content():  # An error tells that no reply will come.
                name = self._node_name(node_id)
                self.record.late.add(name)
                log(WARNING, "  clients   %s answered round %s after it had closed; not counted", name, asked_in)
        self.overdue |= {message_id: (node_id, self.record.round) for message_id, node_id in replies.overdue.items()}

    def _learn(self, server_round: int, answers: list[Answer]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if self.samples is None or not answers:
            return None, None
        samples = self.samples
        with self.record.timed("aggregate"):
            probabilities_NC = self.aggregate_logits(answers, samples.prompted_N)
            scores_N = self.score_samples(answers, samples.prompted_N)
            read_NC = self._read_in_prompts(answers, samples.prompted_N)
            targets = self._soft_targets(samples, probabilities_NC, read_NC)
            self.history = [*self.history, (samples.batch, targets)][-self.config.client.pool_rounds :]
        with self.record.timed("adapt"):
            loss = self.adapt_generator(server_round, samples.generated, scores_N)
        self.record.generator_loss = loss
        if loss is not None:
            log(INFO, "  adapt     loss %.4f  (%.1f s)", loss, self.record.seconds["adapt"])
        accuracy = float(np.mean([answer.report.accuracy for answer in answers]))
        return self._adapter_arrays(), MetricRecord({"accuracy": accuracy, "replies": len(answers)})

    def _read_in_prompts(self, answers: list[Answer], prompted_N: Tensor) -> Tensor | None:
        """Consensus of those that see no image, where a prompt names no class and the configuration asks for it."""
        readers = [answer for answer in answers if answer.report.modality == "text"]
        if not readers or self.config.t2i.agreement != "cross-modal" or not bool((prompted_N < 0).any()):
            return None
        return self.aggregate_logits(readers, prompted_N)

    def _soft_targets(self, samples: Samples, probabilities_NC: Tensor, read_NC: Tensor | None) -> SoftTargets:
        agreement_N = Feedback(probabilities_NC, samples.prompted_N, None, read_NC).agreement_N()
        return SoftTargets(
            batch_id=samples.batch.batch_id,
            probabilities_NC=probabilities_NC.clamp(0, 1).numpy().astype(np.float16),
            weights_N=agreement_N.clamp_min(0.02).numpy().astype(np.float32),
        )

    def _make_samples(self, server_round: int) -> Samples:
        with self.record.timed("generate"):
            prompts = self.make_prompts(server_round)
            start = time.perf_counter()
            generated = self.generate(server_round, prompts)
            seconds = time.perf_counter() - start
            log(
                INFO, "  generate  %s images, guidance %g  (%.1f s)", len(prompts), self.guidance(server_round), seconds
            )
            batch = self._encode_batch(server_round, prompts, generated)
        return Samples(generated, batch, torch.from_numpy(batch.prompted_N))

    def _encode_batch(self, server_round: int, prompts: list[Prompt], generated: Generated) -> SyntheticBatch:
        images_NHWC = resize_images(generated.images_NHWC, min(self.config.data.image_size, self.generator.image_size))
        data, offsets = encode_images(images_NHWC)
        distinct = list(dict.fromkeys(generated.prompts))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        anchored = self._anchor_size() > 0
        return SyntheticBatch(
            batch_id=f"{self.run_key}-{server_round}",
            round=server_round,
            prompts=generated.prompts,
            prompted_N=np.array([prompt.class_index for prompt in prompts], dtype=np.int64),
            images=data,
            offsets=offsets,
            anchors_UD=self.generator.text_embeddings(distinct) if anchored else None,
            anchor_index_N=np.array([row[prompt] for prompt in generated.prompts]) if anchored else None,
        )

    def _configure_distill(self, server_round: int, grid: Grid) -> Iterator[Message]:
        """Make the last message: the last soft targets, and no new batch."""
        for node_id in sorted(grid.get_node_ids()):
            batches, targets = self._due(node_id)
            if not self._sees_images(node_id):
                batches = tuple(batch.without_images() for batch in batches)
            # Round + 1: what a client draws at random is not what it drew in its last round.
            request = Request(self._instructions(server_round + 1, node_id in self.reports), batches, targets)
            yield Message(request.to_content(), dst_node_id=node_id, message_type=f"{MessageType.TRAIN}.distill")

    def _due(self, node_id: int) -> tuple[tuple[SyntheticBatch, ...], tuple[SoftTargets, ...]]:
        """Past batches that a node does not hold; and their soft targets, with those that the node waits for."""
        report = self.reports.get(node_id)
        kept, awaiting = (set(report.kept), set(report.awaiting)) if report else (set(), set())
        absent = tuple(batch for batch, _ in self.history if batch.batch_id not in kept)
        wanted = awaiting | {batch.batch_id for batch in absent}
        return absent, tuple(targets for _, targets in self.history if targets.batch_id in wanted)

    def _sees_images(self, node_id: int) -> bool:
        """Whether a node is sent images; one that has not said what it reads is."""
        return node_id not in self.reports or self.reports[node_id].modality != "text"

    def _instructions(self, server_round: int, is_known: bool) -> Instructions:
        ancestors = () if is_known else self.ancestors
        return Instructions(
            run_key=self.run_key,
            round=server_round,
            classes=self.classes,
            votes=self.config.feedback == "logits+votes",
            anchor_size=self._anchor_size(),
            ancestors=tuple(run_key for run_key, _ in ancestors),
            ancestor_rounds=tuple(last for _, last in ancestors),
        )

    def _anchor_size(self) -> int:
        return self.generator.anchor_size if self.config.client.alignment_weight else 0

    def _parse_report(self, reply: Message) -> Answer:
        return Answer(reply.metadata.src_node_id, ClientReport.from_records(reply.content, "report"))

    def _parse_payload(self, reply: Message) -> Answer:
        if self.samples is None:
            raise RunError("a reply came before any batch was made")
        batch = self.samples.batch
        payload = DistillationPayload.from_records(reply.content, "payload")
        payload.check_answers(batch.batch_id, len(batch), len(self.classes), self.config.feedback == "logits+votes")
        return Answer(reply.metadata.src_node_id, self._parse_report(reply).report, payload)

    # ------------------------------------------------------------------ measures, files and logs

    def _measure(self, server_round: int) -> None:
        """Measure and picture the T2I on the same prompts, seeds and guidance each round.

        A T2I that has not learned since makes the same images: their measures and picture are kept.
        """
        if server_round > 0 and self.record.generator_loss is None:
            self.record.alignment, self.record.frechet = self.measured
            self.run_folder.write_images(server_round, self.pictures, GRID_COLUMNS)
            return
        with self.record.timed("measure"):
            count = self.config.t2i.evaluation_samples if self.judge else len(self.classes) * GRID_COLUMNS
            prompts = sorted(self.prompts(count, np.random.default_rng(self.config.seed)), key=lambda p: p.class_index)
            texts, seeds = [prompt.text for prompt in prompts], self._seeds(0, count)
            made = self.generator.generate(texts, seeds, self.config.t2i.evaluation_guidance)
            if self.judge:
                images_NHWC = resize_images(made.images_NHWC, self.config.data.image_size)
                measures = self.judge.measure(images_NHWC, np.array([prompt.class_index for prompt in prompts]))
                self.record.alignment, self.record.frechet = measures.alignment, measures.frechet
            drawn = self._pictured([prompt.class_index for prompt in prompts])
            self.pictures = [Image.fromarray(made.images_NHWC[index]) for index in drawn]
            self.measured = self.record.alignment, self.record.frechet
            self.run_folder.write_images(server_round, self.pictures, GRID_COLUMNS)

    @staticmethod
    def _pictured(class_indices: list[int]) -> list[int]:
        """Choose the samples of the image grid: a row of each class, as far as there are enough."""
        rows: dict[int, list[int]] = {}
        for index, class_index in enumerate(class_indices):
            rows.setdefault(class_index, []).append(index)
        if len(rows) == 1:
            return list(range(min(len(class_indices), GRID_ROWS * GRID_COLUMNS)))
        return [index for row in list(rows.values())[:GRID_ROWS] for index in row[:GRID_COLUMNS]]

    def _seeds(self, server_round: int, count: int) -> list[int]:
        return [int(state) for state in np.random.SeedSequence((self.config.seed, server_round)).generate_state(count)]

    def _parents(self, server_round: int, prompts: list[Prompt]) -> dict[int, Tensor]:
        """Draw a latent of the last round by score for each prompt whose class (or text) has one."""
        if not self.pool or not self.generator.can_vary:
            return {}
        generated, scores_N = self.pool[-1]
        prompted_N = torch.from_numpy(self.history[-1][0].prompted_N)
        generator = torch.Generator().manual_seed(self._seeds(server_round, 1)[0])
        parents = {}
        for index, prompt in enumerate(prompts):
            if prompt.class_index >= 0:
                alike_N = prompted_N == prompt.class_index
            else:
                alike_N = torch.tensor([text == prompt.text for text in generated.prompts])
            chances_N = scores_N.double() * alike_N
            if bool(chances_N.any()):
                parents[index] = generated.latents_NCHW[int(torch.multinomial(chances_N, 1, generator=generator))]
        return parents

    def _adapter_arrays(self) -> ArrayRecord:
        return ArrayRecord(self.generator.adapter.state())

    def _adapter_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.generator.adapter.state().values())

    def _node_name(self, node_id: int) -> str:
        return self.reports[node_id].client if node_id in self.reports else f"node {node_id}"

    @staticmethod
    def _call(
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
        server_round: int,
        arrays: ArrayRecord,
        result: Result,
    ) -> None:
        metrics = evaluate_fn(server_round, arrays) if evaluate_fn else None
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics

    @staticmethod
    def _progress(total: int) -> Callable[[int], None]:
        """Log how far a generation is, at most every five seconds."""
        last = time.monotonic()

        def progress(done: int) -> None:
            nonlocal last
            if done < total and time.monotonic() - last > 5:
                last = time.monotonic()
                log(INFO, "  generate  %s/%s images", done, total)

        return progress

    def _log_round(self) -> None:
        record = self.record
        if record.round == 0:
            log(INFO, "")
        log(
            INFO,
            "round %s/%s | clients %s | image %s text %s both %s | alignment %s | Frechet %s | "
            "%.2f MB down %.2f MB up | %.0f s",
            record.round,
            self.config.rounds,
            _figure(record.accuracy()),
            _figure(record.accuracy("image")),
            _figure(record.accuracy("text")),
            _figure(record.accuracy("image+text")),
            _figure(record.alignment),
            _figure(record.frechet, 1),
            record.bytes_down / 1e6,
            record.bytes_up / 1e6,
            record.seconds["total"],
        )
        log(INFO, "  clients   %s", record.participation())

    def _log_end(self) -> None:
        lines = self.run_folder.read_metrics()
        first, last = lines[0], lines[-1]
        log(INFO, "")
        log(INFO, "%-28s %8s %8s", "", "before", "after")
        rows = [("clients' mean accuracy", "clients", "accuracy", 3), ("T2I alignment", "generator", "alignment", 3)]
        rows.append(("T2I Frechet distance", "generator", "frechet", 1))
        for name, section, key, digits in rows:
            log(INFO, "%-28s %8s %8s", name, _figure(first[section][key], digits), _figure(last[section][key], digits))
        for client, values in last["clients"]["per_client"].items():
            before = first["clients"]["per_client"].get(client, {}).get("accuracy")
            name = f"  {client} ({values['modality']})"
            log(INFO, "%-28s %8s %8s", name, _figure(before), _figure(values["accuracy"]))
        log(INFO, "")
        log(INFO, "Report: %s", self.run_folder.report)


def _payload(answer: Answer) -> DistillationPayload:
    if answer.payload is None:
        raise ValueError(f"the reply of {answer.report.client} holds no payload")
    return answer.payload


def _held_C(answers: list[Answer]) -> Tensor:
    """Tell which classes these clients have examples of."""
    return torch.from_numpy(np.sum([_payload(answer).class_counts_C for answer in answers], axis=0) > 0)


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
