"""Task models of different architectures and modalities, chosen by name.

A model is an encoder of images, of texts, or one of each whose features are joined, and a linear head.
``register_task_model`` adds one; a name with a colon, ``module:function``, is imported, and
``transformers:SOURCE`` is a model of that library (`client_app.pretrained`).
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import ConfigError
from common.payloads import Modality

TEXT_BUCKETS = 4096
TEXT_LENGTH = 96
PADDING = -1  # Where a text has ended, in the tokens of models with a tokenizer of their own.


@dataclass(frozen=True)
class Inputs:
    """What task models read.

    Attributes
    ----------
    images_BCHW : torch.Tensor, optional
        RGB, float32 in [-1, 1]; or uint8, a quarter of the memory, for samples that are read by index.
    tokens_BL : torch.Tensor, optional
        int64 of the model's `TaskModel.tokenize`.
    """

    images_BCHW: Tensor | None = None
    tokens_BL: Tensor | None = None

    def __getitem__(self, index: Tensor) -> Inputs:
        return Inputs(
            None if self.images_BCHW is None else to_float(self.images_BCHW[index]),
            None if self.tokens_BL is None else self.tokens_BL[index],
        )

    def __len__(self) -> int:
        present = self.images_BCHW if self.images_BCHW is not None else self.tokens_BL
        return 0 if present is None else len(present)


def to_float(images_BCHW: Tensor) -> Tensor:
    """Bring uint8 images to float32 in [-1, 1]; others are there already."""
    return (images_BCHW.float() / 127.5 - 1).contiguous() if images_BCHW.dtype == torch.uint8 else images_BCHW


class TaskModel(nn.Module):
    """A classifier over the features of one encoder, or of an image and a text encoder joined.

    Parameters
    ----------
    classes : int
        Size of the class space.
    image_encoder : torch.nn.Module, optional
        Maps float images (B, 3, S, S) to features (B, F_image).
    text_encoder : torch.nn.Module, optional
        Maps int64 tokens (B, L) to features (B, F_text).
    feature_size : int
        F_image + F_text.

    Attributes
    ----------
    is_pretrained : bool
        Whether the encoders' weights were trained before, and hence learn at the pretrained learning rate.
    """

    is_pretrained: bool = False
    is_frozen: bool = False

    def __init__(
        self,
        classes: int,
        feature_size: int,
        image_encoder: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if image_encoder is None and text_encoder is None:
            raise ValueError("a task model needs an image encoder, a text encoder, or both")
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.feature_size = feature_size
        self.head = nn.Linear(feature_size, classes)

    @property
    def modality(self) -> Modality:
        """What the model reads."""
        if self.image_encoder is None:
            return "text"
        return "image" if self.text_encoder is None else "image+text"

    def tokenize(self, texts: list[str]) -> Tensor:
        """Turn texts into what the text encoder reads (int64, texts x tokens)."""
        return tokenize(texts)

    def freeze_encoders(self) -> None:
        """Leave the encoders as they are in training, dropout and batch statistics too; the head alone learns."""
        for encoder in (self.image_encoder, self.text_encoder):
            if encoder is not None:
                encoder.requires_grad_(False)
        self.is_frozen = True

    def train(self, mode: bool = True) -> Self:
        """Set training mode, which frozen encoders do not enter."""
        super().train(mode)
        for encoder in (self.image_encoder, self.text_encoder):
            if encoder is not None and self.is_frozen:
                encoder.eval()
        return self

    def saved_name(self, name: str) -> str:
        """Name a weight in the saved file; models of a library name theirs as it does."""
        return f"task_model.{name}"

    def save_description(self, folder: Path) -> None:
        """Write what else a library needs to read the saved weights; nothing for a plain model."""

    def features(self, inputs: Inputs) -> Tensor:
        """Return features (B, F)."""
        parts = []
        if self.image_encoder is not None:
            parts.append(self.image_encoder(inputs.images_BCHW))
        if self.text_encoder is not None:
            parts.append(self.text_encoder(inputs.tokens_BL))
        return torch.cat(parts, dim=1)

    def forward(self, inputs: Inputs) -> Tensor:
        """Return logits (B, C)."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


