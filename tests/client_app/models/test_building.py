"""Models of users' own functions: what fits is built and left as it was, what does not is told in one line."""

import sys

import pytest
import torch
from torch import nn

from fedmmkt.client_app.models.building import build_task_model, check_task_model
from fedmmkt.client_app.models.task_model import TaskModel, task_models
from fedmmkt.common.config import ConfigError, NodeConfig, RunConfig
from fedmmkt.deploy.host_checks import check_model
from tests.conftest import registered


def flat(image_size, size=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, size))


class Features(nn.Module):
    """Gives the same number of features whatever it reads."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, inputs):
        return torch.zeros(len(inputs), self.size)


class Calls(nn.Module):
    """Calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return self.function(inputs)


def with_head(head):
    def build(classes, image_size):
        model = TaskModel(classes, 8, flat(image_size))
        model.head = head
        return model

    return build


class OwnFeatures(TaskModel):
    def features(self, inputs):
        return self.image_encoder(inputs.images_BCHW)[:, :4]


class OwnForward(TaskModel):
    def forward(self, inputs):
        return self.features(inputs)


class OwnTokens(TaskModel):
    def tokenize(self, texts):
        return [1, 2]


def fails(classes, image_size):
    raise RuntimeError("first line\nsecond line")


REFUSED = {
    "wrong size": (
        lambda c, s: TaskModel(c, 100, nn.Flatten()),
        "says feature_size 100, but its encoders give 192; allowed: the number of features of all encoders together, "
        "here 192",
    ),
    "wrong size of two": (
        lambda c, s: TaskModel(c, 8, flat(s), Features(5)),
        "says feature_size 8, but its encoders (8 of the image encoder and 5 of the text encoder) give 13; allowed: "
        "the number of features of all encoders together, here 13",
    ),
    "wrong size of own features": (
        lambda c, s: OwnFeatures(c, 8, flat(s)),
        "says feature_size 8, but its features gives 4; allowed: the number of features of all encoders together, "
        "here 4",
    ),
    "four dimensions": (
        lambda c, s: TaskModel(c, 8, nn.Conv2d(3, 8, s)),
        "has an image encoder that gives a tensor of shape (2, 8, 1, 1) for 2 samples; allowed: one row of features "
        "per sample, (2, F), as nn.Flatten() at its end makes",
    ),
    "one dimension": (
        lambda c, s: TaskModel(c, 1, text_encoder=Calls(lambda tokens: tokens.sum(1))),
        "has a text encoder that gives a tensor of shape (2,) for 2 samples; allowed: one row of features per sample, "
        "(2, F), as nn.Flatten() at its end makes",
    ),
    "no tensor": (
        lambda c, s: TaskModel(c, 8, Calls(lambda images: (images.flatten(1), None))),
        "has an image encoder that gives a tuple for 2 samples; allowed: one row of features per sample, (2, F), as "
        "nn.Flatten() at its end makes",
    ),
    "another image size": (
        lambda c, s: TaskModel(c, 8, flat(28)),
        "has an image encoder that fails on images of 8 x 8 pixels (RuntimeError: mat1 and mat2 shapes cannot be "
        "multiplied (2x192 and 2352x8)); allowed: an encoder of float images of the run's size, (B, 3, 8, 8) with "
        "data.image-size 8",
    ),
    "fewer words": (
        lambda c, s: TaskModel(c, 8, text_encoder=Calls(lambda tokens: 1 / 0)),
        "has a text encoder that fails on tokens of shape (2, 96) (ZeroDivisionError: division by zero); allowed: an "
        "encoder of what the model's tokenize gives, (B, L) with any L",
    ),
    "no module": (
        lambda c, s: TaskModel(c, 8, torch.flatten),
        "has a builtin_function_or_method as image_encoder; allowed: a torch.nn.Module, or None",
    ),
    "no tokens": (
        lambda c, s: OwnTokens(c, 8, None, Features(8)),
        "has a tokenize that gives a list for 2 texts; allowed: a tensor with one row of tokens per text",
    ),
    "head of other classes": (
        with_head(nn.Linear(8, 1000)),
        "has a head that gives a tensor of shape (2, 1000) for 2 samples and 3 classes; allowed: logits of shape "
        "(2, 3), one per class of the run",
    ),
    "head of other features": (
        with_head(nn.Linear(9, 3)),
        "has a head that fails on 8 features (RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x8 and 9x3)); "
        "allowed: a head from 8 features to 3 classes",
    ),
    "forward of other classes": (
        lambda c, s: OwnForward(c, 8, flat(s)),
        "has a forward that gives a tensor of shape (2, 8) for 2 samples and 3 classes; allowed: logits of shape "
        "(2, 3), one per class of the run",
    ),
    "fails": (
        fails,
        "cannot be built for 3 classes and images of 8 x 8 pixels (RuntimeError: first line second line); allowed: a "
        "function that returns a TaskModel for them",
    ),
    "no arguments": (lambda: None, "takes (); allowed: a function of the number of classes and the image size"),
    "nothing": (lambda c, s: None, "returned nothing; allowed: a function that returns a TaskModel"),
    "plain module": (
        lambda c, s: nn.Linear(1, 1),
        "returned a Linear; allowed: a function that returns a TaskModel",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_what_is_allowed(case):
    build, told = REFUSED[case]
    with registered(task_models, "mine", build), pytest.raises(ConfigError) as caught:
        build_task_model("mine", 3, 8)
    assert str(caught.value) == f"client model 'mine' {told}"


def test_a_function_of_other_arguments_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "other_arguments.py").write_text("def one(classes): ...\ndef none(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"that takes \(classes\), and is called with \(classes, image_size\)"):
        check_task_model("other_arguments:one")
    with pytest.raises(ConfigError, match=r"'other_arguments:none' takes \(\); allowed: a function of the number of"):
        check_task_model("other_arguments:none")
    sys.modules.pop("other_arguments")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "there is no module 'fails_to_import' to import here"),
        ("import no_such_module", "importing the module 'fails_to_import' failed: No module named 'no_such_module'"),
        ("raise OSError('one\\ntwo')", "importing the module 'fails_to_import' failed: OSError: one two"),
        ("import sys; sys.exit(3)", "importing the module 'fails_to_import' failed: SystemExit: 3"),
        ("def f(:", "importing the module 'fails_to_import' failed: SyntaxError: invalid syntax"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_in_one_line(text, told, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    if text:
        (tmp_path / "fails_to_import.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        build_task_model("fails_to_import:f", 3, 8, where="node-config key 'model'")
    assert str(caught.value).startswith(f"node-config key 'model' is 'fails_to_import:f', but {told}")
    assert "\n" not in str(caught.value)
    assert "; allowed: cnn, dual" in str(caught.value)


def test_what_fits_is_built_and_neither_it_nor_the_random_state_is_changed():
    built = []

    def build(classes, image_size):
        layers = nn.Flatten(), nn.Linear(3 * image_size**2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        model = TaskModel(classes, 8, nn.Sequential(*layers))
        model.head = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, classes))
        built.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        built.append(torch.get_rng_state())
        return model

    with registered(task_models, "mine", build):
        model = build_task_model("mine", 3, 8)
    weights, state = built
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert model.class_count == 3


def test_the_doctor_refuses_what_clients_refuse():
    config = RunConfig.from_flower({"data.classes": "cat,dog", "data.image-size": 8})
    node = NodeConfig(model="mine", data_path="/data", device="cpu")
    with registered(task_models, "mine", lambda c, s: TaskModel(c, 8, flat(s))):
        assert check_model(config, node) == "mine reads image, runs on cpu"
    with (
        registered(task_models, "mine", lambda c, s: TaskModel(c, 9, flat(s))),
        pytest.raises(ConfigError, match="says feature_size 9, but its encoders give 8"),
    ):
        check_model(config, node)
