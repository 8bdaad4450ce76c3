"""A client's trained model after the run: found in its folder, loaded, and right in what it predicts."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fedmmkt.client_app.learning.training import AlignedModel
from fedmmkt.client_app.memory import ClientMemory
from fedmmkt.client_app.models.building import build_task_model
from fedmmkt.client_app.models.task_model import Inputs
from fedmmkt.client_app.trained import ModelDescription, load_client_model
from fedmmkt.common.config import ConfigError
from tests import tiny_transformers

CLASSES = ("disc", "square", "ring")
OWN_MODEL = """
from torch import nn
from fedmmkt import TaskModel

def linear(classes, image_size, *, width=4):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, width))
    return TaskModel(classes, width, image_encoder=encoder)
"""


def saved(folder, model_name="mlp", round_=1, **changes):
    """Save a client's model of random weights as a run does; return the client's folder and the model."""
    described = ModelDescription(
        **{"client": "c-0", "model": model_name, "extra": {}, "classes": CLASSES, "class_counts": (3, 1, 0),
           "balanced_softmax": True, "image_size": 24, "whites": {}, "image_column": "image", "text_column": "text",
           "anchor_size": 4, "round": round_} | changes
    )  # fmt: skip
    task_model = build_task_model(model_name, 3, 24, CLASSES, described.extra)
    model = AlignedModel(task_model, 4)
    memory = ClientMemory(folder / "clients", "run", "c-0")
    optimizer = torch.optim.AdamW(model.parameters())
    memory.save(round_, model, optimizer, described.model_dump(mode="json"), keep_batches=1, keep_rounds=1)
    return folder / "clients" / "c-0", task_model.eval()


def pictures(count=5):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(OWN_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_models", None)


@pytest.mark.parametrize("kind", ["cnn", "text", "dual", "vit", "bert", "clip", "own"])
def test_it_predicts_as_it_did_in_the_run(kind, tmp_path, own_module):
    sources = {"vit": tiny_transformers.image_config, "bert": tiny_transformers.text_config,
               "clip": tiny_transformers.dual_config}  # fmt: skip
    name, extra = {"own": "my_models:linear"}.get(kind, kind), {"width": 7} if kind == "own" else {}
    if kind in sources:
        name = tiny_transformers.save(tmp_path / "source", sources[kind]())
    folder, original = saved(tmp_path, name, extra=extra)
    shutil.rmtree(tmp_path / "source", ignore_errors=True)  # What it came from may be gone.
    texts = ["a digit", "picture of nine", "the one"]

    model = load_client_model(folder, "cpu")
    predicted_NC = model.predict(pictures(3), texts)

    pixels = np.stack([np.asarray(picture) for picture in pictures(3)])
    images_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        logits_NC = original(Inputs(images_BCHW, original.tokenize(texts) if model.reads_texts else None))
    assert model.classes == CLASSES
    assert np.allclose(predicted_NC, logits_NC.softmax(1).numpy(), atol=1e-5)


def test_the_clients_own_prior_is_added_to_logits_for_a_uniform_one(tmp_path):
    folder, _ = saved(tmp_path)
    model = load_client_model(folder, "cpu")
    torch.nn.init.zeros_(model.task_model.head.weight)
    model.task_model.head.bias.data = torch.tensor([0.0, 0.0, 0.0])

    uniform_NC, own_NC = (model.predict(pictures(1), prior=prior) for prior in ("uniform", "own"))

    # Counts 3, 1, 0 with 0.05 more each: 3.05, 1.05 and 0.05 of 4.15.
    assert uniform_NC[0].tolist() == pytest.approx([1 / 3] * 3)
    assert own_NC[0].tolist() == pytest.approx([3.05 / 4.15, 1.05 / 4.15, 0.05 / 4.15], abs=1e-6)


def test_what_is_shared_says_nothing_of_the_client_and_predicts_all_the_same(tmp_path):
    folder = saved(tmp_path)[0] / "final"
    whole = load_client_model(folder, "cpu")
    (folder / "private.json").unlink()

    shared = load_client_model(folder, "cpu")

    described = json.loads((folder / "model.json").read_text())
    assert not {"client", "class_counts", "image_column", "text_column"} & set(described)
    assert "c-0" not in (folder / "model.json").read_text()
    for prior in (None, "uniform"):
        assert np.array_equal(shared.predict(pictures(), prior=prior), whole.predict(pictures(), prior=prior))
    with pytest.raises(ConfigError, match=r"'own', but the class counts are not known: private.json is not beside"):
        shared.predict(pictures(), prior="own")


def test_a_model_of_an_earlier_version_says_all_in_one_file(tmp_path):
    folder = saved(tmp_path)[0] / "final"
    parts = [json.loads((folder / name).read_text()) for name in ("model.json", "private.json")]
    (folder / "private.json").unlink()
    (folder / "model.json").write_text(json.dumps(parts[0] | parts[1]))

    description = load_client_model(folder, "cpu").description

    assert (description.client, description.class_counts) == ("c-0", (3, 1, 0))


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_description_that_is_none_is_refused(text, tmp_path):
    folder = saved(tmp_path)[0] / "final"
    (folder / "model.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model.json cannot be read .*; allowed: what a client of this version"):
        load_client_model(folder, "cpu")


def test_a_model_without_balanced_softmax_has_its_own_prior_alone(tmp_path):
    model = load_client_model(saved(tmp_path, balanced_softmax=False)[0], "cpu")
    assert np.array_equal(model.predict(pictures(), prior="own"), model.predict(pictures()))
    with pytest.raises(ConfigError, match=r"'uniform', but c-0 was trained with client.balanced-softmax=false"):
        model.predict(pictures(), prior="uniform")


def test_deep_images_have_the_white_of_the_training_images(tmp_path):
    model = load_client_model(saved(tmp_path, whites={"PNG I;16": 4095})[0], "cpu")
    for value in (1000, 5000):
        Image.fromarray(np.full((24, 24), value, np.uint16)).save(tmp_path / f"{value}.png")

    # 1000 / 4095 of 255; alone, it would be taken for one of ten bits, almost white.
    assert np.unique(model.read_image(tmp_path / "1000.png")).tolist() == [62]
    with pytest.raises(ValueError, match="its grey values go up to 5000; allowed: 4095, the white of the training"):
        model.read_image(tmp_path / "5000.png")


def test_the_last_model_has_a_place_that_stays_and_lies_on_disk_once(tmp_path):
    folder, _ = saved(tmp_path)
    _, last = saved(tmp_path, round_=2)

    final, newest = folder / "final", tmp_path / "clients" / "run" / "c-0" / "round-00002"

    assert sorted(path.name for path in final.iterdir()) == ["model.json", "model.safetensors", "private.json"]
    assert (final / "model.safetensors").samefile(newest / "model.safetensors")
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "clients")
    copied = load_client_model(tmp_path / "elsewhere", "cpu")
    assert copied.description.round == 2
    assert torch.equal(copied.task_model.head.weight, last.head.weight)


def test_what_is_no_clients_folder_is_refused_with_those_that_are(tmp_path):
    folder, _ = saved(tmp_path)
    with pytest.raises(ConfigError, match=rf"holds no client's model \(model.json\); allowed: .*, here {folder}"):
        load_client_model(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    folder, _ = saved(tmp_path)
    described = (folder / "final" / "model.json").read_text()
    (folder / "final" / "model.json").write_text(described.replace('"mlp"', '"cnn"'))
    with pytest.raises(ConfigError, match=r"the weights in .* do not fit 'cnn'"):
        load_client_model(folder)


def test_missing_inputs_and_unknown_priors_are_refused(tmp_path):
    model = load_client_model(saved(tmp_path, "dual")[0], "cpu")
    with pytest.raises(ConfigError, match=r"c-0 reads image\+text; it needs texts"):
        model.predict(pictures(1))
    with pytest.raises(ConfigError, match="the prior is 'mine'; allowed: own or uniform"):
        model.predict(pictures(1), ["a"], prior="mine")
