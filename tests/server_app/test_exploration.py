"""Exploration: which samples are varied, by scores computed by hand, and that all keep their places."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmmkt.server_app.exploration import draw_parents, generate_or_vary
from fedmmkt.server_app.prompts import Prompt
from fedmmkt.server_app.t2i.samples import Samples


def samples(prompts, prompted, scores=None):
    """Make samples whose latents are their numbers."""
    count = len(prompts)
    return Samples(
        tuple(prompts),
        torch.tensor(prompted),
        np.zeros((count, 2, 2, 3), np.uint8),
        torch.arange(count).float()[:, None],
        None if scores is None else torch.tensor(scores),
    )


SCORED = samples(["a cat", "one cat", "a dog", "fog", "rain"], [0, 0, 1, -1, -1], [0.0, 2.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (Prompt("the cat", 0), 1),  # The only cat with a score.
        (Prompt("a dog", 1), None),  # No dog has one.
        (Prompt("a cow", 2), None),
        (Prompt("rain", -1), 4),  # Without a class, by the text.
        (Prompt("snow", -1), None),
    ],
)
def test_a_parent_is_a_scored_sample_of_the_same_class_or_text(prompt, expected):
    parents = draw_parents(SCORED, [Prompt("unknown", 9), prompt], 0)

    assert {index: int(latent) for index, latent in parents.items()} == ({} if expected is None else {1: expected})


def test_parents_are_drawn_by_score_and_by_seed():
    scored = samples(["a cat"] * 2, [0, 0], [1.0, 3.0])
    prompts = [Prompt("a cat", 0)] * 400

    first, again, other = (draw_parents(scored, prompts, seed) for seed in (0, 0, 1))

    drawn = [int(latent) for latent in first.values()]
    assert sum(drawn) / len(drawn) == pytest.approx(0.75, abs=0.05)
    assert drawn == [int(latent) for latent in again.values()] != [int(latent) for latent in other.values()]


def test_samples_without_scores_have_no_children():
    assert draw_parents(samples(["a cat"], [0]), [Prompt("a cat", 0)], 0) == {}


class Spy:
    """In place of a T2I model: its samples are named by how they were made, and their latents are their seeds."""

    def generate_parts(self, prompts, seeds, guidance, progress, image_size):
        self.generated = (list(prompts), guidance)
        progress(len(prompts))
        return self._made("new", prompts, seeds)

    def vary_parts(self, parents, prompts, seeds, guidance, progress, image_size):
        progress(len(prompts))
        self.varied = ([latents.item() for latents in parents], list(prompts), guidance)
        return self._made("varied", prompts, seeds)

    @staticmethod
    def _made(how, prompts, seeds):
        for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            made = samples([f"{how} {prompt}"], [-1])
            yield range(place, place + 1), replace(made, latents_NCHW=torch.tensor([[seed]]))


@pytest.mark.parametrize(
    ("parents", "expected"),
    [
        ({}, ["new a", "new b", "new c"]),
        ({1: 7.0}, ["new a", "varied b", "new c"]),
        ({2: 8.0, 0: 7.0}, ["varied a", "new b", "varied c"]),
        ({0: 7.0, 1: 8.0, 2: 9.0}, ["varied a", "varied b", "varied c"]),
    ],
)
def test_each_sample_has_the_place_the_seed_and_the_class_of_its_prompt(parents, expected):
    generator, told = Spy(), []
    prompts = [Prompt(text, index) for index, text in enumerate("abc")]
    latents = {index: torch.tensor([latent]) for index, latent in parents.items()}

    made = generate_or_vary(generator, prompts, [5, 6, 7], 1.5, latents, lambda new: told.append(new) or id)

    assert list(made.prompts) == expected
    assert made.latents_NCHW[:, 0].tolist() == [5, 6, 7]
    assert made.prompted_N.tolist() == [0, 1, 2]
    assert told == [count for count in (len(parents), 3 - len(parents)) if count]
    if parents:
        assert generator.varied == ([*parents.values()], ["abc"[index] for index in parents], 1.5)