TaskModelFactory = Callable[[int, int], TaskModel]
_FACTORIES: dict[str, TaskModelFactory] = {}


def register_task_model(name: str) -> Callable[[TaskModelFactory], TaskModelFactory]:
    """Register a function ``(classes, image_size) -> TaskModel`` under a name that run-config can choose."""

    def register(factory: TaskModelFactory) -> TaskModelFactory:
        _FACTORIES[name] = factory
        return factory

    return register


def check_task_model(name: str) -> None:
    """Check what can be known of a model's name without importing or loading it.

    Raises
    ------
    ConfigError
        If no such model is registered.
    """
    if ":" not in name and name not in _FACTORIES:
        raise ConfigError(
            f"client model {name!r} is unknown; allowed: {', '.join(_FACTORIES)}, module:function, or "
            "transformers: with a folder or hub id"
        )


def build_task_model(name: str, classes: int, image_size: int, labels: tuple[str, ...] = ()) -> TaskModel:
    """Build a task model by registered name, by ``transformers:SOURCE``, or by ``module:function``.

    Parameters
    ----------
    name : str
        The model.
    classes : int
        Size of the class space.
    image_size : int
        Pixels a side of the images that it will see.
    labels : tuple of str
        Names of the classes, which a model of transformers keeps in its configuration.

    Raises
    ------
    ConfigError
        If the name is none of these, the model cannot be loaded, or what is built is no `TaskModel`.
    """
    if name.startswith("transformers:"):
        from client_app.pretrained import build_transformers_model  # Slow to import.

        labels = labels or tuple(map(str, range(classes)))
        return build_transformers_model(name.removeprefix("transformers:"), labels, image_size)
    check_task_model(name)
    model = (_FACTORIES.get(name) or _imported(name))(classes, image_size)
    if not isinstance(model, TaskModel):
        raise ConfigError(f"client model {name!r} built a {type(model).__name__}; allowed: a TaskModel")
    return model


def _imported(name: str) -> TaskModelFactory:
    module, _, function = name.partition(":")
    try:
        factory: TaskModelFactory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"client model {name!r} cannot be imported: {error}") from None
    return factory


def model_label(name: str) -> str:
    """Name a model in logs and reports, without the folder that it came from."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith("transformers:") else name


def tokenize(texts: list[str]) -> Tensor:
    """Hash words and their letter trigrams into buckets, so that clients need agree on no vocabulary.

    The bag of hashed n-grams is that of fastText (arXiv 1607.04606).

    Returns
    -------
    torch.Tensor
        int64, texts x `TEXT_LENGTH`; zero is padding.
    """
    tokens_NL = torch.zeros(len(texts), TEXT_LENGTH, dtype=torch.int64)
    cache: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        ids = [token for word in text.lower().split() for token in _word_tokens(word.strip(".,;:!?'\"()"), cache)]
        ids = ids[:TEXT_LENGTH]
        tokens_NL[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return tokens_NL


def _word_tokens(word: str, cache: dict[str, list[int]]) -> list[int]:
    if word not in cache:
        padded = f"<{word}>"
        grams = [padded, *(padded[start : start + 3] for start in range(len(padded) - 2))]
        cache[word] = [1 + zlib.crc32(gram.encode()) % (TEXT_BUCKETS - 1) for gram in dict.fromkeys(grams)]
    return cache[word]


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut, with group norm, since clients' batches are small and skewed."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.first_norm, self.second_norm = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        y = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(y + self.shortcut(x))


class SeparableBlock(nn.Sequential):
    """A depthwise, then a pointwise convolution (MobileNet, arXiv 1704.04861), with group norm."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in, bias=False),
            *(nn.GroupNorm(8, channels_in), nn.ReLU()),
            nn.Conv2d(channels_in, channels, 1, bias=False),
            *(nn.GroupNorm(8, channels), nn.ReLU()),
        )


