"""Client losses against values computed by hand, and the training loop on separable data."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client_app.feedback import nearest_neighbour_votes, to_payload_logits, vote_features
from client_app.learning import (
    AlignedModel,
    PrivateSet,
    SyntheticSet,
    _spread,
    alignment_loss,
    balanced_softmax_loss,
    distillation_loss,
    evaluate,
    prompt_loss,
    train,
)
from client_app.optimizer import AdamW
from client_app.task_models import Inputs, build_task_model, tokenize
from common.augmentation import augment
from common.config import ClientConfig


def test_balanced_softmax_shifts_logits_by_the_prior():
    loss = balanced_softmax_loss(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([0.75, 0.25]).log())
    assert loss.item() == pytest.approx(-math.log(0.25))


def test_distillation_is_zero_at_the_targets_and_scaled_by_temperature():
    targets_BC = torch.tensor([[0.9, 0.1]])
    assert distillation_loss(targets_BC.log(), targets_BC, 2.0).item() == pytest.approx(0, abs=1e-6)
    # At T = 2 the targets soften to (0.75, 0.25), zero logits are (0.5, 0.5): KL 0.1308, times 4.
    assert distillation_loss(torch.zeros(1, 2), targets_BC, 2.0).item() == pytest.approx(4 * 0.13081, abs=1e-4)


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


def test_augmentation_keeps_shape_and_range_and_follows_its_generator():
    images_BCHW = torch.rand(4, 3, 16, 16) * 2 - 1
    first = augment(images_BCHW, torch.Generator().manual_seed(0))
    second = augment(images_BCHW, torch.Generator().manual_seed(0))
    assert first.shape == images_BCHW.shape
    assert torch.equal(first, second)
    assert first.abs().max() <= 1
    assert not torch.equal(first, images_BCHW)


@given(st.integers(0, 20), st.integers(1, 40))
def test_spreading_keeps_order_and_loses_nothing(count, extra):
    batches = list(range(1, count + 1))
    steps = count + extra
    spread = list(_spread(batches, steps))
    assert len(spread) == steps
    assert [item for item in spread if item is not None] == batches


@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet", "mobilenet", "vit", "text", "text-transformer", "dual"])
def test_every_model_learns_from_private_and_synthetic_samples(name):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = AlignedModel(build_task_model(name, 2, 16), 4)
    inputs, labels_N = two_classes(24)
    private = PrivateSet(
        inputs[labels_N == 0], labels_N[labels_N == 0]
    )  # Class 1 is known from synthetic samples alone.
    synthetic = SyntheticSet(
        inputs, torch.eye(2)[labels_N] * 0.98 + 0.01, labels_N, torch.ones(24), torch.eye(4)[labels_N]
    )
    config = ClientConfig(distillation_steps=60, batch_size=8, synthetic_batch_size=8, learning_rate=3e-3)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate)

    train(model, optimizer, private, synthetic, config, 2, generator)

    accuracy, _ = evaluate(model.task_model, inputs, labels_N)
    assert accuracy == 1.0


@pytest.mark.parametrize("steps", [None, 0])
def test_training_without_epochs_or_synthetic_samples_changes_nothing(steps):
    model = AlignedModel(build_task_model("mlp", 2, 16), 0)
    before = [parameter.clone() for parameter in model.parameters()]
    inputs, labels_N = two_classes(4)
    synthetic = None if steps is None else SyntheticSet(inputs, torch.eye(2)[labels_N], labels_N, torch.ones(4))
    optimizer = torch.optim.AdamW(model.parameters())
    config = ClientConfig(distillation_steps=150 if steps is None else steps)
    loss = train(model, optimizer, PrivateSet(inputs, labels_N), synthetic, config, 0, torch.Generator())
    assert loss == 0
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_clients_optimizer_is_torchs():
    """Steps, state and state read back are equal to the last bit."""
    weights = []
    for kind in (torch.optim.AdamW, AdamW):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = kind([parameter], 0.1, weight_decay=1e-3)
        for step in range(4):
            if step == 2:
                state = optimizer.state_dict()
                optimizer = kind([parameter], 0.5)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()
        weights.append(parameter.detach())
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(*weights)


def test_private_epochs_do_not_depend_on_distillation():
    """Comparisons are at equal private epochs: each private sample is seen once an epoch, whatever else is learned."""
    seen = []

    class Spy(Inputs):
        def __getitem__(self, index):
            seen.extend(index.tolist())
            return super().__getitem__(index)

    inputs, labels_N = two_classes(10)
    model = AlignedModel(build_task_model("mlp", 2, 16), 0)
    synthetic = SyntheticSet(inputs, torch.eye(2)[labels_N], labels_N, torch.ones(10))
    private = PrivateSet(Spy(inputs.images_BCHW, inputs.tokens_BL), labels_N)
    config = ClientConfig(distillation_steps=37, batch_size=4)
    train(model, torch.optim.AdamW(model.parameters()), private, synthetic, config, 3, torch.Generator())
    assert sorted(seen) == sorted(list(range(10)) * 3)


def two_classes(count):
    labels_N = torch.arange(count) % 2
    images_BCHW = (labels_N * 2.0 - 1).view(-1, 1, 1, 1) * torch.ones(count, 3, 16, 16) * 0.5
    texts = ["a cat sits", "the dog runs"]
    return Inputs(images_BCHW, tokenize([texts[label] for label in labels_N])), labels_N


def test_tokens_are_the_same_everywhere_and_forgive_case_and_punctuation():
    tokens_NL = tokenize(["The digit three.", "the DIGIT three", "", "x" * 500])
    assert torch.equal(tokens_NL[0], tokens_NL[1])
    assert not tokens_NL[2].any()


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


def test_vote_features_weigh_pixels_and_encoder_alike():
    private = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, second = vote_features(torch.nn.Flatten(), private, private[:5])
    half = first.shape[1] // 2
    assert torch.equal(first[:5], second)
    spreads = [(part - part.mean(0)).square().sum(1).mean().item() for part in (first[:, :half], first[:, half:])]
    assert spreads == pytest.approx([1, 1], abs=1e-4)


def test_payload_logits_fit_half_precision():
    logits_NC = to_payload_logits(torch.tensor([[1e9, -1e9], [1.0, 3.0]]))
    assert logits_NC.dtype == "float16"
    assert abs(logits_NC).max() < 65504
    assert logits_NC[1].tolist() == [1.0, 3.0]
