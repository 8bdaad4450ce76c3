"""The run folder on real disks: whole files, nothing lost, strict JSON."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fedmmkt.common.config import ConfigError
from fedmmkt.server_app.record.run_folder import RunFolder
from tests import ROOT


def run_with_file_limit(limit: int, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose files cannot grow beyond a number of bytes: its writes really fail."""
    script = f"""
import resource
from pathlib import Path
from fedmmkt.server_app.record.run_folder import RunFolder

folder = Path({str(folder)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
{code}
"""
    command = [sys.executable, "-B", "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_new_folder_is_made_with_its_parents_and_holds_nothing_yet(tmp_path):
    folder = RunFolder.create(tmp_path / "runs" / "7")

    assert folder.path == tmp_path / "runs" / "7"
    assert list(folder.path.iterdir()) == []
    assert folder.read_metrics() == []


def test_parts_have_their_places(tmp_path):
    folder = RunFolder(tmp_path)

    assert folder.lora == tmp_path / "lora"
    assert folder.checkpoints == tmp_path / "checkpoints"
    assert folder.report == tmp_path / "report.html"
    assert folder.metrics == tmp_path / "metrics.jsonl"


def test_a_relative_folder_is_refused():
    with pytest.raises(ConfigError, match=r"'output-dir'.*'runs/7' is not absolute; allowed: an absolute path"):
        RunFolder.create(Path("runs/7"))


def test_a_folder_under_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("a file")

    with pytest.raises(ConfigError) as caught:
        RunFolder.create(tmp_path / "taken" / "run")

    assert "'output-dir'" in str(caught.value)
    assert str(tmp_path / "taken" / "run") in str(caught.value)
    assert "(Not a directory)" in str(caught.value)


def test_a_folder_that_takes_no_bytes_is_refused_before_an_earlier_run_is_moved(tmp_path):
    earlier = RunFolder.create(tmp_path / "run")
    earlier.append_metrics({"round": 0})

    done = run_with_file_limit(0, "RunFolder.create(folder)", earlier.path)

    assert done.returncode == 1
    assert "ConfigError: run-config key 'output-dir'" in done.stderr
    assert "(File too large)" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert earlier.read_metrics() == [{"round": 0}]


def test_an_earlier_run_is_moved_aside_whole_and_that_is_logged(tmp_path, caplog):
    earlier = RunFolder.create(tmp_path / "run")
    earlier.append_metrics({"round": 0})
    earlier.write_images(0, [Image.new("RGB", (32, 32))], columns=1)
    os.utime(earlier.metrics, (400 * 86400, 400 * 86400))

    logging.getLogger("flwr").addHandler(caplog.handler)  # Flower's logger does not propagate
    try:
        with caplog.at_level(logging.INFO, logger="flwr"):
            folder = RunFolder.create(tmp_path / "run")
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)

    (aside,) = (path for path in tmp_path.iterdir() if path.name != "run")
    assert aside.name.startswith("run-1971020")  # 400 days after 1970 began, in any time zone
    assert RunFolder(aside).read_metrics() == [{"round": 0}]
    assert (aside / "images" / "round-000.png").exists()
    assert list(folder.path.iterdir()) == []
    assert str(aside) in caplog.text


def test_earlier_runs_of_the_same_second_are_all_kept(tmp_path):
    for number in range(3):
        folder = RunFolder.create(tmp_path / "run")
        folder.append_metrics({"round": 0, "number": number})
        os.utime(folder.metrics, (1_000_000_000, 1_000_000_000))
    RunFolder.create(tmp_path / "run")

    aside = sorted(path for path in tmp_path.iterdir() if path.name != "run")

    assert [path.name.removeprefix(aside[0].name) for path in aside] == ["", "-2", "-3"]
    assert [RunFolder(path).read_metrics()[0]["number"] for path in aside] == [0, 1, 2]


def test_a_linked_folder_keeps_the_new_run_on_the_disk_it_points_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    RunFolder.create(tmp_path / "link").append_metrics({"round": 0})

    folder = RunFolder.create(tmp_path / "link")

    assert folder.path == tmp_path / "disk" / "run"
    assert len(list((tmp_path / "disk").iterdir())) == 2
    assert (tmp_path / "link").is_symlink()


def test_a_folder_of_the_user_is_refused_and_stays_as_it_is(tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")

    with pytest.raises(
        ConfigError, match=r"holds something else \('photo.jpg'\); allowed: .* empty or that of an earlier run"
    ):
        RunFolder.create(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_the_configuration_is_sorted_indented_json(tmp_path):
    RunFolder(tmp_path).write_config({"run_id": "7", "config": {"seed": 0, "rounds": 2}})

    expected = '{\n  "config": {\n    "rounds": 2,\n    "seed": 0\n  },\n  "run_id": "7"\n}\n'
    assert (tmp_path / "config.json").read_text() == expected


def test_metrics_keep_earlier_lines_in_order(tmp_path):
    folder = RunFolder(tmp_path)

    for number in range(3):
        folder.append_metrics({"round": number, "clients": {"accuracy": number / 4}})

    assert folder.metrics.read_text().count("\n") == 3
    assert [line["round"] for line in folder.read_metrics()] == [0, 1, 2]
    assert folder.read_metrics()[2] == {"round": 2, "clients": {"accuracy": 0.5}}


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    folder = RunFolder(tmp_path)

    folder.append_metrics(
        {"round": 0, "generator": {"loss": float("nan"), "frechet": float("inf")}, "list": [float("-inf")]}
    )

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (line,) = (json.loads(text, parse_constant=refuse) for text in folder.metrics.read_text().splitlines())
    assert line == {"round": 0, "generator": {"loss": None, "frechet": None}, "list": [None]}


def test_a_failed_write_leaves_the_good_lines_and_no_rubbish(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics({"round": 0})
    good = folder.metrics.read_bytes()

    done = run_with_file_limit(50, 'RunFolder(folder).append_metrics({"round": 1, "text": "x" * 100})', tmp_path)

    assert done.returncode == 1
    assert "metrics.jsonl could not be written (File too large)" in done.stderr
    assert folder.metrics.read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_pictures_are_placed_row_by_row_with_gaps(tmp_path):
    colours = ["red", "lime", "blue"]

    path = RunFolder(tmp_path).write_images(12, [Image.new("RGB", (32, 32), colour) for colour in colours], columns=2)

    assert path == tmp_path / "images" / "round-012.png"
    with Image.open(path) as grid:
        assert grid.size == (2 * 32 + 2, 2 * 32 + 2)
        pixels = [grid.getpixel(place) for place in ((0, 0), (34, 0), (0, 34), (34, 34), (32, 0))]
    white = (255, 255, 255)
    assert pixels == [(255, 0, 0), (0, 255, 0), (0, 0, 255), white, white]


def test_a_folder_in_which_a_run_has_just_begun_is_refused(tmp_path):
    """It has no metrics yet, and its configuration is not to be overwritten."""
    with RunFolder(tmp_path).in_use(), pytest.raises(ConfigError, match="is being written by a run that is going on"):
        RunFolder.create(tmp_path)
