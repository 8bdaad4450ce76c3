"""Pre-train a small T2I model on a public part of a dataset; the rest becomes the clients' data.

``fedmmkt pretrain --dataset /data/birds --public 10000 --out /data/birds-start`` writes

- ``model/``: a Stable Diffusion pipeline, trained only on the public examples, for ``t2i.model``;
- ``data/``: ``train.parquet`` without the public examples, and ``test.parquet``, for ``data.dataset``;
- ``public/train.parquet``: the public examples;
- ``prompts.jsonl``: the public captions with their classes, for ``t2i.prompts``, if a column holds captions;
- ``cost.json``: the settings, and the seconds of training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedmmkt.common.config import ConfigError, DataConfig
from fedmmkt.common.datasets import (
    Examples,
    labels_of,
    load_splits,
    read_texts,
    to_examples,
    with_readable_images,
)
from fedmmkt.common.devices import pick_device
from fedmmkt.common.files import replaced_folder
from fedmmkt.common.tables import ORIGIN, some, write_parquet

if TYPE_CHECKING:
    import datasets

COST = "cost.json"
MOST_COUNTS = 20  # classes whose examples are counted in a line
# Defaults of the options for the model's sizes and the length of its training.
SIZES: dict[str, dict[str, Any]] = {
    "small": {"autoencoder": (16, 32, 48), "unet": (32, 64), "autoencoder_steps": 600, "diffusion_steps": 1_500},
    "medium": {"autoencoder": (32, 64, 96), "unet": (64, 128), "autoencoder_steps": 2_000, "diffusion_steps": 6_000},
}
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "an image of a {}")


@dataclass(frozen=True)
class PublicPart:
    """The public examples of a dataset, and the remaining examples for clients.

    Attributes
    ----------
    public, private, test : datasets.Dataset
        Disjoint rows. ``test`` is the dataset's own test part, or held out.
    classes : tuple of str
        The class names.
    from_test : int
        How many of the public rows were in the test part.
    without_image : int
        How many more rows would be public, but have no image.
    """

    public: datasets.Dataset
    private: datasets.Dataset
    test: datasets.Dataset
    classes: tuple[str, ...]
    from_test: int = 0
    without_image: int = 0


def divide(config: DataConfig, public: int | str, seed: int, private: int = 0, test: int = 0) -> PublicPart:
    """Divide a dataset into public examples and the clients'.

    Parameters
    ----------
    config : DataConfig
        Names the dataset and its columns.
    public : int or str
        How many examples are drawn from the training part, in proportion to the classes; or ``COLUMN=VALUE``: all
        examples with this value are public, those of the test part too.
    seed : int
        Seed of all draws.
    private, test : int
        Numbers of other training examples and of test examples to keep; 0 keeps all.

    Raises
    ------
    ConfigError
        If the dataset cannot be read, or does not have as many examples, or not the column, the value or others.
    """
    splits, from_test = load_splits(config, seed), 0
    train, held = (with_readable_images(part, config) for part in (splits.train, splits.test))
    if isinstance(public, str):
        all_held = len(held)
        chosen, rest, held = _marked(train, held, config, public)
        from_test = all_held - len(held)
    else:
        labels_N = labels_of(train, config)
        if not len(splits.classes) <= public <= len(labels_N) - len(splits.classes):
            raise ConfigError(
                f"--public is {public}; allowed: {len(splits.classes)} (the classes) up to "
                f"{len(labels_N) - len(splits.classes)} ({config.dataset} has {len(labels_N)} training examples)"
            )
        chosen, rest = _drawn(train, config, public, seed)
    kept = _drawn(rest, config, private, seed)[0] if private else rest
    tested = _drawn(held, config, test, seed)[0] if test else held
    shown = _with_images(chosen, config)
    return PublicPart(shown, kept, tested, splits.classes, from_test, len(chosen) - len(shown))


def _with_images(rows: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """Leave out rows without an image, from which the T2I could not learn."""
    import datasets

    if not isinstance(rows.features.get(config.image_column), datasets.Image):
        return rows  # Whatever reads the images says what is wrong.
    encoded = rows.select_columns(config.image_column).cast_column(config.image_column, datasets.Image(decode=False))
    return rows.select([row for row, item in enumerate(encoded[config.image_column]) if item is not None])


def _marked(
    train: datasets.Dataset, test: datasets.Dataset, config: DataConfig, condition: str
) -> tuple[datasets.Dataset, datasets.Dataset, datasets.Dataset]:
    """Return the rows of both parts that a column marks as public, and the other rows of each part."""
    import datasets

    column, _, value = condition.partition("=")
    said = f"--public is {condition!r}"
    if column not in train.column_names or column not in test.column_names:
        columns = ", ".join(name for name in train.column_names if name != ORIGIN)
        raise ConfigError(
            f"{said}, and the dataset has no column {column!r}; allowed: a number, or COLUMN=VALUE with one of "
            f"{columns}"
        )
    values = [[_as_text(part, column, entry) for entry in part[column][:]] for part in (train, test)]
    marked = [[row for row, entry in enumerate(entries) if entry == value] for entries in values]
    others = [[row for row, entry in enumerate(entries) if entry != value] for entries in values]
    if not any(marked) or not all(others):
        held = some(sorted({entry for entries in values for entry in entries}))
        what = "no row has this value" if not any(marked) else "it leaves clients nothing to learn from or to test on"
        raise ConfigError(f"{said}, and {what}; the column's values: {held}")
    parts = (train, test)
    public = datasets.concatenate_datasets([part.select(rows) for part, rows in zip(parts, marked, strict=True)])
    return public, *(part.select(rows) for part, rows in zip(parts, others, strict=True))


def _as_text(part: datasets.Dataset, column: str, entry: Any) -> str:
    """Return an entry as one would type it: the name of a class, `true`, `7`."""
    names = getattr(part.features[column], "names", None)
    if names and isinstance(entry, int) and entry >= 0:
        return str(names[entry])
    return str(entry).lower() if isinstance(entry, bool) else "" if entry is None else str(entry)


def _drawn(
    rows: datasets.Dataset, config: DataConfig, count: int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Draw ``count`` rows, in proportion to the classes if possible; return them and the other rows.

    If there are no more than ``count`` rows, all are returned.
    """
    from sklearn.model_selection import train_test_split

    index_N, labels_N = np.arange(len(rows)), labels_of(rows, config)
    if count >= len(rows):
        return rows, rows.select([])
    counts = np.bincount(labels_N)
    both_have_all = min(count, len(rows) - count) >= len(counts) and counts[counts > 0].min() >= 2
    stratify = labels_N if both_have_all else None
    drawn, others = train_test_split(index_N, train_size=count, stratify=stratify, random_state=seed)
    return rows.select(np.sort(drawn)), rows.select(np.sort(others))


