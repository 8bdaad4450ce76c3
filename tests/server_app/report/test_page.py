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
    folder = RunFolder.create(path)
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


def make_finished(path: Path, tested: tuple[int, int] = (50, 50)) -> RunFolder:
    """Make a run of one round with final evaluations: cnn-0 knows one class alone; text-1 gains nothing."""
    lines = [make_line(0, {"cnn-0": 0.1, "text-1": 0.2}), make_line(1, {"cnn-0": 0.9, "text-1": 0.5})]
    common = {"tested": list(tested), "accuracy": 0.9, "alone": 0.5}
    cnn = common | {"examples": [40, 0], "correct": [40, 50], "alone_correct": [50, 0]}
    text = common | {"examples": [20, 20], "correct": [25, 25], "alone_correct": [26, 24], "accuracy": 0.5}
    cnn |= {"personal": 0.8, "alone_personal": 1.0}
    text |= {"personal": 0.5, "alone_personal": 0.5}
    lines[-1]["evaluation"] = {"per_client": {"cnn-0": cnn, "text-1": text}}
    return make_run(path, lines, rounds=1)


def test_untrained_alone_and_federated_are_shown_for_each_side(tmp_path):
    page = text_of(write_report(make_two_rounds(tmp_path / "run").path).read_text())

    # Alone is round 1, before the first distillation.
    found = "untrained 15.0 % alone 35.0 % federated 60.0 % +25.0 points compared with alone 2 clients, rounds 0 to 2"
    assert f"All clients, mean accuracy {found}" in page
    assert (
        "Image clients, mean accuracy untrained 10.0 % alone 40.0 % federated 70.0 % +30.0 points compared with alone"
        in page
    )
    assert (
        "Text clients, mean accuracy untrained 20.0 % alone 30.0 % federated 50.0 % +20.0 points compared with alone"
        in page
    )
    assert "T2I alignment before 50.0 % after 90.0 % +40.0 points, better" in page
    assert "T2I Fréchet distance before 200 after 50 −75 %" in page
    assert "Alone is the client's model in round 1: after 8 epochs on its private data" in page
    assert "Guessing gives 50.0 % (chance)" in page
    assert "text-1 gains least: +20.0 points (from 30.0 % to 50.0 %)." in page
    assert "text-1 has the lowest accuracy: 50.0 %, with 40 private examples (alone 30.0 %)." in page


def test_a_finished_run_whose_clients_tell_no_accuracy_says_why(tmp_path):
    lines = [make_line(number, {"cnn-0": 0.5}) for number in range(3)]
    for line in lines:
        budget = {"epsilon": 2.5, "budget": 8.0, "delta": 1e-5, "counts_noise": 2.0, "votes_noise": None}
        line["clients"]["accuracy"] = None
        line["clients"]["per_client"]["cnn-0"] |= {"accuracy": None, "loss": None, "privacy": budget}

    page = text_of(write_report(make_run(tmp_path / "run", lines).path).read_text())

    assert "No accuracy is known: clients with a privacy budget tell none, and no judge measures" in page
    assert "cnn-0 2.500 8 1e-05 2 –" in page
    assert "yet" not in page


def test_the_control_is_what_clients_are_compared_with(tmp_path):
    page = text_of(write_report(make_finished(tmp_path / "run").path).read_text())

    assert "untrained 15.0 % alone 50.0 % federated 70.0 % +20.0 points compared with alone, better 2 clients" in page
    assert "equally many private epochs (10)" in page  # 8 + 1 * 2
    assert "Each client is tested on 100 examples." in page
    assert "Of 2 clients, 1 are better federated than alone beyond noise, 0 worse, 1 within noise." in page
    assert "text-1 gains least: +0.0 points (from 50.0 % to 50.0 %, within noise)." in page
    assert "cnn-0 cnn image 40 10.0 % 50.0 % 90.0 % +40.0 100.0 % → 80.0 %" in page


