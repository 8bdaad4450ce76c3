import numpy as np

from fedmmkt.common.payloads import ClientReport, DistillationPayload
from fedmmkt.server_app.exchange import Answer
from fedmmkt.server_app.standings import bound_answers


def answer(client, examples):
    report = ClientReport(client=client, model="any", modality="image", examples=examples, accuracy=0, loss=0)
    logits_NC = np.zeros((1, 2), np.float16)
    return Answer(
        report, DistillationPayload(batch_id="b", logits_NC=logits_NC, class_counts_C=np.array([examples, 0]))
    )


def test_what_is_bounded_is_shown_once(caplog):
    """When a late answer comes, those from before are bounded again."""
    answers = [answer("ann", 10), answer("bob", 900), answer("eve", 10), answer("late", 500)]

    bounded = bound_answers(answers, [3.0, 3.0, 1.0, 2.0], new={"late"})

    counts = {one.report.client: one.required_payload.class_counts_C.tolist() for one in bounded}
    assert counts == {"ann": [10, 0], "bob": [30, 0], "eve": [10, 0], "late": [20, 0]}  # The lower median is 10.
    assert [one.report.examples for one in bounded] == [10, 900, 10, 500]
    assert "late says 500 examples, and counts as 20" in caplog.text
    assert "bob says" not in caplog.text
