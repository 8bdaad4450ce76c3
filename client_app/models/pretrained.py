"""Task models from transformers: image classifiers, text classifiers, and dual encoders such as CLIP.

``transformers:SOURCE`` names a folder that transformers saved, a hub id, or a folder (or file) with only a
configuration; the weights are then random. A classifier's last linear layer becomes the head of the task model, and the
layers before it become an encoder of pooled features. A dual encoder gets a new head on the features of both encoders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmmkt.client_app.models.task_model import PADDING, TaskModel, TextLengths
from fedmmkt.common.config import ConfigError
from fedmmkt.common.files import write_text
from fedmmkt.common.hub import unreachable_hub

LONGEST_TEXT = 512
BILINEAR, BICUBIC = 2, 3  # PIL's codes, as in the configurations of image processors
WEIGHT_FILES = ("*.safetensors", "*.bin")
# Trained on padded texts without a mask; they read the text feature at the last position.
PADS_TO_THE_END = ("siglip", "siglip2")


@dataclass(frozen=True)
class ImagePreparation:
    """What a model's image processor does to a square RGB image.

    Attributes
    ----------
    size : tuple of int
        Height and width of the model's input. A centre crop of the processor is not applied: the run's images are
        already square, so the whole image is resized to the size of the crop.
    mean, std : tuple of float
        Per channel, for values in [0, 1]; one channel means grey.
    resample : int
        PIL's code of the interpolation.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Convert images in [-1, 1] of any size to the model's input."""
        mode = "bicubic" if self.resample == BICUBIC else "bilinear"
        if images_BCHW.shape[-2:] != self.size:
            images_BCHW = F.interpolate(images_BCHW, self.size, mode=mode, antialias=True).clamp(-1, 1)
        if len(self.mean) == 1:
            images_BCHW = images_BCHW.mean(1, keepdim=True)
        mean, std = (images_BCHW.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return ((images_BCHW + 1) / 2 - mean) / std

    def to_json(self) -> dict[str, Any]:
        """Return the preparation in the format of transformers' image processors."""
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "size": {"height": self.size[0], "width": self.size[1]},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": self.resample,
            "rescale_factor": 1 / 255,
        }


