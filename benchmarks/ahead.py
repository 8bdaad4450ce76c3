"""What generation ahead saves: ``python -m benchmarks.ahead``.

The T2I is the starter. Clients stand for other machines: they wait in their handler, as long as the T2I works in a
round, and learn next to nothing. The same run is made with and without ``t2i.generate-ahead``. A round's wall clock is
given as a fraction of the sum of both, the work of the T2I (generation, update, measuring) and the clients' wait, as
measured in the same round; so it says little of how busy the machine is.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flwr.app import Context, Message

from fedmmkt.client_app.app import app
from fedmmkt.common.config import RunConfig, Setting, to_flower
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app.app import build_strategy

NODES = 2
TINY: dict[str, Setting] = {
    "client.models": "mlp",
    "client.warmup-epochs": 0,
    "client.local-epochs": 0,
    "client.distillation-steps": 1,
    "local-only-control": False,
    "judge": False,
    "tracker": "",
    "checkpoints-kept": 1,
}


def waiting_app(message: Message, context: Context) -> Message:
    """Answer as the app's clients do, after ``extra.wait`` seconds."""
    if message.metadata.message_type == "train":
        time.sleep(float(context.run_config["extra.wait"]))
    return app(message, context)


@dataclass(frozen=True)
class Round:
    """Seconds of a round: its wall clock, the T2I's work in it, that of it beside the clients, and the clients'."""

    wall: float
    t2i: float
    beside: float
    clients: float

    @property
    def ratio(self) -> float:
        """The wall clock as a fraction of the sum of both sides' work."""
        return self.wall / (self.t2i + self.clients)


def measure(settings: dict[str, Setting], wait: float, ahead: bool) -> list[Round]:
    """Run once; return the rounds but for the first, which has nothing made ahead, and the last."""
    with tempfile.TemporaryDirectory() as folder:
        own: dict[str, Setting] = {"extra.wait": wait, "t2i.generate-ahead": ahead, "min-available-nodes": NODES}
        own |= {"output-dir": f"{folder}/run", "client.state-dir": f"{folder}/clients"}
        run_config = to_flower(RunConfig()) | TINY | settings | own
        node_configs: list[Any] = [{"partition-id": node, "num-partitions": NODES} for node in range(NODES)]
        grid = InProcessGrid("benchmarks.ahead:waiting_app", run_config, node_configs, workers=NODES)
        strategy = build_strategy(RunConfig.from_flower(run_config), time.time_ns() % 2**31)
        strategy.start(grid)
        grid.close()
        return rounds_of(strategy.recorder.run_folder.read_metrics(), wait)


def rounds_of(lines: list[dict[str, Any]], wait: float) -> list[Round]:
    """Return the seconds of all rounds but the first, that before it and the last, from their timelines."""
    beside = [span for line in lines for span in line["seconds"]["timeline"]["beside"]]
    starts = [span[1] for line in lines for span in line["seconds"]["timeline"]["server"] if span[0] == "total"]
    rounds = []
    for line, (start, end) in zip(lines[2:], pairwise(starts[2:]), strict=False):
        own = sum(line["seconds"][stage] for stage in ("generate", "adapt"))
        others = sum(
            span[2] - span[1] for span in beside if span[0] in ("generate", "measure") and start <= span[1] < end
        )
        rounds.append(Round(end - start, own + others, others, wait))
    return rounds


def row(name: str, rounds: list[Round]) -> str:
    """Return a row of the table: medians over rounds, and the least and the largest ratio."""
    ratios = sorted(one.ratio for one in rounds)
    medians = [
        statistics.median(getattr(one, field) for one in rounds) for field in ("clients", "t2i", "beside", "wall")
    ]
    seconds = " | ".join(f"{value:.1f}" for value in medians)
    return f"| {name} | {seconds} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"


def main() -> None:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ahead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each run; first and last are not counted")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--adaptation-steps", type=int, nargs="+", default=[4, 40], help="one row each")
    parser.add_argument("--wait", type=float, help="the clients' seconds; by default those that the T2I works")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    print("| update of | clients s | T2I s | of it beside them | round s | round / (clients + T2I) |")
    print("|---" * 6 + "|", flush=True)
    for steps in options.adaptation_steps:
        settings: dict[str, Setting] = {"rounds": options.rounds, "t2i.samples-per-round": options.samples}
        settings |= {"t2i.adaptation-steps": steps}

        wait = options.wait or statistics.median(one.t2i for one in measure(settings | {"rounds": 4}, 0.0, False))
        for ahead in (False, True):
            name = f"{steps} steps, {'ahead' if ahead else 'when the round begins'}"
            print(row(name, measure(settings, wait, ahead)), flush=True)


if __name__ == "__main__":
    main()
