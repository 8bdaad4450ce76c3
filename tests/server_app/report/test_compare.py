"""Runs are compared as they are: of other lengths and clients, without pictures, unfinished or unreadable."""

import re

import pytest
from PIL import Image

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.report.compare import main, write_comparison


def make_run(path, accuracies, rounds, pictures=True, **settings):
    """Make a run; ``accuracies`` has each client's accuracy by round."""
    folder = RunFolder.create(path)
    config = RunConfig.from_flower({"rounds": rounds, **settings}).model_dump(mode="json", by_alias=True)
    folder.write_config({"config": config, "classes": ["zero", "one"], "versions": {"flwr": "1.39.0"}, "run_id": "1"})
    for number in range(max((len(values) for values in accuracies.values()), default=0)):
        per_client = {
            name: {"accuracy": values[number], "modality": "image", "model": "cnn", "examples": 40, "loss": 0.5}
            for name, values in accuracies.items()
            if number < len(values)
        }
        mean = sum(client["accuracy"] for client in per_client.values()) / len(per_client)
        folder.append_metrics(
            {
                "round": number,
                "clients": {"accuracy": mean, "per_client": per_client},
                "generator": {
                    "alignment": 0.1 * number,
                    "frechet": 90.0 - number,
                    "recall": 0.9 - 0.1 * number,
                    "loss": None,
                },
                "bytes": {"down": 1024**2, "up": 1024},
                "seconds": {"generate": 1.0, "total": 8.0},
                "replies": {"received": 1, "rejected": 0, "missing": 0, "reasons": {}},
            }
        )
        if pictures:
            folder.write_images(number, [Image.new("RGB", (8, 8), (number, 0, 0))], columns=1)
    return path


