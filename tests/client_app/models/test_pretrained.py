"""Task models from transformers: every kind is loaded, learns, is kept, and is read back by transformers."""

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from fedmmkt.client_app.learning.training import (
    AlignedModel,
    PrivateSet,
    SyntheticSet,
    evaluate,
    parameter_groups,
    train,
)
from fedmmkt.client_app.memory import ClientMemory
from fedmmkt.client_app.models.building import build_task_model, model_label
from fedmmkt.client_app.models.dry_run import check_dry_run
from fedmmkt.client_app.models.pretrained import ImagePreparation
from fedmmkt.client_app.models.task_model import PADDING, Inputs, TaskModel, TextLengths
from fedmmkt.common.config import ClientConfig, ConfigError
from tests import tiny_transformers as tiny

LABELS = ("cat", "dog")
CONFIGS = {
    "vit": tiny.image_config("vit"),
    "resnet": tiny.image_config("resnet"),
    "bert": tiny.text_config("bert"),
    "distilbert": tiny.text_config("distilbert"),
    "gpt2": tiny.text_config("gpt2"),
    "clip": tiny.dual_config("clip"),
    "siglip": tiny.dual_config("siglip"),
}
MODALITIES = dict.fromkeys(CONFIGS, "text") | {
    "vit": "image", "resnet": "image", "clip": "image+text", "siglip": "image+text",
}  # fmt: skip


def build(name, labels=LABELS):
    torch.manual_seed(0)
    return build_task_model(name, len(labels), 32, labels)


def samples(model, count=12):
    labels_N = torch.arange(count) % 2
    images_BCHW = (labels_N * 200).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    texts = ["a picture of zero", "nine"]
    images = images_BCHW if "image" in model.modality else None
    return Inputs(images, model.tokenize([texts[i] for i in labels_N]) if "text" in model.modality else None), labels_N


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture
def source(kind, tmp_path):
    return tiny.save(tmp_path / kind, CONFIGS[kind])


def test_every_kind_is_loaded_with_a_head_for_the_classes(kind, source):
    model = build(source)
    inputs, _ = samples(model, 5)
    model.eval()
    features_BF = model.features(inputs[torch.arange(5)])
    assert model.modality == MODALITIES[kind]
    assert model.is_pretrained
    assert features_BF.shape == (5, model.feature_size)
    assert torch.equal(model.head(features_BF), model(inputs[torch.arange(5)]))
    assert model.head.out_features == 2


