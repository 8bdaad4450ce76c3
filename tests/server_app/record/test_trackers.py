"""Trackers get the same of a run, go on with it when it is resumed, and never end it."""

import importlib.util
import json
import logging
import os
import struct

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.record.trackers import TRACKERS, TensorBoard, Trackers, check_trackers

BLOCK, FULL, LAST = 32768, 1, 4
TAGS = [
    "clients/accuracy",
    "clients/per_client/cnn (north)/accuracy",
    "clients/per_client/cnn (north)/examples",
]


def make_run(path):
    """Make a run folder that is as it is before round 0, but that it has an adapter."""
    folder = RunFolder.create(path)
    folder.lora.mkdir()
    (folder.lora / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    folder.write_config({"config": {}})
    return folder


def track(folder, tracker, rounds, config=None):
    """Record rounds as the recorder does."""
    trackers = Trackers([tracker], folder)
    with trackers.run(config or RunConfig(seed=7, tracker=tracker)):
        for number in rounds:
            line = line_of(number)
            folder.write_images(number, [Image.new("RGB", (8, 8), (number, 0, 0))], columns=1)
            folder.append_metrics(line)
            trackers.log(line)


def line_of(number):
    per_client = {"cnn (north)": {"accuracy": 0.25, "model": "cnn", "examples": 40}}
    clients = {"accuracy": 0.5 * number, "per_client": per_client}
    return {"round": number, "clients": clients, "generator": {"loss": None, "frechet": float("nan")}}


def track_in_two_parts(path, tracker):
    """Record rounds 0 and 1, then resume after round 0 in the same folder and record rounds 1 and 2."""
    folder = make_run(path)
    track(folder, tracker, (0, 1))
    resumed = RunFolder.resume(path, folder, 0, folder.metrics.read_bytes().index(b"\n") + 1)
    track(resumed, tracker, (1, 2))
    return resumed


def needs(tracker):
    package = TRACKERS[tracker].package
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install 'fedmmkt[{package}]'")


def test_tensorboard_gets_numbers_pictures_and_settings_and_hides_what_is_repeated(tmp_path):
    folder = track_in_two_parts(tmp_path / "run", "tensorboard")

    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == TAGS
    assert [(event.step, event.value) for event in events.Scalars("clients/accuracy")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert [event.step for event in events.Images("images")] == [0, 1, 2]
    (settings,) = events.Tensors("config/text_summary")
    assert b"| seed | 7 |" in settings.tensor_proto.string_val[0]


@needs("mlflow")
def test_mlflow_goes_on_in_one_run_of_the_folders_own_store(tmp_path):
    import mlflow

    folder = track_in_two_parts(tmp_path / "run", "mlflow")

    assert "MLFLOW_TRACKING_URI" not in os.environ
    client = mlflow.MlflowClient(f"sqlite:///{folder.path}/mlflow/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'fedmmkt'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["seed"] == "7"
    assert sorted(run.data.metrics) == [tag.replace("(", "_").replace(")", "_") for tag in TAGS]
    history = client.get_metric_history(run.info.run_id, "clients/accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.0), (1, 0.5), (1, 0.5), (2, 1.0)]
    artifacts = folder.path / "mlflow" / "artifacts" / run.info.run_id / "artifacts"
    assert (artifacts / "lora" / "pytorch_lora_weights.safetensors").read_bytes() == b"weights"
    assert (artifacts / "metrics.jsonl").read_bytes() == folder.metrics.read_bytes()
    assert {path.name.split("+")[2] for path in artifacts.glob("images/*.png")} == {"0", "1", "2"}


@needs("mlflow")
def test_mlflow_is_told_that_a_run_failed(tmp_path):
    import mlflow

    folder = make_run(tmp_path / "run")
    with pytest.raises(KeyError), Trackers(["mlflow"], folder).run(RunConfig()):
        raise KeyError

    client = mlflow.MlflowClient(f"sqlite:///{folder.path}/mlflow/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'fedmmkt'")
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FAILED"]


def records_of(file):
    """Yield the records of an offline run of wandb: a log of LevelDB, in blocks of 32 KiB, after a header."""
    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


@needs("wandb")
def test_wandb_offline_goes_on_in_one_run(tmp_path, monkeypatch):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    folder = track_in_two_parts(tmp_path / "run", "wandb")
    wandb.teardown()  # Waits until its service has written everything.

    files = sorted(folder.path.glob("wandb/offline-run-*/*.wandb"))
    records = [Record.FromString(data) for file in files for data in records_of(file)]
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["round"], row["clients/accuracy"]) for row in rows] == [(0, 0.0), (1, 0.5), (1, 0.5), (2, 1.0)]
    assert all(set(TAGS) <= set(row) for row in rows)
    assert len(list(folder.path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 4
    kept = json.loads((folder.path / "trackers.json").read_text())
    assert {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"} == {kept["wandb"]}
    assert not [argument for record in records for argument in record.environment.args]  # Flower's hold a token.
    paths = {entry.path for record in records for entry in record.artifact.manifest.contents}
    assert {"lora/pytorch_lora_weights.safetensors", "config.json", "metrics.jsonl"} <= paths


@needs("trackio")
def test_trackio_goes_on_in_one_run_of_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # Read when it is first imported.
    from trackio.sqlite_storage import SQLiteStorage

    folder = track_in_two_parts(tmp_path / "run", "trackio")

    kept = json.loads((folder.path / "trackers.json").read_text())
    rows = SQLiteStorage.get_logs("fedmmkt", kept["trackio"])
    assert [(row["step"], row["clients/accuracy"]) for row in rows] == [(0, 0.0), (1, 0.5), (1, 0.5), (2, 1.0)]
    assert all(set(TAGS) <= set(row) and row["images"]["_type"] == "trackio.image" for row in rows)
    assert (tmp_path / "trackio").is_dir()


def test_a_new_tracker_of_a_resumed_run_first_gets_the_rounds_so_far(tmp_path):
    folder = make_run(tmp_path / "run")
    for number in range(2):
        folder.append_metrics(line_of(number))

    track(folder, "tensorboard", (2,))

    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("clients/accuracy")] == [0, 1, 2]


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    def fail(self, round, numbers, picture):
        raise ConnectionError(f"round {round} is lost: http://me:secret@tracker.example is not there")

    monkeypatch.setattr(TensorBoard, "log", fail)
    folder = make_run(tmp_path / "run")

    with caplog.at_level(logging.WARNING):
        track(folder, "tensorboard", (0, 1))

    (warning,) = [record.message for record in caplog.records if "Tracker" in record.message]
    assert "Tracker tensorboard failed (round 0 is lost: http://***@tracker.example is not there)" in warning
    assert len(folder.read_metrics()) == 2


def test_without_trackers_nothing_is_written(tmp_path):
    folder = make_run(tmp_path / "run")

    with Trackers([], folder).run(RunConfig(tracker="")):
        pass

    assert sorted(path.name for path in folder.path.iterdir()) == ["config.json", "lora"]


def test_a_tracker_that_is_not_installed_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(TensorBoard, "package", "not_there")

    with pytest.raises(ConfigError, match=r"'tracker' names 'tensorboard', .* pip install 'fedmmkt\[not_there\]'"):
        check_trackers(["tensorboard"])


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match="'tracker' is 'mlfow'; allowed: 'tensorboard', 'mlflow', 'wandb' or 'trac"):
        RunConfig.from_flower({"tracker": "tensorboard,mlfow"})