def text_of(html):
    body = re.sub(r"<style>.*?</style>", " ", html, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


@pytest.fixture
def runs(tmp_path):
    long = make_run(tmp_path / "long", {"cnn-0": [0.1, 0.4, 0.7], "cnn-1": [0.3, 0.3, 0.2]}, rounds=2)
    short = make_run(tmp_path / "short", {"cnn-0": [0.1, 0.3], "mlp-2": [0.2, 0.5]}, rounds=5, seed=7, pictures=False)
    return [long, short]


def test_runs_of_other_rounds_and_clients_are_compared(runs, tmp_path):
    page = text_of(write_comparison(runs, tmp_path / "page.html").read_text())

    assert "Status finished, 2 rounds round 1 of 5" in page
    assert (
        "All clients, mean accuracy untrained 20.0 % → alone 35.0 % → federated 45.0 % +10.0 points compared with alone"
        in page
    )
    assert "untrained 15.0 % → federated 40.0 % +25.0 points" in page
    assert "before 90.0 % → after 70.0 % −20.0 points, images more alike" in page
    assert (
        "Key long short rounds 2 5 seed 0 7 A dash: the run has no such setting, as runs of an earlier version. Curves"
        in page
    )  # Nothing else differs.
    client = "cnn, image, 40 examples, rounds"
    assert f"cnn-0 alone 40.0 % → 70.0 % +30.0 {client} 0 to 2 before 10.0 % → 30.0 % +20.0 {client} 0 to 1" in page
    assert f"cnn-1 alone 30.0 % → 20.0 % -10.0 {client} 0 to 2 – mlp-2 – before 20.0 %" in page
    assert "To clients 3.0 MiB 2.0 MiB From clients 3.0 KiB 2.0 KiB Time, generate 3.0 s 2.0 s" in page
    assert "Time, total 24.0 s 16.0 s Measuring is done beside the clients' work" in page


def test_numbers_of_examples_with_noise_are_shown_as_such(runs, tmp_path):
    folder = RunFolder(make_run(tmp_path / "private", {"cnn-0": [0.1, 0.5]}, rounds=1))
    lines = folder.read_metrics()
    folder.metrics.unlink()
    for line in lines:
        line["clients"]["per_client"]["cnn-0"]["privacy"] = {"epsilon": 4.0, "budget": 4.0, "delta": 1e-5}
        RunFolder(folder.path).append_metrics(line)

    page = text_of(write_comparison([runs[1], folder.path], tmp_path / "page.html").read_text())

    assert "Clients answer with feedback logits+votes epsilon 4, no logits" in page
    assert "cnn, image, about 40 examples, rounds 0 to 1" in page
    assert "were told with noise" in page


def test_curves_lie_over_each_other_and_pictures_beside_each_other(runs, tmp_path):
    html = write_comparison(runs, tmp_path / "page.html").read_text()

    titles = ["Clients&#39; mean accuracy", "T2I alignment", "T2I Fréchet distance", "T2I recall"]
    assert re.findall(r"<h3>(.*?)</h3>", html) == [*titles, "long", "short"]
    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert all("var(--blue)" in svg and "var(--orange)" in svg for svg in drawn)
    assert len(drawn) == 4
    assert re.findall(r'alt="(.*?)"', html) == ["long, round 2", "long, round 0"]
    assert "No pictures." in html
    references = re.findall(r"""(?:src|href)=["']([^"'#]{1,15})""", html)
    assert set(references) == {"data:image/png;"}


def test_a_folder_that_cannot_be_read_is_left_out_and_named(runs, tmp_path, capsys):
    broken = make_run(tmp_path / "broken", {"cnn-0": [0.1]}, rounds=1)
    (broken / "metrics.jsonl").write_text('{"round": 0\n')
    page = tmp_path / "page.html"

    assert main([*map(str, [*runs, broken, tmp_path / "missing"]), "--out", str(page)]) == 0

    shown = capsys.readouterr()
    assert shown.out.strip() == str(page)
    assert f"{broken} is left out: its files are not those of a run" in shown.err
    assert f"{tmp_path / 'missing'} is left out: No such file or directory" in shown.err
    assert "Left out:" in page.read_text()


def test_a_run_before_its_first_round_and_one_of_the_same_name_are_shown(runs, tmp_path):
    begun = make_run(tmp_path / "other" / "long", {}, rounds=3)

    page = text_of(write_comparison([runs[0], begun], tmp_path / "page.html").read_text())

    assert f"Measure {runs[0]} {begun} Status finished, 2 rounds before the first round" in page


def test_names_are_text_not_markup(runs, tmp_path):
    evil = make_run(tmp_path / "<b>evil", {"<script>alert(1)": [0.5, 0.5]}, rounds=1)

    html = write_comparison([runs[0], evil], tmp_path / "page.html").read_text()

    assert "<script>" not in html
    assert "<b>evil" not in html


def test_one_run_alone_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="1 of 1 folders can be read; allowed: two runs or more"):
        write_comparison([runs[0], runs[0]], tmp_path / "page.html")


def test_the_rows_of_pictures_have_their_classes_and_prompts(runs, tmp_path):
    RunFolder(runs[0]).write_captions(["a nought", "the digit 0", "an ace", "an ace"], 2, ["zero", "one"])

    page = text_of(write_comparison(runs, tmp_path / "page.html").read_text())

    assert "long Class zero one After, round 2 Class zero one Before, round 0" in page
    assert "All prompts a nought · the digit 0 an ace" in page
    assert page.count("All prompts") == 1  # the other run has no pictures


def test_failed_runs_and_other_datasets_are_told(runs, tmp_path):
    RunFolder(runs[1]).write_failure("round 2: no client gave a valid reply")
    birds = make_run(tmp_path / "birds", {"cnn-0": [0.1, 0.3]}, rounds=1, **{"data.dataset": "/data/birds.csv"})
    zoo = make_run(tmp_path / "zoo", {"cnn-0": [0.1, 0.3]}, rounds=1, **{"data.dataset": "/data/birds.csv"})

    other = text_of(write_comparison([runs[0], birds], tmp_path / "page.html").read_text())
    same = text_of(write_comparison([birds, zoo], tmp_path / "page.html").read_text())
    failed = text_of(write_comparison(runs, tmp_path / "page.html").read_text())

    assert "failed after round 1 of 5: round 2: no client gave a valid reply" in failed
    assert "their alignments and Fréchet distances are not comparable with each other" in other
    assert "not comparable" not in same
