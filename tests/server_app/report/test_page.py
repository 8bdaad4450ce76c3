"""The report opens alone, shows what was measured, and copes with what was not."""

import base64
import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedmmkt.common.config import RunConfig
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.report.page import main, write_report
from fedmmkt.server_app.report.pictures import MOST_PICTURES
from tests import ROOT


def make_line(number: int, accuracies: dict[str, float], **changes: Any) -> dict[str, Any]:
    """Make a line of metrics; a client's name begins with its model."""
    modalities = {"cnn": "image", "text": "text", "dual": "image+text"}
    per_client = {
        name: {
            "accuracy": accuracy,
            "modality": modalities.get(name.split("-")[0], "image"),
            "model": name.split("-")[0],
            "examples": 40,
            "loss": 0.5,
        }
        for name, accuracy in accuracies.items()
    }
    return {
        "round": number,
        "clients": {"accuracy": sum(accuracies.values()) / len(accuracies), "per_client": per_client},
        "generator": {"alignment": None, "frechet": None, "loss": None},
        "bytes": {"down": 2_097_152, "up": 1024},
        "seconds": {"generate": 1, "clients": 2, "aggregate": 0, "adapt": 3, "measure": 1, "total": 8},
        "replies": {"received": len(accuracies), "rejected": 0, "missing": 0, "reasons": {}},
    } | changes


def make_run(path: Path, lines: list[dict[str, Any]], rounds: int = 2, pictures: bool = True) -> RunFolder:
    folder = RunFolder.create(path, tensorboard=False)
    config = RunConfig(rounds=rounds).model_dump(mode="json", by_alias=True)
    folder.write_config({"config": config, "classes": ["zero", "one"], "versions": {"flwr": "1.39.0"}, "run_id": "77"})
    for line in lines:
        folder.append_metrics(line)
        if pictures:
            folder.write_images(line["round"], [Image.new("RGB", (8, 8), (line["round"] % 256, 0, 0))] * 2, columns=2)
    return folder


def make_two_rounds(path: Path) -> RunFolder:
    lines = [
        make_line(0, {"cnn-0": 0.1, "text-1": 0.2}, generator={"alignment": 0.5, "frechet": 200.0, "loss": None}),
        make_line(1, {"cnn-0": 0.4, "text-1": 0.3}, generator={"alignment": 0.6, "frechet": 90.0, "loss": 0.25}),
        make_line(2, {"cnn-0": 0.7, "text-1": 0.5}, generator={"alignment": 0.9, "frechet": 50.0, "loss": 0.125}),
    ]
    return make_run(path, lines)


def text_of(html: str) -> str:
    """Give what a reader sees, with single spaces."""
    body = re.sub(r"<(style|script)>.*?</\1>", " ", html, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def pixels_of(html: str, label: str) -> tuple[int, ...]:
    """Give the first pixel of the picture with this alternative text."""
    uri = re.search(rf'alt="{label}" src="data:image/\w+;base64,([^"]+)"', html)
    assert uri, label
    with Image.open(io.BytesIO(base64.b64decode(uri[1]))) as image:
        return image.convert("RGB").getpixel((0, 0))


def test_before_and_after_are_shown_for_each_side(tmp_path):
    page = text_of(write_report(make_two_rounds(tmp_path / "run").path).read_text())

    assert "All clients, mean accuracy 15.0 % → 60.0 % +45.0 points, better 2 clients, rounds 0 to 2" in page
    assert "Image clients, mean accuracy 10.0 % → 70.0 % +60.0 points, better" in page
    assert "Text clients, mean accuracy 20.0 % → 50.0 % +30.0 points, better" in page
    assert "T2I alignment 50.0 % → 90.0 % +40.0 points, better" in page
    assert "T2I Fréchet distance 200 → 50 −75 %, better" in page


def test_a_fall_is_called_worse(tmp_path):
    lines = [
        make_line(0, {"cnn-0": 0.5}, generator={"alignment": None, "frechet": 50.0, "loss": None}),
        make_line(1, {"cnn-0": 0.4}, generator={"alignment": None, "frechet": 60.0, "loss": None}),
    ]

    page = text_of(write_report(make_run(tmp_path / "run", lines).path).read_text())

    assert "50.0 % → 40.0 % −10.0 points, worse" in page
    assert "50 → 60 +20 %, worse" in page


def test_rounds_clients_and_configuration_are_tabled(tmp_path):
    page = text_of(write_report(make_two_rounds(tmp_path / "run").path).read_text())

    assert "cnn-0 cnn image 40 10.0 % 70.0 % +60.0" in page
    assert "1 35.0 % 60.0 % 90 0.25 2.0 MiB 1.0 KiB 8.0 s 2 0 0" in page
    assert "client.learning-rate 0.001" in page
    assert "t2i.guidance 1.5, 1.0" in page
    assert "versions.flwr 1.39.0" in page
    assert "classes zero, one" in page


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    html = write_report(make_two_rounds(tmp_path / "run").path).read_text()

    references = re.findall(r"""(?:src|href|srcset|action|data)=["']([^"']*)|url\(["']?([^"')]*)""", html)
    targets = [source or url for source, url in references]
    assert {target.split(",")[0].split("#")[0] for target in targets} == {"data:image/png;base64", ""}
    assert "@import" not in html
    assert "<link" not in html
    assert "<script src" not in html


def test_elements_are_closed_in_order(tmp_path):
    class Checker(HTMLParser):
        stack: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, _: Any) -> None:
            if tag not in {"meta", "img", "input", "br"}:
                self.stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.stack.pop() == tag

    checker = Checker()
    checker.feed(write_report(make_two_rounds(tmp_path / "run").path).read_text())
    checker.close()

    assert checker.stack == []