def test_accuracy_by_class_is_shown_alone_and_federated(tmp_path):
    html = write_report(make_finished(tmp_path / "run").path).read_text()

    alone, federated = (text_of(table) for table in re.findall(r'<table class="heat">.*?</table>', html, flags=re.S))
    assert alone == "Alone Client zero one all tests 76 24 cnn-0 100 0 text-1 52 48"
    assert federated == "Federated Client zero one all tests 65 75 cnn-0 80 100 text-1 50 50"
    assert 'title="50 of 50 test examples, 40 private examples"' in html


def test_numbers_of_examples_with_noise_are_shown_as_such(tmp_path):
    lines = make_finished(tmp_path / "exact").read_metrics()
    budget = {"epsilon": 8.0, "budget": 8.0, "delta": 1e-5, "counts_noise": 2.0, "votes_noise": 2.0}
    for line in lines:
        line["clients"]["per_client"]["text-1"]["privacy"] = budget

    html = write_report(make_run(tmp_path / "run", lines, rounds=1).path).read_text()

    page = text_of(html)
    assert "feedback logits+votes, 1 of 2 clients: epsilon 8, no logits" in page
    assert "text-1 text text about 40 20.0 %" in page
    assert "cnn-0 cnn image 40 10.0 %" in page
    assert 'Numbers of examples with "about" were told with noise' in page.replace("&#34;", '"')
    assert "with about 40 private examples (alone 50.0 %)" in page  # text-1 has the lowest accuracy.
    assert 'title="25 of 50 test examples, about 20 private examples"' in html
    assert html.count('class="held"') == 2  # cnn-0 holds one class, alone and federated.


def test_with_budgets_for_all_no_logits_are_told(tmp_path):
    lines = make_finished(tmp_path / "exact").read_metrics()
    for line in lines:
        for name, budget in (("cnn-0", 2.0), ("text-1", 8.0)):
            line["clients"]["per_client"][name]["privacy"] = {"epsilon": 2.0, "budget": budget, "delta": 1e-5}

    page = text_of(write_report(make_run(tmp_path / "run", lines, rounds=1).path).read_text())

    assert "T2I starter · epsilon 2 to 8, no logits · 2 clients" in " ".join(page.split())
    assert "feedback logits+votes" not in page[: page.index("Configuration")]


def test_a_fall_beyond_noise_is_called_worse(tmp_path):
    lines = [
        make_line(0, {"cnn-0": 0.5}, generator={"alignment": 0.9, "frechet": 50.0, "loss": None}),
        make_line(1, {"cnn-0": 0.4}, generator={"alignment": 0.5, "frechet": 60.0, "loss": None}),
    ]

    page = text_of(write_report(make_run(tmp_path / "run", lines).path).read_text())

    assert "untrained 50.0 % federated 40.0 % −10.0 points 1 client" in page  # the test set is not known
    assert "before 90.0 % after 50.0 % −40.0 points, worse" in page
    assert "before 50 after 60 +20 %" in page


def test_rounds_clients_and_configuration_are_tabled(tmp_path):
    page = text_of(write_report(make_two_rounds(tmp_path / "run").path).read_text())

    assert "cnn-0 cnn image 40 10.0 % 40.0 % 70.0 % +30.0" in page
    assert "1 35.0 % 60.0 % 90 0.25 2.0 MiB 1.0 KiB 8.0 s 2 0 0" in page
    assert "time of all rounds 24.0 s to clients 6.0 MiB from clients 3.0 KiB" in page
    assert "client.learning-rate 0.001" in page
    assert "t2i.guidance 1.5, 1.0" in page
    assert "rounds 2 changed; default 8" in page
    assert "versions.flwr 1.39.0" in page
    assert "classes zero, one" in page