class ImageEncoder(nn.Module):
    """Maps images to the features of a model from transformers."""

    def __init__(self, model: nn.Module, prepare: ImagePreparation) -> None:
        super().__init__()
        self.model = model
        self.prepare = prepare

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images in [-1, 1] to features (B, F)."""
        pixels_BCHW = self.prepare(images_BCHW)
        model: Any = self.model
        if hasattr(model, "get_image_features"):
            return _unit(model.get_image_features(pixel_values=pixels_BCHW))
        return model(pixel_values=pixels_BCHW).logits


class TextEncoder(nn.Module):
    """Maps tokens to the features of a model from transformers.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model, with an identity in place of its head.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's own tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        config: Any = model.config
        self.pads_to_the_end = config.model_type in PADS_TO_THE_END

    def tokenize(self, texts: list[str]) -> Tensor:
        """Tokenize texts (int64, texts x tokens), cut to the longest text that the model reads."""
        encoded = self.tokenizer(
            texts,
            padding="max_length" if self.pads_to_the_end else "longest",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids_BL: Tensor = encoded["input_ids"]
        return ids_BL if self.pads_to_the_end else ids_BL.masked_fill(encoded["attention_mask"] == 0, PADDING)

    def text_lengths(self, texts: list[str]) -> TextLengths:
        """Count the tokens of texts before they are cut."""
        ids = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"] if texts else []
        return TextLengths([len(tokens) for tokens in ids], self.tokenizer.model_max_length, "tokens")

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Map tokens to features (B, F)."""
        present_BL = tokens_BL != PADDING
        # Cut common padding: attention costs the square of the length, and most batches are far from the longest text.
        present_BL = present_BL[:, : max(1, int(present_BL.sum(1).max()))]
        ids_BL = tokens_BL[:, : present_BL.shape[1]].masked_fill(~present_BL, self.tokenizer.pad_token_id)
        model_inputs = {"input_ids": ids_BL, "attention_mask": present_BL.long()}
        if self.pads_to_the_end:
            del model_inputs["attention_mask"]
        model: Any = self.model
        if hasattr(model, "get_text_features"):
            return _unit(model.get_text_features(**model_inputs))
        return model(**model_inputs).logits


class TransformersModel(TaskModel):
    """A task model around a model from transformers.

    Parameters
    ----------
    classes : int
        Size of the class space.
    feature_size : int
        Number of features of all encoders together.
    image_encoder : ImageEncoder, optional
    text_encoder : TextEncoder, optional
    head_name : str
        Name of the model's original head layer; empty if it had none.
    is_pretrained : bool
        Whether the encoders are pretrained.
    """

    def __init__(
        self,
        classes: int,
        feature_size: int,
        image_encoder: ImageEncoder | None,
        text_encoder: TextEncoder | None,
        head_name: str = "",
        is_pretrained: bool = False,
    ) -> None:
        super().__init__(classes, feature_size, image_encoder, text_encoder)
        self.head_name = head_name
        self.is_pretrained = is_pretrained

    def tokenize(self, texts: list[str]) -> Tensor:
        """Tokenize texts with the model's own tokenizer."""
        return (
            self.text_encoder.tokenize(texts) if isinstance(self.text_encoder, TextEncoder) else super().tokenize(texts)
        )

    def text_lengths(self, texts: list[str]) -> TextLengths | None:
        """Count the tokens of texts by the model's own tokenizer."""
        encoder = self.text_encoder
        return encoder.text_lengths(texts) if isinstance(encoder, TextEncoder) else super().text_lengths(texts)

    def saved_name(self, name: str) -> str:
        """Return the name that transformers uses for a weight, so that it can load the saved file."""
        for prefix in ("image_encoder.model.", "text_encoder.model."):
            if name.startswith(prefix):
                return name.removeprefix(prefix)
        return name.replace("head", self.head_name, 1) if self.head_name else super().saved_name(name)

    def save_description(self, folder: Path) -> None:
        """Write configuration, tokenizer and image processor, so that transformers can load the saved weights."""
        if isinstance(self.text_encoder, TextEncoder):
            self.text_encoder.tokenizer.save_pretrained(folder)
        if isinstance(self.image_encoder, ImageEncoder):
            write_text(folder / "preprocessor_config.json", json.dumps(self.image_encoder.prepare.to_json(), indent=2))
        encoder: Any = self.image_encoder or self.text_encoder
        encoder.model.config.architectures = [type(encoder.model).__name__]
        encoder.model.config.save_pretrained(folder)


def check_source(source: str) -> Path:
    """Check that a folder or configuration file is there; return the folder, which is none for a hub id.

    Raises
    ------
    ConfigError
        If there is no such folder, or it has no ``config.json``.
    """
    name = f"client model {'transformers:' + source!r}"
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent
    if _is_path(source) and not path.exists():
        raise ConfigError(f"{name} is not there; allowed: a folder with config.json, or a hub id such as owner/name")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"{name} has no config.json; allowed: a folder that transformers saved, or a hub id")
    return path


def check_on_hub(source: str) -> None:
    """Check that a model's configuration is on the hub, or in its cache here.

    Raises
    ------
    ConfigError
        If it is not.
    """
    from huggingface_hub import hf_hub_download

    unreachable = unreachable_hub()
    with _explained(f"client model {'transformers:' + source!r}"):
        try:
            hf_hub_download(source, "config.json")
        except Exception as error:
            raise (OSError(unreachable) if unreachable else error) from None


def build_transformers_model(source: str, labels: tuple[str, ...], image_size: int) -> TransformersModel:
    """Load a model from transformers and give it a head for the run's classes.

    A head that was trained for exactly these classes, in this order, is kept. Any other head is initialised again.

    Parameters
    ----------
    source : str
        Folder, hub id, or configuration file.
    labels : tuple of str
        The class space.
    image_size : int
        Side of the images in pixels, used if neither processor nor configuration names a size.

    Raises
    ------
    ConfigError
        If the model cannot be loaded, does not classify images or texts, or has no tokenizer.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    name = f"client model {'transformers:' + source!r}"
    path = check_source(source)
    place = str(path) if path.is_dir() else source
    loader: Any
    reads: tuple[str, ...]
    with _quietly(), _explained(name):
        config = transformers.AutoConfig.from_pretrained(place)
        kind = type(config)
        if kind in modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING:
            loader, reads = transformers.AutoModel, ("image", "text")
        elif kind in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            loader, reads = transformers.AutoModelForImageClassification, ("image",)
        elif kind in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            loader, reads = transformers.AutoModelForSequenceClassification, ("text",)
        else:
            raise ConfigError(
                f"{name} is a {config.model_type!r}; allowed: what transformers has for image classification, "
                "text classification or zero-shot image classification (dual encoders)"
            )
        tokenizer = _load_tokenizer(place, name, config) if "text" in reads else None
        prepare = _load_preparation(place, config, image_size) if "image" in reads else None
        trained_labels = tuple(str(config.id2label[index]) for index in sorted(config.id2label or {}))
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        is_pretrained = not path.is_dir() or any(any(path.glob(pattern)) for pattern in WEIGHT_FILES)
        if is_pretrained:
            model = loader.from_pretrained(place, config=config, ignore_mismatched_sizes=True, dtype=torch.float32)
        else:
            model = loader.from_config(config)
        images = ImageEncoder(model, prepare) if prepare else None
        texts = TextEncoder(model, tokenizer) if tokenizer else None
        if images and texts:
            return TransformersModel(len(labels), _joined_size(images, texts), images, texts, "", is_pretrained)
        head_name, head = _take_head(model, len(labels), name)
    if trained_labels != labels:
        head.reset_parameters()
    task_model = TransformersModel(len(labels), head.in_features, images, texts, head_name, is_pretrained)
    task_model.head = head
    return task_model


def _take_head(model: Any, classes: int, name: str) -> tuple[str, nn.Linear]:
    """Replace a classifier's last linear layer by an identity; return the name of the layer, and the layer."""
    heads = [
        (key, module)
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes
    ]
    if not heads:
        raise ConfigError(f"{name} is a {type(model).__name__}, which does not end in a linear layer over its classes")
    model.set_submodule(heads[-1][0], nn.Identity())
    return heads[-1]


