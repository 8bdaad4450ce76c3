"""The base of all task models: their inputs, and a linear head on the features of one or two encoders."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from fedmmkt.common.payloads import Modality
from fedmmkt.common.registry import Registry

TEXT_BUCKETS = 4096
LONGEST_TEXT = 512  # words of a text that are read
LONGEST_WORD = 32  # letters; a longer word, or a text without spaces, counts as several words
LEAST_WIDTH = 96  # tokens of a padded text, so that encoders that look at several neighbours always find enough
PADDING = -1  # Padding after the end of a text, for models with their own tokenizer.


@dataclass(frozen=True)
class Inputs:
    """The inputs of task models.

    Attributes
    ----------
    images_BCHW : torch.Tensor, optional
        RGB; float32 in [-1, 1], or uint8 for samples that are read by index (a quarter of the memory).
    tokens_BL : torch.Tensor, optional
        int64 tokens from the model's `TaskModel.tokenize`, or what `compact` makes of them for samples that are read by
        index.
    """

    images_BCHW: Tensor | None = None
    tokens_BL: Tensor | None = None

    def __getitem__(self, index: Tensor) -> Inputs:
        return Inputs(
            None if self.images_BCHW is None else to_float(self.images_BCHW[index]),
            None if self.tokens_BL is None else _expanded(self.tokens_BL[index]),
        )

    def __len__(self) -> int:
        present = self.images_BCHW if self.images_BCHW is not None else self.tokens_BL
        return 0 if present is None else len(present)


def to_float(images_BCHW: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]; other images are returned unchanged."""
    return (images_BCHW.float() / 127.5 - 1).contiguous() if images_BCHW.dtype == torch.uint8 else images_BCHW


def compact(tokens_NL: Tensor) -> Tensor:
    """Keep int64 tokens in as few bytes as their values need; `Inputs` makes them int64 again when it is indexed."""
    if tokens_NL.dtype != torch.int64 or not tokens_NL.numel():
        return tokens_NL
    least, most = int(tokens_NL.min()), int(tokens_NL.max())
    for dtype in (torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= least and most <= torch.iinfo(dtype).max:
            return tokens_NL.to(dtype)
    return tokens_NL


def _expanded(tokens_BL: Tensor) -> Tensor:
    return tokens_BL.long() if tokens_BL.dtype in (torch.int16, torch.int32) else tokens_BL


@dataclass(frozen=True)
class TextLengths:
    """How long texts are, and how much of a text a model reads.

    Attributes
    ----------
    lengths : list of int
        Length of each text.
    longest_read : int
        A longer text is cut to this length.
    unit : str
        What is counted: words or tokens.
    """

    lengths: list[int]
    longest_read: int
    unit: str

    def describe_cut(self) -> str:
        """Say how many texts are cut, and how much of them; empty if none is."""
        cut = [length for length in self.lengths if length > self.longest_read]
        if not cut:
            return ""
        lost, unit = sum(cut) - self.longest_read * len(cut), self.unit
        return (
            f"{len(cut)} of {len(self.lengths)} are longer than the {self.longest_read} {unit} that the model reads, "
            f"and are cut: {lost} of {sum(self.lengths)} {unit} are not read (the longest has {max(cut)})"
        )


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
    class_count : int
        Size of the class space.
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
        self.class_count = classes
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

    def text_lengths(self, texts: list[str]) -> TextLengths | None:
        """Measure texts against what `tokenize` reads of them; None if that is not known.

        A subclass with a `tokenize` of its own may say it here, so that clients are warned of texts that are cut.
        """
        if type(self).tokenize is not TaskModel.tokenize:
            return None
        return hashed_lengths(texts)

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


TaskModelFactory = Callable[[int, int], TaskModel]
task_models: Registry[TaskModelFactory] = Registry(
    "task model", "client.models", ("classes", "image_size"), also="transformers: with a folder or hub id"
)
"""The task models: functions of the number of classes and the side of images in pixels, each giving a `TaskModel`."""


def tokenize(texts: list[str], mark_words: bool = False) -> Tensor:
    """Hash words and their letter trigrams into buckets, so that clients need no common vocabulary.

    This is the bag of hashed n-grams of fastText (arXiv 1607.04606). The first `LONGEST_TEXT` words of a text are read.

    Parameters
    ----------
    texts : list of str
        The texts.
    mark_words : bool
        Whether `TEXT_BUCKETS` is added to the first token of each word.

    Returns
    -------
    torch.Tensor
        int64 tokens, padded with zeros to the longest of the texts, and to at least `LEAST_WIDTH`.
    """
    cache: dict[str, list[int]] = {}
    rows = [_text_tokens(text, cache, TEXT_BUCKETS if mark_words else 0) for text in texts]
    tokens_NL = torch.zeros(len(texts), max([LEAST_WIDTH, *map(len, rows)]), dtype=torch.int64)
    for tokens_L, row in zip(tokens_NL, rows, strict=True):
        tokens_L[: len(row)] = torch.from_numpy(row)
    return tokens_NL


def hashed_lengths(texts: list[str]) -> TextLengths:
    """Count the words of texts, for models that read what `tokenize` makes of them."""
    return TextLengths([len(split_words(text)) for text in texts], LONGEST_TEXT, "words")


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words of at most `LONGEST_WORD` letters, without punctuation around them."""
    words = (word.strip(".,;:!?'\"()") for word in text.lower().split())
    return [word[start : start + LONGEST_WORD] for word in words for start in range(0, len(word) or 1, LONGEST_WORD)]


def _text_tokens(text: str, cache: dict[str, list[int]], mark: int) -> np.ndarray:
    """Return the tokens of all words that are read, int16; ``mark`` is added to the first one of each word."""
    ids: list[int] = []
    for word in split_words(text)[:LONGEST_TEXT]:
        if word not in cache:
            first, *others = _word_tokens(word)
            cache[word] = [first + mark, *others]
        ids += cache[word]
    return np.array(ids, dtype=np.int16)


def _word_tokens(word: str) -> list[int]:
    padded = f"<{word}>"
    grams = [padded, *(padded[start : start + 3] for start in range(len(padded) - 2))]
    return [1 + zlib.crc32(gram.encode()) % (TEXT_BUCKETS - 1) for gram in dict.fromkeys(grams)]
