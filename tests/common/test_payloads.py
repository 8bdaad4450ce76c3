"""Messages survive the wire, and what does not fit is refused with its reason."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedmmkt.common.payloads import (
    ClientReport,
    DistillationPayload,
    FinalEvaluation,
    Instructions,
    PayloadError,
    Request,
    SoftTargets,
    SyntheticBatch,
    record_bytes,
)


def make_batch(count=3, batch_id="run-1"):
    return SyntheticBatch(
        batch_id=batch_id,
        round=1,
        prompts=tuple(f"prompt {index}" for index in range(count)),
        prompted_N=np.arange(count) % 2,
        images=np.arange(4 * count, dtype=np.uint8),
        offsets=np.arange(count + 1) * 4,
        anchors_UD=np.ones((2, 5), np.float16),
        anchor_index_N=np.zeros(count, np.int64),
    )


def make_payload(**changes):
    values = {
        "batch_id": "run-1",
        "logits_NC": np.array([[1, 2], [3, 4], [5, 6]], np.float16),
        "class_counts_C": np.array([3, 0]),
        "votes_N": np.array([0, 1, 2], np.float32),
    }
    return DistillationPayload(**(values | changes))


def equal(first, second):
    return all(
        np.array_equal(value, getattr(second, name))
        if isinstance(value, np.ndarray)
        else value == getattr(second, name)
        for name, value in first
    )


def test_a_request_survives_the_wire():
    targets = SoftTargets(
        batch_id="run-0", probabilities_NC=np.full((2, 2), 0.5, np.float16), weights_N=np.ones(2, np.float32)
    )
    instructions = Instructions(run_key="run", round=1, classes=("a", "b"), votes=True, anchor_size=5)
    request = Request(instructions, (make_batch(batch_id="run-0"), make_batch()), (targets,))

    parsed = Request.from_content(request.to_content())

    assert parsed.instructions == instructions
    assert [batch.batch_id for batch in parsed.batches] == ["run-0", "run-1"]
    assert equal(parsed.batches[1], make_batch())
    assert equal(parsed.targets[0], targets)


@given(samples=st.integers(1, 6), classes=st.integers(2, 6), votes=st.booleans(), seed=st.integers(0, 1000))
def test_a_payload_survives_the_wire(samples, classes, votes, seed):
    rng = np.random.default_rng(seed)
    payload = DistillationPayload(
        batch_id="b",
        logits_NC=rng.normal(size=(samples, classes)).astype(np.float16),
        class_counts_C=rng.integers(1, 9, classes),
        votes_N=rng.integers(0, 9, samples).astype(np.float32) if votes else None,
    )
    parsed = DistillationPayload.from_records(RecordDict(payload.to_records("payload")), "payload")
    assert equal(parsed, payload)


def test_a_report_survives_the_wire_and_shows_its_numbers_as_metrics():
    report = ClientReport(
        client="c", model="cnn", modality="image", examples=3, accuracy=0.5, loss=1.25, kept=("run-1",)
    )
    records = RecordDict(report.to_records("report"))
    assert dict(records["report.metrics"]) == {"examples": 3, "accuracy": 0.5, "loss": 1.25}
    assert ClientReport.from_records(records, "report") == report


def make_evaluation(**changes):
    counts = {"examples_C": [5, 0], "tested_C": [4, 6], "correct_C": [4, 3], "alone_correct_C": [4, 0]} | changes
    return FinalEvaluation(**{name: np.array(values) for name, values in counts.items()})


def test_a_final_evaluation_survives_the_wire():
    evaluation = make_evaluation()

    parsed = FinalEvaluation.from_records(RecordDict(evaluation.to_records("evaluation")), "evaluation")

    assert equal(parsed, evaluation)
    parsed.check_classes(2)
    with pytest.raises(PayloadError, match="has 2 classes; expected 3"):
        parsed.check_classes(3)


def test_images_that_cannot_be_decoded_are_refused_by_batch_and_image():
    with pytest.raises(PayloadError, match=r"batch 'run-1': image 0 cannot be decoded: cannot identify image"):
        make_batch().decoded_NHWC(8)

    assert make_batch().without_images().decoded_NHWC(8) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct_C": [5, 3]}, "correct_C exceeds tested_C"),
        ({"alone_correct_C": [4, -1]}, "alone_correct_C has a negative count"),
        ({"examples_C": [5]}, "examples_C has 1 classes, tested_C 2"),
        ({"examples_C": [0, 0]}, "no private example"),
        ({"tested_C": [0, 0], "correct_C": [0, 0], "alone_correct_C": [0, 0]}, "no test example"),
    ],
)
def test_a_final_evaluation_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_evaluation(**changes)


def test_a_text_client_is_sent_no_image():
    batch = make_batch().without_images()
    assert "images" not in batch.to_records("batch")["batch.arrays"]
    assert batch.prompts == make_batch().prompts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_NC": np.array([[1, np.nan]] * 3, np.float16)}, "3 of 6 values are not finite"),
        ({"logits_NC": np.zeros((3, 2), np.float32)}, r"expected a float16 array of 2 dimension\(s\), found float32"),
        ({"logits_NC": np.zeros(3, np.float16)}, r"found float16 \(3,\)"),
        ({"class_counts_C": np.array([1, 2, 3])}, "3 class counts for 2 logits"),
        ({"class_counts_C": np.array([1, -2])}, "a class count is negative"),
        ({"class_counts_C": np.array([0, 0])}, "no class has a private example"),
        ({"votes_N": np.zeros(2, np.float32)}, "2 votes for 3 samples"),
        ({"votes_N": np.array([0, -1, 0], np.float32)}, "a vote is negative"),
        ({"batch_id": ""}, "batch_id"),
    ],
)
def test_a_bad_payload_is_refused_with_its_reason(changes, message):
    content = dict(make_payload()) | changes
    arrays = {name: Array(value) for name, value in content.items() if isinstance(value, np.ndarray)}
    records = RecordDict(
        {"payload": ConfigRecord({"batch_id": content["batch_id"]}), "payload.arrays": ArrayRecord(arrays)}
    )
    with pytest.raises(PayloadError, match=message):
        DistillationPayload.from_records(records, "payload")


def test_random_bytes_and_missing_records_are_refused():
    records = RecordDict(make_payload().to_records("payload"))
    records["payload.arrays"]["logits_NC"] = Array("float16", (3, 2), "numpy.ndarray", b"no numpy file at all")
    with pytest.raises(PayloadError, match="DistillationPayload cannot be read"):
        DistillationPayload.from_records(records, "payload")
    with pytest.raises(PayloadError, match=r"no DistillationPayload in the records \[\]; expected 'payload'"):
        DistillationPayload.from_records(RecordDict(), "payload")


def test_unknown_fields_are_refused():
    records = RecordDict(make_payload().to_records("payload"))
    records["payload"]["private_text"] = "secret"
    with pytest.raises(PayloadError, match="private_text"):
        DistillationPayload.from_records(records, "payload")


def test_a_payload_must_answer_the_batch_that_was_asked():
    payload = make_payload()
    payload.check_answers("run-1", 3, 2, votes=True)
    with pytest.raises(PayloadError, match="answers batch 'run-1'; expected 'run-2'"):
        payload.check_answers("run-2", 3, 2, votes=True)
    with pytest.raises(PayloadError, match=r"shape \(3, 2\); expected \(3, 5\)"):
        payload.check_answers("run-1", 3, 5, votes=True)
    with pytest.raises(PayloadError, match="votes were sent"):
        payload.check_answers("run-1", 3, 2, votes=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompted_N": np.array([0, 1])}, "2 entries for 3 prompts"),
        ({"offsets": np.array([0, 4, 8])}, "3 offsets for 3 images"),
        ({"offsets": np.array([0, 4, 8, 99])}, "outside the image buffer"),
        ({"anchor_index_N": np.array([0, 1, 2])}, "outside the anchors"),
        ({"images": None}, "come together"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SyntheticBatch(**(dict(make_batch()) | changes))


def test_soft_targets_must_be_distributions():
    with pytest.raises(ValueError, match="does not sum to one"):
        SoftTargets(batch_id="b", probabilities_NC=np.full((1, 2), 0.3, np.float16), weights_N=np.ones(1, np.float32))


def test_a_run_key_cannot_leave_the_state_folder():
    with pytest.raises(ValueError, match="run_key"):
        Instructions(run_key="../../etc", round=1, classes=("a", "b"), votes=True, anchor_size=0)


def test_bytes_count_arrays_as_they_are_sent():
    payload = make_payload()
    # Three .npy buffers of 128 bytes of header each and 12, 16 and 12 bytes of data, and the JSON of the rest.
    assert record_bytes(RecordDict(payload.to_records("payload"))) == 3 * 128 + 12 + 16 + 12 + len(
        '{"batch_id": "run-1"}'
    )


@pytest.mark.parametrize("classes", [10, 1000, 21_000, 100_000])
def test_half_precision_holds_soft_targets_of_many_classes(classes):
    """Uniform, peaked with a long tail that rounds to zero, and drawn: each row still sums to one within .004."""
    rng = np.random.default_rng(0)
    tail = np.full(classes, 2.9e-8)  # Just under half of the smallest number of half precision.
    tail[0] = 1 - tail[1:].sum()
    probabilities_NC = np.stack([np.full(classes, 1 / classes), tail, rng.dirichlet(np.full(classes, 0.1))])

    targets = SoftTargets(
        batch_id="b", probabilities_NC=probabilities_NC.astype(np.float16), weights_N=np.ones(3, np.float32)
    )

    sums_N = targets.probabilities_NC.astype(np.float64).sum(1)
    assert np.abs(sums_N - 1).max() < 0.004
    assert np.abs(targets.probabilities_NC - probabilities_NC).max() < 5e-4
