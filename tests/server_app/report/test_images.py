import pytest

from fedmmkt.server_app.report.history import History
from fedmmkt.server_app.report.images import MeasureRow, VerdictRow, measure_rows, verdict_rows
from fedmmkt.server_app.report.measures import fading_of, headlines_of
from fedmmkt.server_app.report.page import write_report
from tests.server_app.report.test_page import make_line, make_run, text_of

BEFORE = {"alignment": 0.5, "frechet": 200.0, "loss": None, "precision": 0.25, "recall": 0.75, "density": 0.5}
AFTER = {"alignment": 0.9, "frechet": 50.0, "loss": 0.1, "precision": 0.75, "recall": 0.25, "density": 1.5}
FLOORS = {"images": 180, "frechet": 12.0, "precision": 0.9, "recall": 0.9, "density": 1.0, "coverage": 0.9}


def make_lines():
    lines = [
        make_line(number, {"cnn-0": 0.5}, generator=generator | {"coverage": coverage})
        for number, (generator, coverage) in enumerate([(BEFORE, 0.5), (BEFORE, 0.5), (AFTER, 0.25)])
    ]
    preference = {"agreement": -0.5, "votes": 3.25}
    lines[2]["guard"] = {"verdict": "accepted", "preference": preference, "rounds": 1, "step": 0.5, "base_share": 0.25}
    return lines


def test_each_measure_is_shown_before_after_and_for_real_images():
    rows = measure_rows(make_lines(), FLOORS)

    assert rows[0] == MeasureRow("Alignment", "50.0 %", "90.0 %", "–")
    assert rows[1] == MeasureRow("Fréchet distance", "200", "50", "12")
    assert rows[3] == MeasureRow("Recall", "75.0 %", "25.0 %", "90.0 %")
    assert rows[4] == MeasureRow("Density", "0.5", "1.5", "1")
    assert len(rows) == 6


def test_runs_of_earlier_versions_have_no_such_rows():
    assert measure_rows([make_line(0, {"cnn-0": 0.5})], {}) == []
    assert verdict_rows([make_line(0, {"cnn-0": 0.5})]) == []


def test_a_verdict_is_told_in_words():
    assert verdict_rows(make_lines()) == [
        VerdictRow(2, "accepted: clients prefer its images", "agreement −0.5, votes +3.2", "50.0 %", "25.0 %")
    ]


def test_the_page_shows_both(tmp_path):
    page = text_of(write_report(make_run(tmp_path / "run", make_lines()).path).read_text())

    assert "Recall 75.0 % 25.0 %" in page
    assert "2 accepted: clients prefer its images agreement −0.5, votes +3.2 50.0 % 25.0 %" in page


def test_the_headlines_say_that_images_are_nearer_to_real_ones_and_more_alike(tmp_path):
    page = text_of(write_report(make_run(tmp_path / "run", make_lines()).path).read_text())

    headlines = page[: page.index("Generated images")]  # Above the pictures and the table.
    assert "T2I recall before 75.0 % after 25.0 % −50.0 points, images more alike" in headlines
    assert (
        "Images of the T2I are nearer to real ones on the whole, but more alike than before: 25.0 % of the real images "
        "have their like among them, before 75.0 % (recall)."
    ) in headlines


@pytest.mark.parametrize(
    ("frechet", "recall", "images", "said"),
    [
        (200.0, 0.25, 200, ["Images of the T2I are more alike than before: 25.0 %"]),
        (200.0, 0.7, None, ["Images of the T2I are more alike than before: 70.0 %"]),
        (200.0, 0.7, 200, []),  # Two standard errors of the difference are 8.8 points.
        (50.0, 0.75, 200, []),
        (50.0, 0.8, 200, []),
    ],
)
def test_a_fall_of_recall_beyond_noise_is_called_more_alike(frechet, recall, images, said):
    after = BEFORE | {"frechet": frechet, "recall": recall}
    lines = [make_line(number, {"cnn-0": 0.5}, generator=one) for number, one in enumerate((BEFORE, after))]

    sentences = fading_of(lines, images)

    assert [sentence.partition(" of the real images")[0] for sentence in sentences] == said


@pytest.mark.parametrize(("floor", "said"), [
    (49.0, "nearer to real images"),
    (50.0, "real images among themselves have 50"),
    (119.0, "real images among themselves have 119"),
])  # fmt: skip
def test_a_distance_up_to_that_of_real_images_is_not_judged(floor, said, tmp_path):
    folder = make_run(tmp_path / "run", make_lines())  # The distance falls from 200 to 50.
    folder.write_config(folder.read_config() | {"judge": {"accuracy": 1.0, "floors": {"frechet": floor, "images": 14}}})

    page = text_of(write_report(folder.path).read_text())

    assert f"T2I Fréchet distance before 200 after 50 −75 %, {said} lower is better" in page
    assert ("are nearer to real ones on the whole" in page) == (floor < 50)


@pytest.mark.parametrize(("after", "judged"), [(121.0, False), (216.0, False), (217.0, True)])
def test_a_rise_from_within_the_floor_is_judged_if_it_exceeds_it(after, judged):
    generator = {"alignment": None, "frechet": 97.0, "loss": None}
    lines = [make_line(number, {"cnn-0": 0.5}, generator=generator) for number in range(2)]
    lines[1]["generator"] = {**generator, "frechet": after}

    (headline,) = [one for one in headlines_of(History.of(lines).lines, None, 119.0) if "Fréchet" in one.title]

    assert ("further from real images" in headline.change) == judged
    assert ("real images among themselves have 119" in headline.change) != judged


def test_runs_of_earlier_versions_say_nothing_of_recall():
    assert fading_of([make_line(number, {"cnn-0": 0.5}) for number in range(2)]) == []
