"""What the console shows of a round and of the whole run."""

import logging

import pytest

from fedmmkt.server_app.record.console import log_before_and_after

FIRST = {
    "clients": {"accuracy": 0.1, "per_client": {"cnn-0": {"accuracy": 0.1, "modality": "image"}}},
    "generator": {"alignment": 0.5, "frechet": 665.04, "recall": 0.8},
}
LAST = {
    "clients": {
        "accuracy": 0.75,
        "per_client": {
            "cnn-0": {"accuracy": 0.7, "modality": "image"},
            "mlp-1": {"accuracy": 0.8, "modality": "text"},
        },
    },
    "generator": {"alignment": 0.9, "frechet": 330.0, "recall": 0.23},
    "evaluation": {"alone": 0.6, "per_client": {"cnn-0": {"alone": 0.6}}},
}


@pytest.fixture
def rows(caplog):
    """Return a function that gives the words of each row of a run's last table."""

    def shown(first, last):
        with caplog.at_level(logging.INFO, logger="flwr"):
            log_before_and_after(first, last)
        return [message.split() for message in caplog.messages]

    return shown


def test_a_fall_of_recall_stands_beside_alignment_and_distance(rows):
    assert rows(FIRST, LAST) == [
        ["before", "alone", "after"],
        ["clients'", "mean", "accuracy", "0.100", "0.600", "0.750"],
        ["T2I", "alignment", "0.500", "-", "0.900"],
        ["T2I", "Frechet", "distance", "665.0", "-", "330.0"],
        ["T2I", "recall", "0.800", "-", "0.230"],
        ["cnn-0", "(image)", "0.100", "0.600", "0.700"],
        ["mlp-1", "(text)", "-", "-", "0.800"],
    ]


def test_a_run_that_was_not_judged_has_no_row_for_recall(rows):
    first, last = (line | {"generator": {"alignment": None, "frechet": None, "loss": None}} for line in (FIRST, LAST))

    assert [row[1] for row in rows(first, last) if row[0] == "T2I"] == ["alignment", "Frechet"]
