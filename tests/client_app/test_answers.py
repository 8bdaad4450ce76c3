"""What a client answers: votes and logits, against values computed by hand."""

import math

import pytest
import torch

from fedmmkt.client_app.answers import PUBLIC_PART, nearest_neighbour_votes, style_of, to_payload_logits, vote_features


def test_votes_go_to_the_nearest_of_the_same_class():
    private, labels_M = torch.tensor([[0.0], [0.1], [0.9]]), torch.tensor([0, 0, 1])
    synthetic, prompted_N = torch.tensor([[0.02], [0.5], [0.95], [0.05]]), torch.tensor([0, 0, 1, 1])

    votes_N = nearest_neighbour_votes(private, labels_M, synthetic, prompted_N, neighbours=1)

    # Both images of class 0 are nearest to sample 0; the one of class 1 to sample 2; sample 3 is of class 1.
    assert votes_N.tolist() == [2.0, 0.0, 1.0, 0.0]


def test_votes_cross_classes_where_prompts_name_none():
    features = torch.tensor([[0.0], [1.0]])
    votes_N = nearest_neighbour_votes(features[:1], torch.tensor([1]), features, torch.tensor([-1, -1]), neighbours=1)
    assert votes_N.tolist() == [1.0, 0.0]


def test_vote_features_weigh_pixels_encoder_and_style_whatever_their_scale():
    private = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, second = vote_features(torch.nn.Flatten(), private, private[:5])
    assert torch.allclose(first[:5], second, atol=1e-5)
    parts = first.split([3 * 64, 3 * 64, 5], dim=1)
    spreads = [(part - part.mean(0)).square().sum(1).mean().item() for part in parts]
    assert spreads == pytest.approx([0.25, 1, 0.1], abs=1e-4)


def test_style_is_brightness_contrast_and_detail():
    """Of 4 x 4 pixels: flat grey; stripes of one pixel; the left half bright."""
    flat, stripes, half = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    stripes[..., ::2], half[..., :2] = 1.0, 1.0

    of_flat, of_stripes, of_half = style_of(torch.cat([flat, stripes, half])).unbind()

    assert of_flat.tolist() == pytest.approx([0.5, 0, *[math.log(1e-6) / 2] * 3], abs=1e-5)
    assert of_stripes[:2].tolist() == of_half[:2].tolist() == pytest.approx([0.5, (16 / 15) ** 0.5 / 2])
    # Stripes 1, 0, 1, 0 have means over three pixels of 2/3, 2/3, 1/3, 1/3, and differ by 1/3, 2/3, 2/3, 1/3.
    assert of_stripes[2].item() == pytest.approx(math.log(10 / 36) / 2, abs=1e-5)
    # Of halves 1, 1, 0, 0, the two columns in the middle differ by 1/3.
    assert of_half[2].item() == pytest.approx(math.log(2 / 36) / 2, abs=1e-5)
    assert of_half[3] > of_stripes[3]  # Its detail is larger.


def test_votes_do_not_count_brightness_and_contrast():
    pattern = torch.zeros(1, 3, 8, 8)
    pattern[..., :4, :] = 1
    unlike, flat, pale = pattern.transpose(2, 3), torch.full_like(pattern, 0.25), 0.1 * pattern - 0.8
    encoder = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 1))
    torch.nn.init.zeros_(encoder[2].weight)  # It sees no difference.

    private_MF, synthetic_NF = vote_features(encoder, torch.cat([pattern, unlike]), torch.cat([flat, unlike, pale]))

    # The pale sample has the pattern itself. Half of the other one's pixels differ, so it does not correlate, as the
    # flat one, which has no pattern: of squared lengths 1, 1 and 0, these are at a distance of 2 and 1 from the first.
    pixels = 3 * 64
    squared_N = (synthetic_NF - private_MF[0])[:, :pixels].square().sum(1)
    assert (squared_N / squared_N[1]).tolist() == pytest.approx([0.5, 1, 0], abs=1e-5)
    labels_M, prompted_N = torch.tensor([0, 1]), torch.zeros(3, dtype=torch.int64)
    seen = private_MF[:, :pixels], synthetic_NF[:, :pixels]
    assert nearest_neighbour_votes(seen[0], labels_M, seen[1], prompted_N, 1).tolist() == [0, 0, 1]


def test_a_public_encoder_compares_directions_from_the_private_mean():
    """A sample in the middle is no nearer than one that lies further out in the image's own direction."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    private_MF = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]) + 5
    middle, further, across = torch.tensor([[5.1, 5.1], [9.0, 5.0], [5.0, 9.0]])
    encoder = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 1))
    torch.nn.init.zeros_(encoder[2].weight)

    features = vote_features(encoder, images, images[:3], (private_MF, torch.stack([middle, further, across])))

    privates, synthetics = (part[:, -2:] for part in features)
    squared_N = (synthetics - privates[0]).square().sum(1) / PUBLIC_PART
    # Unit vectors: of the first image (1, 0), of the samples (1, 1) / sqrt 2, (1, 0) and (0, 1).
    assert squared_N.tolist() == pytest.approx([2 - 2**0.5, 0, 2], abs=1e-5)


def test_payload_logits_fit_half_precision():
    logits_NC = to_payload_logits(torch.tensor([[1e9, -1e9], [1.0, 3.0]]))
    assert logits_NC.dtype == "float16"
    assert abs(logits_NC).max() < 65504
    assert logits_NC[1].tolist() == [1.0, 3.0]
