"""Exploration: some samples of a round are variations of well-scored samples of the last round, others are new."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmmkt.server_app.prompts import Prompt
from fedmmkt.server_app.t2i.generator import Generator
from fedmmkt.server_app.t2i.samples import Samples


def draw_parents(scored: Samples, prompts: Sequence[Prompt], seed: int) -> dict[int, Tensor]:
    """Draw a scored sample for each prompt, with probability proportional to the score.

    The sample has the class of the prompt, or its text if the prompt names no class. A prompt without such a sample
    gets none.

    Returns
    -------
    dict of int to torch.Tensor
        Latents of the drawn samples, by index of the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    parents: dict[int, Tensor] = {}
    if scored.scores_N is None:
        return parents
    scores_N = scored.scores_N.double()
    rows_of_text: dict[str, list[int]] = {}
    for row, text in enumerate(scored.prompts):
        rows_of_text.setdefault(text, []).append(row)
    for index, prompt in enumerate(prompts):
        if prompt.class_index >= 0:
            rows = torch.arange(len(scores_N))
            chances_N = scores_N * (scored.prompted_N == prompt.class_index)
        else:
            rows = torch.tensor(rows_of_text.get(prompt.text, []), dtype=torch.long)
            chances_N = scores_N[rows]
        if bool(chances_N.any()):
            parents[index] = scored.latents_NCHW[rows[int(torch.multinomial(chances_N, 1, generator=generator))]]
    return parents


def generate_or_vary(
    generator: Generator,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    guidance: float,
    parents: Mapping[int, Tensor],
    progress: Callable[[int], Callable[[int], object]],
    image_size: int | None = None,
) -> Samples:
    """Generate one image per prompt; if the prompt has a parent, the image is a variation of the parent.

    Parameters
    ----------
    generator : Generator
        The T2I model.
    prompts, seeds : sequence
        One prompt and one seed per sample.
    guidance : float
        Guidance scale.
    parents : mapping of int to torch.Tensor
        Latents from `draw_parents`, by index of the prompt.
    progress : callable
        Called with a number of images; returns a function that is called with the number of finished images.
    image_size : int, optional
        Side in pixels to which images are resized as they are made.
    """
    varied, new = list(parents), [index for index in range(len(prompts)) if index not in parents]
    texts = [prompt.text for prompt in prompts]

    def of(chosen: list[int]) -> tuple[list[str], list[int], float]:
        return [texts[index] for index in chosen], [seeds[index] for index in chosen], guidance

    def parts() -> Iterator[tuple[list[int], Samples]]:
        if varied:
            latents = [parents[index] for index in varied]
            made = generator.vary_parts(latents, *of(varied), progress(len(varied)), image_size)
            yield from (([varied[place] for place in places], part) for places, part in made)
        if new:
            made = generator.generate_parts(*of(new), progress(len(new)), image_size)
            yield from (([new[place] for place in places], part) for places, part in made)

    in_order = Samples.gather(parts(), len(prompts))
    return replace(in_order, prompted_N=torch.tensor([prompt.class_index for prompt in prompts], dtype=torch.int64))