def test_a_client_that_does_not_count_whole_is_told_with_the_reason(tmp_path):
    doubts = [{}, {"cnn-0": {"weight": 0, "votes": True, "reason": "first"}}]
    doubts += [{"cnn-0": {"weight": weight, "votes": True, "reason": "it says <b>"}} for weight in (0, 0.5)]

    texts = []
    for count in (2, 3, 4):
        lines = [
            make_line(number, {"cnn-0": 0.1, "text-1": 0.2}, reliability=doubts[number]) for number in range(count)
        ]
        texts.append(text_of(write_report(make_run(tmp_path / str(count), lines).path).read_text()))

    assert "cnn-0 not counted in 1 of 2 rounds: first" in texts[0]
    assert "cnn-0 not counted in 2 of 3 rounds: it says &lt;b&gt;" in texts[1]
    assert "cnn-0 counted in part only in 3 of 4 rounds: it says &lt;b&gt;" in texts[2]


def test_the_command_that_repeats_the_run_is_shown(tmp_path):
    page = text_of(write_report(make_two_rounds(tmp_path / "run").path).read_text())

    assert "fedmmkt demo --nodes 2 --run-config rounds=2" in page
    assert "flwr run . --stream --run-config rounds=2" in page


def test_the_title_says_dataset_model_and_date(tmp_path):
    folder = make_two_rounds(tmp_path / "run")
    folder.write_config(folder.read_config() | {"started": "2026-03-04T05:06:07"})

    html = write_report(folder.path).read_text()

    assert "<title>FedMMKT: mnist, T2I starter, 2026-03-04</title>" in html


def test_the_machine_is_described(tmp_path):
    folder = make_two_rounds(tmp_path / "run")
    hardware = {"processor": "A CPU", "cores": 2, "memory": "8.0 GiB", "gpus": ["A GPU"], "system": "Linux"}
    folder.write_config(folder.read_config() | {"hardware": hardware, "commit": "0123456789ab"})

    page = text_of(write_report(folder.path).read_text())

    assert "hardware of the server A CPU, 2 cores, 8.0 GiB, A GPU system Linux" in page
    assert "commit 0123456789ab" in page


def test_prompts_and_real_images_stand_beside_the_pictures(tmp_path):
    folder = make_two_rounds(tmp_path / "run")
    real = [Image.new("RGB", (8, 8), (0, 0, 250))]
    folder.write_captions(["a <zero>", "the zero"], columns=2, rows=["zero"], real=real)

    html = write_report(folder.path).read_text()

    assert "<li>zero</li>" in html
    assert "<li>a &lt;zero&gt; · the zero</li>" in html
    assert 'data-prompts=\'["a \\u003czero\\u003e", "the zero"]\'' in html
    assert pixels_of(html, "Real test images") == (0, 0, 250)
    assert "whoever gets this page sees these photos" in text_of(html)


def test_a_page_without_real_images_does_not_speak_of_them(tmp_path):
    assert "these photos" not in write_report(make_two_rounds(tmp_path / "run").path).read_text()


def test_many_clients_are_shown_by_their_spread_and_their_extremes(tmp_path):
    accuracies = [{f"cnn-{index}": 0.1 + level * index / 1000 for index in range(200)} for level in (0, 1, 4)]
    lines = [make_line(number, clients) for number, clients in enumerate(accuracies)]

    html = write_report(make_run(tmp_path / "run", lines).path).read_text()

    page = text_of(html)
    assert "Of 200 clients, the 20 that gain least and the 20 that gain most." in page
    assert "cnn-0 cnn image" in page
    assert "cnn-199 cnn image" in page
    assert "cnn-100 cnn image" not in page
    assert "Number of clients by their gain" in page
    assert len(html) < 150_000


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
    assert "All clients, mean accuracy untrained 15.0 % 2 clients, round 0" in page
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

    assert "location.reload()" in running
    assert "Round 1 of 2" in running
    assert "location.reload()" not in finished
    assert "Finished: 2 of 2 rounds" in finished