def captions_of(texts: Sequence[str | None], examples: Examples, classes: tuple[str, ...], seed: int) -> list[str]:
    """Return captions of the public examples: their texts, or where one has none, from templates with the class name.

    Parameters
    ----------
    texts : sequence of (str or None)
        A text for each example.
    examples : Examples
        The examples, of which the labels are used.
    """
    rng = np.random.default_rng(seed)
    return [
        text if text and text.strip() else TEMPLATES[rng.integers(len(TEMPLATES))].format(classes[label])
        for text, label in zip(texts, examples.labels_N, strict=True)
    ]


def write_prompts(path: Path, examples: Examples, classes: tuple[str, ...], captions: list[str]) -> None:
    """Write the distinct captions with their classes, in the format of ``t2i.prompts``."""
    lines = dict(zip(captions, (classes[label] for label in examples.labels_N), strict=True))
    path.write_text("".join(json.dumps({"prompt": text, "class": name}) + "\n" for text, name in lines.items()))


def main(command: list[str] | None = None) -> int:
    """Parse the command line, divide the dataset, train, and write all files; return the exit code."""
    # It warns that torchvision is missing, which nobody needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = argparse.ArgumentParser(
        prog="fedmmkt pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="dataset, as in the run-config key data.dataset")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; one that this command wrote is replaced"
    )
    parser.add_argument(
        "--public",
        type=_number_or_condition,
        required=True,
        metavar="N|COLUMN=VALUE",
        help="examples for the T2I: a number, drawn at random; or those with a value in a column, such as split=public",
    )
    parser.add_argument("--private", type=int, default=0, help="training examples for clients; 0: all others")
    parser.add_argument("--test", type=int, default=0, help="test examples; 0: all")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--caption-column", default="", help="column of captions; empty: templates with the class name")
    parser.add_argument("--image-size", type=int, default=32, help="side in pixels, a multiple of eight")
    parser.add_argument(
        "--size",
        choices=tuple(SIZES),
        default="medium",
        help="defaults of the next four options (default: %(default)s); small takes minutes on two cores, medium half "
        "an hour",
    )
    parser.add_argument(
        "--autoencoder", type=int, nargs="+", help=f"channels of its levels ({_of_sizes('autoencoder')})"
    )
    parser.add_argument("--unet", type=int, nargs=2, help=f"channels of its two levels ({_of_sizes('unet')})")
    parser.add_argument("--autoencoder-steps", type=int, help=_of_sizes("autoencoder_steps"))
    parser.add_argument("--diffusion-steps", type=int, help=_of_sizes("diffusion_steps"))
    parser.add_argument("--latent-channels", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24, help="tokens per caption; longer captions are cut")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, or auto (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch on a CPU; 0: as many as torch takes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(command)
    for option, value in SIZES[arguments.size].items():
        if getattr(arguments, option) is None:
            setattr(arguments, option, value)
    try:
        _check(arguments)
        with replaced_folder(arguments.out) as folder:
            cost = make(arguments, folder)
    except (ConfigError, OSError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{cost['seconds']:.0f} s of training; what the model draws: {arguments.out / 'model' / 'samples.png'}")
    print(f"fedmmkt demo --run-config '{run_config_of(arguments)}'")
    return 0


def _of_sizes(option: str) -> str:
    """Return the default of an option for each size, as it is typed."""
    values = {size: defaults[option] for size, defaults in SIZES.items()}
    return ", ".join(f"{size}: {str(value).strip('()').replace(',', '')}" for size, value in values.items())


def _number_or_condition(text: str) -> int | str:
    if text.isdecimal():
        return int(text)
    if text.partition("=")[0] and "=" in text:
        return text
    raise argparse.ArgumentTypeError(f"is {text!r}; allowed: a number, or COLUMN=VALUE such as split=public")


def _told_parts(part: PublicPart, without_caption: int) -> str:
    """Say how many examples each part has, and what the public ones are."""
    notes = {
        f"{part.without_image} more have no image and are left out": part.without_image,
        f"{part.from_test} of them were in the test part": part.from_test,
        f"{without_caption} have no caption, and get one with the name of their class": without_caption,
    }
    told = "; ".join(note for note, count in notes.items() if count)
    return (
        f"{len(part.public)} public examples for the T2I{f' ({told})' if told else ''}; for clients "
        f"{len(part.private)} to learn and {len(part.test)} to test; classes: {some(part.classes)}"
    )


def _told_counts(examples: Examples, classes: tuple[str, ...]) -> str:
    """Say how many examples there are of each class; warn of classes that the T2I would never see."""
    counts = np.bincount(examples.labels_N, minlength=len(classes)).tolist()
    if without := [name for name, count in zip(classes, counts, strict=True) if not count]:
        print(
            f"WARNING: no public example is of the class {some(without)}: the T2I cannot draw it, and what it draws "
            "for its prompts teaches clients something else; take other rows, or leave the class out of the run",
            file=sys.stderr,
            flush=True,
        )
    return some([f"{name} {count}" for name, count in zip(classes, counts, strict=True)], MOST_COUNTS)


def run_config_of(arguments: argparse.Namespace) -> str:
    """Return the settings with which a run uses what was written."""
    out = arguments.out.resolve()
    settings = {
        "data.dataset": out / "data",
        "data.image-column": arguments.image_column,
        "data.label-column": arguments.label_column,
        "data.text-column": arguments.caption_column,
        "t2i.model": out / "model",
        "t2i.prompts": out / "prompts.jsonl" if arguments.caption_column else "",
        "client.models": "" if arguments.caption_column else "cnn,mlp,vit,resnet",  # Others read texts.
    }
    texts = [f'{key}="{value}"' for key, value in settings.items() if str(value)]
    return " ".join([*texts, f"data.image-size={arguments.image_size}"])


class _NamedByOptions(DataConfig):
    """Data that options of the command line name, for error texts."""

    def key(self, field: str) -> str:
        return f"option --{'caption-column' if field == 'text_column' else field.replace('_', '-')}"


def _check(arguments: argparse.Namespace) -> None:
    """Refuse settings that would fail in the midst of training, and to replace a folder of anything else."""
    out = arguments.out
    if out.exists() and not (out / COST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"option --out is {str(out)!r}, which holds something else; allowed: a new or an empty folder, or an "
            "earlier one of this command"
        )
    if arguments.threads < 0:
        raise ConfigError(f"option --threads is {arguments.threads}; allowed: 0 or more")
    for option in ("autoencoder_steps", "diffusion_steps"):
        if (steps := getattr(arguments, option)) < 3:
            raise ConfigError(f"option --{option.replace('_', '-')} is {steps}; allowed: 3 or more")
    multiple = 2 ** len(arguments.autoencoder)  # The autoencoder halves the side once a level but one, the U-Net once.
    if arguments.image_size < multiple or arguments.image_size % multiple:
        raise ConfigError(f"option --image-size is {arguments.image_size}; allowed: a multiple of {multiple}")
    for option in ("autoencoder", "unet"):
        if any(channels < 8 or channels % 8 for channels in getattr(arguments, option)):
            raise ConfigError(f"option --{option} is {getattr(arguments, option)}; allowed: multiples of eight")


def make(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the files of the module's description into ``folder``; return the content of ``cost.json``."""
    from fedmmkt.starter.pretraining import Architecture, build_tokenizer, draw_samples, pretrain, save

    config = _NamedByOptions(
        dataset=arguments.dataset,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        image_size=arguments.image_size,
        text_column=arguments.caption_column or DataConfig().text_column,
    )
    device = pick_device(arguments.device)
    part = divide(config, arguments.public, arguments.seed, arguments.private, arguments.test)
    rows = len(part.public)
    texts = read_texts(part.public, config) if arguments.caption_column else [None] * rows
    print(_told_parts(part, rows - sum(bool(text and text.strip()) for text in texts)), flush=True)
    examples = to_examples(part.public, config, images=True, texts=False)
    print(f"public examples of each class: {_told_counts(examples, part.classes)}", flush=True)
    captions = captions_of(texts, examples, part.classes, arguments.seed)
    for name, rows in (("public/train", part.public), ("data/train", part.private), ("data/test", part.test)):
        (folder / name).parent.mkdir(exist_ok=True)
        write_parquet(rows, folder / f"{name}.parquet")
    if arguments.caption_column:
        write_prompts(folder / "prompts.jsonl", examples, part.classes, captions)
    assert examples.images_NHWC is not None
    images_NCHW = torch.from_numpy(examples.images_NHWC).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    torch.manual_seed(arguments.seed)
    pipeline = pretrain(
        images_NCHW,
        captions,
        build_tokenizer(captions, arguments.tokens),
        Architecture(tuple(arguments.autoencoder), arguments.latent_channels, tuple(arguments.unet)),
        arguments.autoencoder_steps,
        arguments.diffusion_steps,
        arguments.seed,
        str(device),
    )
    seconds = time.perf_counter() - start
    save(pipeline, folder / "model")
    most = [caption for caption, _ in Counter(captions).most_common(10)]
    draw_samples(folder / "model", most)
    cost = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
        "private": len(part.private),
        "test": len(part.test),
        "parameters": sum(
            p.numel() for m in (pipeline.vae, pipeline.unet, pipeline.text_encoder) for p in m.parameters()
        ),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }
    (folder / COST).write_text(json.dumps(cost, indent=2) + "\n")
    return cost
