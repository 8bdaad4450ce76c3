"""Data and models of users, named in configuration alone, in one federation."""

import re
from pathlib import Path

import datasets
import pytest

from client_app import task_models
from client_app.pretrained import PREFIX
from common.config import DataConfig, RunConfig
from common.datasets import load_splits
from deploy.in_process import InProcessGrid
from server_app.app import build_strategy
from tests import tiny_transformers

DOCUMENT = (Path(__file__).parent.parent / "docs" / "bring-your-own.md").read_text()


def example(name):
    """Return what the document's example defines."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if f"def {name}(" in code]
    names = {}
    exec(code, names)
    return names[name]


@pytest.fixture
def digits_of(tmp_path):
    """Return a function that writes some classes and columns of the digits to a node's folder."""
    train = load_splits(DataConfig(), 0).train

    def write(name, classes, columns):
        labels = train["label"][:]
        part = train.select([row for row, label in enumerate(labels) if label in classes][:60])
        names = datasets.Dataset.from_dict(
            {"label": [train.features["label"].int2str(label) for label in part["label"]]}
        )
        part = datasets.concatenate_datasets([part.select_columns(columns), names], axis=1)
        part.to_parquet(tmp_path / f"{name}.parquet")
        return str(tmp_path / f"{name}.parquet")

    return write


def test_all_kinds_of_nodes_run_together(digits_of, tiny_run, tmp_path):
    task_models.register_task_model("small-dual")(example("small_dual"))
    models = {
        kind: tiny_transformers.save(tmp_path / kind, config)
        for kind, config in (
            ("vit", tiny_transformers.image_config()),
            ("bert", tiny_transformers.text_config()),
            ("clip", tiny_transformers.dual_config()),
        )
    }
    everything, pair = range(10), ["image", "text"]
    nodes = [
        {"name": "images-only", "model": "cnn", "data-path": digits_of("images", everything, ["image"])},
        {"name": "texts-only", "model": models["bert"], "data-path": digits_of("texts", everything, ["text"])},
        {"name": "pairs", "model": models["clip"], "data-path": digits_of("pairs", everything, pair)},
        {"name": "three-classes", "model": models["vit"], "data-path": digits_of("three", (2, 5, 7), pair)},
        {"name": "one-class", "model": "small-dual", "data-path": digits_of("one", (4,), pair)},
    ]
    run_config = tiny_run(rounds=1)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    try:
        strategy.start(InProcessGrid("client_app.app:app", run_config, nodes))
    finally:
        del task_models._FACTORIES["small-dual"]
    line = strategy.run_folder.read_metrics()[-1]
    assert line["replies"]["received"] == 5
    assert set(line["clients"]["by_modality"]) == {"image", "text", "image+text"}
    assert all(model.startswith(PREFIX) for model in models.values())


def test_a_class_that_the_run_does_not_have_costs_its_node_alone(digits_of, tiny_run, tmp_path, caplog):
    nodes = [{"name": name, "model": "mlp", "data-path": digits_of(name, classes, ["image"])}
             for name, classes in (("fits", (0, 1)), ("strange", (0, 9)))]  # fmt: skip
    run_config = tiny_run(rounds=1, data__classes="zero,one", min_nodes=1)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    strategy.start(InProcessGrid("client_app.app:app", run_config, nodes))
    assert strategy.run_folder.read_metrics()[-1]["replies"]["received"] == 1
    assert "the data's classes 'nine' are not in the run; allowed: zero, one" in caplog.text
