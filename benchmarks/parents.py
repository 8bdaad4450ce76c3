"""Time to draw the parents of a round's variations by number of prompts: ``python -m benchmarks.parents``.

With classes, each draw looks at all samples of the last round; without, at those with the prompt's text.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from fedmmkt.server_app.exploration import draw_parents
from fedmmkt.server_app.prompts import Prompt
from fedmmkt.server_app.t2i.samples import Samples


def seconds(count: int, classes: int) -> float:
    """Return how long the draw for half of so many prompts takes; without classes, each prompt is another text."""
    prompts = [Prompt(f"prompt {index}", index % classes if classes else -1) for index in range(count)]
    prompted_N = torch.tensor([prompt.class_index for prompt in prompts])
    texts = tuple(prompt.text for prompt in prompts)
    made = Samples(texts, prompted_N, np.zeros((count, 1, 1, 3), np.uint8), torch.zeros(count, 4, 1, 1))
    scored = made.scored(torch.rand(count, generator=torch.Generator().manual_seed(0)))
    start = time.perf_counter()
    draw_parents(scored, prompts[: count // 2], 0)
    return time.perf_counter() - start


def main() -> None:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parents", description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--classes", type=int, default=100)
    arguments = parser.parse_args()
    print(f"| prompts | s, {arguments.classes} classes | s, without classes |\n|---|---|---|")
    for count in arguments.prompts:
        print(f"| {count:,} | {seconds(count, arguments.classes):.2f} | {seconds(count, 0):.2f} |", flush=True)


if __name__ == "__main__":
    main()
