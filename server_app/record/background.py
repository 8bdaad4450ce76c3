"""What the server does beside its clients: jobs that one thread does in order while the server waits for replies."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from logging import ERROR
from types import TracebackType

from flwr.supercore import log

Job = Callable[[], object]


class Background:
    """Does jobs in the order in which they were added, in another thread; as a context, it ends with its block.

    An added job waits for `begin`, so that it does not take the processor, or the T2I model, from what the server does
    meanwhile. The first error of a job is raised by `check` and `wait` in the caller's thread; no later job is done.

    The thread ends with the last job that may begin. As long as it lived it would hold threads of torch, and where
    there are more of these than cores, those of the other threads sleep after each operation: on two cores, an update
    of the starter T2I then takes twice as long.
    """

    def __init__(self) -> None:
        self._added: list[Job] = []
        self._begun: deque[Job] = deque()
        self._thread: threading.Thread | None = None  # There while a job is under way.
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self.is_failing = False  # Whether the block has failed, so that only what was there before is still wanted.

    def add(self, job: Job) -> None:
        """Add a job; it is done after those that were added before."""
        self._added.append(job)

    def begin(self) -> None:
        """Let the jobs that were added be done."""
        with self._changed:
            self._begun.extend(self._added)
            self._added = []
            if self._begun and self._thread is None:
                # Daemon: a server that is told to stop does not wait for it. What it writes is atomic.
                self._thread = threading.Thread(target=self._work, name="beside the clients", daemon=True)
                self._thread.start()

    def check(self) -> None:
        """Raise the error of a job that failed, if one did."""
        if self._error is not None:
            raise self._error

    def wait(self, begin: bool = True) -> None:
        """Wait until all added jobs are done, or those that may begin already; raise the error of one that failed."""
        if begin:
            self.begin()
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None)
        self.check()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Do the jobs that are left, unless the process was told to stop."""
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            self.is_failing = True
            self._finish_after(error)

    def _finish_after(self, error: BaseException | None) -> None:
        """Do the jobs that are left after an error, which is the one that counts."""
        try:
            self.wait()
        except Exception as other:
            if other is not error:
                log(ERROR, "What the server was doing beside its clients failed as well: %s", other)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                if self._error is None:
                    job()
            except BaseException as error:
                self._error = error

    def _next(self) -> Job | None:
        """Return the next job, or None if there is none: the thread then ends."""
        with self._changed:
            if self._begun:
                return self._begun.popleft()
            self._thread = None
            self._changed.notify_all()
            return None
