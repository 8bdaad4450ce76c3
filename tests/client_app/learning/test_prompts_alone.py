"""Soft targets that are prompts alone, mixed with what a client sees itself; expectations by hand."""

import numpy as np
import pytest
import torch

from fedmmkt.client_app.learning.prompts_alone import names_prompts_alone, with_own_sight
from fedmmkt.client_app.learning.training import SyntheticSet
from fedmmkt.client_app.models.task_model import Inputs

PROMPTED_N = torch.tensor([0, 0, 1, 2])
OWN_NC = torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.6, 0.1], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])


def synthetic(probabilities_NC=None):
    probabilities_NC = torch.eye(3)[PROMPTED_N] if probabilities_NC is None else probabilities_NC
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    return SyntheticSet(Inputs(images), probabilities_NC, PROMPTED_N, torch.tensor([1.0, 1.0, 0.5, 0.5]))


@pytest.mark.parametrize(
    ("probabilities", "prompted", "is_alone"),
    [
        ([[1, 0], [0, 1]], [0, 1], True),
        ([[1, 0], [0, 1]], [0, 0], False),  # Somebody sees another class.
        ([[1, 0], [0.001, 0.999]], [0, 1], False),
        ([[1, 0], [0, 1]], [0, -1], False),  # A prompt that names no class: the target is somebody's.
        (np.zeros((0, 2)), [], False),
    ],
)
def test_prompts_alone_are_known_by_their_soft_targets(probabilities, prompted, is_alone):
    assert names_prompts_alone(np.array(probabilities, np.float16), np.array(prompted, np.int64)) is is_alone


def test_half_of_a_target_is_what_the_client_sees():
    mixed = with_own_sight(synthetic(), OWN_NC, torch.ones(4, dtype=torch.bool))

    expected = [[0.95, 0.05, 0], [0.65, 0.3, 0.05], [0, 1, 0], [0.25, 0.25, 0.5]]
    assert mixed.probabilities_NC.numpy() == pytest.approx(np.array(expected))


def test_samples_are_drawn_by_how_clearly_the_client_sees_the_prompted_class_among_those_of_the_class():
    """Class 0: 0.9 and 0.3, mean 0.6. Class 1 has one sample, and so has class 2, which is not seen in it at all."""
    mixed = with_own_sight(synthetic(), OWN_NC, torch.ones(4, dtype=torch.bool))

    assert mixed.weights_N.tolist() == pytest.approx([1.5, 0.5, 0.5, 0.5])


def test_targets_that_clients_made_stay_as_they_are():
    some_NC = torch.full((4, 3), 1 / 3)
    alone_N = torch.tensor([True, True, False, False])

    mixed = with_own_sight(synthetic(some_NC), OWN_NC, alone_N)

    assert torch.equal(mixed.probabilities_NC[2:], some_NC[2:])
    assert mixed.weights_N[2:].tolist() == [0.5, 0.5]
    assert mixed.weights_N[:2].tolist() == pytest.approx([1.5, 0.5])
