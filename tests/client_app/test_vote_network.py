"""The network by which private images vote: trained once on them, kept, and the same whatever happened before."""

import pytest
import torch

from fedmmkt.client_app import vote_network as module
from fedmmkt.client_app.vote_network import SIDE, vote_network
from fedmmkt.common.config import ClientConfig

CONFIG = ClientConfig()


def bars(count, side=16, seed=0):
    """Draw an upright bar (class 0) or a lying one (class 1), at a random place."""
    draws = torch.Generator().manual_seed(seed)
    images_NCHW, labels_N = torch.zeros(count, 3, side, side, dtype=torch.uint8), torch.arange(count) % 2
    for image_CHW, label in zip(images_NCHW, labels_N.tolist(), strict=True):
        place = int(torch.randint(side - 3, (1,), generator=draws))
        part = image_CHW.transpose(1, 2) if label else image_CHW
        part[:, :, place : place + 3] = 255
    return images_NCHW, labels_N


@pytest.fixture
def file(tmp_path):
    return tmp_path / "data" / "ann" / "vote-network.safetensors"


def test_it_learns_what_tells_the_private_classes_apart(file):
    images_NCHW, labels_N = bars(120)
    network = vote_network(images_NCHW, labels_N, 2, CONFIG, 0, file)
    others_NCHW, others_N = bars(40, seed=1)

    features, others = network(images_NCHW), network(others_NCHW)

    nearest = torch.cdist(others, features).argmin(1)
    assert (labels_N[nearest] == others_N).float().mean() > 0.9
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_it_is_trained_once_and_then_read(file, monkeypatch):
    images_NCHW, labels_N = bars(20)
    first = vote_network(images_NCHW, labels_N, 2, CONFIG, 0, file)
    torch.rand(5)  # Other draws in between change nothing.
    monkeypatch.setattr(module, "train", None)  # It would raise.

    again = vote_network(images_NCHW, labels_N, 2, CONFIG, 0, file)

    assert torch.equal(again(images_NCHW), first(images_NCHW))
    assert file.exists()


@pytest.mark.parametrize("changed", ["images", "labels", "seed", "classes", "settings"])
def test_what_it_depends_on_makes_another_one(file, changed):
    images_NCHW, labels_N = bars(20)
    first = vote_network(images_NCHW, labels_N, 2, CONFIG, 0, file)

    another = vote_network(
        255 - images_NCHW if changed == "images" else images_NCHW,
        1 - labels_N if changed == "labels" else labels_N,
        3 if changed == "classes" else 2,
        ClientConfig(learning_rate=0.01) if changed == "settings" else CONFIG,
        1 if changed == "seed" else 0,
        file,
    )

    assert not torch.equal(another(images_NCHW), first(images_NCHW))


def test_it_disturbs_no_other_random_draws(file):
    images_NCHW, labels_N = bars(20)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)

    vote_network(images_NCHW, labels_N, 2, CONFIG, 0, file)

    assert torch.equal(torch.rand(4), expected)


def test_large_images_are_read_small_and_of_many_a_part(file, monkeypatch):
    images_NCHW, labels_N = bars(30, side=64)
    monkeypatch.setattr(module, "MOST_IMAGES", 10)
    seen, train = [], module.train

    def spy(model, optimizer, private, *rest):
        seen.append(tuple(private.inputs.images_BCHW.shape))
        return train(model, optimizer, private, *rest)

    monkeypatch.setattr(module, "train", spy)
    network = vote_network(images_NCHW, labels_N, 2, CONFIG, 0, file)

    assert seen == [(10, 3, SIDE, SIDE)]
    assert network(images_NCHW).shape == (30, 64)


def test_on_a_disk_that_cannot_be_written_it_is_trained_all_the_same(tmp_path, caplog):
    (tmp_path / "a file").write_text("")
    images_NCHW, labels_N = bars(20)

    network = vote_network(images_NCHW, labels_N, 2, CONFIG, 0, tmp_path / "a file" / "vote-network.safetensors")

    assert network(images_NCHW).shape == (20, 64)
    assert "vote-network.safetensors could not be kept" in caplog.text
