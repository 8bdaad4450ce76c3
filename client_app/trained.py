"""A client's trained model outside of a run: it is loaded from the client's folder, and predicts classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor

from fedmmkt.client_app.learning.losses import log_prior
from fedmmkt.client_app.learning.training import AlignedModel, predict
from fedmmkt.client_app.memory import DESCRIPTION, FINAL, OWN, load_weights
from fedmmkt.client_app.models.building import TRANSFORMERS, build_task_model
from fedmmkt.client_app.models.task_model import Inputs, TaskModel
from fedmmkt.common.config import ConfigError, Setting
from fedmmkt.common.datasets import RefusedImageError, read_image
from fedmmkt.common.devices import pick_device
from fedmmkt.common.images import GreyError, to_rgb_arrays, to_square, whites_of

if TYPE_CHECKING:
    from PIL import Image

Prior = Literal["own", "uniform"]


class ModelDescription(BaseModel):
    """What a client says of its saved model, in ``model.json``, and of itself and its data, in ``private.json``.

    The latter, which need not be there, has the client's name, the class counts and the columns.

    Attributes
    ----------
    client, model : str
        Name of the client, and of its task model as in ``client.models``.
    extra : dict
        The run's table ``extra``, from which a model of the user's own may take settings.
    classes : tuple of str
        The class space.
    class_counts : tuple of int or None
        Number of the client's training examples of each class; None if it is not known.
    balanced_softmax : bool
        Whether it was trained with ``client.balanced-softmax``.
    image_size : int
        Side of the images, in pixels.
    whites : dict
        What was taken for white in its images of more than eight bits, by format and mode.
    image_column, text_column : str
        The columns of its data.
    anchor_size : int
        Size of the T2I's text embeddings, to which features were aligned; 0 for none.
    round : int
        The round in which it learned last.
    """

    model_config = ConfigDict(frozen=True)

    client: str = "this model"
    model: str
    extra: dict[str, Setting]
    classes: tuple[str, ...]
    class_counts: tuple[int, ...] | None = None
    balanced_softmax: bool
    image_size: int
    whites: dict[str, float]
    image_column: str = "image"
    text_column: str = "text"
    anchor_size: int
    round: int


@dataclass(frozen=True)
class ClientModel:
    """A client's trained model; made by `load_client_model`.

    Attributes
    ----------
    task_model : TaskModel
        The model itself, a `torch.nn.Module` in evaluation mode.
    description : ModelDescription
        What it needs for predictions, such as the names of the classes.
    device : torch.device
        Where it computes.
    """

    task_model: TaskModel
    description: ModelDescription
    device: torch.device

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the predicted probabilities."""
        return self.description.classes

    @property
    def reads_images(self) -> bool:
        """Whether it needs an image of each example."""
        return "image" in self.task_model.modality

    @property
    def reads_texts(self) -> bool:
        """Whether it needs a text of each example."""
        return "text" in self.task_model.modality

    def read_image(self, source: Image.Image | str | Path | bytes) -> NDArray[np.uint8]:
        """Read an image as the client reads those that it learns from: square, RGB, of its image size.

        Parameters
        ----------
        source : PIL.Image.Image, str, Path or bytes
            An image, its file, or its encoded bytes.

        Raises
        ------
        ValueError
            If it does not decode, or has grey values beyond the white of the client's training images.
        """
        size, whites = self.description.image_size, self.description.whites
        try:
            if isinstance(source, bytes | str | Path):
                content, path = (source, "") if isinstance(source, bytes) else (None, str(source))
                square = read_image(content, path, size)
            else:
                square = to_square(source, size)
        except (RefusedImageError, FileNotFoundError, GreyError) as error:
            raise ValueError(str(error)) from error
        except Exception as error:  # Decoders raise many kinds of errors on broken bytes.
            raise ValueError(f"its image does not decode: {error}") from error
        white = whites.get(square.kind, square.largest)
        if square.largest > white:
            raise ValueError(
                f"its grey values go up to {square.largest:g}; allowed: {white:g}, the white of the training images"
            )
        return to_rgb_arrays([square], whites_of([square]) | whites)[0]

    def predict(
        self,
        images: Sequence[Image.Image | str | Path | bytes] | None = None,
        texts: Sequence[str] | None = None,
        prior: Prior | None = None,
    ) -> NDArray[np.float32]:
        """Return the probability of each class for each example.

        Parameters
        ----------
        images : sequence, optional
            One image per example, as in `read_image`, if the model reads images.
        texts : sequence of str, optional
            One text per example, if the model reads texts.
        prior : str, optional
            How frequent the classes are among these examples. ``uniform``: all alike, as the model is measured in a
            run. ``own``: as in the client's training examples, which is right for more examples of the same origin.
            Balanced softmax (arXiv 2007.10740) trains logits for a uniform prior; its equation 3 gives those for the
            other. A model that was trained without it has only its ``own``. By default, the logits are taken as they
            are. ``own`` needs ``private.json``, unless the model was trained without balanced softmax.

        Returns
        -------
        numpy.ndarray
            float32 (examples, classes); each row sums to one.

        Raises
        ------
        ConfigError
            If the model needs images or texts that are not given, or cannot have the prior.
        ValueError
            If an image cannot be read.
        """
        if (self.reads_images and images is None) or (self.reads_texts and texts is None):
            raise ConfigError(
                f"{self.description.client} reads {self.task_model.modality}; it needs "
                f"{'images' if self.reads_images and images is None else 'texts'}"
            )
        shift_C = self._shift(prior)
        images_BCHW = tokens_BL = None
        if self.reads_images and images is not None:
            size = self.description.image_size
            pixels_NHWC = np.array([self.read_image(image) for image in images], np.uint8).reshape(-1, size, size, 3)
            images_BCHW = torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).to(self.device)
        if self.reads_texts and texts is not None:
            tokens_BL = self.task_model.tokenize(list(texts)).to(self.device)
        inputs = Inputs(images_BCHW, tokens_BL)
        if not len(inputs):
            return np.zeros((0, len(self.classes)), np.float32)
        logits_NC = predict(self.task_model, inputs).float().cpu()
        probabilities_NC: NDArray[np.float32] = (logits_NC + shift_C).softmax(1).numpy()
        return probabilities_NC

    def _shift(self, prior: Prior | None) -> Tensor:
        """Return what is added to the logits for a prior (C,)."""
        if prior not in (None, "own", "uniform"):
            raise ConfigError(f"the prior is {prior!r}; allowed: own or uniform")
        if prior == "uniform" and not self.description.balanced_softmax:
            raise ConfigError(
                f"the prior is 'uniform', but {self.description.client} was trained with "
                "client.balanced-softmax=false, so that its own prior is in its logits; allowed: own"
            )
        if prior != "own" or not self.description.balanced_softmax:
            return torch.zeros(len(self.classes))
        if self.description.class_counts is None:
            raise ConfigError(
                f"the prior is 'own', but the class counts are not known: {OWN} is not beside {DESCRIPTION}; "
                "allowed: uniform"
            )
        return log_prior(torch.tensor(self.description.class_counts).float())