def test_every_kind_learns(kind, source):
    model = AlignedModel(build(source), 4)
    inputs, labels_N = samples(model.task_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    synthetic = SyntheticSet(inputs, torch.eye(2)[labels_N], labels_N, torch.ones(12), torch.eye(4)[labels_N])
    config = ClientConfig(distillation_steps=40, batch_size=4, synthetic_batch_size=8, learning_rate=1e-2,
                          pretrained_learning_rate=1e-3)  # fmt: skip
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    train(model, optimizer, PrivateSet(inputs, labels_N), synthetic, config, 2, torch.Generator().manual_seed(0))
    accuracy, _ = evaluate(model.task_model, inputs, labels_N)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert accuracy == 1.0
    assert any("encoder" in name for name in moved)
    assert {"projection.weight", "task_model.head.weight"} <= moved


def test_what_a_client_keeps_is_read_by_transformers(kind, source, tmp_path):
    model = AlignedModel(build(source), 4)
    optimizer = torch.optim.AdamW(parameter_groups(model, ClientConfig()))
    with torch.no_grad():
        model.task_model.head.weight += 1
    memory = ClientMemory(tmp_path / "state", "run", "client")
    memory.save(1, model, optimizer, {}, keep_batches=1, keep_rounds=1)

    other = AlignedModel(build(source), 4)
    memory.load_model(other, torch.optim.AdamW(parameter_groups(other, ClientConfig())))
    loaders = {"image": transformers.AutoModelForImageClassification, "image+text": transformers.AutoModel}
    saved = memory.folder / "round-00001"
    loader = loaders.get(MODALITIES[kind], transformers.AutoModelForSequenceClassification)
    theirs, info = loader.from_pretrained(saved, output_loading_info=True)

    inputs, _ = samples(model.task_model, 3)
    inputs = inputs[torch.arange(3)]
    for part in (model, other, theirs):
        part.eval()
    logits_BC = model.task_model(inputs)
    assert torch.equal(other.task_model(inputs), logits_BC)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    read = {}
    if inputs.images_BCHW is not None:
        pictures = [Image.fromarray(np.full((32, 32, 3), 200 * (i % 2), np.uint8)) for i in range(3)]
        read |= transformers.AutoImageProcessor.from_pretrained(saved)(pictures, return_tensors="pt")
    if inputs.tokens_BL is not None:
        texts = ["a picture of zero", "nine", "a picture of zero"]
        padding = "max_length" if kind == "siglip" else True
        read |= transformers.AutoTokenizer.from_pretrained(saved)(texts, return_tensors="pt", padding=padding)
        read.pop("token_type_ids", None)
        if kind == "siglip":
            del read["attention_mask"]
    with torch.no_grad():
        answer = theirs(**read)
    if MODALITIES[kind] == "image+text":
        towers = torch.cat([answer.image_embeds, answer.text_embeds], 1)
        assert torch.allclose(towers, model.task_model.features(inputs), atol=1e-5)
    else:
        assert torch.allclose(answer.logits, logits_BC, atol=1e-4)
        assert theirs.config.id2label == {0: "cat", 1: "dog"}


def test_a_head_for_just_these_classes_is_kept_and_any_other_made_anew(tmp_path):
    config = tiny.image_config(labels=2)
    config.id2label, config.label2id = {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}
    source = tiny.save(tmp_path / "model", config)
    kept = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model").classifier.weight
    assert torch.equal(build(source).head.weight, kept)
    assert not torch.equal(build(source, ("dog", "cat")).head.weight, kept)
    assert build(source, ("cat", "dog", "cow")).head.out_features == 3


def test_a_configuration_alone_begins_with_random_weights(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.text_config(), weights=False)
    model = build(source)
    assert not model.is_pretrained
    assert not any((tmp_path / "model").glob("*.safetensors"))
    other = build(f"{source}/config.json")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_encoders_trained_before_learn_at_their_own_rate(tmp_path):
    trained = AlignedModel(build(tiny.save(tmp_path / "a", tiny.dual_config())), 4)
    fresh = AlignedModel(build(tiny.save(tmp_path / "b", tiny.dual_config(), weights=False)), 4)
    config = ClientConfig(learning_rate=1e-3, pretrained_learning_rate=1e-5)
    groups = parameter_groups(trained, config)
    assert [group["lr"] for group in groups] == [1e-3, 1e-5]
    assert len(groups[0]["params"]) == 4  # Head and projection, weight and bias.
    assert sum(len(group["params"]) for group in groups) == len(list(trained.parameters()))
    assert [group["lr"] for group in parameter_groups(fresh, config)] == [1e-3]


def test_frozen_encoders_stay_as_they_are(tmp_path):
    model = AlignedModel(build(tiny.save(tmp_path / "model", tiny.image_config("resnet"))), 0)
    model.task_model.freeze_encoders()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, labels_N = samples(model.task_model)
    optimizer = torch.optim.AdamW(parameter_groups(model, ClientConfig()))
    train(model, optimizer, PrivateSet(inputs, labels_N), None, ClientConfig(), 1, torch.Generator())
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"task_model.head.weight", "task_model.head.bias"}


@pytest.mark.parametrize("size", [16, 32, 48])
def test_images_are_prepared_as_the_processor_does(tmp_path, size):
    mean, std = [0.48, 0.45, 0.4], [0.26, 0.25, 0.27]
    processor = transformers.ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=mean, image_std=std)
    tiny.save(tmp_path / "model", tiny.image_config())
    processor.save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    images_BCHW = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    ours = build(f"transformers:{tmp_path / 'model'}").image_encoder.prepare(images_BCHW)
    assert ours.shape == theirs.shape == (1, 3, 24, 24)
    assert (ours - theirs).abs().max() < 0.02  # PIL rounds to whole numbers between its two passes.


