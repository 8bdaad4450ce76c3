"""Image, text and image+text clients on real pairs, and what alignment across modalities gives.

``python -m benchmarks.emoji --start DIR``, where ``DIR`` is what ``python -m starter.public`` made of a dataset with
images, texts and labels. Prompts are the public texts without their classes: what a prompt means, only the
clients' word says. Prints a table over seeds, and paired tests of what each part gives. A finished run is kept in the
output folder and not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from scipy import stats
from torch.nn import functional as F

from benchmarks.rows import MEMORY, Lines, Overrides, row_folder, run_once, spread
from common.config import DataConfig, T2IConfig
from common.dataset_files import read_dataset
from common.datasets import load_splits, to_examples
from common.payloads import SoftTargets, SyntheticBatch
from server_app.evaluation import Judge
from server_app.exchange import Answer
from server_app.generator import Generator
from server_app.strategy import FedMMKT

NODES = 6
SETTINGS: Overrides = {
    "client.models": "cnn,text,dual,resnet,text-transformer,cnn",
    "client.distillation-steps": 100,
    "t2i.samples-per-round": 200,
    "client.alignment-weight": 0.0,
    "data.alpha": 0.5,
    "judge": False,
    "checkpoints-kept": 0,
    "t2i.adaptation-steps": 40,
}
LOCAL, WITHIN, ACROSS = "local-only", "soft targets within modalities", "soft targets across modalities"
CONFIDENCE, LOSS = "the same, samples by confidence alone", "the same, with the alignment loss"
FEW = "soft targets across modalities, of as few clients"
WHOLE, CONTRAST = "the same, the T2I adapted", "the same, the T2I adapted by contrast"
FROZEN: Overrides = {"t2i.scores": "none"}
ROWS: dict[str, Overrides] = {
    LOCAL: FROZEN | {"client.distillation-weight": 0.0, "t2i.samples-per-round": 20},
    WITHIN: FROZEN,
    FEW: FROZEN,
    ACROSS: FROZEN,
    CONFIDENCE: FROZEN | {"t2i.agreement": "confidence"},
    LOSS: FROZEN | {"client.alignment-weight": 0.1},
    WHOLE: {},
    CONTRAST: {"t2i.scores": "consensus", "t2i.update": "negative-aware"},
}
PAIRS = (
    (ACROSS, WITHIN),
    (FEW, WITHIN),
    (ACROSS, FEW),
    (ACROSS, CONFIDENCE),
    (LOSS, ACROSS),
    (WHOLE, ACROSS),
    (CONTRAST, ACROSS),
    (CONTRAST, WHOLE),
    (ACROSS, LOCAL),
)


class WithinModalities(FedMMKT):
    """The control without transfer across modalities: what text clients answer reaches text clients alone.

    Those that see images get what image clients say. That of image+text clients, who read the prompts too, reaches
    nobody.
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.own: dict[tuple[str, bool], SoftTargets] = {}

    def _learn(self, server_round: int, answers: list[Answer]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        learned = super()._learn(server_round, answers)
        if self.samples is not None:
            for sees_images, modality in ((True, "image"), (False, "text")):
                own = [answer for answer in answers if answer.report.modality == modality]
                others = [a for a in answers if a.report.modality not in (modality, "image+text")]
                probabilities_NC = self.aggregate_logits(self.voices(own, others), self.samples.prompted_N)
                targets = self._soft_targets(self.samples, probabilities_NC, None)
                self.own[self.samples.batch.batch_id, sees_images] = targets
        return learned

    def voices(self, own: list[Answer], others: list[Answer]) -> list[Answer]:
        """Choose the answers of which a modality is told, from its own and the other's."""
        return own

    def _due(self, node_id: int) -> tuple[tuple[SyntheticBatch, ...], tuple[SoftTargets, ...]]:
        batches, targets = super()._due(node_id)
        return batches, tuple(self.own[one.batch_id, self._sees_images(node_id)] for one in targets)


class AsFewAcross(WithinModalities):
    """The control of equally many voices: each modality is told of as many clients, the greater half of the other's."""

    def voices(self, own: list[Answer], others: list[Answer]) -> list[Answer]:
        """Put the other's in the place of its own."""
        kept = len(own) // 2
        return own[:kept] + others[: len(own) - kept]


STRATEGIES = {WITHIN: WithinModalities, FEW: AsFewAcross}
GUIDANCE = 1.25  # of the images that are measured
COLUMNS = (
    "all clients",
    "image",
    "text",
    "image+text",
    "own image",
    "alignment",
    "Frechet",
    "MB down",
    "MB up",
    "server MB",
    "client MB",
)
DECIMALS = {"Frechet": 0, "MB down": 2, "MB up": 2, "server MB": 0, "client MB": 0}
TESTED = COLUMNS[:7]  # Columns of the paired tests.
Measures = dict[str, float | None]


@dataclass(frozen=True)
class Pairs:
    """How well a T2I's images go with their prompts, the public texts.

    Attributes
    ----------
    own : float
        Part of the images to which, of all public images, that of the same text is nearest (judge's features).
    alignment : float
        Part of the images in which the judge sees the class of the text.
    frechet : float
        Frechet distance to the real test images.
    """

    own: float
    alignment: float
    frechet: float


class PairJudge:
    """A judge of images of the public texts, trained on all real images; it measures only.

    Parameters
    ----------
    start : Path
        Folder that ``starter.public`` made.
    """

    def __init__(self, start: Path) -> None:
        cost = json.loads((start / "cost.json").read_text())
        config = DataConfig(
            dataset=str(start / "data"),
            image_column=cost["image_column"],
            label_column=cost["label_column"],
            image_size=cost["image_size"],
        )
        splits = load_splits(config, seed=0)
        seen = read_dataset(config.model_copy(update={"dataset": str(start / "public")}))["train"]
        train, test, public = (_real(part, config) for part in (splits.train, splits.test, seen))
        lines = [json.loads(line) for line in (start / "prompts.jsonl").read_text().splitlines()]
        self.prompts = [line["prompt"] for line in lines]
        self.labels_N = np.array([splits.classes.index(line["class"]) for line in lines])
        row = {text: index for index, text in enumerate(seen[cost["caption_column"]][:])}
        self.public_NHWC = public[0][[row[prompt] for prompt in self.prompts]]
        images_NHWC, labels_N = (np.concatenate(pair) for pair in zip(train, public, strict=True))
        self.judge = Judge(images_NHWC, labels_N, *test, len(splits.classes), seed=0)

    def measure(self, generator: Generator, guidance: float) -> Pairs:
        """Generate an image of each public text, with fixed seeds, and measure the pairs."""
        made = generator.generate(self.prompts, range(len(self.prompts)), guidance).images_NHWC
        features_NF, real_NF = (self.judge.embed(images_NHWC) for images_NHWC in (made, self.public_NHWC))
        centre_F = real_NF.mean(0)
        near_NN = F.normalize(features_NF - centre_F, dim=1) @ F.normalize(real_NF - centre_F, dim=1).T
        own = float((near_NN.argmax(1) == torch.arange(len(near_NN))).double().mean())
        measures = self.judge.measure(made, self.labels_N)
        return Pairs(own, measures.alignment or 0.0, measures.frechet)


def _real(part: Any, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Read images and labels."""
    examples = to_examples(part, config, images=True, texts=False)
    if examples.images_NHWC is None:
        raise ValueError("pairs have images")
    return examples.images_NHWC, examples.labels_N


def run_row(
    name: str, seed: int, rounds: int, alpha: float, start: Path, out: Path, extra: Overrides | None = None
) -> Lines:
    """Run one row with one seed, unless it is there; return its lines of metrics."""
    changes: Overrides = {
        "rounds": rounds,
        "seed": seed,
        "data.dataset": str(start / "data"),
        "data.alpha": alpha,
        "t2i.model": str(start / "model"),
        "t2i.prompts": str(out / "prompts.jsonl"),
    }
    overrides = SETTINGS | changes | ROWS[name] | (extra or {})
    return run_once(row_folder(out, name, seed), overrides, NODES, STRATEGIES.get(name, FedMMKT))


def measured_pairs(name: str, seed: int, start: Path, out: Path, judge: PairJudge) -> Pairs:
    """Measure the T2I that a run left, unless that is kept; the one that it began with for a row that never adapts."""
    frozen = ROWS[name].get("t2i.scores") == "none"
    folder = out if frozen else row_folder(out, name, seed)
    kept = folder / "pairs.json"
    if not kept.exists():
        generator = Generator(T2IConfig(model=str(start / "model")), seed=0)
        if not frozen:
            generator.adapter.load(folder / "run" / "lora")
        kept.write_text(json.dumps(asdict(judge.measure(generator, GUIDANCE))))
    return Pairs(**json.loads(kept.read_text()))


def measures(lines: Lines, pairs: Pairs) -> Measures:
    """Collect what the tables show of one run."""
    clients = lines[-1]["clients"]
    values: Measures = {"all clients": clients["accuracy"]}
    values |= {name: clients["by_modality"].get(name) for name in ("image", "text", "image+text")}
    values |= {column.title: column.value(lines) for column in MEMORY}
    values |= {"own image": pairs.own, "alignment": pairs.alignment, "Frechet": pairs.frechet}
    return values | {f"MB {way}": sum(line["bytes"][way] for line in lines) / 1e6 for way in ("down", "up")}


def table(rows: dict[str, list[Measures]]) -> str:
    """Make a Markdown table, a row a method, mean and standard deviation over seeds."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, seeds in rows.items():
        cells = [spread([one[column] for one in seeds], DECIMALS.get(column, 3)) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paired_tests(rows: dict[str, list[Measures]]) -> str:
    """Compare rows seed by seed: mean difference, seeds that agree with its sign, and p of a paired t-test."""
    lines = [f"| difference | {' | '.join(TESTED)} |", "|---" * (len(TESTED) + 1) + "|"]
    for one, other in PAIRS:
        if one not in rows or other not in rows or len(rows[one]) < 2:
            continue
        cells = []
        for column in TESTED:
            pairs = [(a.get(column), b.get(column)) for a, b in zip(rows[one], rows[other], strict=True)]
            differences = np.array([a - b for a, b in pairs if a is not None and b is not None])
            if not differences.any():
                cells.append("0")
                continue
            mean = differences.mean()
            alike = int((np.sign(differences) == np.sign(mean)).sum())
            p = stats.ttest_1samp(differences, 0).pvalue
            cells.append(f"{mean:+.{DECIMALS.get(column, 3)}f} ({alike}/{len(differences)}, p = {p:.2g})")
        lines.append(f"| {one} - {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run what is missing, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji", description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="folder that `python -m starter.public` made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/emoji"))
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    start, out = arguments.start.resolve(), (arguments.out / f"alpha-{arguments.alpha:g}").resolve()
    for needed in ("model", "data", "public", "prompts.jsonl"):
        if not (start / needed).exists():
            parser.error(f"--start is {str(start)!r}, which has no {needed}; make it with python -m starter.public")
    out.mkdir(parents=True, exist_ok=True)
    judge = PairJudge(start)
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in judge.prompts))
    rows: dict[str, list[Measures]] = {name: [] for name in arguments.rows}
    began = time.perf_counter()
    for seed in arguments.seeds:
        for name in arguments.rows:
            lines = run_row(name, seed, arguments.rounds, arguments.alpha, start, out)
            pairs = measured_pairs(name, seed, start, out, judge)
            rows[name].append(measures(lines, pairs))
            print(
                f"seed {seed} {name}: {rows[name][-1]} ({time.perf_counter() - began:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
    print(f"\n### alpha {arguments.alpha:g}, {len(arguments.seeds)} seeds, {arguments.rounds} rounds\n\n{table(rows)}")
    print(f"\n{paired_tests(rows)}")


if __name__ == "__main__":
    main()
