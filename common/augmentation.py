"""Random augmentation of training images, and random warps of generated ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def augment(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Apply a random shift, scale, rotation, shear and contrast to each image.

    Pixels from outside the image get the colour of the nearest border pixel.

    Parameters
    ----------
    images_BCHW : torch.Tensor
        float32 in [-1, 1]; the result has the same shape and range.
    generator : torch.Generator
        Source of the random numbers, on the CPU.
    """
    count = len(images_BCHW)
    uniform = torch.rand(count, 7, generator=generator) * 2 - 1
    angle, shear = uniform[:, 0] * 0.2, uniform[:, 1] * 0.15
    scale_x, scale_y = 1 + uniform[:, 2] * 0.12, 1 + uniform[:, 3] * 0.12
    cosine, sine = torch.cos(angle), torch.sin(angle)
    rows = (scale_x * cosine, shear - sine, uniform[:, 4] * 0.12, sine + shear, scale_y * cosine, uniform[:, 5] * 0.12)
    theta_B23 = torch.stack(rows, dim=1).view(count, 2, 3).to(images_BCHW.device)
    grid = F.affine_grid(theta_B23, list(images_BCHW.shape), align_corners=False)
    moved = F.grid_sample(images_BCHW, grid, padding_mode="border", align_corners=False)
    contrast = (1 + uniform[:, 6] * 0.2).view(-1, 1, 1, 1).to(images_BCHW.device)
    return ((moved + 1) * contrast - 1).clamp(-1, 1)


def warp(images_BCHW: Tensor, seeds: Sequence[int], amount: float) -> Tensor:
    """Turn, shear, scale, shift and bend each image at random.

    It is bent by a smooth field of displacements, as in elastic distortions (Simard et al., Best practices for
    convolutional neural networks, 2003). Pixels from outside the image get the colour of the nearest border pixel.

    Parameters
    ----------
    images_BCHW : torch.Tensor
        float32 in [-1, 1]; the result has the same shape and range.
    seeds : sequence of int
        One per image, which alone decides how it is warped.
    amount : float
        At 1, an image is turned by up to a quarter of a radian, scaled by up to a fifth, and bent by some three
        hundredths of its side. At 0, it stays as it is.
    """
    if not amount:
        return images_BCHW
    draws = [_draws(torch.Generator().manual_seed(seed)) for seed in seeds]
    uniform_B6, bent_B2HW = (torch.stack(parts) for parts in zip(*draws, strict=True))
    angle, shear, shift_x, shift_y = (uniform_B6[:, k] * amount * size for k, size in enumerate((0.25, 0.25, 0.1, 0.1)))
    scale_x, scale_y = (uniform_B6[:, 4:] * amount * 0.18).exp().unbind(1)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    rows = (scale_x * cosine, shear - sine, shift_x, sine, scale_y * cosine, shift_y)
    theta_B23 = torch.stack(rows, dim=1).view(len(seeds), 2, 3)
    bent_B2HW = F.interpolate(bent_B2HW * amount * 0.06, images_BCHW.shape[-2:], mode="bicubic", align_corners=True)
    grid = F.affine_grid(theta_B23, list(images_BCHW.shape), align_corners=False) + bent_B2HW.movedim(1, -1)
    grid = grid.to(images_BCHW.device)
    # Bilinear pixels would be blurred, and variations of variations the more.
    warped_BCHW = F.grid_sample(images_BCHW, grid, "bicubic", padding_mode="border", align_corners=False)
    return warped_BCHW.clamp(-1, 1)


def _draws(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw what warps one image: six numbers in [-1, 1], and displacements at 4 x 4 points."""
    return torch.rand(6, generator=generator) * 2 - 1, torch.randn(2, 4, 4, generator=generator)