def load_client_model(folder: str | Path, device: str = "auto") -> ClientModel:
    """Load the model that a client saved.

    Parameters
    ----------
    folder : str or Path
        The client's folder, such as ``runs/demo/clients/cnn-0``, or a folder ``final`` or ``round-NNNNN`` in one.
    device : str
        As a node's ``device``: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises
    ------
    ConfigError
        If the folder holds no model, the model cannot be built or loaded, or the device is not there.
    """
    place = _model_folder(Path(folder).expanduser())
    chosen = pick_device(device)
    try:
        description = _read_description(place)
    except (OSError, ValueError, TypeError) as error:  # As of broken JSON, or of something else than a mapping.
        raise ConfigError(
            f"{place / DESCRIPTION} cannot be read ({_first_line(error)}); allowed: what a client of this version saved"
        ) from None
    # A model of transformers is whole in the folder; the place that it came from may be elsewhere, or changed.
    is_transformers = description.model.startswith(TRANSFORMERS)
    name = f"{TRANSFORMERS}{place.resolve()}" if is_transformers else description.model
    task_model = build_task_model(
        name,
        len(description.classes),
        description.image_size,
        description.classes,
        description.extra,
        f"{place / DESCRIPTION}: 'model'",
    )
    model = AlignedModel(task_model, description.anchor_size)
    try:
        load_weights(place, model)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"the weights in {place} do not fit {description.model!r} ({_first_line(error)})") from None
    return ClientModel(task_model.to(chosen).eval(), description, chosen)


def _read_description(place: Path) -> ModelDescription:
    """Read what the folder of a model says of it; the client's own part may have been left out."""
    files = [place / DESCRIPTION, *filter(Path.is_file, [place / OWN])]
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return ModelDescription.model_validate({key: value for part in parts for key, value in dict(part).items()})


def _model_folder(folder: Path) -> Path:
    """Return the folder itself, or ``final`` in it, whichever holds a model."""
    for place in (folder, folder / FINAL):
        if (place / DESCRIPTION).is_file():
            return place
    place = folder if folder.is_dir() else folder.parent  # Of a misspelt name, its neighbours.
    found = (path for depth in ("*", "*/*") for path in place.glob(f"{depth}/{FINAL}/{DESCRIPTION}"))
    known = sorted({path.parent.parent for path in found})
    there = f", here {', '.join(map(str, known))}" if known else ", such as runs/demo/clients/cnn-0"
    raise ConfigError(f"{folder} holds no client's model ({DESCRIPTION}); allowed: a client's folder{there}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
