"""What the control says of single clients, with values computed by hand."""

import pytest

from fedmmkt.common.config import RunConfig
from fedmmkt.server_app.report.control import (
    few_steps_of,
    forgotten_of,
    personal_of,
    personal_share,
    prompts_alone,
)
from fedmmkt.server_app.report.measures import client_rows
from fedmmkt.server_app.report.page import write_report
from tests.server_app.report.test_page import make_finished, make_line, make_run, text_of

CLASSES = ("None", "spot", "mole")
# As in a run of skin photos: better on the whole, and one class lost.
TEXT = {"examples": [8, 5, 5], "tested": [5, 6, 4], "correct": [0, 6, 4], "alone_correct": [5, 0, 4]}


def lines_with(evaluations, noise=None):
    lines = [make_line(number, dict.fromkeys(evaluations, 0.5)) for number in range(2)]
    if noise is not None:
        for client in lines[-1]["clients"]["per_client"].values():
            client["privacy"] = {"epsilon": 8.0, "budget": 8.0, "delta": 1e-5, "counts_noise": noise}
    lines[-1]["evaluation"] = {"per_client": evaluations}
    return lines


def test_the_error_of_personal_accuracy_is_that_of_its_classes():
    alone = personal_share(TEXT, "alone_correct")

    # 8/18 of 5/5, 5/18 of 0/6, 5/18 of 4/4. With two successes and failures more: 7/9, 2/10, 6/8.
    errors = [(7 / 9 * 2 / 9 / 9) ** 0.5, (0.2 * 0.8 / 10) ** 0.5, (0.75 * 0.25 / 8) ** 0.5]
    expected = sum((weight / 18 * error) ** 2 for weight, error in zip((8, 5, 5), errors, strict=True)) ** 0.5
    assert alone.value == pytest.approx(13 / 18)
    assert alone.error == pytest.approx(expected)
    assert personal_share({**TEXT, "examples": [0, 0, 0]}, "correct") is None
    assert personal_share({"examples": [1], "tested": [1], "correct": [1]}, "alone_correct") is None


def test_a_client_whose_personal_accuracy_falls_is_counted_and_named():
    large = {"examples": [30, 0], "tested": [100, 100], "correct": [60, 100], "alone_correct": [90, 0]}

    (small,) = personal_of(lines_with({"text-3": TEXT}))
    (said,) = personal_of(lines_with({"text-3": TEXT, "cnn-0": large}))

    assert small == (
        "By personal accuracy (each client's own mixture of classes), 0 are better, 0 worse, 1 within noise; "
        "text-3 falls most: −16.7 points (from 72.2 % to 55.6 %, within noise)."
    )
    assert "0 are better, 1 worse, 1 within noise; cnn-0 falls most: −30.0 points (from 90.0 % to 60.0 %)." in said


def test_a_class_that_a_client_holds_and_has_lost_is_named():
    held_by_none = {**TEXT, "examples": [0, 5, 5]}
    two_tests = {**TEXT, "tested": [2, 6, 4], "alone_correct": [2, 0, 4]}

    assert forgotten_of(lines_with({"text-3": TEXT}), CLASSES) == [
        "Known worse than alone, of classes that a client holds: text-3 None, 100.0 % to 0.0 % (of 5 test examples)."
    ]
    assert forgotten_of(lines_with({"text-3": held_by_none}), CLASSES) == []
    assert forgotten_of(lines_with({"text-3": two_tests}), CLASSES) == []


@pytest.mark.parametrize(("noise", "told"), [(2.0, 1), (4.0, 0)])
def test_with_noise_a_client_holds_a_class_if_its_number_exceeds_the_noise(noise, told):
    assert len(forgotten_of(lines_with({"text-3": TEXT}, noise), CLASSES)) == told  # It says 8 examples.


def test_of_many_falls_the_largest_are_named():
    falls = {f"cnn-{index}": {**TEXT, "tested": [20, 6, 4], "alone_correct": [20 - index, 0, 4]} for index in range(6)}

    (said,) = forgotten_of(lines_with(falls), CLASSES)

    assert "holds: cnn-0 None, 100.0 % to 0.0 %" in said
    assert said.endswith("cnn-3 None, 85.0 % to 0.0 % (of 20 test examples); and 2 more.")


@pytest.mark.parametrize(("settings", "said"), [
    # 40 examples are 3 batches of 16. Alone: 3 * (4 + 2 * 2) steps; else 12 in round 1, then 150 in each.
    ({}, "For 2 of 2 clients it may have learned too little: of few private examples, equally many epochs are few "
         "optimiser steps (cnn-0 about 24, against 312 with synthetic samples). A part of the gain may be that of more "
         "steps."),
    ({"client.distillation-steps": 42}, ""),  # 24 against 96.
    ({"client.distillation-weight": 0.0, "client.prompt-weight": 0.0, "client.alignment-weight": 0.0}, ""),
])  # fmt: skip
def test_a_control_of_few_steps_is_told(settings, said):
    config = RunConfig.from_flower({"rounds": 2, "client.warmup-epochs": 4, **settings})
    rows = client_rows([make_line(number, {"cnn-0": 0.1, "text-1": 0.2}) for number in range(2)])

    assert few_steps_of(rows, config.model_dump(mode="json", by_alias=True)) == said


def test_the_page_says_all_three(tmp_path):
    lines = make_finished(tmp_path / "run").read_metrics()
    lines[-1]["evaluation"]["per_client"]["cnn-0"] |= {"alone_correct": [50, 0], "correct": [20, 50]}

    page = text_of(write_report(make_run(tmp_path / "more", lines, rounds=4).path).read_text()).replace("&#39;", "'")

    assert "By personal accuracy (each client's own mixture of classes), 0 are better, 1 worse, 1 within noise" in page
    assert "Known worse than alone, of classes that a client holds: cnn-0 zero, 100.0 % to 40.0 %" in page
    assert "For 2 of 2 clients it may have learned too little" in page


@pytest.mark.parametrize(("settings", "is_told"), [
    ({}, True),
    ({"t2i.scores": "none"}, True),
    ({"t2i.scores": "none", "client.distillation-weight": 0.0}, False),  # It is that control.
    ({"client.prompt-weight": 0.0}, False),  # Nobody learns from the prompts' classes.
])  # fmt: skip
def test_the_control_without_any_clients_word_is_named(settings, is_told):
    config = RunConfig.from_flower(settings).model_dump(mode="json", by_alias=True)

    option = "--run-config 'client.distillation-weight=0.0 client.alignment-weight=0.0 t2i.scores=\"none\"'"
    assert prompts_alone(config, 4).strip() == (option if is_told else "")
    assert prompts_alone(config, 0) == ""


def test_the_page_names_the_control_without_any_clients_word(tmp_path):
    page = text_of(write_report(make_finished(tmp_path / "run").path).read_text())

    assert "a run without any client's word tells, --run-config" in page
