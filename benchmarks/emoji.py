"""Image, text and image+text clients on real pairs, and the gain of transfer across modalities.

Run ``python -m benchmarks.emoji --start DIR``. ``DIR`` is the output of ``fedmmkt pretrain`` for a dataset with images,
texts and labels. The prompts are the public texts without their classes, so only the clients' answers say what a prompt
means. The benchmark prints a table over seeds, and paired tests of the parts of the method. Finished runs are kept in
the output folder and not repeated.
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
from scipy import stats
from torch.nn import functional as F

from benchmarks.rows import MEMORY, Lines, Overrides, row_folder, run_once, spread
from fedmmkt.common.config import DataConfig, T2IConfig
from fedmmkt.common.dataset_files import read_dataset
from fedmmkt.common.datasets import load_splits, to_examples
from fedmmkt.common.payloads import ClientReport
from fedmmkt.server_app.exchange import Answer
from fedmmkt.server_app.record.judge import Judge
from fedmmkt.server_app.strategy import FedMMKT
from fedmmkt.server_app.t2i.generator import Generator

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
# Sample weights use only confidence, so that no information from text clients reaches image clients.
CONTROL = FROZEN | {"t2i.agreement": "confidence"}
ROWS: dict[str, Overrides] = {
    LOCAL: FROZEN | {"client.distillation-weight": 0.0, "t2i.samples-per-round": 20},
    WITHIN: CONTROL | {"strategy": "benchmarks.emoji:WithinModalities"},
    FEW: CONTROL | {"strategy": "benchmarks.emoji:AsFewAcross"},
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
    """Control without transfer across modalities: text clients learn only from text clients.

    All other clients learn only from image clients. Nobody learns from image+text clients, because these read the
    prompts as well.
    """

    def teachers(self, client: ClientReport, answers: list[Answer]) -> list[Answer]:
        """Choose the answers of the client's own kind, image or text."""
        own, _ = by_kind(client, answers)
        return own


class AsFewAcross(FedMMKT):
    """Control with the same number of teachers as `WithinModalities`, but across modalities.

    Half of the answers of the client's own kind (rounded up) are replaced by answers of the other kind.
    """

    def teachers(self, client: ClientReport, answers: list[Answer]) -> list[Answer]:
        """Replace answers of the client's own kind by answers of the other kind."""
        own, others = by_kind(client, answers)
        kept = len(own) // 2
        return own[:kept] + others[: len(own) - kept]


def by_kind(client: ClientReport, answers: list[Answer]) -> tuple[list[Answer], list[Answer]]:
    """Return the answers of the client's own kind (image or text), and those of the other kind."""
    own = "text" if client.modality == "text" else "image"
    kinds = (own, "image" if own == "text" else "text")
    of_own, of_other = ([answer for answer in answers if answer.report.modality == kind] for kind in kinds)
    return of_own, of_other


GUIDANCE = 1.25  # guidance scale of the measured images
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
    """How well the images of a T2I fit their prompts, the public texts.

    Attributes
    ----------
    own : float
        Fraction of the images whose nearest public image, in the judge's features, is that of the same text.
    alignment : float
        Fraction of the images in which the judge recognises the class of the text.
    frechet : float
        Frechet distance to the real test images.
    """

    own: float
    alignment: float
    frechet: float


class PairJudge:
    """A judge for generated images of the public texts, trained on all real images; it only measures.

    Parameters
    ----------
    start : Path
        Output folder of ``starter.public``.
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
        """Generate one image per public text, with fixed seeds, and measure the pairs."""
        made = generator.generate(self.prompts, range(len(self.prompts)), guidance).images_NHWC
        features_NF, real_NF = (self.judge.embed(images_NHWC) for images_NHWC in (made, self.public_NHWC))
        centre_F = real_NF.mean(0)
        near_NN = F.normalize(features_NF - centre_F, dim=1) @ F.normalize(real_NF - centre_F, dim=1).T
        own = float((near_NN.argmax(1) == torch.arange(len(near_NN))).double().mean())
        measures = self.judge.measure(made, self.labels_N)
        return Pairs(own, measures.alignment or 0.0, measures.frechet or 0.0)


def _real(part: Any, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Read images and labels."""
    examples = to_examples(part, config, images=True, texts=False)
    if examples.images_NHWC is None:
        raise ValueError("pairs have images")
    return examples.images_NHWC, examples.labels_N


def run_row(
    name: str, seed: int, rounds: int, alpha: float, start: Path, out: Path, extra: Overrides | None = None
) -> Lines:
    """Run one row with one seed unless the run is kept; return its lines of metrics."""
    changes: Overrides = {
        "rounds": rounds,
        "seed": seed,
        "data.dataset": str(start / "data"),
        "data.alpha": alpha,
        "t2i.model": str(start / "model"),
        "t2i.prompts": str(out / "prompts.jsonl"),
    }
    overrides = SETTINGS | changes | ROWS[name] | (extra or {})
    return run_once(row_folder(out, name, seed), overrides, NODES)


def measured_pairs(name: str, seed: int, start: Path, out: Path, judge: PairJudge) -> Pairs:
    """Measure the T2I at the end of a run, unless the result is kept.

    Rows with a frozen T2I share one measurement of the T2I at the start.
    """
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
    """Return the values of one run that the tables show."""
    clients = lines[-1]["clients"]
    values: Measures = {"all clients": clients["accuracy"]}
    values |= {name: clients["by_modality"].get(name) for name in ("image", "text", "image+text")}
    values |= {column.title: column.value(lines) for column in MEMORY}
    values |= {"own image": pairs.own, "alignment": pairs.alignment, "Frechet": pairs.frechet}
    return values | {f"MB {way}": sum(line["bytes"][way] for line in lines) / 1e6 for way in ("down", "up")}


def table(rows: dict[str, list[Measures]]) -> str:
    """Make a Markdown table with one row per method: means and standard deviations over seeds."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, seeds in rows.items():
        cells = [spread([one[column] for one in seeds], DECIMALS.get(column, 3)) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paired_tests(rows: dict[str, list[Measures]]) -> str:
    """Compare rows seed by seed: mean difference, number of seeds with its sign, and p of a paired t-test."""
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
            same_sign = int((np.sign(differences) == np.sign(mean)).sum())
            p = stats.ttest_1samp(differences, 0).pvalue
            cells.append(f"{mean:+.{DECIMALS.get(column, 3)}f} ({same_sign}/{len(differences)}, p = {p:.2g})")
        lines.append(f"| {one} - {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, do the missing runs, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji", description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="output folder of `fedmmkt pretrain`")
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
            parser.error(f"--start is {str(start)!r}, which has no {needed}; make it with fedmmkt pretrain")
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