@torch.no_grad()
def _joined_size(images: ImageEncoder, texts: TextEncoder) -> int:
    """Return the number of features of both encoders together.

    It is measured on an example, because each model family names these sizes differently in its configuration.
    """
    parts = images(torch.zeros(1, 3, 8, 8)), texts(texts.tokenize(["a"]))
    return sum(part.shape[1] for part in parts)


def _load_tokenizer(place: str, name: str, config: Any) -> Any:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # What transformers returns if there are no files.
            raise ValueError("it knows no words")
    except Exception as error:  # The tokenizers of transformers raise many kinds of errors.
        raise ConfigError(
            f"{name} has no tokenizer that can be read ({_first_line(error)}); save one beside its configuration, "
            "by tokenizer.save_pretrained(folder)"
        ) from None
    text_config = getattr(config, "text_config", None) or config
    if len(tokenizer) > text_config.vocab_size:
        raise ConfigError(
            f"{name} has a tokenizer of {len(tokenizer)} tokens and a configuration of {text_config.vocab_size}; "
            "allowed: the model's own tokenizer"
        )
    if tokenizer.pad_token is None:  # For example GPT-2, which finds the end of a text by the mask.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    positions = getattr(text_config, "max_position_embeddings", None) or LONGEST_TEXT
    if text_config.model_type in ("roberta", "xlm-roberta", "camembert"):  # Position ids start after the padding id.
        positions -= tokenizer.pad_token_id + 1
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions, LONGEST_TEXT)
    tokenizer.padding_side = "right"
    return tokenizer


def _load_preparation(place: str, config: Any, image_size: int) -> ImagePreparation:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(place)
    except OSError:  # There is no processor, for example beside a configuration alone.
        processor = {}
    vision = getattr(config, "vision_config", None) or config
    size = processor.get("size") or getattr(vision, "image_size", None) or image_size
    if processor.get("do_center_crop"):
        size = processor.get("crop_size") or size
    half = (0.5,) * getattr(vision, "num_channels", 3)
    mean, std = (tuple(processor.get(key) or half) for key in ("image_mean", "image_std"))
    if not processor.get("do_normalize", True):
        mean, std = (0.0,) * len(half), (1.0,) * len(half)
    return ImagePreparation(_height_and_width(size), mean, std, processor.get("resample", BILINEAR))


def _height_and_width(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        return (side, side) if side else (size["height"], size["width"])
    height, width = size
    return height, width


def _unit(features: Any) -> Tensor:
    """Scale features to unit length, as dual encoders do before a comparison."""
    features_BF: Tensor = getattr(features, "pooler_output", features)
    return F.normalize(features_BF, dim=1)


def _is_path(source: str) -> bool:
    return source.startswith(("/", "~", ".")) or source.count("/") > 1


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn any error from loading into one clear `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # Each loader reports bad files and network problems in its own way.
        raise ConfigError(
            f"{name} cannot be loaded ({_first_line(error)}); allowed: a folder with config.json, or a hub id that "
            "this machine can reach (a gated one needs `hf auth login`) or has in its cache"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quietly() -> Iterator[None]:
    """Load without progress bars and without transformers' warnings about heads that do not fit."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
