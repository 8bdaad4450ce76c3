import math

import numpy as np
import pytest
import torch

from fedmmkt.common.config import ConfigError
from fedmmkt.common.payloads import ClientReport, DistillationPayload
from fedmmkt.server_app.prompts import Prompt
from fedmmkt.server_app.rules.noisy_votes import sum_of_votes
from fedmmkt.server_app.rules.without_logits import check_prompts, completed, of_prompts

TWO = torch.tensor([0, 0])  # Two samples of class 0: each image of this class votes for both.


def answer(votes_N, noise=None, counts=(9,), counts_noise=None):
    return DistillationPayload(
        batch_id="b",
        class_counts_C=np.array(counts),
        counts_noise=counts_noise,
        votes_N=None if votes_N is None else np.array(votes_N, np.float32),
        votes_noise=noise,
    )


def test_votes_without_noise_are_summed():
    assert sum_of_votes([answer([0, 2]), answer(None), answer([5, 1])], TWO).tolist() == [5, 3]
    assert sum_of_votes([answer(None)], TWO) is None


def test_one_standard_deviation_of_the_noise_is_taken_from_the_sum():
    found_N = sum_of_votes([answer([10, -2], 3.0), answer([1, 3], 4.0), answer([1, 0])], TWO)

    # All count whole, since 9 images give 9 votes to each sample; the noise of the sum is the root of 9 + 16.
    assert found_N.tolist() == pytest.approx([12 - 5, 0])


def test_noise_above_the_votes_of_a_client_counts_by_their_ratio():
    found_N = sum_of_votes([answer([12, 0], 2.0), answer([0, 27], 27.0)], TWO)

    # Of the second client, 9 images give each sample 9 votes, a third of its noise.
    assert found_N.tolist() == pytest.approx([12 - math.hypot(2, 9), 0])
    assert sum_of_votes([answer([0, 27], 27.0)], TWO).tolist() == [0, 0]
    assert sum_of_votes([answer([0, 36], 27.0)], TWO).tolist() == pytest.approx([0, 12 - 9])


def test_what_images_give_a_sample_depends_on_their_class():
    prompted_N = torch.tensor([0, 0, 0, 0, 0, 0, 1, -1])
    voter = answer([20, 0, 0, 0, 0, 0, 20, 20], 10.0, counts=[14, 2])

    # Images of class 0 vote for 3 of 7 samples, 14 * 3 / 7 = 6 votes for each; those of class 1 for both of theirs, 2.
    expected_N = [20 * 0.6 - 6, 0, 0, 0, 0, 0, 20 * 0.2 - 2, 20 * 0.8 - 8]
    assert sum_of_votes([voter], prompted_N).tolist() == pytest.approx(expected_N)


def test_a_client_says_nothing_of_a_class_of_which_it_has_nothing():
    found_N = sum_of_votes([answer([5, 5], 1.0, counts=[9, 0])], torch.tensor([0, 1]))

    assert found_N.tolist() == [4, 0]


def test_a_vote_counts_for_no_more_than_an_honest_client_can_say():
    # Of 9 images, at most 9 vote for a sample, and noise adds or takes 4 * 2 but once in 16,000 times.
    assert sum_of_votes([answer([25, -16], 2.0), answer([0, 20])], TWO).tolist() == [9 + 8 - 2, 20 - 8 - 2]
    # The noise of the class counts is granted to their number too: 9 + 4 * 1.5 images.
    assert sum_of_votes([answer([31, 0], 2.0, counts_noise=1.5)], TWO).tolist() == [9 + 6 + 8 - 2, 0]


@pytest.mark.parametrize("noise", [1e-6, 9.0, 1e3, 1e12])
def test_a_liar_moves_a_sum_by_no_more_than_its_examples_whatever_noise_it_states(noise):
    honest = [answer([60, 20], 4.0, counts=[50]) for _ in range(4)]
    liar = answer([-8 * noise, 9 + 8 * noise], noise)

    without_N, with_N = sum_of_votes(honest, TWO), sum_of_votes([*honest, liar], TWO)

    # It counts for 9 votes, and for 4 times noise that is taken for 9 at most.
    low, high = -4 * 9 - (math.hypot(8, 9) - 8), 9 + 4 * 9
    moved_N = with_N - without_N
    assert bool(((moved_N >= low - 1e-3) & (moved_N <= high + 1e-3)).all())


def test_liars_who_state_hardly_any_noise_do_not_silence_those_who_state_theirs():
    """Honest clients count as before; the threshold is the noise that they added, and no less."""
    honest = [answer([30, 0], 6.0, counts=[30]) for _ in range(4)]
    liars = [answer([0, 9], 1e-6) for _ in range(3)]

    assert sum_of_votes(honest, TWO).tolist() == [120 - 12, 0]
    assert sum_of_votes([*honest, *liars], TWO).tolist() == pytest.approx([120 - 12, 27 - 12])


def test_prompts_stand_in_for_logits():
    assert of_prompts(torch.tensor([1, 0]), 2).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ConfigError, match="1 of 2 prompts name no class, and no client sends logits"):
        of_prompts(torch.tensor([1, -1]), 2)


def test_they_stand_in_for_classes_that_nobody_with_logits_holds():
    even_NC = torch.full((3, 2), 0.5)

    done_NC = completed(even_NC, torch.tensor([0, 1, -1]), torch.tensor([True, False]))

    assert done_NC.tolist() == [[0.5, 0.5], [0, 1], [0.5, 0.5]]


def test_prompts_without_a_class_are_refused_before_anything_is_generated():
    def client(**budget):
        return ClientReport(client="c", model="cnn", modality="image", examples=1, **budget)

    private, prompts = client(epsilon=1.0, budget=8.0, delta=1e-5), [Prompt("a thing", -1)]

    check_prompts(prompts, [])
    check_prompts(prompts, [private, client()])
    check_prompts([Prompt("a cat", 0)], [private])
    with pytest.raises(ConfigError, match="1 of 1 prompts name no class"):
        check_prompts(prompts, [private, private])
