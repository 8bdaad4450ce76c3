"""The ledger of a node's privacy budget: a file that holds every answer that the node gave from its private data.

The ledger is a text file with one JSON object a line. The first line is the budget; its operator makes it with
``fedmmkt budget new``. Each later line is the plan of a run, or an answer with its noise. An answer is on the disk
before it leaves the node, so that a node never spends more than its ledger says, whenever it is killed. A question that
was answered before gets the same answer again, which costs nothing.

Each line has the checksum of all lines up to it. Beside it, the node's state folder keeps the *head*: how many lines
there were, and their checksum. So a ledger that was damaged, cut off or replaced by an older copy is found out; then
nothing is answered until the operator makes a new one. A last line without an end is what a killed process was writing:
it was not answered yet, and is removed. What is refused is not written, and the number of runs is bounded.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmmkt.client_app.privacy.noise import with_noise
from fedmmkt.client_app.refusals import RefusedError
from fedmmkt.common.config import ConfigError
from fedmmkt.common.files import private_folder, write_text
from fedmmkt.common.privacy import Budget, Plan, epsilon_of, most_precision, plan_of, precision_of

LEAST_SHARE = 0.01  # Part of a run's equal share below which what remains is not worth a run.
MOST_RUNS = 100  # Plan lines for each run of the budget: who starts and resumes runs without end fills no disk.
MOST_BYTES = 256 * 2**20  # Of a ledger; its answers to usual runs are some megabytes.
_SLACK = 1e-9  # For rounding, relative to the budget.


class LedgerError(ConfigError):
    """A ledger cannot be used; the text names the file and what is wrong."""


class SpentError(RefusedError):
    """The budget does not allow an answer; the text tells nothing of the data."""


@dataclass(frozen=True)
class Answer:
    """An answer with noise.

    Attributes
    ----------
    values_N : numpy.ndarray
        int64.
    noise : float
        Noise multiplier.
    """

    values_N: NDArray[np.int64]
    noise: float


@dataclass(frozen=True)
class Statement:
    """What a ledger tells of its budget.

    Attributes
    ----------
    budget : Budget
        The whole budget.
    noises : tuple of float
        The noise multipliers of all answers.
    runs : tuple of str
        The keys of the runs that have a plan, oldest first.
    """

    budget: Budget
    noises: tuple[float, ...]
    runs: tuple[str, ...]

    @property
    def epsilon(self) -> float:
        """The epsilon that all answers together have spent, at the budget's delta."""
        return epsilon_of(self.noises, self.budget.delta)

    @property
    def is_spent(self) -> bool:
        """Whether what remains is not worth a new run."""
        return _unspent(self.budget, self.noises) < _least(self.budget)


@dataclass
class _Pages:
    """The content of a ledger.

    Attributes
    ----------
    name : str
        Random name of the ledger, by which its head is found.
    checks : list of str
        The checksum of each line, as of all lines up to it.
    origins : dict of str to str
        By the key of each run, that of the run that its plan was made for: its own, or that of an earlier run that it
        continues.
    plans : dict of str to Plan
        By the key of the run that it was made for.
    noises_of : dict of str to list of float
        The noise multipliers of the answers that a run got, by the key of the run that its plan was made for.
    size : int
        Length in bytes, up to the last whole line.
    """

    name: str
    budget: Budget
    origins: dict[str, str] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    noises: list[float] = field(default_factory=list)
    noises_of: dict[str, list[float]] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    size: int = 0


def create_ledger(path: Path, budget: Budget) -> None:
    """Make a ledger with a whole budget.

    Raises
    ------
    LedgerError
        If the file is there already.
    OSError
        If it cannot be written.
    """
    line, _ = _line("", _content({"name": secrets.token_hex(8), "budget": asdict(budget)}))
    _place(path, line)


def copy_ledger(earlier: Path, path: Path) -> None:
    """Make a ledger that goes on where an earlier one is; raises as `create_ledger`."""
    _place(path, earlier.read_bytes())


