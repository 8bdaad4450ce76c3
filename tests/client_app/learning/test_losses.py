"""Client losses against values computed by hand."""

import math

import pytest
import torch

from fedmmkt.client_app.learning.losses import (
    alignment_loss,
    balanced_softmax_loss,
    distillation_loss,
    probability_floor,
    prompt_loss,
)


def test_balanced_softmax_shifts_logits_by_the_prior():
    loss = balanced_softmax_loss(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([0.75, 0.25]).log())
    assert loss.item() == pytest.approx(-math.log(0.25))


def test_distillation_is_zero_at_the_targets_and_scaled_by_temperature():
    targets_BC = torch.tensor([[0.9, 0.1]])
    assert distillation_loss(targets_BC.log(), targets_BC, 2.0).item() == pytest.approx(0, abs=1e-6)
    # At T = 2 the targets soften to (0.75, 0.25), zero logits are (0.5, 0.5): KL 0.1308, times 4.
    assert distillation_loss(torch.zeros(1, 2), targets_BC, 2.0).item() == pytest.approx(4 * 0.13081, abs=1e-4)


@pytest.mark.parametrize(("classes", "sure"), [(2, 1 / 1.001), (10, 1 / 1.009), (1000, 1 / 1.009), (21_000, 1 / 1.009)])
def test_a_sure_target_stays_sure_with_any_number_of_classes(classes, sure):
    """A zero softens to a thousandth with ten classes. The loss is zero only at the softened target."""
    target_BC, student_BC = torch.zeros(1, classes), torch.full((1, classes), (1 - sure) / (classes - 1))
    target_BC[0, 0], student_BC[0, 0] = 1, sure

    assert distillation_loss(2 * student_BC.log(), target_BC, 2.0).item() == pytest.approx(0, abs=1e-5)


def test_the_floor_is_what_it_was_up_to_ten_classes_and_never_zero():
    assert [probability_floor(classes, 2.0) for classes in (2, 10)] == [1e-6, 1e-6]
    assert probability_floor(1000, 2.0) == pytest.approx(1e-6 * (9 / 999) ** 2)
    assert torch.tensor(probability_floor(100_000, 100.0)).log().isfinite()


def test_prompt_loss_counts_named_classes_only():
    logits_BC = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    assert prompt_loss(logits_BC, torch.tensor([1, -1])).item() == pytest.approx(math.log(2))
    assert prompt_loss(logits_BC, torch.tensor([-1, -1])).item() == 0


def test_alignment_prefers_features_at_their_own_prompt():
    anchors_BD = torch.eye(2)
    right, wrong = alignment_loss(anchors_BD * 3, anchors_BD), alignment_loss(anchors_BD.flip(0), anchors_BD)
    assert right.item() < 0.01
    assert wrong.item() > 9


def test_alignment_does_not_push_equal_prompts_apart():
    anchors_BD = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # Both texts are the same: the best there is is to be close to both, at the entropy of a fair coin.
    assert alignment_loss(anchors_BD, anchors_BD).item() == pytest.approx(math.log(2), abs=1e-5)