def test_pictures_are_those_of_the_first_and_the_last_round(tmp_path):
    html = write_report(make_two_rounds(tmp_path / "run").path).read_text()

    assert pixels_of(html, "Generated in round 0") == (0, 0, 0)
    assert pixels_of(html, "Generated in round 2") == (2, 0, 0)
    assert html.count("data:image/png") == 2 + 3  # the pair, and each round in the strip
    assert "image-rendering: pixelated" in html


def test_of_many_rounds_some_pictures_are_shown_with_both_ends(tmp_path):
    lines = [make_line(number, {"cnn-0": 0.5}) for number in range(40)]

    html = write_report(make_run(tmp_path / "run", lines, rounds=40).path).read_text()

    assert html.count("data:image/png") == 2 + MOST_PICTURES
    assert pixels_of(html, "Generated in round 39") == (39, 0, 0)


def test_large_pictures_are_reduced(tmp_path):
    folder = make_run(tmp_path / "run", [make_line(0, {"cnn-0": 0.5})], pictures=False)
    noise = Image.frombytes("RGB", (2000, 1000), os.urandom(2000 * 1000 * 3))
    folder.write_images(0, [noise], columns=1)

    html = write_report(folder.path).read_text()

    (uri,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    with Image.open(io.BytesIO(base64.b64decode(uri))) as image:
        assert image.size == (1600, 800)


@pytest.mark.parametrize("many", [False, True])
def test_names_and_reasons_are_text_not_markup(tmp_path, many):
    evil = "<script>alert('$x$')</script>"
    names = [evil, "_hidden", "50$%$ & more", *(f"cnn-{number}" for number in range(20 if many else 0))]
    replies = {"received": 3, "rejected": 1, "missing": 0, "reasons": {evil: "</table><b>no"}}
    lines = [make_line(number, dict.fromkeys(names, 0.5), replies=replies) for number in range(2)]

    html = write_report(make_run(tmp_path / "run", lines).path).read_text()

    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(&#39;$x$&#39;)&lt;/script&gt;" in html
    assert "&lt;/table&gt;&lt;b&gt;no" in html
    assert "_hidden" in text_of(html)
    assert "50$%$ &amp; more" in html


def test_round_0_alone_without_a_judge_is_enough(tmp_path):
    html = write_report(make_run(tmp_path / "run", [make_line(0, {"cnn-0": 0.1, "text-1": 0.2})]).path).read_text()

    page = text_of(html)
    assert "Round 0 of 2" in page
    assert "All clients, mean accuracy 15.0 % 2 clients, round 0" in page
    assert "No judge measures the T2I model" in page
    assert "T2I alignment" not in page
    assert "LoRA loss" not in re.findall(r"<h3>(.*?)</h3>", html)
    assert "None" not in page


def test_a_run_before_its_first_round_has_a_page(tmp_path):
    page = text_of(write_report(make_run(tmp_path / "run", []).path).read_text())

    assert "Before the first round" in page
    assert "Nothing is measured yet." in page


def test_the_page_reloads_itself_until_the_last_round(tmp_path):
    lines = [make_line(number, {"cnn-0": 0.5}) for number in range(3)]
    running = write_report(make_run(tmp_path / "running", lines[:2]).path).read_text()
    finished = write_report(make_run(tmp_path / "finished", lines).path).read_text()

    assert '<meta http-equiv="refresh" content="10">' in running
    assert "Round 1 of 2" in running
    assert "http-equiv" not in finished
    assert "Finished: 2 of 2 rounds" in finished


def test_clients_that_come_late_or_miss_rounds_are_shown_with_their_rounds(tmp_path):
    missing = {"received": 1, "rejected": 0, "missing": 1, "reasons": {"cnn-0": "no answer"}}
    lines = [
        make_line(0, {"cnn-0": 0.1}),
        make_line(1, {"cnn-0": 0.4, "cnn-10": 0.2, "cnn-2": 0.2}),
        make_line(2, {"cnn-10": 0.6, "cnn-2": 0.6}, replies=missing),
    ]

    page = text_of(write_report(make_run(tmp_path / "run", lines).path).read_text())

    assert "10.0 % → 60.0 % +50.0 points, better 1 → 2 clients, rounds 0 to 2" in page
    assert "cnn-0 cnn image 40 10.0 % 40.0 % round 1 +30.0" in page
    assert page.index("cnn-2 cnn image 40 20.0 % round 1 60.0 % +40.0") < page.index("cnn-10 cnn image")
    assert "5 received, 0 rejected, 1 missing." in page
    assert "2 cnn-0 no answer" in page


def test_charts_are_drawn_in_the_colours_of_the_page(tmp_path):
    html = write_report(make_two_rounds(tmp_path / "run").path).read_text()

    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert len(drawn) == 6
    assert all("var(--ink)" in svg and "#010203" not in svg for svg in drawn)


def test_the_command_line_rebuilds_a_report(tmp_path):
    folder = make_two_rounds(tmp_path / "run")

    command = [sys.executable, "-B", "-m", "fedmmkt", "report", str(folder.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == str(folder.report)
    assert done.stderr == ""
    assert folder.report.read_text().startswith("<!doctype html>")


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "nothing")])

    assert stopped.value.code == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
