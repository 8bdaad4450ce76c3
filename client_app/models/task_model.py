"""The base of all task models: their inputs, and a linear head on the features of one or two encoders."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from fedmmkt.common.payloads import Modality
from fedmmkt.common.registry import Registry

TEXT_BUCKETS = 4096
TEXT_LENGTH = 96
PADDING = -1  # Padding after the end of a text, for models with their own tokenizer.


@dataclass(frozen=True)
class Inputs:
    """The inputs of task models.

    Attributes
    ----------
    images_BCHW : torch.Tensor, optional
        RGB; float32 in [-1, 1], or uint8 for samples that are read by index (a quarter of the memory).
    tokens_BL : torch.Tensor, optional
        int64 tokens from the model's `TaskModel.tokenize`.
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
    """Convert uint8 images to float32 in [-1, 1]; other images are returned unchanged."""
    return (images_BCHW.float() / 127.5 - 1).contiguous() if images_BCHW.dtype == torch.uint8 else images_BCHW


class TaskModel(nn.Module):
    """A linear classifier on the features of an image encoder, a text encoder, or both together.

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
        Whether the encoders are pretrained; they then use the learning rate for pretrained encoders.
    is_frozen : bool
        Whether the encoders are frozen.
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
        """The kind of inputs that the model reads."""
        if self.image_encoder is None:
            return "text"
        return "image" if self.text_encoder is None else "image+text"

    def tokenize(self, texts: list[str]) -> Tensor:
        """Turn texts into tokens for the text encoder (int64, texts x tokens)."""
        return tokenize(texts)

    def freeze_encoders(self) -> None:
        """Freeze the encoders, including dropout and batch statistics; only the head is trained."""
        for encoder in (self.image_encoder, self.text_encoder):
            if encoder is not None:
                encoder.requires_grad_(False)
        self.is_frozen = True

    def train(self, mode: bool = True) -> Self:
        """Set training mode; frozen encoders stay in evaluation mode."""
        super().train(mode)
        for encoder in (self.image_encoder, self.text_encoder):
            if encoder is not None and self.is_frozen:
                encoder.eval()
        return self

    def saved_name(self, name: str) -> str:
        """Return the name of a weight in the saved file; models from a library keep the names of that library."""
        return f"task_model.{name}"

    def save_description(self, folder: Path) -> None:
        """Write other files that a library needs to load the saved weights; a plain model needs none."""

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


# Called with the number of classes and the side of the images in pixels.
TaskModelFactory = Callable[[int, int], TaskModel]
task_models: Registry[TaskModelFactory] = Registry(
    "task model", "client.models", ("classes", "image_size"), also="transformers: with a folder or hub id"
)


def tokenize(texts: list[str]) -> Tensor:
    """Hash words and their letter trigrams into buckets, so that clients need no common vocabulary.

    This is the bag of hashed n-grams of fastText (arXiv 1607.04606).

    Returns
    -------
    torch.Tensor
        int64 tokens, texts x `TEXT_LENGTH`; zero is padding.
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
