"""The T2I of finished runs, measured again."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from benchmarks.measured import mean_of, measured_again
from benchmarks.rows import run_once
from tests.conftest import TINY


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run two clients for two rounds on a few images; the guidance scale of the last is that of the measures."""
    out = tmp_path_factory.mktemp("rows")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
    columns = {"image": [Image.fromarray(one) for one in pixels], "label": ["dark", "light"] * 30}
    datasets.Dataset.from_dict(columns).to_parquet(out / "data.parquet")
    settings = TINY | {
        "data.dataset": str(out / "data.parquet"),
        "data.partitioner": "iid",
        "client.models": "mlp",
        "judge": True,
        "judge-cache": str(out / "judges"),
        "t2i.guidance": "1.5,1.0",
        "seed": 0,
    }
    return out, run_once(out / "whole" / "seed-0", settings, 2)


def test_on_as_many_images_the_measures_are_those_of_the_run(finished):
    out, lines = finished

    (again,) = measured_again({"whole": [lines]}, out, 30)["whole"]

    for measure in ("alignment", "frechet", "recall"):
        assert again[0]["generator"][measure] == pytest.approx(lines[0]["generator"][measure], rel=1e-4)
        assert again[-1]["generator"][measure] == pytest.approx(lines[-1]["generator"][measure], rel=1e-4)
    assert again[0]["generator"]["frechet"] != again[-1]["generator"]["frechet"]
    assert again[1:-1] == lines[1:-1]
    assert again[-1]["clients"] == lines[-1]["clients"]


def test_several_draws_are_sets_of_their_own_and_their_mean_is_kept(finished):
    out, lines = finished

    (once,) = measured_again({"whole": [lines]}, out, 30)["whole"]
    (twice,) = measured_again({"whole": [lines]}, out, 30, draws=2)["whole"]

    assert twice[-1]["generator"]["frechet"] != once[-1]["generator"]["frechet"]
    kept = json.loads((out / "whole" / "seed-0" / "t2i-on-2-times-30-images.json").read_text())
    assert kept[1]["frechet"] == twice[-1]["generator"]["frechet"]


def test_the_mean_of_draws_is_of_each_measure_that_all_have():
    draws = [{"recall": 0.5, "frechet": 4.0, "public": None}, {"recall": 0.7, "frechet": None, "public": None}]

    assert mean_of(draws) == {"recall": pytest.approx(0.6), "frechet": None, "public": None}


def test_one_draw_keeps_all_that_was_measured():
    draw = {"recall": 0.5, "public": {"encoder": "efficientnet-lite0", "recall": 0.25}}

    assert mean_of([draw]) == draw


def test_measures_are_kept_beside_the_run(finished):
    out, lines = finished
    kept = [{"frechet": 7.0}, {"frechet": 5.0}]
    (out / "whole" / "seed-0" / "t2i-on-40-images.json").write_text(json.dumps(kept))

    (again,) = measured_again({"whole": [lines]}, out, 40)["whole"]

    assert (again[0]["generator"]["frechet"], again[-1]["generator"]["frechet"]) == (7.0, 5.0)


def test_a_run_without_a_t2i_stays_as_it_is(tmp_path):
    lines = [{"clients": {"accuracy": 0.5}, "generator": {}}]

    assert measured_again({"FedAvg": [lines]}, tmp_path, 30) == {"FedAvg": [lines]}
