"""The model cards that a run leaves: what the hub reads, what a stranger reads, and code that runs."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from fedmmkt.client_app.models.task_model import Inputs
from fedmmkt.common.config import RunConfig, to_flower
from fedmmkt.common.model_card import TAGS
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.record.run_folder import RunFolder
from tests import tiny_transformers
from tests.conftest import TINY

CLIENTS = ("clinic-a", "clinic-b", "clinic-c", "clinic-d")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run one round with four named clients, two of them with models from transformers."""
    folder = tmp_path_factory.mktemp("cards")
    vit = tiny_transformers.save(folder / "vit", tiny_transformers.image_config(), size={"height": 24, "width": 24})
    bert = tiny_transformers.save(folder / "bert", tiny_transformers.text_config())
    models = {"client.models": f"mlp,dual,{vit},{bert}", "rounds": 1, "data.alpha": 1.0}
    run_config = to_flower(RunConfig()) | TINY | models | {"output-dir": str(folder / "run")}
    nodes = [{"partition-id": i, "num-partitions": 4, "name": name} for i, name in enumerate(CLIENTS)]
    grid = InProcessGrid("fedmmkt.client_app.app:app", run_config, nodes)
    build_strategy(RunConfig.from_flower(run_config), 1).start(grid)
    return folder / "run"


def client_folder(run, name):
    """Return the folder of a client's model after the last round."""
    return sorted(run.glob(f"clients/*/{name}/round-*"))[-1]


def run_code(card, folder, monkeypatch):
    """Run the code that a card shows, in the folder of the card; return its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir(folder)
    variables = {}
    exec(code, variables)
    return variables


def test_the_adapters_card_says_what_the_hub_reads(run):
    card = ModelCard.load(run / "lora" / "README.md")

    header = card.data.to_dict()
    assert header["library_name"] == "diffusers"
    assert header["pipeline_tag"] == "text-to-image"
    assert header["tags"] == [*TAGS, "text-to-image", "lora"]
    assert header["license_name"] == "to-be-filled-in"
    assert "base_model" not in header  # The starter is on no hub.
    assert "datasets" not in header
    (result,) = card.data.eval_results  # No judge measured the T2I model.
    assert (result.metric_type, result.dataset_name) == ("accuracy", "handwritten digits of scikit-learn")
    accuracies = [client["accuracy"] for client in RunFolder(run).read_metrics()[-1]["clients"]["per_client"].values()]
    assert result.metric_value == pytest.approx(sum(accuracies) / 4, abs=1e-4)


def test_the_adapters_card_says_what_a_stranger_reads_and_no_more(run):
    text = (run / "lora" / "README.md").read_text()

    assert "| **Rounds** | 1 |" in text
    assert "| **Clients** | 4 (2 image, 1 image+text, 1 text) |" in text
    assert re.search(r"clients' accuracy, all \| \d+\.\d ± \d+\.\d % \(\d+\.\d to \d+\.\d\) \| \d", text)
    assert "**Nothing is differentially private**" in text
    assert "votes: for each generated image" in text
    assert "eprint = {2510.12254}" in text
    assert (run / "lora" / "samples.png").read_bytes() == (run / "images" / "round-001.png").read_bytes()
    assert not [name for name in (*CLIENTS, str(run.parent)) if name in text]


def test_the_adapters_card_loads_it(run, monkeypatch):
    variables = run_code(ModelCard.load(run / "lora" / "README.md"), run / "lora", monkeypatch)

    assert variables["image"].size == (32, 32)
    assert variables["pipeline"].get_active_adapters()


@pytest.mark.parametrize(("client", "library"), [("clinic-a", None), ("clinic-b", None), ("clinic-c", "transformers"),
                                                 ("clinic-d", "transformers")])  # fmt: skip
def test_a_clients_card_tells_its_accuracy_and_nothing_else_of_its_data(run, client, library):
    folder = client_folder(run, client)
    card = ModelCard.load(folder / "README.md")

    assert card.data.library_name == library
    assert card.data.license_name == "to-be-filled-in"
    (result,) = card.data.eval_results
    assert result.metric_type == "accuracy"
    assert result.dataset_name == "handwritten digits of scikit-learn"
    (accuracy,) = re.findall(r"Accuracy (\d+\.\d) %,", card.text)
    assert float(accuracy) == pytest.approx(100 * result.metric_value, abs=0.06)  # Both are rounded.
    assert "Rounds: 1." in card.text
    assert "**Nothing is differentially private**" in card.text
    assert "eprint = {2510.12254}" in card.text
    assert not [word for word in (*CLIENTS, str(run.parent)) if word in card.content]
    own = json.loads((folder / "private.json").read_text())
    shared = json.loads((folder / "model.json").read_text())
    assert own.keys() == {"client", "class_counts", "image_column", "text_column"}
    assert client not in (folder / "model.json").read_text()
    assert not own.keys() & shared.keys()
    assert "JSON files but `private.json`" in card.text
    assert [path.parent.name for path in Path(folder.parent).rglob("README.md")] == [folder.name]


@pytest.mark.parametrize("client", ["clinic-a", "clinic-b"])
def test_a_clients_card_loads_a_model_of_ours(run, client, monkeypatch):
    folder = client_folder(run, client)

    model = run_code(ModelCard.load(folder / "README.md"), folder, monkeypatch)["model"]

    tokens_BL = model.tokenize(["the digit one"]) if client == "clinic-b" else None
    with torch.no_grad():
        assert model(Inputs(torch.zeros(1, 3, 32, 32), tokens_BL)).shape == (1, 10)


def test_a_clients_card_loads_a_text_model_of_transformers(run, monkeypatch):
    folder = client_folder(run, "clinic-d")

    classify = run_code(ModelCard.load(folder / "README.md"), folder, monkeypatch)["classify"]

    (answer,) = classify("the digit one")
    assert answer["label"] in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_a_clients_card_loads_an_image_model_of_transformers(run, monkeypatch):
    folder = client_folder(run, "clinic-c")

    classify = run_code(ModelCard.load(folder / "README.md"), folder, monkeypatch)["classify"]

    assert len(classify(str(run / "images" / "round-001.png"))) == 5