class PatchTransformer(nn.Module):
    """transformers' ViT on few patches; its tokens are flattened, since their mean loses place on small data."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel  # Slow to import, and only this model needs it.

        config = ViTConfig(
            image_size=image_size,
            patch_size=max(1, image_size // 8),
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.reduce = nn.Linear(48, 16)
        patches = (image_size // config.patch_size) ** 2
        self.feature_size = 16 * patches

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images to features (B, 16 x patches)."""
        tokens_BLD = self.vit(images_BCHW).last_hidden_state[:, 1:]
        return F.gelu(self.reduce(tokens_BLD)).flatten(1)


class TextBag(nn.Module):
    """Mean of token embeddings, then a hidden layer."""

    def __init__(self, size: int = 64, embedding: int = 16) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(TEXT_BUCKETS, embedding, mode="mean", padding_idx=0)
        self.hidden = nn.Linear(embedding, size)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Map tokens to features (B, size)."""
        return F.relu(self.hidden(self.embedding(tokens_BL)))


class TextTransformer(nn.Module):
    """One transformer layer over token embeddings, averaged over the tokens that are there."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TEXT_BUCKETS, size, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(size, 4, 2 * size, dropout=0.0, batch_first=True)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Map tokens to features (B, size)."""
        present_BL = tokens_BL > 0
        present_BL[:, 0] = True  # An empty text still has one token to attend to.
        states_BLD = self.layer(self.embedding(tokens_BL), src_key_padding_mask=~present_BL)
        weight_BL1 = present_BL[..., None].to(states_BLD.dtype)
        mean_BD: Tensor = (states_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)
        return mean_BD


def _cnn_encoder() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(4)),
        *(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU()),
    )


@register_task_model("cnn")
def cnn(classes: int, image_size: int) -> TaskModel:
    """Three convolutions and a hidden layer; 90 thousand parameters."""
    return TaskModel(classes, 64, image_encoder=_cnn_encoder())


@register_task_model("mlp")
def mlp(classes: int, image_size: int) -> TaskModel:
    """Two hidden layers over 16 x 16 pixels; 107 thousand parameters."""
    layers = (nn.AdaptiveAvgPool2d(16), nn.Flatten(), nn.Linear(768, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    return TaskModel(classes, 64, image_encoder=nn.Sequential(*layers))


@register_task_model("resnet")
def resnet(classes: int, image_size: int) -> TaskModel:
    """Three residual blocks; 91 thousand parameters."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.GroupNorm(8, 16), nn.ReLU())
    blocks = (ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2))
    encoder = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return TaskModel(classes, 256, image_encoder=encoder)


@register_task_model("mobilenet")
def mobilenet(classes: int, image_size: int) -> TaskModel:
    """Four depthwise separable blocks; 76 thousand parameters."""
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.GroupNorm(8, 32), nn.ReLU())
    sizes = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2))
    encoder = nn.Sequential(stem, *(SeparableBlock(*size) for size in sizes), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return TaskModel(classes, 1024, image_encoder=encoder)


@register_task_model("vit")
def vit(classes: int, image_size: int) -> TaskModel:
    """Two transformer layers over 8 x 8 patches."""
    encoder = PatchTransformer(image_size)
    return TaskModel(classes, encoder.feature_size, image_encoder=encoder)


@register_task_model("text")
def text(classes: int, image_size: int) -> TaskModel:
    """Bag of hashed words and letter trigrams."""
    return TaskModel(classes, 64, text_encoder=TextBag())


@register_task_model("text-transformer")
def text_transformer(classes: int, image_size: int) -> TaskModel:
    """One transformer layer over hashed words and letter trigrams."""
    return TaskModel(classes, 32, text_encoder=TextTransformer())


@register_task_model("dual")
def dual(classes: int, image_size: int) -> TaskModel:
    """A convolutional image encoder and a bag of words side by side."""
    return TaskModel(classes, 128, image_encoder=_cnn_encoder(), text_encoder=TextBag())
