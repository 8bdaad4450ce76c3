"""Generated samples: images with all that the T2I model needs to learn from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

NO_CLASS = -1  # Class index of a prompt that names no class.


@dataclass(frozen=True)
class Samples:
    """Generated images, with their prompts and latents.

    Attributes
    ----------
    prompts : tuple of str
        One prompt per sample.
    prompted_N : torch.Tensor
        int64; the class that each prompt names, `NO_CLASS` if it names none.
    images_NHWC : numpy.ndarray
        uint8 RGB. Empty if the samples are kept only for `Generator.adapt`.
    latents_NCHW : torch.Tensor
        The denoised latents of the images, in the denoiser's scale, on the CPU.
    scores_N : torch.Tensor, optional
        Weight of each sample in the T2I's update, not negative; None until clients have answered.
    """

    prompts: tuple[str, ...]
    prompted_N: Tensor
    images_NHWC: np.ndarray
    latents_NCHW: Tensor
    scores_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """Concatenate samples; scores are kept only if all parts have them."""
        scores = [part.scores_N for part in parts if part.scores_N is not None]
        return cls(
            tuple(prompt for part in parts for prompt in part.prompts),
            torch.cat([part.prompted_N for part in parts]),
            np.concatenate([part.images_NHWC for part in parts]),
            torch.cat([part.latents_NCHW for part in parts]),
            torch.cat(scores) if len(scores) == len(parts) else None,
        )

    @classmethod
    def gather(cls, parts: Iterable[tuple[Sequence[int], Samples]], count: int) -> Samples:
        """Put parts of ``count`` samples in place as they come, so that no second copy of them is held.

        Parameters
        ----------
        parts : iterable of (sequence of int, Samples)
            The positions of a part's samples, and the samples, without scores. Each position comes once.
        count : int
            Number of samples of all parts.
        """
        prompts, prompted_N = [""] * count, torch.full((count,), NO_CLASS)
        images_NHWC, latents_NCHW = np.empty((0, 0, 0, 3), np.uint8), torch.empty(0)
        for positions, part in parts:
            if not latents_NCHW.numel():
                images_NHWC = np.empty((count, *part.images_NHWC.shape[1:]), np.uint8)
                latents_NCHW = part.latents_NCHW.new_empty((count, *part.latents_NCHW.shape[1:]))
            rows = torch.tensor(positions)
            images_NHWC[rows.numpy()], latents_NCHW[rows] = part.images_NHWC, part.latents_NCHW
            prompted_N[rows] = part.prompted_N
            for position, prompt in zip(positions, part.prompts, strict=True):
                prompts[position] = prompt
        return cls(tuple(prompts), prompted_N, images_NHWC, latents_NCHW)

    def select(self, index: np.ndarray) -> Samples:
        """Return the samples at the positions ``index``, in this order."""
        rows = torch.from_numpy(index)
        return Samples(
            tuple(self.prompts[i] for i in index),
            self.prompted_N[rows],
            self.images_NHWC[index],
            self.latents_NCHW[rows],
            None if self.scores_N is None else self.scores_N[rows],
        )

    def scored(self, scores_N: Tensor) -> Samples:
        """Return the samples with scores and without images, because images need most of the memory."""
        return replace(self, scores_N=scores_N, images_NHWC=np.empty((len(self), 0, 0, 3), np.uint8))


def latents_of(parts: Sequence[Samples], index_B: Tensor) -> Tensor:
    """Return the latents of samples, by their positions in all parts together (B, C, H, W)."""
    starts = np.cumsum([0, *map(len, parts)])
    places = np.searchsorted(starts, index_B.numpy(), side="right") - 1
    return torch.stack([parts[k].latents_NCHW[int(i) - starts[k]] for k, i in zip(places, index_B, strict=True)])


def sample_seeds(seed: int, server_round: int, count: int) -> list[int]:
    """Return one seed per sample; the seeds depend only on the run's seed and the round."""
    return [int(state) for state in np.random.SeedSequence((seed, server_round)).generate_state(count)]
