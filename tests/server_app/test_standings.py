from logging import INFO, WARNING

import numpy as np

from fedmmkt.common.payloads import ClientReport, DistillationPayload
from fedmmkt.server_app.exchange import Answer
from fedmmkt.server_app.standings import bound_answers


def answer(client, examples, noise=None):
    report = ClientReport(client=client, model="any", modality="image", examples=examples, accuracy=0, loss=0)
    logits_NC = np.zeros((1, 2), np.float16) if noise is None else None
    counts_C = np.array([examples, 0])
    return Answer(
        report, DistillationPayload(batch_id="b", logits_NC=logits_NC, class_counts_C=counts_C, counts_noise=noise)
    )


def test_what_is_bounded_is_shown_once(caplog):
    """When a late answer comes, those from before are bounded again."""
    caplog.set_level(INFO, "flwr")
    answers = [answer("ann", 10), answer("bob", 900), answer("eve", 10), answer("late", 500)]

    bounded = bound_answers(answers, [3.0, 3.0, 1.0, 2.0], new={"late"}, cap=3.0)

    counts = {one.report.client: one.required_payload.class_counts_C.tolist() for one in bounded}
    assert counts == {"ann": [10, 0], "bob": [30, 0], "eve": [10, 0], "late": [20, 0]}  # The lower median is 10.
    assert [one.report.examples for one in bounded] == [10, 900, 10, 500]
    assert "late says 500 examples, and counts as 20: its answers do not show clearly enough that" in caplog.text
    assert "counts for at most 2 times the median client (robust); this is no reproach" in caplog.text
    assert "bob says" not in caplog.text


def test_who_sends_no_logits_or_very_many_examples_is_told_why_it_is_bounded(caplog):
    caplog.set_level(INFO, "flwr")
    answers = [answer("ann", 10), answer("cnn", 40, noise=2.0), answer("eve", 900), answer("fay", 10)]

    bound_answers(answers, [3.0, 1.0, 3.0, 3.0], new={"cnn", "eve"}, cap=3.0)

    said = [(record.levelno, record.getMessage().strip()) for record in caplog.records]
    assert said == [
        (
            INFO,
            "clients   cnn says about 40 examples, and counts as 10: with a privacy budget it sends no logits, and its "
            "votes are not clearly like the others', so it counts for at most the median client (robust); this is no "
            "reproach",
        ),
        (
            WARNING,
            "clients   eve says 900 examples, and counts as 30: nobody counts for more than 3 times the median client "
            "(client-cap)",
        ),
    ]
