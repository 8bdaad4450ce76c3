"""The recorder of a run: it measures each round, writes the results, and shows them on the console.

It does not depend on the strategy. It reads the ledger when it writes a checkpoint. The checkpoint of a round is
written at once; what is slow, the measures of the T2I and the pages, is done while the clients work on the next round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.supercore import log
from torch import Tensor

from fedmmkt.common.config import RunConfig
from fedmmkt.common.failures import RunError, describe
from fedmmkt.common.payloads import record_bytes
from fedmmkt.common.progress import FIRST_SECONDS, GROWTH, TRANSIENT, Progress, duration
from fedmmkt.server_app.exchange import Reply, listed_names
from fedmmkt.server_app.ledger import Ledger
from fedmmkt.server_app.prompts import PromptSource
from fedmmkt.server_app.publish.card import write_adapter_card
from fedmmkt.server_app.record.background import Background
from fedmmkt.server_app.record.checkpoint import Checkpoints, ServerState
from fedmmkt.server_app.record.console import figure, log_before_and_after, log_round
from fedmmkt.server_app.record.evaluation_images import EvaluationImages
from fedmmkt.server_app.record.judge import Judge
from fedmmkt.server_app.record.round_record import RoundRecord, spans
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.record.trackers import Trackers
from fedmmkt.server_app.report.history import History
from fedmmkt.server_app.report.page import write_report
from fedmmkt.server_app.rules.reliability import Standing
from fedmmkt.server_app.standings import log_changes
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.trial import log_verdict

PAGE_REST = 20  # After a page is written, none is for so many times the seconds that it took; the last one always is.


class Recorder:
    """Measures a run, writes the results and shows them.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    classes : tuple of str
        The class space.
    run_folder : RunFolder
        Folder of all results.
    generator : Generator
        The T2I model to measure.
    prompts : PromptSource
        Source of the prompts for the evaluation images.
    judge : Judge, optional
        Measures the evaluation images.
    described : mapping, optional
        What ``config.json`` says of the run besides its configuration.

    Attributes
    ----------
    last_round : int or None
        The last recorded round; None before round 0.
    """

    def __init__(
        self,
        config: RunConfig,
        classes: tuple[str, ...],
        run_folder: RunFolder,
        generator: Generator,
        prompts: PromptSource,
        judge: Judge | None = None,
        described: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.classes = classes
        self.run_folder = run_folder
        self.trackers = Trackers(config.tracker, run_folder)
        self.generator = generator
        self._described = dict(described or {})
        self.last_round: int | None = None
        self._record = RoundRecord(0)
        self.images = EvaluationImages(config, classes, run_folder, generator, prompts, judge)
        self._history = History()
        self._checkpoints = Checkpoints(run_folder.checkpoints, config.checkpoints_kept)
        self._background = Background()
        self._unmeasured: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        self._snapshot: dict[str, Tensor] = {}
        self._measures: dict[str, Any] = {}
        self._beside: list[tuple[str, float, float]] = []
        self._last_seconds = 0.0
        self._zero, self._page_due, self._page_is_stale = time.perf_counter(), 0.0, False
        self._expected, self._answered, self._began, self._told = 0, 0, 0.0, 0.0

    def restore(self, state: ServerState, is_measured: bool) -> None:
        """Continue after the round of a checkpoint.

        Parameters
        ----------
        state : ServerState
            The checkpoint.
        is_measured : bool
            Whether the run folder has the metrics of its round. Otherwise the round is measured when the run goes on.
        """
        self.last_round, self._last_seconds = state.round, state.line["seconds"]["total"]
        self.generator.adapter.save(self.run_folder.lora, state.adapter)
        self._history = History.of(self.run_folder.read_lines())
        if is_measured:
            last = self._history.lines[-1]["generator"]
            self.images.remember(state.round, state.adapter, {key: last[key] for key in last if key != "loss"})
        else:
            self._unmeasured = state.line, state.adapter
        ends = [end for _, _, end in state.line["seconds"].get("timeline", {}).get("server", ())]
        self._zero = time.perf_counter() - max(ends, default=0.0)

    @contextmanager
    def run(self, config: RunConfig) -> Iterator[None]:
        """Lock the run folder for a run with this configuration inside the block.

        Raises
        ------
        ConfigError
            If another run is writing to the folder.
        OSError
            If something that was written beside the clients could not be.
        """
        self.config = config
        self._checkpoints.keep = config.checkpoints_kept
        described = self._described | {"config": config.model_dump(mode="json", by_alias=True)}
        with self.run_folder.in_use():
            self.run_folder.write_failure("")
            self.run_folder.write_config(described)
            with self._telling_failure(), self.trackers.run(config):
                try:
                    with self._background:
                        if self._unmeasured:
                            line, adapter = self._unmeasured
                            measures: dict[str, Any] = {}
                            self._background.add(partial(self._measure, line["round"], adapter, measures))
                            self._background.add(partial(self._publish, line, adapter, measures))
                        yield
                finally:
                    if self._page_is_stale:
                        self.report()

    @contextmanager
    def _telling_failure(self) -> Iterator[None]:
        """If the block fails, say why in the pages about the run, and raise the error."""
        try:
            yield
        except Exception as error:
            with suppress(OSError):  # A full disk is told as the cause.
                self.run_folder.write_failure(describe(error))
                self.report()
                if self._history.lines:
                    self._describe(write_adapter_card)
            raise

    @contextmanager
    def round(self, server_round: int, ledger: Ledger) -> Iterator[None]:
        """Record the block as a round: write its checkpoint, and let the rest be done beside the next exchange.

        The rest is what can be made again from the checkpoint: measures of the T2I, picture, metrics, trackers, pages.
        """
        record = self._record = RoundRecord(server_round)
        self._snapshot, self._measures = {}, {}
        with record.timed("total"):
            yield
        if not self._snapshot:
            self.measure()
        record.gone |= ledger.clients - record.connected
        self._background.wait(begin=False)  # The exchange let the lines of earlier rounds be written.
        line = record.to_json(self._zero)
        with self._beside_timed("checkpoint"):
            self._checkpoints.write(self._state(line, self._snapshot, ledger))
        self._background.add(partial(self._publish, line, self._snapshot, self._measures, record.participation()))
        self.last_round, self._last_seconds = server_round, record.seconds["total"]

    def measure(self) -> None:
        """Let the T2I be measured, as it is now, beside the next exchange with clients."""
        self._snapshot = {name: tensor.clone() for name, tensor in self.generator.adapter.state().items()}
        measures = self._measures = {}
        self._background.add(partial(self._measure, self._record.round, self._snapshot, measures))

    def beside(self, stage: str, job: Callable[[], object]) -> None:
        """Let a job be done beside the next exchange with clients, after the others; not if the run fails before."""

        def timed() -> None:
            if not self._background.is_failing:
                with self._beside_timed(stage):
                    job()

        self._background.add(timed)

    @contextmanager
    def unrecorded(self, server_round: int) -> Iterator[None]:
        """Run the block without recording it."""
        self._record = RoundRecord(server_round)
        yield

    # ------------------------------------------------------------------ what happens in a round

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to a stage of the round."""
        with self._record.timed(stage):
            yield

    @contextmanager
    def exchange(self, messages: Sequence[Message]) -> Iterator[None]:
        """Record the block as an exchange of these messages; call `note` for each reply inside the block."""
        record = self._record
        record.bytes_down += sum(record_bytes(message.content) for message in messages)
        self._expected, self._answered = len(messages), 0
        self._began = self._told = time.perf_counter()
        missing = set(record.missing)
        self._background.begin()
        with record.timed("clients"):
            yield
        self._background.wait()  # What follows may change the T2I.
        if closed_without := [name for name in record.missing if name not in missing]:
            log(WARNING, "  clients   the round closed without %s", ", ".join(closed_without))

    def record_reply(self, reply: Reply, name: str, sent_in: int) -> None:
        """Record and show the result of a message; ``name`` is the node's name, ``sent_in`` the message's round."""
        known = dict(self._record.rejected)
        self._record.record_reply(reply, name)
        if reply.kind == "answered" and reply.answer is not None:
            self._answered, self._told = self._answered + 1, time.perf_counter()
            self._record.messages.append((name, self._began, self._told))
            seconds, accuracy = self._told - self._began, reply.answer.report.accuracy
            count = f"{self._answered}/{self._expected}"
            log(INFO, "  clients   %s  %-12s accuracy %s  (%.1f s)", count, name, figure(accuracy), seconds)
        elif reply.kind == "rejected":
            same = next((other for other in known if other != name and known[other] == reply.reason), "")
            log(WARNING, "  clients   %s is left out of this round: %s", name, f"as {same}" if same else reply.reason)
        elif reply.counts_late:
            log(INFO, "  clients   %s answered round %s late; its batch is still taught, so it counts", name, sent_in)
        elif reply.kind == "late" and reply.bytes:
            why = f": {reply.reason}" if reply.reason else ""
            log(WARNING, "  clients   %s answered round %s too late; the reply is not counted%s", name, sent_in, why)

    def record_early(self, messages: Sequence[Message]) -> None:
        """Record messages that let clients learn early, which are on their way now."""
        self._record.bytes_down += sum(record_bytes(message.content) for message in messages)

    def record_early_reply(self, reply: Reply, name: str, sent: float) -> None:
        """Record that a client has learned early, from a message that was sent at a time of `time.perf_counter`."""
        self._record.bytes_up += reply.bytes
        if reply.message is not None:
            now, ago = time.perf_counter(), time.time() - reply.message.metadata.created_at  # By the client's clock.
            self._record.messages.append((name, sent, min(now, max(sent, now - ago))))

    def record_evaluation(self, reply: Reply, name: str) -> None:
        """Record and show a client's final evaluation; one that is missing is shown only."""
        if reply.answer is None or reply.answer.evaluation is None:
            log(INFO, "  evaluate  %s gives no measures by class: %s", name, reply.reason)
            return
        evaluation = self._record.evaluations[reply.answer.report.client] = reply.answer.evaluation
        if evaluation.alone_correct_C is not None:
            alone = evaluation.alone_correct_C.sum() / evaluation.tested_C.sum()
            accuracy = figure(reply.answer.report.accuracy)
            log(INFO, "  evaluate  %-12s accuracy %s; alone %.3f", name, accuracy, alone)

    def record_standings(self, before: Mapping[str, Standing], after: Mapping[str, Standing]) -> None:
        """Record what each client's answer counts for, and show changes."""
        log_changes(before, after)
        self._record.standings = {**(self._record.standings or {}), **after}

    def record_unsent(self, message: Message) -> None:
        """Record that a message of the present exchange was not sent."""
        self._record.bytes_down -= record_bytes(message.content)

    def record_connected(self, clients: set[str]) -> None:
        """Record which clients are connected."""
        self._record.connected = clients

    def record_asked(self, clients: set[str]) -> None:
        """Record which clients were asked."""
        self._record.asked |= clients

    def answered_clients(self) -> list[str]:
        """Return the clients that gave a valid reply in this round."""
        return [report.client for report in self._record.reports]

    def log_generation(self, server_round: int, count: int, guidance: float, seconds: float) -> None:
        """Show that the batch of a round was generated, if not of the present one."""
        ahead = "" if server_round == self._record.round else f" of round {server_round}"
        log(INFO, "  generate  %s images%s, guidance %g  (%.1f s)", count, ahead, guidance, seconds)

    def record_update(self, loss: float | None) -> None:
        """Record the mean loss of the T2I's update; None if there was none, or one that is not finite."""
        if loss is None:
            return
        if not math.isfinite(loss):
            log(WARNING, "  adapt     loss %s, which is recorded as none", loss)
            return
        self._record.generator_loss = float(loss)
        log(INFO, "  adapt     loss %.4f  (%.1f s)", loss, self._record.seconds["adapt"])

    def record_verdict(self, verdict: dict[str, Any] | None) -> None:
        """Record and show what the clients decided about the T2I's last update; None without one on trial."""
        self._record.guard = verdict
        if verdict is not None:
            log_verdict(verdict)

    def log_waiting(self, clients: Sequence[str]) -> None:
        """Show which clients have not answered yet, unless something was shown a moment ago."""
        self._background.check()
        now = time.perf_counter()
        if now - self._told < max(FIRST_SECONDS, GROWTH * (now - self._began)):
            return
        self._told = now
        waited = " for ".join(filter(None, [listed_names(clients), duration(now - self._began)]))
        log(INFO, "  clients   waiting for %s of %s: %s%s", len(clients), self._expected, waited, TRANSIENT)

    def time_left(self, server_round: int, rounds: int) -> str:
        """Say how long the remaining rounds take if each takes as long as the last one; empty before round 2."""
        seconds = self._last_seconds if server_round > 1 else 0.0
        return f" about {duration(seconds * (rounds - server_round + 1))} left" if seconds else ""

    def progress(self, total: int) -> Callable[[int], object]:
        """Return a function that shows the progress of a generation; it ends one that a failed run no longer needs."""
        progress = Progress("generate", total, "images")

        def tell(done: int) -> None:
            if self._background.is_failing:
                raise RunError("the run has failed meanwhile")
            progress(done)

        return tell

    # ------------------------------------------------------------------ measures

    def _measure(self, round: int, adapter: dict[str, Tensor], measures: dict[str, Any]) -> None:
        """Measure the T2I as it was at the end of a round; ``measures`` gets the result."""
        with self._beside_timed("measure"):
            measures |= self.images.measure(round, adapter)

    def _publish(
        self, line: dict[str, Any], adapter: dict[str, Tensor], measures: Mapping[str, Any], participation: str = ""
    ) -> None:
        """Write adapter, metrics and pages of a round that was measured, and show it."""
        beside, self._beside = self._beside, []
        self.generator.adapter.save(self.run_folder.lora, adapter)
        line["generator"] |= measures
        line["seconds"]["measure"] = round(sum(end - start for name, start, end in beside if name == "measure"), 3)
        line["seconds"]["timeline"]["beside"] = spans(beside, self._zero)
        self.run_folder.append_metrics(line)
        self._history.add(line)
        self.trackers.log(line)
        with self._beside_timed("report"):
            self._page_is_stale = True
            if time.perf_counter() >= self._page_due:
                began = time.perf_counter()
                self.report()
                self._page_due = began + PAGE_REST * (time.perf_counter() - began)
            self._describe(write_adapter_card)
        log_round(line, self.config.rounds, participation)

    @contextmanager
    def _beside_timed(self, name: str) -> Iterator[None]:
        """Record the block's time as one of what is done beside the clients."""
        start = time.perf_counter()
        yield
        self._beside.append((name, start, time.perf_counter()))

    def _state(self, line: dict[str, Any], adapter: dict[str, Tensor], ledger: Ledger) -> ServerState:
        """Collect the state that a later run needs to continue from here."""
        return ServerState(
            round=line["round"],
            run_key=ledger.run_key,
            ancestors=ledger.ancestors,
            config=self.config.model_dump(mode="json", by_alias=True),
            classes=self.classes,
            clients=tuple(sorted(ledger.clients)),
            identities=ledger.identities,
            standings=ledger.standings,
            drawn=tuple(sorted(ledger.drawn)),
            adapter=adapter,
            pool=ledger.pool,
            history=ledger.history,
            line=line,
            earlier=self.run_folder.metrics_mark(),
            guard=ledger.guard,
            made_from=ledger.made_from,
        )

    def report(self) -> None:
        """Write the report of all recorded rounds."""
        self._describe(write_report)
        self._page_is_stale = False

    def _describe(self, write: Callable[[Path, History], object]) -> None:
        """Write a page about the run. It can be made again from the run folder, so no fault in it ends the run."""
        try:
            write(self.run_folder.path, self._history)
        except OSError:  # A full disk would lose what cannot be made again.
            raise
        except Exception as error:
            log(WARNING, "  %s failed, and the run goes on: %r", write.__name__.replace("_", " "), error)

    def end(self) -> None:
        """Wait for what is done beside the clients; show the measures of clients and T2I before and after the run."""
        self._background.wait()
        self.report()
        log(INFO, "")
        log_before_and_after(self._history.lines[0], self._history.lines[-1])
        log(INFO, "")
        for cause in self._history.causes():
            log(WARNING, "Left out of a round or more: %s", cause)
        log(INFO, "Report: %s", self.run_folder.report)
