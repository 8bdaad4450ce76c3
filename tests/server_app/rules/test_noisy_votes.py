import math

import numpy as np
import pytest
import torch

from fedmmkt.common.config import ConfigError
from fedmmkt.common.payloads import ClientReport, DistillationPayload
from fedmmkt.server_app.prompts import Prompt
from fedmmkt.server_app.rules.noisy_votes import sum_of_votes
from fedmmkt.server_app.rules.without_logits import check_prompts, completed, of_prompts


def answer(votes_N, noise=None):
    votes_N = None if votes_N is None else np.array(votes_N, np.float32)
    return DistillationPayload(batch_id="b", class_counts_C=np.array([9]), votes_N=votes_N, votes_noise=noise)


def test_votes_without_noise_are_summed():
    assert sum_of_votes([answer([0, 2]), answer(None), answer([5, 1])]).tolist() == [5, 3]
    assert sum_of_votes([answer(None)]) is None


def test_one_standard_deviation_of_the_noise_is_taken_from_the_sum():
    found_N = sum_of_votes([answer([10, -2, 4], 3.0), answer([1, 3, 2], 4.0 * 3 / 4), answer([1, 0, 0])])

    # Of 1, 3 and 3, the lower median is 3, and all count whole; the noise of the sum is the square root of 18.
    assert found_N.tolist() == pytest.approx([12 - 18**0.5, 0, 6 - 18**0.5])


def test_a_client_with_much_noise_counts_by_its_variance():
    found_N = sum_of_votes([answer([8, 0], 2.0), answer([8, 0], 2.0), answer([0, 160], 20.0)])

    # It counts by 2^2 / 20^2 = .01, so that its noise of 20 is .2.
    assert found_N.tolist() == pytest.approx([16 - math.sqrt(4 + 4 + 0.04), 0])


def test_a_claim_of_endless_noise_drowns_nobody():
    honest = [answer([30, 0], 2.0), answer([30, 0], 2.0), answer([20, 1])]
    liar = answer([-7e12, 7e12], 1e12)

    without, with_liar = sum_of_votes(honest), sum_of_votes([*honest, liar])

    assert with_liar.tolist() == pytest.approx(without.tolist(), abs=0.1)
    alone = sum_of_votes([*[answer([20, 0])] * 3, liar])
    assert alone[0] > 59
    assert alone[1] < 1


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
