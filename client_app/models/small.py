"""The built-in task models: small models of different architectures, which train in seconds on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmmkt.client_app.models.task_model import (
    LEAST_WIDTH,
    TEXT_BUCKETS,
    TaskModel,
    TextLengths,
    hashed_lengths,
    task_models,
    tokenize,
)


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut; it uses group norm because clients' batches are small and skewed."""

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
    """A depthwise and then a pointwise convolution (MobileNet, arXiv 1704.04861), with group norm."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in, bias=False),
            *(nn.GroupNorm(8, channels_in), nn.ReLU()),
            nn.Conv2d(channels_in, channels, 1, bias=False),
            *(nn.GroupNorm(8, channels), nn.ReLU()),
        )


class PatchTransformer(nn.Module):
    """transformers' ViT on few patches.

    Its tokens are flattened, not averaged: on small data, their mean loses the information about position.
    """

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
    """Mean of token embeddings, then a hidden layer.

    In a text of hundreds of words, a few common ones would drown those that tell its class. So in texts of more than
    `LEAST_WIDTH` tokens, each token counts once. And the mean of n unrelated vectors shrinks as 1 / sqrt(n), so theirs
    is scaled up to the size that it has at this length.
    """

    def __init__(self, size: int = 64, embedding: int = 16) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(TEXT_BUCKETS, embedding, mode="mean", padding_idx=0)
        self.hidden = nn.Linear(embedding, size)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Map tokens to features (B, size)."""
        lengths_B1 = _lengths(tokens_BL)
        tokens_BL = tokens_BL[:, : max(LEAST_WIDTH, int(lengths_B1.max()))]
        tokens_BL = torch.where(lengths_B1 > LEAST_WIDTH, _distinct(tokens_BL), tokens_BL)
        scale_B1 = (_lengths(tokens_BL).clamp_min(LEAST_WIDTH) / LEAST_WIDTH).sqrt()
        return F.relu(self.hidden(self.embedding(tokens_BL) * scale_B1))


def _lengths(tokens_BL: Tensor) -> Tensor:
    return (tokens_BL > 0).sum(1, keepdim=True)


def _distinct(tokens_BL: Tensor) -> Tensor:
    """Sort the tokens of each text, and replace repeated ones by padding."""
    sorted_BL = tokens_BL.sort(1).values
    repeated_BL = F.pad(sorted_BL[:, 1:] == sorted_BL[:, :-1], (1, 0))
    return sorted_BL.masked_fill(repeated_BL, 0)


class TextTransformer(nn.Module):
    """One transformer layer over words, then the mean over all words.

    A word is the mean of the embeddings of its tokens, as in fastText. Attention costs the square of the length, so it
    is over words, which are several times fewer than their tokens. If no token is marked as the first of a word, each
    counts as a word.
    """

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(TEXT_BUCKETS, size, mode="mean")
        self.layer = nn.TransformerEncoderLayer(size, 4, 2 * size, dropout=0.0, batch_first=True)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Map tokens to features (B, size)."""
        starts_BL = tokens_BL >= TEXT_BUCKETS
        starts_BL = starts_BL if bool(starts_BL.any()) else tokens_BL > 0
        counts_B1 = starts_BL.sum(1, keepdim=True).clamp_min(1)  # An empty text needs one word to attend to.
        words_BWD = self.word_vectors(tokens_BL, starts_BL, int(counts_B1.max()))
        present_BW = torch.arange(words_BWD.shape[1], device=tokens_BL.device) < counts_B1
        states_BWD = self.layer(words_BWD, src_key_padding_mask=~present_BW)
        weight_BW1 = present_BW[..., None].to(states_BWD.dtype)
        mean_BD: Tensor = (states_BWD * weight_BW1).sum(1) / weight_BW1.sum(1)
        return mean_BD

    def word_vectors(self, tokens_BL: Tensor, starts_BL: Tensor, longest: int) -> Tensor:
        """Return one vector per word, padded with zeros to the longest text."""
        words_BWD = self.embedding.weight.new_zeros(len(tokens_BL), longest, self.embedding.embedding_dim)
        if bool(starts_BL.any()):
            row_T, place_T = torch.nonzero(starts_BL, as_tuple=True)
            number_T = starts_BL.cumsum(1)[row_T, place_T] - 1
            present_BL = tokens_BL > 0
            first_T = torch.nonzero(starts_BL[present_BL])[:, 0]
            words_BWD[row_T, number_T] = self.embedding(tokens_BL[present_BL] % TEXT_BUCKETS, first_T)
        return words_BWD


class WordModel(TaskModel):
    """A task model whose text encoder reads tokens in which the first of each word is marked."""

    def tokenize(self, texts: list[str]) -> Tensor:
        """Hash texts and mark the first token of each word."""
        return tokenize(texts, mark_words=True)

    def text_lengths(self, texts: list[str]) -> TextLengths:
        """Count the words of texts."""
        return hashed_lengths(texts)


class Convolutions(nn.Sequential):
    """Layers that read images with the channels of a pixel side by side: max pooling is then much faster on CPUs."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images to features (B, F)."""
        x = images_BCHW.contiguous(memory_format=torch.channels_last)
        for layer in self:
            x = layer(x)
        return x


def _cnn_encoder() -> Convolutions:
    return Convolutions(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(4)),
        *(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU()),
    )


@task_models.register("cnn")
def cnn(classes: int, image_size: int) -> TaskModel:
    """Three convolutions and a hidden layer; 90 thousand parameters."""
    return TaskModel(classes, 64, image_encoder=_cnn_encoder())


@task_models.register("mlp")
def mlp(classes: int, image_size: int) -> TaskModel:
    """Two hidden layers over 16 x 16 pixels; 107 thousand parameters."""
    layers = (nn.AdaptiveAvgPool2d(16), nn.Flatten(), nn.Linear(768, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    return TaskModel(classes, 64, image_encoder=nn.Sequential(*layers))


@task_models.register("resnet")
def resnet(classes: int, image_size: int) -> TaskModel:
    """Three residual blocks; 91 thousand parameters."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.GroupNorm(8, 16), nn.ReLU())
    blocks = (ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2))
    encoder = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return TaskModel(classes, 256, image_encoder=encoder)


@task_models.register("mobilenet")
def mobilenet(classes: int, image_size: int) -> TaskModel:
    """Four depthwise separable blocks; 76 thousand parameters."""
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.GroupNorm(8, 32), nn.ReLU())
    sizes = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2))
    encoder = nn.Sequential(stem, *(SeparableBlock(*size) for size in sizes), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return TaskModel(classes, 1024, image_encoder=encoder)


@task_models.register("vit")
def vit(classes: int, image_size: int) -> TaskModel:
    """Two transformer layers over 8 x 8 patches."""
    encoder = PatchTransformer(image_size)
    return TaskModel(classes, encoder.feature_size, image_encoder=encoder)


@task_models.register("text")
def text(classes: int, image_size: int) -> TaskModel:
    """Bag of hashed words and letter trigrams."""
    return TaskModel(classes, 64, text_encoder=TextBag())


@task_models.register("text-transformer")
def text_transformer(classes: int, image_size: int) -> TaskModel:
    """One transformer layer over words, hashed with their letter trigrams."""
    return WordModel(classes, 32, text_encoder=TextTransformer())


@task_models.register("dual")
def dual(classes: int, image_size: int) -> TaskModel:
    """A convolutional image encoder and a bag of words side by side."""
    return TaskModel(classes, 128, image_encoder=_cnn_encoder(), text_encoder=TextBag())
