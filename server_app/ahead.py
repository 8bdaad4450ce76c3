"""Generation ahead: while clients work on a round's batch, the server makes that of the next round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from fedmmkt.common.payloads import ClientReport, SyntheticBatch
from fedmmkt.server_app.guard import Arms
from fedmmkt.server_app.ledger import Ledger, Source
from fedmmkt.server_app.prompts import Prompt
from fedmmkt.server_app.recorder import Recorder
from fedmmkt.server_app.rules.without_logits import check_prompts
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.t2i.samples import Samples


@dataclass(frozen=True)
class Made:
    """A batch that was made: its prompts, its samples, which adapter made each, and what clients get of it."""

    prompts: Sequence[Prompt]
    samples: Samples
    arms: Arms | None
    batch: SyntheticBatch


class Ahead:
    """Makes the batches of a run, each when its round begins, or beside the clients' work on the round before.

    A batch that is made ahead is made from the state before its clients answer: adapter, pool and guard as they were
    after the last round but one. That state is in the ledger, and so in checkpoints, so that a run that goes on makes
    the same batch. While clients work nothing changes it, so the batch does not depend on when they answer.

    Parameters
    ----------
    generator : Generator
        The T2I model.
    ledger : Ledger
        Holds the pool, the guard's state, and the state that the next batch is made from.
    recorder : Recorder
        Does the work beside the clients.
    make : callable
        Makes the batch of a round. It is also given the clients whose prompts have to be checked.
    """

    def __init__(
        self,
        generator: Generator,
        ledger: Ledger,
        recorder: Recorder,
        make: Callable[[int, Sequence[ClientReport]], Made],
    ) -> None:
        self.generator, self.ledger, self.recorder, self.make = generator, ledger, recorder, make
        self._round, self._made = 0, Future[Made]()

    def batch(self, server_round: int, clients: Sequence[ClientReport]) -> Made:
        """Return the batch of a round: the one that was made ahead, or one that is made now.

        Parameters
        ----------
        server_round : int
            The round, from 1.
        clients : sequence of ClientReport
            The known clients, who must be able to learn from the prompts.

        Raises
        ------
        Exception
            What went wrong while the batch was made, ahead or now.
        """
        made, self._made = self._made, Future()
        if self._round == server_round and made.done():
            check_prompts(made.result().prompts, clients)
            return made.result()
        made.cancel()
        source = self.ledger.made_from
        if source is None or source.round != server_round:
            return self.make(server_round, clients)
        with self._as_in(source):
            return self.make(server_round, clients)

    def begin(self, server_round: int) -> None:
        """Let the batch of a round be made beside the next exchange with clients, if the run has this round."""
        adapter = {name: tensor.clone() for name, tensor in self.generator.adapter.state().items()}
        self.ledger.made_from = Source(server_round, adapter, tuple(self.ledger.pool), self.ledger.guard)
        self._made.cancel()
        if server_round <= self.recorder.config.rounds:
            self._round, self._made = server_round, Future()
            self.recorder.beside("generate", partial(self._make, server_round, self._made))

    def _make(self, server_round: int, made: Future[Made]) -> None:
        """Make a batch; what goes wrong is told when its round begins, as if it were made then."""
        if made.set_running_or_notify_cancel():
            try:
                made.set_result(self.make(server_round, ()))  # Which clients are known by now depends on the clock.
            except Exception as error:
                made.set_exception(error)

    @contextmanager
    def _as_in(self, source: Source) -> Iterator[None]:
        """Have adapter, pool and guard of an earlier state inside the block."""
        ledger = self.ledger
        present = ledger.pool, ledger.guard
        ledger.pool, ledger.guard = list(source.pool), source.guard
        try:
            with self.generator.adapter.holding(source.adapter):
                yield
        finally:
            ledger.pool, ledger.guard = present
