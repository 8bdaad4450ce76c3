"""Batches of one sample: for models that cannot learn from one, or cannot read one, and for those that can."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmmkt.client_app.answers import vote_features
from fedmmkt.client_app.learning.batches import epoch_batches, has_lone_sample, learns_from_one
from fedmmkt.client_app.learning.training import AlignedModel, PrivateSet, SyntheticSet, evaluate, predict, train
from fedmmkt.client_app.models.building import build_task_model
from fedmmkt.client_app.models.task_model import Inputs, TaskModel, task_models
from fedmmkt.common.config import ClientConfig, RunConfig
from fedmmkt.server_app.app import build_strategy
from tests.conftest import registered


class Squeeze(nn.Module):
    """Takes the batch's dimension away with the others where there is one sample."""

    def forward(self, x):
        return x.squeeze()


def batch_norm(classes, image_size):
    layers = nn.Flatten(), nn.Linear(3 * image_size**2, 8), nn.Dropout(0.1), nn.BatchNorm1d(8), nn.ReLU()
    return TaskModel(classes, 8, image_encoder=nn.Sequential(*layers))


def squeezing(classes, image_size):
    layers = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), Squeeze(), nn.BatchNorm1d(8)
    return TaskModel(classes, 8, image_encoder=nn.Sequential(*layers))


def samples(count):
    generator = torch.Generator().manual_seed(0)
    return Inputs(torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1), torch.arange(count) % 2


def sizes(count, size, least):
    return [len(batch) for batch in epoch_batches(count, size, 1, torch.Generator(), least)]


def test_a_lone_last_sample_joins_the_batch_before_it_or_is_left_out():
    assert sizes(9, 4, least=1) == [4, 4, 1]
    assert sizes(9, 4, least=2) == [4, 5]
    assert sizes(10, 4, least=2) == [4, 4, 2]
    assert sizes(1, 4, least=2) == []
    assert sizes(5, 1, least=2) == [2, 3]


@given(st.integers(1, 40), st.integers(1, 10))
def test_samples_are_alone_where_batches_say_so(count, size):
    assert has_lone_sample(count, size) == (1 in sizes(count, size, least=1))
    assert sizes(count, size, least=2).count(1) == 0
    if not has_lone_sample(count, size):
        assert sizes(count, size, least=2) == sizes(count, size, least=1)


@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet", "mobilenet"])
def test_built_in_models_learn_from_one(name):
    assert learns_from_one(build_task_model(name, 2, 8), samples(1)[0])


@pytest.mark.parametrize("build", [batch_norm, squeezing])
def test_the_trial_leaves_model_and_random_state_as_they_were(build):
    model, (inputs, _) = build(2, 8), samples(3)
    model.eval()
    model.head.train()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert not learns_from_one(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_frozen_batch_norm_learns_from_one():
    model = batch_norm(2, 8)
    model.freeze_encoders()
    assert learns_from_one(model, samples(1)[0])


@pytest.mark.parametrize("build", [batch_norm, squeezing])
@pytest.mark.parametrize(("count", "size", "steps"), [(5, 4, 1), (4, 1, 2), (1, 4, 0)])
def test_models_learn_whatever_number_of_private_samples_there_is(build, count, size, steps, caplog):
    torch.manual_seed(0)
    model, (inputs, labels_N) = AlignedModel(build(2, 8), 0), samples(count)
    optimizer = torch.optim.AdamW(model.parameters())
    taken = []
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    config = ClientConfig(batch_size=size)
    loss = train(model, optimizer, PrivateSet(inputs, labels_N), None, config, 1, torch.Generator().manual_seed(0))
    assert len(taken) == steps
    assert (loss > 0) == (steps > 0)
    assert ("The only private example is left out" in caplog.text) == (steps == 0)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("build", [batch_norm, squeezing])
def test_models_learn_from_single_synthetic_samples(build, count):
    model, (inputs, labels_N) = AlignedModel(build(2, 8), 0), samples(count)
    synthetic = SyntheticSet(inputs, torch.eye(2)[labels_N], labels_N, torch.ones(count))
    config = ClientConfig(synthetic_batch_size=1, distillation_steps=3)
    optimizer, generator = torch.optim.AdamW(model.parameters()), torch.Generator().manual_seed(0)
    assert train(model, optimizer, PrivateSet(*samples(4)), synthetic, config, 0, generator) > 0


@pytest.mark.parametrize("build", [batch_norm, squeezing])
def test_single_samples_are_read_as_they_are_among_others(build):
    model, (inputs, labels_N) = build(2, 8), samples(5)
    together = predict(model, inputs)
    assert torch.allclose(predict(model, inputs, batch_size=4), together, atol=1e-6)
    assert torch.allclose(predict(model, Inputs(inputs.images_BCHW[:1])), together[:1], atol=1e-6)
    assert evaluate(model, Inputs(inputs.images_BCHW[:1]), labels_N[:1])[0] in (0.0, 1.0)
    private, synthetic = vote_features(model.image_encoder, inputs.images_BCHW[:1], inputs.images_BCHW)
    assert torch.allclose(private, synthetic[:1], atol=1e-3)
    assert synthetic.shape[0] == 5


def test_batch_norm_goes_through_a_run_whose_last_batches_hold_one_sample(tiny_run, make_grid):
    """Of four equal parts of the digits, two have 359 examples: two batches of 179, and one."""
    run_config = tiny_run(client__models="bn", client__batch_size=179, data__partitioner="iid", rounds=2)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    with registered(task_models, "bn", batch_norm):
        strategy.start(make_grid(run_config, nodes=4))
    lines = strategy.recorder.run_folder.read_metrics()
    assert [line["replies"]["received"] for line in lines if line["round"]] == [4, 4]
    assert sorted(client["examples"] for client in lines[-1]["clients"]["per_client"].values()) == [359, 359, 360, 360]
