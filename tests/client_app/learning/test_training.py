"""The training loop on separable data."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmmkt.client_app.learning.training import AlignedModel, PrivateSet, SyntheticSet, evaluate, train
from fedmmkt.client_app.models.building import build_task_model
from fedmmkt.client_app.models.task_model import Inputs, tokenize
from fedmmkt.common.config import ClientConfig


class Spy(Inputs):
    """Inputs that tell a function which of them are read."""

    def __init__(self, inputs, told):
        super().__init__(inputs.images_BCHW, inputs.tokens_BL)
        object.__setattr__(self, "told", told)

    def __getitem__(self, index):
        self.told(index.tolist())
        return super().__getitem__(index)


class CountingAdamW(torch.optim.AdamW):
    """An optimizer that closes a step of what spies told."""

    steps = None

    def step(self):
        super().step()
        self.steps.append({})


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 2), st.integers(1, 20))
def test_the_shorter_of_both_kinds_of_steps_is_spread_over_the_longer_and_nothing_is_lost(count, epochs, drawn):
    inputs, labels_N = two_classes(count)
    model = AlignedModel(build_task_model("mlp", 2, 16), 0)
    optimizer = CountingAdamW(model.parameters())
    optimizer.steps = steps = [{}]
    private = PrivateSet(Spy(inputs, lambda index: steps[-1].update(private=index)), labels_N)
    targets_NC = torch.eye(2)[labels_N]
    read = Spy(inputs, lambda index: steps[-1].update(synthetic=index))
    synthetic = SyntheticSet(read, targets_NC, labels_N, torch.ones(count))
    config = ClientConfig(distillation_steps=drawn, batch_size=1, synthetic_batch_size=2)

    train(model, optimizer, private, synthetic, config, epochs, torch.Generator().manual_seed(0))

    assert steps.pop() == {}
    assert len(steps) == max(count * epochs, drawn)
    seen = [sample for step in steps for sample in step.get("private", ())]
    each_epoch = [sorted(seen[first : first + count]) for first in range(0, len(seen), count)]
    assert each_epoch == [list(range(count))] * epochs
    assert [len(step["synthetic"]) for step in steps if "synthetic" in step] == [2] * drawn
    for kind in ("private", "synthetic"):
        taken = [number for number, step in enumerate(steps) if kind in step]
        gaps = {later - earlier for earlier, later in pairwise(taken)}
        assert not gaps or max(gaps) - min(gaps) <= 1


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


def test_private_epochs_do_not_depend_on_distillation():
    """Comparisons are at equal private epochs: each private sample is seen once an epoch, whatever else is learned."""
    seen = []
    inputs, labels_N = two_classes(10)
    model = AlignedModel(build_task_model("mlp", 2, 16), 0)
    synthetic = SyntheticSet(inputs, torch.eye(2)[labels_N], labels_N, torch.ones(10))
    private = PrivateSet(Spy(inputs, seen.extend), labels_N)
    config = ClientConfig(distillation_steps=37, batch_size=4)
    train(model, torch.optim.AdamW(model.parameters()), private, synthetic, config, 3, torch.Generator())
    assert sorted(seen) == sorted(list(range(10)) * 3)


def two_classes(count):
    labels_N = torch.arange(count) % 2
    images_BCHW = (labels_N * 2.0 - 1).view(-1, 1, 1, 1) * torch.ones(count, 3, 16, 16) * 0.5
    texts = ["a cat sits", "the dog runs"]
    return Inputs(images_BCHW, tokenize([texts[label] for label in labels_N])), labels_N
