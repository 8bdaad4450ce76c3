"""The privacy budget of a node: make its ledger, or show what is spent.

``fedmmkt budget new FILE --epsilon 8`` makes a ledger; the node-config key ``privacy-ledger=FILE`` uses it. Then all
that leaves the node has noise, and all its answers together are differentially private with this epsilon.
``fedmmkt budget show FILE`` shows what they have spent so far. One ledger belongs to one dataset.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedmmkt.client_app.privacy.ledger import PrivacyLedger, create_ledger
from fedmmkt.common.config import ConfigError
from fedmmkt.common.privacy import DEFAULT_DELTA, LARGEST_EPSILON, UNIT, Budget


def describe(path: Path) -> str:
    """Describe a ledger: its budget, what is spent, and the runs.

    Raises
    ------
    ConfigError
        If it cannot be used.
    """
    told = PrivacyLedger(path).statement()
    budget = told.budget
    return (
        f"budget   epsilon {budget.epsilon:g} at delta {budget.delta:g}, for {budget.runs} run(s); per {UNIT}\n"
        f"spent    epsilon {told.epsilon:.3f}, by {len(told.noises)} answer(s)\n"
        f"runs     {', '.join(told.runs) or 'none'}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Make or show a ledger; return the exit code."""
    parser = argparse.ArgumentParser(prog="fedmmkt budget", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a ledger with a whole budget")
    show = commands.add_parser("show", help="show what is spent")
    for command in (new, show):
        command.add_argument("ledger", type=Path, help="the file")
    new.add_argument("--epsilon", type=float, required=True, help="for all answers together; smaller is more private")
    new.add_argument(
        "--delta", type=float, default=DEFAULT_DELTA, help="below 1 / number of examples (default: %(default)s)"
    )
    new.add_argument("--runs", type=int, default=1, help="number of runs to divide it among (default: 1)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "new":
            _create(options.ledger, options.epsilon, options.delta, options.runs)
        print(describe(options.ledger))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _create(path: Path, epsilon: float, delta: float, runs: int) -> None:
    for name, value, allowed, holds in (
        ("epsilon", epsilon, f"above 0, up to {LARGEST_EPSILON:g}", 0 < epsilon <= LARGEST_EPSILON),
        ("delta", delta, "above 0, below 1", 0 < delta < 1),
        ("runs", runs, "1 or more", runs >= 1),
    ):
        if not holds:
            raise ConfigError(f"--{name} is {value:g}; allowed: {allowed}")
    try:
        create_ledger(path.expanduser(), Budget(epsilon, delta, runs))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
