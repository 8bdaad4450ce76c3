"""Predict classes with a client's trained model, and write a table of them.

``fedmmkt predict runs/demo/clients/cnn-0 new/ other.png`` writes the columns ``file``, ``class`` and ``probability``
as CSV. Files are images, folders of images, or tables (CSV, parquet, ...) with a column of images, of texts, or of
both, as the model reads. With tables there are further columns: ``row``, counted from 0, ``image``, the file of the
row's image as far as the table names it, and that of ``--id-column``.

A file or row that cannot be read is named on standard error and left out; the exit code is then 1. It is 2 where the
model or a file is not what it should be, and then no table is written to ``--out``.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fedmmkt.common.config import ConfigError
from fedmmkt.common.files import write_atomically
from fedmmkt.common.table_files import kind_of
from fedmmkt.deploy.local_command import run_locally

if TYPE_CHECKING:
    from fedmmkt.client_app.data.unlabelled import Unlabelled
    from fedmmkt.client_app.trained import ClientModel, Prior

AT_ONCE = 64  # examples that are held in memory


def main(arguments: list[str] | None = None) -> int:
    """Predict as the command line asks; return the exit code."""
    options = _parse_arguments(arguments)
    return run_locally(partial(_run, options), options.app)


def write_predictions(
    model: ClientModel,
    examples: Iterable[Unlabelled],
    stream: TextIO,
    prior: Prior | None = None,
    with_rows: bool = False,
    all_classes: bool = False,
    id_column: str = "",
) -> list[str]:
    """Write the table of predictions as CSV, a few examples at a time.

    Parameters
    ----------
    model : ClientModel
        The model.
    examples : iterable of Unlabelled
        The examples.
    stream : TextIO
        Where the table goes.
    prior : str, optional
        As in `ClientModel.predict`.
    with_rows : bool
        Whether there is a column ``row``, and for a model that reads images a column ``image``.
    all_classes : bool
        Whether there is a column for the probability of each class.
    id_column : str
        Name of a column for the examples' ids; empty for none.

    Returns
    -------
    list of str
        What was left out, and why.
    """
    writer, left_out = csv.writer(stream, lineterminator="\n"), []
    each = [f"p({name})" for name in model.classes] if all_classes else []
    of_rows = ["row", *(["image"] if model.reads_images else [])] if with_rows else []
    remaining = iter(examples)
    part = list(islice(remaining, AT_ONCE))  # Before the first line is written: a wrong column is found here.
    writer.writerow(["file", *of_rows, *filter(None, [id_column]), "class", "probability", *each])
    while part:
        kept, problems = _readable(model, part)
        left_out += problems
        probabilities_NC = model.predict(
            [image for _, image in kept], [example.text or "" for example, _ in kept], prior
        )
        for (example, _), row_C in zip(kept, probabilities_NC.tolist(), strict=True):
            best = max(range(len(row_C)), key=row_C.__getitem__)
            numbers = [f"{value:.4f}" for value in (row_C[best], *(row_C if all_classes else []))]
            place = [example.file, *[example.row, example.named][: len(of_rows)], *([example.id] if id_column else [])]
            writer.writerow([*place, model.classes[best], *numbers])
        stream.flush()
        part = list(islice(remaining, AT_ONCE))
    return left_out


def _readable(model: ClientModel, examples: list[Unlabelled]) -> tuple[list[tuple[Unlabelled, Any]], list[str]]:
    """Return the examples that can be read, with their decoded images, and what is wrong with the others."""
    from PIL import Image

    kept: list[tuple[Unlabelled, Any]] = []
    problems = []
    for example in examples:
        called = f" ({example.id})" if example.id else f" ({example.named})" if example.named else ""
        where = example.file if example.row is None else f"{example.file}, row {example.row}{called}"
        image = None
        if model.reads_texts and not (example.text or "").strip():
            problems.append(f"{where}: it has no text")
            continue
        if model.reads_images and example.image is None:
            problems.append(f"{where}: it has no image")
            continue
        if model.reads_images and example.image is not None:
            try:
                image = Image.fromarray(model.read_image(example.image))
            except ValueError as error:
                problems.append(f"{where}: {error}")
                continue
        kept.append((example, image))
    return kept, problems


def _run(options: argparse.Namespace) -> int:
    from fedmmkt.client_app.data.unlabelled import read_unlabelled
    from fedmmkt.client_app.trained import load_client_model

    model = load_client_model(options.client, options.device)
    if not options.files:
        raise ConfigError("no FILE is given; allowed: images, folders of images, or tables")
    examples = read_unlabelled(
        options.files,
        model.reads_images,
        model.reads_texts,
        options.image_column or model.description.image_column,
        options.text_column or model.description.text_column,
        options.id_column,
    )
    with_rows = any(map(kind_of, options.files))
    left_out: list[str] = []

    def write(stream: TextIO) -> None:
        left_out.extend(
            write_predictions(model, examples, stream, options.prior, with_rows, options.all_classes, options.id_column)
        )

    def write_file(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as stream:
            write(stream)

    if options.out:
        write_atomically(options.out, write_file)
    else:
        write(sys.stdout)
    for problem in left_out:
        print(f"left out: {problem}", file=sys.stderr)
    return 1 if left_out else 0


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fedmmkt predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "client", type=Path, metavar="CLIENT-FOLDER", help="a client's folder, such as runs/demo/clients/cnn-0"
    )
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="images, folders of images, or tables")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table (default: standard output)")
    parser.add_argument(
        "--prior",
        choices=("own", "uniform"),
        help="how frequent classes are: as in the client's training data, or all alike, as a run measures its clients "
        "(the default)",
    )
    parser.add_argument("--all-classes", action="store_true", help="add the probability of each class")
    parser.add_argument("--image-column", default="", help="column of images (default: that of the client's data)")
    parser.add_argument("--text-column", default="", help="column of texts (default: that of the client's data)")
    parser.add_argument(
        "--id-column", default="", help="column of tables that goes into the predictions, such as an id"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--app", type=Path, metavar="FOLDER", help="folder of your own app, if the model is of it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
