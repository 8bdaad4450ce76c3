"""Samples: joined, selected and scored, and the seeds that they are made from."""

import numpy as np
import torch

from fedmmkt.server_app.t2i.samples import Samples, latents_of, sample_seeds


def samples(*numbers, scores=None):
    """Make samples of which every part tells the number."""
    return Samples(
        tuple(f"prompt {number}" for number in numbers),
        torch.tensor(numbers),
        np.array(numbers, np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8),
        torch.tensor(numbers).float()[:, None, None, None],
        None if scores is None else torch.tensor(scores),
    )


def numbers_of(samples):
    """Return the number that each part of each sample tells."""
    parts = [int(prompt.removeprefix("prompt ")) for prompt in samples.prompts], samples.prompted_N.tolist()
    return [*parts, samples.images_NHWC[:, 0, 0, 0].tolist(), samples.latents_NCHW[:, 0, 0, 0].tolist()]


def test_parts_are_joined_in_order():
    joined = Samples.join([samples(3, 1, scores=[0.5, 1.0]), samples(2, scores=[2.0])])

    assert numbers_of(joined) == [[3, 1, 2]] * 4
    assert joined.scores_N.tolist() == [0.5, 1.0, 2.0]
    assert len(joined) == 3


def test_scores_are_joined_if_all_parts_have_them():
    assert Samples.join([samples(1, scores=[1.0]), samples(2)]).scores_N is None


def test_samples_are_selected_in_the_order_of_the_index():
    selected = samples(5, 6, 7, scores=[0.5, 0.6, 0.7]).select(np.array([2, 0]))

    assert numbers_of(selected) == [[7, 5]] * 4
    assert [round(score, 1) for score in selected.scores_N.tolist()] == [0.7, 0.5]
    assert samples(5).select(np.array([0])).scores_N is None


def test_scored_samples_have_no_images_left():
    made = samples(5, 6)

    scored = made.scored(torch.tensor([1.0, 0.0]))

    assert scored.scores_N.tolist() == [1.0, 0.0]
    assert scored.images_NHWC.size == 0
    assert len(Samples.join([scored, scored]).images_NHWC) == 4
    assert made.images_NHWC.size > 0
    assert scored.latents_NCHW is made.latents_NCHW


def test_seeds_depend_on_the_run_and_the_round_alone():
    seeds = sample_seeds(0, 1, 4)

    assert seeds == sample_seeds(0, 1, 4)
    assert sample_seeds(0, 1, 2) == seeds[:2]
    assert len({*seeds, *sample_seeds(0, 2, 4), *sample_seeds(1, 1, 4)}) == 12


def test_parts_are_gathered_in_place_and_latents_found_in_parts_that_are_not_joined():
    def part(*values):
        numbers = torch.tensor(values)
        images_NHWC = np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
        return Samples(tuple(map(str, values)), numbers, images_NHWC, numbers.float().view(-1, 1, 1, 1))

    gathered = Samples.gather(iter([([2, 0], part(12, 10)), (range(1, 2), part(11))]), 3)

    assert gathered.prompts == ("10", "11", "12")
    assert gathered.prompted_N.tolist() == gathered.latents_NCHW.flatten().tolist() == [10, 11, 12]
    assert gathered.images_NHWC[:, 0, 0, 0].tolist() == [10, 11, 12]
    index_B = torch.tensor([3, 0, 2, 4, 3])
    found = latents_of([part(1, 2), part(3, 4, 5)], index_B)
    assert torch.equal(found, Samples.join([part(1, 2), part(3, 4, 5)]).latents_NCHW[index_B])