def test_clients_that_come_late_or_miss_rounds_are_shown_with_their_rounds(tmp_path):
    missing = {"received": 1, "rejected": 0, "missing": 1, "reasons": {"cnn-0": "no answer"}}
    lines = [
        make_line(0, {"cnn-0": 0.1}),
        make_line(1, {"cnn-0": 0.4, "cnn-10": 0.2, "cnn-2": 0.2}),
        make_line(2, {"cnn-10": 0.6, "cnn-2": 0.6}, replies=missing),
    ]

    page = text_of(write_report(make_run(tmp_path / "run", lines).path).read_text())

    found = (
        "untrained 10.0 % alone 20.0 % federated 60.0 % +40.0 points compared with alone 1 → 2 clients, rounds 0 to 2"
    )
    assert found in page
    assert "cnn-0 cnn image 40 10.0 % 40.0 % 40.0 % round 1 +0.0" in page
    assert page.index("cnn-2 cnn image 40 20.0 % round 1 20.0 % 60.0 % +40.0") < page.index("cnn-10 cnn image")
    assert "5 received, 0 rejected, 1 missing." in page
    assert "2 cnn-0 no answer" in page


def test_charts_are_drawn_in_the_colours_of_the_page_and_say_their_values(tmp_path):
    html = write_report(make_two_rounds(tmp_path / "run").path).read_text()

    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert len(drawn) == 6
    assert all("var(--ink)" in svg and "#010203" not in svg and 'role="img"' in svg for svg in drawn)
    label = "Accuracy of each client: mean accuracy 15.0 % in round 0, 60.0 % in round 2"
    assert f'aria-label="{label}"' in drawn[0]
    assert "<title>Round 1: mean 35.0 %, cnn-0 40.0 %, text-1 30.0 %</title>" in drawn[0]
    assert "<title>Round 2: 90.0 %</title>" in drawn[1]


def test_the_bars_of_a_round_end_at_its_seconds(tmp_path):
    html = write_report(make_two_rounds(tmp_path / "run").path).read_text()

    (drawn,) = re.findall(r'<svg role="img" aria-label="Seconds of a round.*?</svg>', html, flags=re.S)
    (highest,) = re.findall(r"<text[^>]*>(\d+)</text>(?!.*</text>)", drawn, flags=re.S)
    # Of the 8 s of a round, 1 s is of the first stage: the axis does not end with it.
    assert int(highest) == 8


def test_axes_name_no_round_that_is_not_there(tmp_path):
    html = write_report(make_run(tmp_path / "run", [make_line(0, {"cnn-0": 0.5})]).path).read_text()

    accuracy = re.search(r"<svg.*?</svg>", html, flags=re.S)
    assert accuracy
    horizontal = re.search(r'<g id="matplotlib.axis_1">.*?<g id="matplotlib.axis_2">', accuracy[0], flags=re.S)
    assert horizontal
    assert re.findall(r"<text[^>]*>(.*?)</text>", horizontal[0]) == ["0", "round"]


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


def test_a_failed_run_says_so_and_why(tmp_path):
    line = make_line(0, {"cnn-0": 0.1}, replies={"received": 1, "rejected": 0, "missing": 0, "reasons": {}})
    folder = make_run(tmp_path / "run", [line])
    folder.write_failure("round 1: none of 2 nodes gave a valid reply")

    html = write_report(folder.path).read_text()
    folder.write_failure("")
    again = text_of(write_report(folder.path).read_text())
    unmeasured = make_run(tmp_path / "new", [])
    unmeasured.write_failure("the disk is full")
    early = text_of(write_report(unmeasured.path).read_text())

    assert "(failed)</title>" in html
    assert "Failed after round 0 of 2" in text_of(html)
    assert "The run failed: round 1: none of 2 nodes gave a valid reply" in text_of(html)
    assert "Every reply came" not in html
    assert "location.reload()" not in html
    assert "Round 0 of 2" in again
    assert "Failed before the end of round 0" in early
    assert "The run failed: the disk is full" in early


def test_a_frozen_model_has_learned_nothing(tmp_path):
    folder = make_two_rounds(tmp_path / "run")
    described = folder.read_config()
    described["config"]["t2i"]["scores"] = "none"
    learned = text_of(write_report(folder.path).read_text())
    folder.write_config(described)

    page = text_of(write_report(folder.path).read_text())

    assert "what changes is what it learned" in learned
    assert 'the model was left as it is ( t2i.scores="none" ), so that nothing changes.' in page
    assert "what it learned" not in page