@given(
    size=st.integers(1, 40),
    to=st.integers(1, 40),
    channels=st.sampled_from([1, 3]),
    resample=st.sampled_from([0, 2, 3]),
)
@settings(deadline=None)
def test_any_image_becomes_what_the_model_reads(size, to, channels, resample):
    prepare = ImagePreparation((to, to), (0.5,) * channels, (0.5,) * channels, resample)
    prepared = prepare(torch.rand(2, 3, size, size) * 2 - 1)
    assert prepared.shape == (2, channels, to, to)
    assert prepared.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": {"shortest_edge": 30}, "do_center_crop": True, "crop_size": {"height": 20, "width": 20}}, (20, 20)),
        ({"size": {"shortest_edge": 30}}, (30, 30)),
        ({"size": 28}, (28, 28)),
        ({"size": [26, 27]}, (26, 27)),
        (None, (24, 24)),
    ],
)
def test_the_size_is_the_processors_or_the_configurations(tmp_path, processor, expected):
    tiny.save(tmp_path / "model", tiny.image_config())
    if processor is not None:
        (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor | {"do_normalize": False}))
    prepare = build(f"transformers:{tmp_path / 'model'}").image_encoder.prepare
    assert prepare.size == expected
    assert prepare.mean == ((0.5,) * 3 if processor is None else (0.0,) * 3)


def test_long_texts_are_cut_and_short_ones_cost_little(tmp_path):
    model = build(tiny.save(tmp_path / "model", tiny.text_config()))
    tokens_BL = model.tokenize(["the digit " * 500, "", "one"])
    assert tokens_BL.shape == (3, 16)
    assert (tokens_BL[2] != PADDING).sum() == 3
    lengths = []
    model.text_encoder.model.register_forward_pre_hook(
        lambda module, args, read: lengths.append(read["input_ids"].shape[1]), with_kwargs=True
    )
    model.eval()
    alone = model(Inputs(None, tokens_BL[2:]))
    assert lengths == [3]
    assert torch.allclose(alone, model(Inputs(None, tokens_BL))[2:], atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "clip", "siglip"])
def test_texts_longer_than_the_model_reads_are_counted(kind, tmp_path, caplog):
    model = build(tiny.save(tmp_path / "model", CONFIGS[kind]))
    lengths = model.text_lengths(["the digit " * 500, "one", "the " * 20])
    assert lengths == TextLengths([1002, 3, 22], 16, "tokens")
    assert lengths.describe_cut() == (
        "2 of 3 are longer than the 16 tokens that the model reads, and are cut: 992 of 1027 tokens are not read "
        "(the longest has 1002)"
    )
    assert model.text_lengths([]).longest_read == 16
    assert "longer than the specified maximum" not in caplog.text


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_passes_the_dry_run(kind, tmp_path):
    check_dry_run(build(tiny.save(tmp_path / "model", CONFIGS[kind])), 2, 32, kind)


@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=4))
@settings(deadline=None, max_examples=20)
def test_any_text_is_read(text_model, texts):
    logits_BC = text_model(Inputs(None, text_model.tokenize(texts)))
    assert logits_BC.shape == (len(texts), 2)
    assert bool(logits_BC.isfinite().all())


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return build(tiny.save(tmp_path_factory.mktemp("model"), tiny.text_config("gpt2"))).eval()


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'transformers:/no/such/model' is not there; allowed: a folder with"):
        build("transformers:/no/such/model")
    with pytest.raises(ConfigError, match=r"'transformers:nobody/nothing' cannot be loaded .*hub id that this machine"):
        build("transformers:nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "vits"}')
    with pytest.raises(ConfigError, match=r"is a 'vits'; allowed: what transformers has for image classification"):
        build(f"transformers:{tmp_path}")
    (tmp_path / "config.json").write_text("no json")
    with pytest.raises(ConfigError, match=r"cannot be loaded \("):
        build(f"transformers:{tmp_path}")
    tiny.text_config().save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"has no tokenizer that can be read .*tokenizer.save_pretrained"):
        build(f"transformers:{tmp_path / 'bert'}")
    tiny.tokenizer(additional_special_tokens=["[NEW]"]).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"has a tokenizer of 26 tokens and a configuration of 25; allowed"):
        build(f"transformers:{tmp_path / 'bert'}")


def test_names_in_reports_tell_no_folder():
    assert model_label("transformers:/home/ann/models/tiny-vit/") == "tiny-vit"
    assert model_label("transformers:google/vit-base") == "vit-base"
    assert model_label("mine.models:net") == "mine.models:net"


def test_plain_models_are_frozen_alike():
    model = TaskModel(2, 4, image_encoder=nn.Sequential(nn.Dropout(0.5), nn.Flatten()))
    model.freeze_encoders()
    model.train()
    assert not model.image_encoder.training
    assert model.head.training
