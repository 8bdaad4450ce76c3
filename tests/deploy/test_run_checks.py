"""Mistakes that are told before anything is started, all at once."""

import json
import shutil

import pytest
from PIL import Image

from fedmmkt.common.config import ConfigError
from fedmmkt.common.datasets import load_splits
from fedmmkt.common.installed import installed
from fedmmkt.deploy import run_checks
from fedmmkt.deploy.run_checks import check_run
from fedmmkt.deploy.settings import effective_config
from fedmmkt.server_app.record.run_folder import RunFolder
from tests import ROOT


@pytest.fixture
def birds(tmp_path):
    """A table of texts and images with two species."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    rows = [f"{picture},{species},a bird\n" for picture, species in (("a.png", "robin"), ("b.png", "owl"))] * 20
    (tmp_path / "birds.csv").write_text("photo,species,note\n" + "".join(rows))
    return tmp_path / "birds.csv"


# A T2I model that has another name than `starter`, which is refused where no class is a digit.
OTHER_T2I = {"t2i.model": str(installed("starter/model"))}


def problems(**config):
    with pytest.raises(ConfigError) as caught:
        check_run(ROOT, 2, {key.replace("__", ".").replace("_", "-"): value for key, value in config.items()})
    return str(caught.value).splitlines()


def test_all_wrong_names_are_told_at_once(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "class": "cat"}\n')

    told = problems(
        client__models="cnn,foo,transformers:/nowhere/vit,transformers:no/model",
        t2i__scores="vote",
        t2i__model="/nowhere/model",
        t2i__adapter="/nowhere/lora",
        t2i__prompts=str(tmp_path / "p.jsonl"),
        resume_from="/nowhere/run",
        output_dir="/proc/no",
        min_available_nodes=3,
    )

    expected = [
        "min-available-nodes is 3, but only 2 nodes are simulated",
        "output folder '/proc/no' cannot be written",
        "'client.models' is 'foo', but no task model",
        "client model 'transformers:/nowhere/vit' is not there",
        "client model 'transformers:no/model' cannot be loaded",
        "'t2i.scores' is 'vote', but no score rule",
        "'t2i.model' is '/nowhere/model', and /nowhere/model is no folder",
        "'t2i.adapter' is '/nowhere/lora', which is no folder",
        "line 1 names class 'cat'; allowed: zero, one",
        "'resume-from' is '/nowhere/run', which is not there",
    ]
    assert len(told) == len(expected)
    assert all(text in line for text, line in zip(expected, told, strict=True))


def test_a_wrong_key_does_not_hide_what_is_wrong_else(birds):
    told = problems(rouns=3, rounds=-1, data__dataset="/nowhere/birds.csv", t2i__scores="vote", output_dir="/proc/no")
    unsure = problems(data__datset=str(birds), data__image_column="photo", t2i__scores="vote", output_dir="relative")

    expected = ["'/proc/no' cannot be written", "'rounds' is -1", "'rouns' is unknown", "is 'vote', but no score rule"]
    assert len(told) == 5
    assert all(text in "\n".join(told) for text in [*expected, "'/nowhere/birds.csv', which is not there"])
    assert len(unsure) == 3  # nothing of digits, which have no column `photo`
    for text in ("'data.datset' is unknown", "output-dir is 'relative'", "is 'vote', but no score rule"):
        assert text in "\n".join(unsure)


@pytest.mark.parametrize("key", ["judge_encoder", "client__vote_encoder"])
def test_an_unknown_image_encoder_is_told(key):
    (told,) = problems(**{key: "efficientnet"})
    check_run(ROOT, 2, {key.replace("__", ".").replace("_", "-"): "efficientnet-lite0"})

    assert f"{key.replace('__', '.').replace('_', '-')!r} is 'efficientnet', but no image encoder" in told


@pytest.mark.parametrize("dataset", ["digits", "birds"])
def test_too_many_nodes_for_the_data_are_told(birds, dataset):
    given = {"data.dataset": str(birds), "data.image-column": "photo", "data.label-column": "species"}
    settings = given if dataset == "birds" else {}

    with pytest.raises(ConfigError, match=r"cannot divide (1438|32) examples among 144 clients: .*Lower data.min-exam"):
        check_run(ROOT, 144, settings | {"client.models": "cnn"})


def test_a_run_folder_in_use_is_told(tmp_path):
    with RunFolder(tmp_path).in_use():
        (told,) = problems(output_dir=str(tmp_path))
    check_run(ROOT, 2, {"output-dir": str(tmp_path)})

    assert "is being written by a run that is going on" in told


def test_a_t2i_model_without_its_weights_is_told(tmp_path):
    folder = shutil.copytree(installed("starter/model"), tmp_path / "model")
    next((folder / "unet").glob("*.safetensors")).unlink()

    (told,) = problems(t2i__model=str(folder))

    assert f"'{folder}', but its component 'unet' (UNet2DConditionModel) has no weights" in told


def test_a_pipeline_of_no_family_is_told(tmp_path):
    folder = shutil.copytree(installed("starter/model"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))

    (told,) = problems(t2i__model=str(folder))

    assert f"'t2i.model' is '{folder}', a KandinskyPipeline; allowed: " in told


def test_data_are_read_as_the_run_reads_them(birds):
    columns = {"data__image_column": "photo", "data__label_column": "species", "data__text_column": "note"}
    columns["t2i__model"] = OTHER_T2I["t2i.model"]
    right = OTHER_T2I | {"data.dataset": str(birds), "data.label-column": "species", "client.models": "cnn"}

    check_run(ROOT, 2, right | {"data.image-column": "photo"})
    (no_path,) = problems(data__dataset="/nowhere/birds.csv", **columns)
    (no_label,) = problems(data__dataset=str(birds), **columns | {"data__label_column": "kind"})
    (no_text,) = problems(data__dataset=str(birds), client__models="text,cnn", **columns | {"data__text_column": "t"})

    assert "'data.dataset' is '/nowhere/birds.csv', which is not there" in no_path
    assert "'data.label-column' is 'kind', and the dataset has no such column; allowed: species, note" in no_label
    assert "'data.text-column' is 't', and the dataset has no such column, which client model 'text' reads" in no_text


def test_models_that_no_node_gets_need_no_column(birds):
    columns = {"data.image-column": "photo", "data.label-column": "species", "data.text-column": "t"}

    check_run(ROOT, 2, OTHER_T2I | columns | {"data.dataset": str(birds), "client.models": "cnn,mlp,text"})


def test_an_image_file_that_is_not_there_is_told(birds):
    (birds.parent / "b.png").unlink()

    (told,) = problems(data__dataset=str(birds), data__image_column="photo", data__label_column="species")

    assert f"(its image '{birds.parent / 'b.png'}' is not there)" in told
    assert "of which 16 of 32 images cannot be read: row " in told


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_of_large_tables_the_columns_are_read(birds, kind, monkeypatch):
    import pandas

    monkeypatch.setattr(run_checks, "READ_WHOLE", 0)
    if kind == "parquet":
        pandas.read_csv(birds).to_parquet(birds.with_suffix(".parquet"))
    settings = {"data__dataset": str(birds.with_suffix(f".{kind}")), "data__image_column": "photo"}

    (no_label,) = problems(**settings, client__models="cnn")
    (no_text,) = problems(**settings, client__models="text", data__label_column="species")

    assert (
        "'data.label-column' is 'label', and the dataset has no such column; allowed: photo, species, note" in no_label
    )
    assert "'data.text-column' is 'text', and the dataset has no such column, which client model 'text'" in no_text


def test_paths_are_those_of_the_folder_of_the_command(birds, monkeypatch):
    monkeypatch.chdir(birds.parent)
    given = {
        "data.dataset": "birds.csv",
        "data.classes": "robin,owl",
        "client.models": "cnn, transformers:a/b,transformers:.",
        "t2i.model": "starter",
        "resume-from": "runs/first",
    }

    config = effective_config(ROOT, 2, None, given)

    assert config == given | {
        "min-available-nodes": 2,
        "data.dataset": str(birds),
        "client.models": f"cnn, transformers:a/b,transformers:{birds.parent}",
        "resume-from": str(birds.parent / "runs/first"),
    }


def test_classes_that_the_data_lacks_or_the_list_does_not_name_are_told(birds):
    given = {"data__dataset": str(birds), "data__image_column": "photo", "data__label_column": "species"}
    given["t2i__model"] = OTHER_T2I["t2i.model"]

    (other,) = problems(**given, client__models="cnn", data__classes="robin,howl")
    (unnamed,) = problems(**given, client__models="cnn", data__classes="robin,wren", judge=False)
    (digits,) = problems(data__classes="cat,dog", t2i__model=OTHER_T2I["t2i.model"])

    assert "'data.classes' is 'robin, howl', and the column 'species' of " in other
    assert "holds 'owl, robin': the column has no howl; the key does not name owl; allowed: " in other
    assert "the key does not name owl" in unnamed
    assert "the column has no cat, dog; the key does not name zero, one" in digits
    settings = {key.replace("__", ".").replace("_", "-"): value for key, value in given.items()}
    check_run(
        ROOT, 2, OTHER_T2I | settings | {"client.models": "cnn", "data.classes": "owl,robin,wren", "judge": False}
    )


def test_integers_take_the_names_of_classes_in_order(birds):
    birds.write_text(birds.read_text().replace(",owl,", ",0,").replace(",robin,", ",1,"))
    given = {"data.dataset": str(birds), "data.image-column": "photo", "data.label-column": "species"}

    check_run(ROOT, 2, OTHER_T2I | given | {"client.models": "cnn", "data.classes": "robin,owl"})


def test_settings_are_told_before_photos_are_read(birds, caplog):
    (birds.parent / "b.png").unlink()
    rows = birds.read_text().splitlines(keepends=True)
    birds.write_text("".join([rows[0], *rows[1::2], rows[2]]))  # One of many is missing: a warning, no error.
    given = {"data__dataset": str(birds), "data__image_column": "photo", "data__label_column": "species"}

    (told,) = problems(**given, client__models="cnn", rounds=0)
    quiet = caplog.text
    (header,) = problems(**given | {"data__label_column": "kind"}, client__models="cnn", t2i__scores="vote")[1:]

    assert "'rounds' is 0" in told
    assert "not there" not in quiet
    assert "'data.label-column' is 'kind', and the dataset has no such column" in header


def test_what_is_likely_not_meant_is_told_before_the_start(birds, caplog):
    rows = birds.read_text().splitlines()
    birds.write_text(
        "\n".join([rows[0] + ",part"] + [f"{row},{('Train', 'test')[n % 2]}" for n, row in enumerate(rows[1:])])
    )
    given = {"data.dataset": str(birds), "data.image-column": "photo", "data.label-column": "species"}

    check_run(ROOT, 2, OTHER_T2I | given | {"client.models": "cnn"})

    assert "the column 'part' (Train, test) is not used: splits are files" in caplog.text
    assert f"move {birds.name} out of the folder" in caplog.text


def test_the_starter_is_refused_where_it_draws_no_class_and_warned_of_where_it_draws_some(birds, caplog):
    given = {"data__dataset": str(birds), "data__image_column": "photo", "data__label_column": "species"}

    (told,) = problems(**given, client__models="cnn")
    birds.write_text(birds.read_text().replace("owl", "seven"))
    load_splits.cache_clear()
    settings = {key.replace("__", ".").replace("_", "-"): value for key, value in given.items()}
    check_run(ROOT, 2, settings | {"client.models": "cnn"})

    assert "'t2i.model' is 'starter', which draws nothing but the digits zero to nine" in told
    assert "the classes are owl, robin; allowed: another model" in told
    assert "zero to nine: its images of 1 of 2 classes ('robin') will show digits" in caplog.text


def test_test_images_that_are_also_learned_from_are_told_before_the_start(birds, caplog):
    rows = birds.read_text().splitlines()
    for name, lines in (("train", rows[1::2]), ("test", rows[2::2])):  # Beside the table that they are from.
        (birds.parent / f"{name}.csv").write_text("\n".join([rows[0], *lines]))
    given = {"data.dataset": str(birds.parent), "data.image-column": "photo", "data.label-column": "species"}

    check_run(ROOT, 2, OTHER_T2I | given | {"client.models": "cnn"})

    assert f"test images {len(rows[2::2])} are also among those to learn" in caplog.text
