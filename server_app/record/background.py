"""What the server does beside its clients: jobs that one thread does in order while the server waits for replies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from logging import ERROR
from queue import SimpleQueue
from types import TracebackType

from flwr.supercore import log

Job = Callable[[], object]


class Background:
    """One thread that does jobs in the order in which they were added; as a context, it ends with its block.

    An added job waits for `begin`, so that it does not take the processor, or the T2I model, from what the server does
    meanwhile. The first error of a job is raised by `check` and `wait` in the caller's thread; no later job is done.
    """

    def __init__(self) -> None:
        self._added: list[Job] = []
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._undone = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self.is_failing = False  # Whether the block has failed, so that only what was there before is still wanted.
        self._thread: threading.Thread | None = None

    def add(self, job: Job) -> None:
        """Add a job; it is done after those that were added before."""
        self._added.append(job)

    def begin(self) -> None:
        """Let the thread do the jobs that were added."""
        if self._added and self._thread is None:
            # Daemon: a server that is told to stop does not wait for it. What it writes is atomic.
            self._thread = threading.Thread(target=self._work, name="beside the clients", daemon=True)
            self._thread.start()
        with self._changed:
            self._undone += len(self._added)
        for job in self._added:
            self._jobs.put(job)
        self._added = []

    def check(self) -> None:
        """Raise the error of a job that failed, if one did."""
        if self._error is not None:
            raise self._error

    def wait(self, begin: bool = True) -> None:
        """Wait until all added jobs are done, or those that may begin already; raise the error of one that failed."""
        if begin:
            self.begin()
        with self._changed:
            self._changed.wait_for(lambda: self._undone == 0)
        self.check()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Do the jobs that are left, unless the process was told to stop."""
        try:
            if kind is None:
                self.wait()
            elif issubclass(kind, Exception):
                self.is_failing = True
                self._finish_after(error)
        finally:
            self._jobs.put(None)
            self._thread = None

    def _finish_after(self, error: BaseException | None) -> None:
        """Do the jobs that are left after an error, which is the one that counts."""
        try:
            self.wait()
        except Exception as other:
            if other is not error:
                log(ERROR, "What the server was doing beside its clients failed as well: %s", other)

    def _work(self) -> None:
        jobs = self._jobs
        while (job := jobs.get()) is not None:
            try:
                if self._error is None:
                    job()
            except BaseException as error:
                self._error = error
            finally:
                with self._changed:
                    self._undone -= 1
                    self._changed.notify_all()
