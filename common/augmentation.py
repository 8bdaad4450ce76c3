"""Random augmentation of training images."""

from __future__ import annotations

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
