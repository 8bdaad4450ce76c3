"""A dry run of a task model on examples: whether its parts fit each other, before anything is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedmmkt.client_app.models.task_model import Inputs, TaskModel
from fedmmkt.common.config import ConfigError
from fedmmkt.common.failures import one_line

# Two samples, since several kinds of layers take one for none.
EXAMPLE_TEXTS = ["an example of a text", "another"]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Run a model inside the block without a trace: its buffers, its modes and torch's random state stay as they were.

    No gradients are kept, so weights do not change either.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    with torch.random.fork_rng([device_of(model)] if device_of(model).type == "cuda" else []), torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in values:
                buffer.copy_(value)
            for module, before in buffers:
                module._buffers.update(before)
            for module, mode in modes:
                module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's weights; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def check_dry_run(model: TaskModel, classes: int, image_size: int, name: str) -> None:
    """Check in evaluation mode that a model's encoders, feature size and head fit each other and the run.

    Parameters
    ----------
    model : TaskModel
        The model; it is left as it was.
    classes : int
        Size of the class space.
    image_size : int
        Side of the run's images in pixels.
    name : str
        The model's name, for error texts.

    Raises
    ------
    ConfigError
        If they do not fit; the text says what was found and what is allowed.
    """
    what = f"client model {name!r}"
    for kind in ("image_encoder", "text_encoder"):
        encoder = getattr(model, kind)
        if not isinstance(encoder, nn.Module | None):
            raise ConfigError(f"{what} has a {type(encoder).__name__} as {kind}; allowed: a torch.nn.Module, or None")
    with unchanged(model):
        model.eval()
        inputs = _examples(model, image_size, what)
        features_BF = _features(model, inputs, what)
        _check_head(model, features_BF, classes, what)
        if type(model).forward is not TaskModel.forward:
            logits_BC = _tried(lambda: model(inputs), f"{what} has a forward that fails", "logits of `Inputs`")
            _check_logits(logits_BC, classes, f"{what} has a forward that gives")


def _examples(model: TaskModel, image_size: int, what: str) -> Inputs:
    images_BCHW = tokens_BL = None
    if "image" in model.modality:
        images_BCHW = torch.zeros(len(EXAMPLE_TEXTS), 3, image_size, image_size, device=device_of(model))
    if "text" in model.modality:
        allowed = "a tensor with one row of tokens per text"
        tokens = _tried(lambda: model.tokenize(EXAMPLE_TEXTS), f"{what} has a tokenize that fails", allowed)
        if not isinstance(tokens, Tensor) or tokens.dim() < 1 or len(tokens) != len(EXAMPLE_TEXTS):
            raise ConfigError(
                f"{what} has a tokenize that gives {_described(tokens)} for {len(EXAMPLE_TEXTS)} texts; "
                f"allowed: {allowed}"
            )
        tokens_BL = tokens.to(device_of(model))
    return Inputs(images_BCHW, tokens_BL)


def _features(model: TaskModel, inputs: Inputs, what: str) -> Tensor:
    """Return the features of all encoders together, checked."""
    if type(model).features is not TaskModel.features:
        features_BF = _rows(lambda: model.features(inputs), what, "features", "the examples", "features of `Inputs`")
        found, parts = features_BF.shape[1], "features"
    else:
        encoded = _encoded(model, inputs, what)
        features_BF = torch.cat(list(encoded.values()), 1)
        sizes = [f"{part.shape[1]} of the {kind} encoder" for kind, part in encoded.items()]
        found, parts = features_BF.shape[1], "encoders"
        if len(sizes) > 1:
            parts = f"encoders ({' and '.join(sizes)})"
    if found != model.feature_size:
        given = "gives" if parts == "features" else "give"
        raise ConfigError(
            f"{what} says feature_size {model.feature_size}, but its {parts} {given} {found}; allowed: the number of "
            f"features of all encoders together, here {found}"
        )
    return features_BF


def _encoded(model: TaskModel, inputs: Inputs, what: str) -> dict[str, Tensor]:
    """Return the features of each encoder, checked."""
    encoded = {}
    if (images := model.image_encoder) is not None and inputs.images_BCHW is not None:
        side = inputs.images_BCHW.shape[-1]
        allowed = f"an encoder of float images of the run's size, (B, 3, {side}, {side}) with data.image-size {side}"
        given = f"images of {side} x {side} pixels"
        encoded["image"] = _rows(lambda: images(inputs.images_BCHW), what, "image encoder", given, allowed)
    if (texts := model.text_encoder) is not None and inputs.tokens_BL is not None:
        shape = tuple(inputs.tokens_BL.shape)
        allowed = "an encoder of what the model's tokenize gives, (B, L) with any L"
        given = f"tokens of shape {shape}"
        encoded["text"] = _rows(lambda: texts(inputs.tokens_BL), what, "text encoder", given, allowed)
    return encoded


def _rows(call: Callable[[], object], what: str, part: str, given: str, allowed: str) -> Tensor:
    """Return one row of features per example."""
    rows = _tried(call, f"{what} has {_a(part)} that fails on {given}", allowed)
    count = len(EXAMPLE_TEXTS)
    if not isinstance(rows, Tensor) or rows.dim() != 2 or len(rows) != count:
        raise ConfigError(
            f"{what} has {_a(part)} that gives {_described(rows)} for {count} samples; allowed: one row of features "
            f"per sample, ({count}, F), as nn.Flatten() at its end makes"
        )
    return rows


def _check_head(model: TaskModel, features_BF: Tensor, classes: int, what: str) -> None:
    size = features_BF.shape[1]
    allowed = f"a head from {size} features to {classes} classes"
    logits = _tried(lambda: model.head(features_BF), f"{what} has a head that fails on {size} features", allowed)
    _check_logits(logits, classes, f"{what} has a head that gives")


def _check_logits(logits: object, classes: int, what: str) -> None:
    expected = (len(EXAMPLE_TEXTS), classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        raise ConfigError(
            f"{what} {_described(logits)} for {expected[0]} samples and {classes} classes; allowed: logits of shape "
            f"{expected}, one per class of the run"
        )


def _tried(call: Callable[[], object], failing: str, allowed: str) -> object:
    try:
        return call()
    except Exception as error:  # The user's model may raise anything.
        raise ConfigError(f"{failing} ({one_line(error)}); allowed: {allowed}") from error


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _a(part: str) -> str:
    return part if part.endswith("s") else f"{'an' if part[0] in 'aeiou' else 'a'} {part}"