def _place(path: Path, content: bytes) -> None:
    """Make a file with a ledger's content, which is on the disk when this returns."""
    private_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(16)}")
    try:
        with temporary.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # Unlike a renaming, it never replaces a ledger.
    except FileExistsError:
        raise LedgerError(
            f"{path} is there already; allowed: another name, or move the old ledger away first"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


class PrivacyLedger:
    """A node's ledger. Several processes may use it at once.

    Parameters
    ----------
    path : Path
        The file.
    heads : Path, optional
        Folder of the heads of ledgers, elsewhere than the ledger. Who only reads needs none.
    """

    def __init__(self, path: Path, heads: Path | None = None) -> None:
        self.path, self.heads = path.expanduser(), heads.expanduser() if heads else None

    def statement(self) -> Statement:
        """Return what the ledger tells, and change nothing; raises `LedgerError` if it cannot be used."""
        with self._open(reads_only=True) as (pages, _):
            return Statement(pages.budget, tuple(pages.noises), tuple(pages.origins))

    def plan(self, run_key: str, ancestors: Sequence[str], rounds: int) -> tuple[str, Plan]:
        """Return the plan of a run; make one if it has none.

        The first runs, as many as the budget is for, get an equal part of it each, which no other run can spend. Later
        ones get all that the earlier ones have left unspent.

        Parameters
        ----------
        run_key : str
            Key of the run.
        ancestors : sequence of str
            Keys of the runs that it continues, oldest first. It goes on with the plan of the newest one that has any.
        rounds : int
            Number of rounds of the whole run.

        Returns
        -------
        tuple
            Key of the run that the plan was made for, and the plan.

        Raises
        ------
        LedgerError
            If the ledger cannot be used.
        SpentError
            If what remains is not worth a run, or if there were `MOST_RUNS` runs for each run of the budget.
        """
        with self._open() as (pages, write):
            if run_key not in pages.origins:
                if len(pages.origins) >= MOST_RUNS * pages.budget.runs:
                    raise SpentError(f"the node refused: its privacy ledger has {len(pages.origins)} runs already")
                # It gets a line even with an earlier run's plan: a run names its ancestors in its first message alone.
                begun = (pages.origins[key] for key in reversed(ancestors) if key in pages.origins)
                origin = next(begun, run_key)
                plan = pages.plans.get(origin) or _new_plan(pages, rounds)
                write({"run": run_key, "origin": origin, **asdict(plan)})
            origin = pages.origins[run_key]
            return origin, pages.plans[origin]

    def answer(
        self, question: str, values_N: NDArray[np.int64], sensitivity: float, noise: float, origin: str = ""
    ) -> Answer:
        """Add noise to an answer and write it down, or return the answer that the question got before.

        Parameters
        ----------
        question : str
            All that the values depend on besides the private data, or a hash of it.
        values_N : numpy.ndarray
            int64; the exact answer.
        sensitivity : float
            How much one example can change it (L2 norm).
        noise : float
            Noise multiplier.
        origin : str
            The run that asks, as `plan` returns it; it gets no more than its plan allows. Empty: no run.

        Raises
        ------
        LedgerError
            If the ledger cannot be used.
        SpentError
            If the budget, or the run's part of it, does not allow the answer.
        """
        with self._open() as (pages, write):
            if question not in pages.answers:
                allowed = most_precision(pages.budget.epsilon, pages.budget.delta) * (1 + _SLACK)
                if precision_of([*pages.noises, noise]) > allowed:
                    raise _spent(pages)
                spent = precision_of([*pages.noises_of.get(origin, []), noise])
                if origin and spent > pages.plans[origin].precision * (1 + _SLACK):
                    raise _spent(pages, "this run's part of ")
                noisy_N = with_noise(values_N, noise * sensitivity)
                write({"question": question, "noise": noise, "answer": noisy_N.tolist(), "origin": origin})
            return pages.answers[question]

    @contextmanager
    def _open(self, reads_only: bool = False) -> Iterator[tuple[_Pages, Any]]:
        """Yield the content of the locked ledger, and a function that adds an entry to both."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY if reads_only else os.O_RDWR | os.O_APPEND)
        except OSError as error:
            raise LedgerError(f"privacy ledger {self.path} cannot be opened ({error.strerror}); {_NEW}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if reads_only else fcntl.LOCK_EX)
            pages = _read(self.path, descriptor)
            if not self._has_newest_head(pages) and not reads_only:
                os.fsync(descriptor)  # A killed process may have written the newest line, and no more.
                self._write_head(pages)
            yield pages, lambda entry: self._write(descriptor, pages, entry)
        finally:
            os.close(descriptor)  # This also gives the lock back.

    def _has_newest_head(self, pages: _Pages) -> bool:
        """Check that the ledger has all lines that the head tells of; return whether it has no more."""
        if self.heads is None:
            return True
        path = _head_of(pages, self.heads)
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
            lines, holds = head["lines"], pages.checks[head["lines"] - 1] == head["check"]
        except FileNotFoundError:
            return False
        except OSError as error:
            raise LedgerError(
                f"{path}, the head of privacy ledger {self.path}, cannot be read ({error.strerror})"
            ) from None
        except (ValueError, LookupError, TypeError):  # It is damaged, or tells of lines that are not there.
            holds = False
        if not holds:
            raise LedgerError(f"privacy ledger {self.path} is older than the answers that {path} knows of; {_NEW}")
        return bool(lines == len(pages.checks))

    def _write_head(self, pages: _Pages) -> None:
        if self.heads is None:
            return
        private_folder(self.heads)
        head = {"lines": len(pages.checks), "check": pages.checks[-1]}
        write_text(_head_of(pages, self.heads), json.dumps(head) + "\n")

    def _write(self, descriptor: int, pages: _Pages, entry: dict[str, Any]) -> None:
        """Add an entry; when this returns, it is on the disk."""
        line, check = _line(pages.checks[-1], _content(entry))
        if pages.size + len(line) > MOST_BYTES:
            raise SpentError("the node refused: its privacy ledger is full")
        os.ftruncate(descriptor, pages.size)  # Without the line that a killed process was writing.
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
        os.fsync(descriptor)
        _add(pages, entry, check, len(line))
        self._write_head(pages)


_NEW = "nothing is answered until there is a new one, from `fedmmkt budget new`"


def _new_plan(pages: _Pages, rounds: int) -> Plan:
    unspent = _unspent(pages.budget, pages.noises)
    share = min(unspent, _equal_share(pages.budget)) if len(pages.plans) < pages.budget.runs else unspent
    if share < _least(pages.budget):
        raise _spent(pages)
    return plan_of(share, rounds)


def _unspent(budget: Budget, noises: Iterable[float]) -> float:
    return most_precision(budget.epsilon, budget.delta) - precision_of(noises)


def _equal_share(budget: Budget) -> float:
    return most_precision(budget.epsilon, budget.delta) / budget.runs


def _least(budget: Budget) -> float:
    """Return the precision below which what remains is not worth a run."""
    return LEAST_SHARE * _equal_share(budget)


def _spent(pages: _Pages, part: str = "") -> SpentError:
    return SpentError(f"the node refused: {part}its privacy budget of epsilon {pages.budget.epsilon:g} is spent")


def _head_of(pages: _Pages, heads: Path) -> Path:
    return heads / f"{pages.name}.json"


def _content(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True).encode()


def _line(before: str, content: bytes) -> tuple[bytes, str]:
    """Return the line of an entry's content, and its checksum."""
    check = hashlib.sha256(before.encode() + content).hexdigest()
    return b'{"check": "%b", "entry": %b}\n' % (check.encode(), content), check


_CONTENT = slice(len(_line("", b"")[0]) - len(b"}\n"), -len(b"}\n"))  # Where a line has it.


def _read(path: Path, descriptor: int) -> _Pages:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # A killed process was writing it.
    pages, is_whole = None, True
    try:
        for line in lines:
            content = line[_CONTENT]
            expected, check = _line(pages.checks[-1] if pages else "", content)
            if line != expected:
                raise ValueError("its checksum is wrong")
            entry = json.loads(content)
            pages = pages or _Pages(entry["name"], Budget(**entry["budget"]))
            _add(pages, entry, check, len(line))
    except (ValueError, LookupError, TypeError):
        is_whole = False
    if pages is None or not is_whole:
        number = len(pages.checks) + 1 if pages else 1
        raise LedgerError(f"privacy ledger {path}, line {number}, is damaged, or is none; {_NEW}")
    return pages


def _add(pages: _Pages, entry: dict[str, Any], check: str, size: int) -> None:
    if "run" in entry:
        pages.origins[entry["run"]] = entry["origin"]
        pages.plans[entry["origin"]] = Plan(entry["counts"], entry["votes"])
    elif "question" in entry:
        pages.noises.append(entry["noise"])
        pages.noises_of.setdefault(entry["origin"], []).append(entry["noise"])
        pages.answers[entry["question"]] = Answer(np.array(entry["answer"], dtype=np.int64), entry["noise"])
    pages.checks.append(check)
    pages.size += size


def _sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a power cut cannot lose a file that was made in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
