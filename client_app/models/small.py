"""The built-in task models: small models of different architectures, which train in seconds on a CPU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fedmmkt.client_app.models.task_model import TEXT_BUCKETS, TaskModel, task_models


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
    """One transformer layer over token embeddings, then the mean over all tokens except padding."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TEXT_BUCKETS, size, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(size, 4, 2 * size, dropout=0.0, batch_first=True)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Map tokens to features (B, size)."""
        present_BL = tokens_BL > 0
        present_BL[:, 0] = True  # An empty text needs one token to attend to.
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
    """One transformer layer over hashed words and letter trigrams."""
    return TaskModel(classes, 32, text_encoder=TextTransformer())


@task_models.register("dual")
def dual(classes: int, image_size: int) -> TaskModel:
    """A convolutional image encoder and a bag of words side by side."""
    return TaskModel(classes, 128, image_encoder=_cnn_encoder(), text_encoder=TextBag())
