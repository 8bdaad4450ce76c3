"""A T2I's folder: whole, in a variant, or refused with the file and what helps."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from fedmmkt.common.config import ConfigError
from fedmmkt.deploy import doctor
from fedmmkt.server_app.t2i.generator import load_pipeline
from fedmmkt.server_app.t2i.pipeline_folder import variant_to_load
from tests import tiny_pipelines

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 492265168\n"
TEXT, UNET = "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Save a whole pipeline."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    tiny_pipelines.save("sd-epsilon", folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def unpack_tokenizer(folder):
    """Write a tokenizer's vocabulary and merges apart, as most models of the hub have them."""
    packed = folder / "tokenizer/tokenizer.json"
    content = json.loads(packed.read_text())["model"]
    (folder / "tokenizer/vocab.json").write_text(json.dumps(content["vocab"]))
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["merges"]]
    (folder / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    packed.unlink()
    return lines


def point(path):
    path.write_bytes(POINTER)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path):
    path.write_bytes(b"")


def web_page(path):
    path.write_bytes(b"<!DOCTYPE html><html>404: not found</html>")


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (point, TEXT, r"text_encoder/model.safetensors is a git-lfs pointer .*; run `git lfs pull`"),
        (point, UNET, r"unet/diffusion_pytorch_model.safetensors is a git-lfs pointer"),
        (point, "tokenizer/tokenizer.json", r"tokenizer/tokenizer.json is a git-lfs pointer"),
        (point, "model_index.json", r"model_index.json is a git-lfs pointer"),
        (halve, TEXT, r"text_encoder/model.safetensors is cut off: it has \d+ of \d+ bytes; .* download it again"),
        (halve, UNET, r"unet/diffusion_pytorch_model.safetensors is cut off"),
        (halve, "unet/config.json", r"unet/config.json is no JSON, or cut off"),
        (halve, "tokenizer/tokenizer.json", r"tokenizer/tokenizer.json is no JSON, or cut off"),
        (empty, TEXT, r"text_encoder/model.safetensors is empty"),
        (web_page, UNET, r"unet/diffusion_pytorch_model.safetensors is no safetensors file"),
        (remove, TEXT, r"component 'text_encoder' \(CLIPTextModel\) has no weights in .*/text_encoder; .*again"),
        (remove, "text_encoder/config.json", r"text_encoder/config.json is missing"),
        (remove, "scheduler/scheduler_config.json", r"scheduler_config.json is missing"),
        (remove, "tokenizer", r"component 'tokenizer' is missing: .*/tokenizer is no folder; .*download it again"),
        (remove, "tokenizer/tokenizer.json", r"'tokenizer' has no vocabulary: .* lacks tokenizer.json or vocab.json"),
        (remove, "tokenizer/tokenizer_config.json", r"tokenizer/tokenizer_config.json is missing"),
        (remove, "vae", r"component 'vae' is missing"),
        (remove, "scheduler", r"component 'scheduler' is missing"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named_by_the_doctor_at_last(damage, name, message, folder, capsys):
    damage(folder / name)
    with pytest.raises(ConfigError, match=rf"^run-config key 't2i.model' is '{folder}', but .*{message}"):
        load_pipeline(str(folder))

    assert doctor.main(["--t2i", "--run-config", f't2i.model="{folder}"']) == 1

    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("WRONG T2I model: run-config key 't2i.model'")


@pytest.mark.parametrize("name", ["vae", "unet", "tokenizer", "text_encoder", "scheduler"])
def test_a_component_that_the_index_does_not_name_is_told(name, folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {name: [None, None]}))
    with pytest.raises(ConfigError, match=f"model_index.json names no '{name}'"):
        load_pipeline(str(folder))


def equal(some, others):
    modules = ("text_encoder", "unet", "vae")
    states = ((getattr(pipeline, name).state_dict() for name in modules) for pipeline in (some, others))
    return all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(*states, strict=True)
    )


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_of_a_variant_alone_loads(variant, whole, tmp_path, capsys):
    pipeline = DiffusionPipeline.from_pretrained(whole)
    pipeline.save_pretrained(tmp_path / "model", variant=variant)

    assert equal(load_pipeline(str(tmp_path / "model")), pipeline)
    assert doctor.main(["--t2i", "--run-config", f't2i.model="{tmp_path}/model"']) == 0
    assert "is a StableDiffusionPipeline of 16 pixels" in capsys.readouterr().out.splitlines()[-1]


def test_a_variant_is_loaded_only_where_plain_weights_lack(whole, folder, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(whole)
    pipeline.save_pretrained(tmp_path / "variant", variant="fp16")
    for name in (TEXT, UNET, "vae/diffusion_pytorch_model.safetensors"):
        shutil.copy((tmp_path / "variant" / name).with_suffix(".fp16.safetensors"), (folder / name).parent)
    assert variant_to_load(folder) is None

    point(folder / UNET)
    (folder / TEXT).unlink()
    assert variant_to_load(folder) == "fp16"
    assert equal(load_pipeline(str(folder)), pipeline)

    (folder / "vae/diffusion_pytorch_model.fp16.safetensors").unlink()  # Its plain weights are there.
    assert equal(load_pipeline(str(folder)), pipeline)

    point((folder / UNET).with_suffix(".fp16.safetensors"))
    with pytest.raises(ConfigError, match=r"diffusion_pytorch_model\S*.safetensors is a git-lfs pointer"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_looked_at_one_by_one(variant, whole, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(whole)
    pipeline.save_pretrained(tmp_path / "model", variant=variant, max_shard_size="200KB")
    shards = sorted((tmp_path / "model/unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert equal(load_pipeline(str(tmp_path / "model")), pipeline)

    halve(shards[1])
    with pytest.raises(ConfigError, match=f"{shards[1].name} is cut off"):
        load_pipeline(str(tmp_path / "model"))
    shards[1].unlink()
    with pytest.raises(ConfigError, match=f"{shards[1].name} is missing"):
        load_pipeline(str(tmp_path / "model"))


def test_weights_of_torch_are_read_or_found_cut_off(whole, folder):
    weights = folder / UNET
    torch.save(load_file(weights), folder / "unet/diffusion_pytorch_model.bin")
    weights.unlink()
    assert equal(load_pipeline(str(folder)), load_pipeline(str(whole)))

    halve(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"unet/diffusion_pytorch_model.bin is cut off"):
        load_pipeline(str(folder))


def test_a_tokenizer_of_vocabulary_and_merges_is_read_whole(whole, folder):
    text = "a picture of the digit seven"
    lines = unpack_tokenizer(folder)
    tokens, expected = (load_pipeline(str(path)).tokenizer(text).input_ids for path in (folder, whole))
    assert tokens == expected

    merges = folder / "tokenizer/merges.txt"
    merges.write_text("\n".join(["#version: 0.2", *lines[: len(lines) // 2]]) + "\n")
    with pytest.raises(ConfigError, match=r"merges.txt is cut off: \d+ of \d+ tokens in vocab.json lack a merge"):
        load_pipeline(str(folder))
    merges.unlink()
    with pytest.raises(ConfigError, match=r"'tokenizer' has no vocabulary"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("kind", tiny_pipelines.PIPELINES)
def test_a_whole_folder_of_each_family_is_taken(kind, tmp_path):
    tiny_pipelines.save(kind, tmp_path)
    assert variant_to_load(tmp_path) is None
