"""Draw a labelled folder of images with the T2I model of a run.

``fedmmkt generate runs/demo --per-class 500 --out drawn`` writes PNG files and ``metadata.jsonl`` with
``file_name``, ``label`` and ``prompt``, as ``datasets.load_dataset("imagefolder", data_dir="drawn")`` reads them.
Model, steps, prompts, guidance, classes and seed are those of the run, after its last round.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from fedmmkt.deploy.local_command import run_locally


def main(arguments: list[str] | None = None) -> int:
    """Draw what the command line asks for; return the exit code."""
    options = _parse_arguments(arguments)
    return run_locally(partial(_run, options), options.app)


def _run(options: argparse.Namespace) -> int:
    from fedmmkt.deploy.run_config_text import parse_run_config
    from fedmmkt.server_app.trained import generate_folder

    count = generate_folder(
        options.run,
        options.out,
        options.per_class,
        options.prompts,
        options.round,
        not options.without_adapter,
        options.guidance,
        options.seed,
        parse_run_config(options.run_config),
    )
    print(f"{count} images in {options.out}")
    return 0


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fedmmkt generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--per-class", type=int, metavar="N", help="draw N images of each class")
    what.add_argument(
        "--prompts", type=Path, metavar="FILE", help="draw an image for each prompt of a file, as in t2i.prompts"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write, new or empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--round", type=int, metavar="K", help="with the adapter after round K (default: the last)")
    which.add_argument("--without-adapter", action="store_true", help="with the T2I model as it was made")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: that of the round)")
    parser.add_argument("--seed", type=int, help="seed of prompts and images (default: that of the run)")
    parser.add_argument(
        "--run-config",
        action="append",
        default=[],
        metavar="PAIRS",
        help="changes to the run's settings, such as 't2i.device=\"cuda:0,cuda:1\" t2i.inference-steps=30'",
    )
    parser.add_argument("--app", type=Path, metavar="FOLDER", help="folder of your own app, if the family is of it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
