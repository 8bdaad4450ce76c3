"""The final evaluations in a line of metrics, with accuracies computed by hand."""

import numpy as np
import pytest

from fedmmkt.common.payloads import FinalEvaluation
from fedmmkt.server_app.record.round_record import RoundRecord, personal_accuracy


def test_accuracies_follow_from_the_counts():
    record = RoundRecord(2)
    record.evaluations["cnn"] = FinalEvaluation(
        examples_C=np.array([30, 10]),
        tested_C=np.array([4, 6]),
        correct_C=np.array([2, 6]),
        alone_correct_C=np.array([4, 0]),
    )
    record.evaluations["text"] = FinalEvaluation(
        examples_C=np.array([5, 5]), tested_C=np.array([4, 6]), correct_C=np.array([0, 6])
    )

    evaluation = record.to_json()["evaluation"]

    assert evaluation["per_client"]["cnn"] == {
        "examples": [30, 10],
        "tested": [4, 6],
        "correct": [2, 6],
        "accuracy": 0.8,
        "personal": 0.75 * 0.5 + 0.25 * 1.0,
        "alone_correct": [4, 0],
        "alone": 0.4,
        "alone_personal": 0.75,
    }
    means = {name: value for name, value in evaluation.items() if name != "per_client"}
    assert means == pytest.approx(
        {"accuracy": 0.7, "personal": (0.625 + 0.5) / 2, "alone": 0.4, "alone_personal": 0.75}
    )


def test_a_round_without_evaluations_has_no_such_key():
    assert "evaluation" not in RoundRecord(1).to_json()


def test_personal_accuracy_leaves_out_classes_without_test_examples():
    tested_C = np.array([0, 4, 4])

    assert personal_accuracy(np.array([0, 1, 4]), tested_C, np.array([8, 1, 1])) == pytest.approx(0.5 * 0.25 + 0.5)
    assert personal_accuracy(np.array([0, 1, 4]), tested_C, np.array([8, 0, 0])) is None
