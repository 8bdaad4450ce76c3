"""What it saves that server and clients work at the same time: ``python -m benchmarks.ahead``.

The T2I is the starter. Clients stand for other machines: where they learn they wait, as long as the T2I worked in the
last round that was recorded, and learn next to nothing. The same run is made one after the other, with
``t2i.generate-ahead``, with ``learn-early``, which changes no result, and with both. A
round's wall clock is given as a fraction of the sum of both, the work of the T2I (generation, update, measuring) and
the clients' wait, as measured in the same round; so it says little of how busy the machine is.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from fedmmkt.client_app.app import app
from fedmmkt.common.config import RunConfig, Setting, to_flower
from fedmmkt.common.payloads import Request
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.record.run_folder import RunFolder

NODES, WAITS = 2, "waits.txt"
WAYS = {
    "one after the other": (),
    "learn-early": ("learn-early",),
    "t2i.generate-ahead": ("t2i.generate-ahead",),
    "both": ("learn-early", "t2i.generate-ahead"),
}
TINY: dict[str, Setting] = {
    "client.models": "mlp",
    "client.warmup-epochs": 0,
    "client.local-epochs": 0,
    "client.distillation-steps": 1,
    "local-only-control": False,
    "judge": False,
    "tracker": "",
    "checkpoints-kept": 1,
    "learn-early": False,  # But for the ways that name it.
}


def waiting_app(message: Message, context: Context) -> Message:
    """Answer as the app's clients do, after as many seconds as the T2I worked in the last recorded round."""
    is_early, kind = bool(context.run_config["learn-early"]), message.metadata.message_type
    if kind == "train.early" or (kind == "train" and (not is_early or _round_of(message) == 1)):
        folder = RunFolder(Path(str(context.run_config["output-dir"])))
        recorded = folder.read_metrics()
        wait = t2i_seconds(recorded[-1]) if recorded else 0.0
        time.sleep(wait)
        if context.node_config["partition-id"] == 0:
            with (folder.path / WAITS).open("a", encoding="utf-8") as file:
                file.write(f"{wait}\n")
    return app(message, context)


def _round_of(message: Message) -> int:
    return Request.from_content(message.content).instructions.round


def t2i_seconds(line: dict[str, Any]) -> float:
    """Return how long the T2I worked, in a round and beside the exchange that followed it or was part of it."""
    return sum(line["seconds"][stage] for stage in ("generate", "adapt")) + sum(
        end - start for name, start, end in line["seconds"]["timeline"]["beside"] if name in ("generate", "measure")
    )


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


def measure(settings: dict[str, Setting]) -> list[Round]:
    """Run once; return the rounds from the third on, but for the last."""
    with tempfile.TemporaryDirectory() as name:
        own: dict[str, Setting] = {"output-dir": f"{name}/run", "client.state-dir": f"{name}/clients"}
        own |= {"min-available-nodes": NODES}
        run_config = to_flower(RunConfig()) | TINY | settings | own
        node_configs: list[Any] = [{"partition-id": node, "num-partitions": NODES} for node in range(NODES)]
        grid = InProcessGrid("benchmarks.ahead:waiting_app", run_config, node_configs, workers=NODES)
        strategy = build_strategy(RunConfig.from_flower(run_config), time.time_ns() % 2**31)
        strategy.start(grid)
        grid.close()
        folder = strategy.recorder.run_folder
        waits = [float(wait) for wait in (folder.path / WAITS).read_text(encoding="utf-8").split()]
        return rounds_of(folder.read_metrics(), waits)


def rounds_of(lines: list[dict[str, Any]], waits: list[float]) -> list[Round]:
    """Return the seconds of the rounds from the third on, but for the last.

    Before, clients waited for what the T2I did in round 0 and 1, which have no update or nothing made ahead.
    """
    beside = [span for line in lines for span in line["seconds"]["timeline"]["beside"]]
    starts = [span[1] for line in lines for span in line["seconds"]["timeline"]["server"] if span[0] == "total"]
    rounds = []
    for line, wait, (start, end) in list(zip(lines[1:], waits, pairwise(starts[1:]), strict=False))[2:]:
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
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds of each run; the first two and the last do not count"
    )
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--adaptation-steps", type=int, nargs="+", default=[4, 40], help="one row each")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    print("| update of | clients s | T2I s | of it beside them | round s | round / (clients + T2I) |")
    print("|---" * 6 + "|", flush=True)
    for steps in options.adaptation_steps:
        settings: dict[str, Setting] = {"rounds": options.rounds, "t2i.samples-per-round": options.samples}
        settings |= {"t2i.adaptation-steps": steps}
        for name, keys in WAYS.items():
            print(row(f"{steps} steps, {name}", measure(settings | dict.fromkeys(keys, True))), flush=True)


if __name__ == "__main__":
    main()
