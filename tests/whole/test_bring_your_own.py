"""Data and models of users, named in configuration alone, in one federation."""

import json
import re
from pathlib import Path

import datasets
import pytest
from flwr.app import Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedmmkt.client_app.models.building import TRANSFORMERS
from fedmmkt.client_app.models.task_model import task_models
from fedmmkt.common.config import ConfigError, DataConfig, RunConfig
from fedmmkt.common.datasets import load_splits
from fedmmkt.common.natural_order import natural_key
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app.app import build_strategy, main
from fedmmkt.server_app.class_space import classes_of_clients
from tests import ROOT, tiny_transformers
from tests.conftest import registered

DOCUMENT = (ROOT / "docs" / "bring-your-own.md").read_text()


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
        {"name": "pairs", "model": models["clip"], "data-path": digits_of("pairs", everything, pair)}
        | {"share-votes": True},
        {"name": "three-classes", "model": models["vit"], "data-path": digits_of("three", (2, 5, 7), pair)},
        {"name": "one-class", "model": "small-dual", "data-path": digits_of("one", (4,), pair)},
    ]
    run_config = tiny_run(rounds=1)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    grid = InProcessGrid("fedmmkt.client_app.app:app", run_config, nodes)
    told, pull = [], grid.pull_messages
    grid.pull_messages = lambda ids: [told.append(reply) or reply for reply in pull(ids)]
    with registered(task_models, "small-dual", example("small_dual")):
        strategy.start(grid)
    line = strategy.recorder.run_folder.read_metrics()[-1]
    assert line["replies"]["received"] == 5
    assert set(line["clients"]["by_modality"]) == {"image", "text", "image+text"}
    answers = [reply.content for reply in told if "payload" in reply.content]
    voters = [answer["report"]["client"] for answer in answers if "votes_N" in answer["payload.arrays"]]
    assert (len(answers), voters) == (5, ["pairs"])  # The run asks all, and one consents.
    assert all(model.startswith(TRANSFORMERS) for model in models.values())


def test_a_class_that_the_run_does_not_have_costs_its_node_alone(digits_of, tiny_run, tmp_path, caplog):
    nodes = [{"name": name, "model": "mlp", "data-path": digits_of(name, classes, ["image"])}
             for name, classes in (("fits", (0, 1)), ("strange", (0, 9)))]  # fmt: skip
    run_config = tiny_run(rounds=1, data__classes="zero,one", min_available_nodes=1)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    strategy.start(InProcessGrid("fedmmkt.client_app.app:app", run_config, nodes))
    assert strategy.recorder.run_folder.read_metrics()[-1]["replies"]["received"] == 1
    assert "the data's classes 'nine' are not in the run; allowed: zero, one" in caplog.text


def test_the_class_space_may_be_all_that_clients_hold(digits_of, tiny_run, caplog):
    nodes = [{"name": name, "model": "mlp", "data-path": digits_of(name, classes, ["image"]), "share-classes": True}
             for name, classes in (("low", (0, 1)), ("high", (9, 1)))]  # fmt: skip
    nodes.append({"name": "lost", "model": "mlp", "data-path": "/no/such/data", "share-classes": True})
    nodes.append({"name": "silent", "model": "mlp", "data-path": nodes[0]["data-path"]})
    run_config = tiny_run(rounds=1, data__classes="clients")
    grid = InProcessGrid("fedmmkt.client_app.app:app", run_config, nodes)
    told, pull = [], grid.pull_messages
    grid.pull_messages = lambda ids: [told.append(reply) or reply for reply in pull(ids)]
    main(grid, Context(1, 0, {}, RecordDict(), run_config))
    described = json.loads((Path(run_config["output-dir"]) / "config.json").read_text())
    assert described["classes"] == ["nine", "one", "zero"]
    first = [reply.content for reply in told if reply.metadata.message_type == "query.classes" and reply.has_content()]
    assert [set(content) for content in first] == [{"classes", "classes.arrays"}] * 2
    assert [dict(content["classes"]) for content in first] == [
        {"classes": ["one", "zero"]},
        {"classes": ["nine", "one"]},
    ]
    assert not any(content["classes.arrays"] for content in first)
    assert "Node 3 named no classes: the node refused: data (see the node's log, " in caplog.text
    assert "Node 4 named no classes: the node refused: its node-config has no share" in caplog.text


def test_fewer_than_two_classes_among_clients_are_named(digits_of, tiny_run):
    own = {"model": "mlp", "share-classes": True}
    nodes = [own | {"data-path": digits_of(name, (4,), ["image"])} for name in ("a", "b")]
    run_config = tiny_run(data__classes="clients")
    grid = InProcessGrid("fedmmkt.client_app.app:app", run_config, nodes)
    with pytest.raises(ConfigError, match=r"is 'clients', and the 2 clients hold 1 class\(es\); allowed: two or more"):
        classes_of_clients(grid, RunConfig.from_flower(run_config))


@given(st.lists(st.text(min_size=1, max_size=5), unique=True).flatmap(lambda names: st.permutations(names).map(tuple)))
def test_any_class_names_have_one_order(names):
    backwards = list(reversed(names))
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)
    assert sorted(["class 10", "class 9", "a1b"], key=natural_key) == ["a1b", "class 9", "class 10"]
