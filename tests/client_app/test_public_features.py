"""Votes with a public image encoder: its features of private images are kept, and a client without it does without."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from fedmmkt.client_app.public_features import PublicFeatures
from fedmmkt.common.config import ConfigError, NodeConfig, RunConfig
from fedmmkt.common.image_encoders import image_encoders, public_encoder
from fedmmkt.server_app.app import build_strategy
from tests import tiny_transformers

SIMULATED = NodeConfig.from_flower({"partition-id": 0, "num-partitions": 2})
OWN = {"data-path": "anything.csv"}
IMAGES = torch.randint(0, 256, (7, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
CPU = torch.device("cpu")


@pytest.fixture
def counting():
    """Register an encoder that counts the images it has seen."""

    class Counting(torch.nn.Module):
        seen = 0

        def forward(self, images_BCHW):
            self.seen += len(images_BCHW)
            return images_BCHW.mean((2, 3))

    @image_encoders.register("counting")
    def make():
        """Count."""
        return Counting()

    yield "counting"
    image_encoders.unregister("counting")
    public_encoder.cache_clear()


def test_features_of_private_images_are_made_once_and_kept(counting, tmp_path):
    file = tmp_path / "ann" / "features.safetensors"
    first = PublicFeatures(counting, SIMULATED, file, CPU).of_private(IMAGES)
    again = PublicFeatures(counting, SIMULATED, file, CPU)

    kept = again.of_private(IMAGES)

    assert again.encoder.seen == 7
    assert torch.equal(kept, first)
    assert torch.allclose(first, IMAGES.float().mean((2, 3)) / 127.5 - 1, atol=1e-5)
    assert file.stat().st_mode & 0o077 == 0 or file.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["others", "bytes"])
def test_features_of_other_images_or_damaged_ones_are_made_again(counting, tmp_path, damage):
    file = tmp_path / "features.safetensors"
    features = PublicFeatures(counting, SIMULATED, file, CPU)
    features.of_private(IMAGES if damage == "bytes" else 255 - IMAGES)
    if damage == "bytes":
        file.write_bytes(file.read_bytes()[:20])

    found = features.of_private(IMAGES)

    assert torch.allclose(found, IMAGES.float().mean((2, 3)) / 127.5 - 1, atol=1e-5)
    assert torch.equal(load_file(file)["features"], found)


def test_where_they_cannot_be_kept_they_are_made_all_the_same(counting, tmp_path, caplog):
    (tmp_path / "a file").write_text("")

    found = PublicFeatures(counting, SIMULATED, tmp_path / "a file" / "features.safetensors", CPU).of_private(IMAGES)

    assert found.shape == (7, 3)
    assert "could not be kept" in caplog.text


def test_an_image_model_of_transformers_is_an_encoder(tmp_path):
    folder = tmp_path / "vit"
    tiny_transformers.save(folder, tiny_transformers.image_config())

    features = PublicFeatures(f"transformers:{folder}", SIMULATED, tmp_path / "features.safetensors", CPU)

    found = features.of(IMAGES)
    assert found.ndim == 2
    assert len(found) == 7
    assert not any(parameter.requires_grad for parameter in features.encoder.parameters())


@pytest.mark.parametrize("name", ["transformers:owner/model", "own:encoder"])
def test_a_node_with_data_of_its_own_takes_no_code_or_model_that_a_run_names(name, tmp_path):
    with pytest.raises(ConfigError, match="run-models=true"):
        PublicFeatures(name, NodeConfig.from_flower(OWN), tmp_path / "features.safetensors", CPU)


def test_a_run_votes_with_a_public_encoder(tiny_run, make_grid, tmp_path):
    run_config = tiny_run(client__vote_encoder="efficientnet-lite0", client__models="mlp")
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)

    strategy.start(make_grid(run_config, nodes=2))

    kept = sorted(tmp_path.rglob("features.safetensors"))
    assert len(kept) == 2
    assert load_file(kept[0])["features"].shape[1] == 1280
    assert strategy.recorder.run_folder.read_metrics()[-1]["generator"]["loss"] > 0


def test_a_client_without_the_encoder_votes_without_it_and_says_so(tiny_run, make_grid, caplog):
    run_config = tiny_run(client__vote_encoder="no-such-encoder", client__models="mlp", rounds=1)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)

    with caplog.at_level(logging.WARNING):
        strategy.start(make_grid(run_config, nodes=2))

    assert strategy.recorder.run_folder.read_metrics()[-1]["replies"]["received"] == 2
