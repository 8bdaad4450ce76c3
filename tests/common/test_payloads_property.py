"""Whatever comes, from bytes or from structures: a message is read, or it is a `PayloadError`.

``FEDMMKT_EXAMPLES=2000`` tries more of them.
"""

import contextlib
import os

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fedmmkt.common.payloads import (
    PAYLOAD_RECORDS,
    REPORT_RECORDS,
    ClassReport,
    ClientReport,
    DistillationPayload,
    Instructions,
    PayloadError,
    Request,
    SoftTargets,
    SyntheticBatch,
    check_keys,
    record_bytes,
)
from fedmmkt.common.plain_text import is_plain, printable
from fedmmkt.server_app.inbox import inflate

many = settings(
    max_examples=int(os.environ.get("FEDMMKT_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
MESSAGES = (Instructions, SyntheticBatch, SoftTargets, ClientReport, ClassReport, DistillationPayload)
FIELDS = sorted({name for message in MESSAGES for name in message.model_fields})
PREFIXES = ("instructions", "batch-0", "targets-0", "report", "classes", "payload")

names = st.one_of(st.sampled_from(FIELDS), st.text(max_size=5))
integers = st.one_of(st.integers(-3, 3), st.sampled_from([2**62, -(2**63), 10**12 + 1]))
floats = st.one_of(st.floats(width=64), st.sampled_from([0.5, 1e308, 3.4e38]))
texts = st.one_of(st.text(max_size=5), st.sampled_from(["run", "image", "text\nforged", "x" * 300, "\u202egnp"]))
scalars = st.one_of(integers, floats, texts, st.booleans(), st.binary(max_size=3))
lists = st.one_of(*(st.lists(kind, max_size=3) for kind in (integers, floats, texts, st.booleans())))
dtypes = st.sampled_from(["float16", "float32", "float64", "int64", "uint8", "bool"])
real_arrays = dtypes.flatmap(
    lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
).map(Array)
HUGE = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,), }".ljust(127) + b"\n"
raw_arrays = st.builds(
    Array, dtypes, st.just((1,)), st.sampled_from(["numpy.ndarray", "torch"]),
    st.one_of(st.binary(max_size=20), st.just(HUGE), st.binary(max_size=20).map(lambda tail: HUGE + tail)),
)  # fmt: skip
config_records = st.dictionaries(names, st.one_of(scalars, lists), max_size=8).map(ConfigRecord)
metric_records = st.dictionaries(
    names, st.one_of(st.integers(-(2**63), 2**63 - 1), floats, st.lists(floats, max_size=2)), max_size=4
).map(MetricRecord)
array_records = st.dictionaries(names, st.one_of(real_arrays, raw_arrays), max_size=5).map(ArrayRecord)
keys = st.one_of(
    st.sampled_from([f"{prefix}{end}" for prefix in PREFIXES for end in ("", ".arrays", ".metrics")]),
    st.text(max_size=5),
)
contents = st.dictionaries(keys, st.one_of(config_records, metric_records, array_records), max_size=6).map(RecordDict)


def read_everything(content):
    """Read a message in every way; each may refuse it."""
    reads = [lambda m=m, p=p: m.from_records(content, p) for m, p in zip(MESSAGES, PREFIXES, strict=True)]
    for read in (*reads, lambda: Request.from_content(content), lambda: check_keys(content, REPORT_RECORDS)):
        with contextlib.suppress(PayloadError):
            read()
    assert record_bytes(content) >= 0


@many
@given(contents)
def test_any_records_are_read_or_refused(content):
    read_everything(content)


@many
@given(st.data())
def test_fields_of_any_value_in_an_otherwise_right_reply_are_read_or_refused(data):
    content = honest()
    key = data.draw(st.sampled_from(sorted(content)))
    record = content[key]
    kinds = {ConfigRecord: st.one_of(scalars, lists), MetricRecord: floats, ArrayRecord: real_arrays | raw_arrays}
    record[data.draw(st.sampled_from(sorted(record)) | names)] = data.draw(kinds[type(record)])
    try:
        report = ClientReport.from_records(content, "report")
        payload = DistillationPayload.from_records(content, "payload")
        payload.check_answers("b", 3, 2, votes=True)
        payload.check_possible(report, np.array([0, 1, -1]))
    except PayloadError:
        return
    assert is_plain(report.client)
    assert int(payload.class_counts_C.sum()) == report.examples
    assert np.isfinite(payload.logits_NC).all()
    assert payload.votes_N is None or payload.votes_N.sum() <= 3 * report.examples


@many
@given(st.data())
def test_a_reply_with_any_bytes_changed_is_put_together_and_read_or_refused(data):
    objects = {name: one.deflate() for name, one in get_all_nested_objects(MESSAGE).items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(objects)))
        content = bytearray(objects[name])
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        objects[name] = bytes(content)
    try:
        message = inflate(1_000_000, MESSAGE.object_id, objects)
    except PayloadError:
        return
    if message.has_content():
        read_everything(message.content)


@many
@given(st.text())
def test_any_text_becomes_one_line(text):
    line = printable(text, 50)

    assert len(line) < 100
    assert is_plain(line)


@pytest.mark.parametrize("name", ["clinic\nround 9/9", "a\x1b[2J", "a\u202eb", "a\u2028b", "x" * 201, ""])
def test_names_that_could_forge_a_line_are_refused(name):
    content = honest()
    content["report"]["client"] = name

    with pytest.raises(PayloadError, match=r"ClientReport\.client"):
        ClientReport.from_records(content, "report")


@pytest.mark.parametrize("name", ["clinic a", "Klinik Süd", "医院", "می‌خواهم"])
def test_names_of_any_language_are_taken(name):
    content = honest()
    content["report"]["client"] = name

    assert ClientReport.from_records(content, "report").client == name


def honest():
    report = ClientReport(client="c", model="cnn", modality="image", examples=4, accuracy=0.5, loss=1.25, kept=("b",))
    payload = DistillationPayload(
        batch_id="b",
        logits_NC=np.zeros((3, 2), np.float16),
        class_counts_C=np.array([1, 3]),
        votes_N=np.array([1, 3, 4], np.float32),
    )
    content = RecordDict({**report.to_records("report"), **payload.to_records("payload")})
    check_keys(content, REPORT_RECORDS | PAYLOAD_RECORDS)
    return content


def message_of(content) -> Message:
    metadata = Metadata(
        run_id=1, message_id="", src_node_id=5, dst_node_id=1, reply_to_message_id="asked", group_id="",
        created_at=0.0, ttl=60.0, message_type="train",
    )  # fmt: skip
    return make_message(metadata, content)


MESSAGE = message_of(honest())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_counts_C": np.array([2**62, 3])}, "a class count is above 1000000000000"),
        ({"class_counts_C": np.array([1, 4])}, "class counts are of 5 examples, and the report says 4"),
        ({"votes_N": np.array([2, 0, 0], np.float32)}, "1 of 3 samples have more votes than images that may vote"),
        ({"votes_N": np.array([0, 0, 3.4e38], np.float32)}, "1 of 3 samples have more votes"),
        ({"votes_N": np.array([1, np.inf, 0], np.float32)}, "1 of 3 values are not finite"),
        ({"logits_NC": np.full((3, 2), 65000, np.float16)}, "a logit is beyond 60000"),
    ],
)
def test_what_no_honest_client_can_send_is_refused(changes, message):
    content = honest()
    for name, value in changes.items():
        content["payload.arrays"][name] = Array(value)

    with pytest.raises(PayloadError, match=message):
        DistillationPayload.from_records(content, "payload").check_possible(
            ClientReport.from_records(content, "report"), np.array([0, 1, -1])
        )


def test_a_client_casts_three_votes_an_image_at_most():
    counts_C, prompted_N = np.array([2, 0]), np.zeros(4, np.int64)
    report = ClientReport(client="c", model="cnn", modality="image", examples=2, accuracy=0, loss=0)
    payloads = [
        DistillationPayload(
            batch_id="b", logits_NC=np.zeros((4, 2), np.float16), class_counts_C=counts_C, votes_N=votes_N
        )
        for votes_N in (np.array([2, 2, 2, 0], np.float32), np.array([2, 2, 2, 1], np.float32))
    ]

    payloads[0].check_possible(report, prompted_N)
    with pytest.raises(PayloadError, match="7 votes of 2 images; allowed: 3 of each"):
        payloads[1].check_possible(report, prompted_N)
    with pytest.raises(PayloadError, match="votes were sent by a client that reads no images"):
        payloads[0].check_possible(report.model_copy(update={"modality": "text"}), prompted_N)


def test_records_that_nobody_asked_for_are_refused_by_name():
    with pytest.raises(PayloadError, match=r"records that nobody asked for: notes; allowed: report, report\.metrics"):
        check_keys(RecordDict({"report": ConfigRecord(), "notes": ConfigRecord()}), REPORT_RECORDS)


def private_answer(votes_N, counts_C=(3, 1), votes_noise=2.0, counts_noise=1.0, **report):
    counts_C = np.array(counts_C)
    told = {"epsilon": 1.0, "budget": 8.0, "delta": 1e-5} | report
    payload = DistillationPayload(
        batch_id="b",
        class_counts_C=counts_C,
        votes_N=np.array(votes_N, np.float32),
        votes_noise=votes_noise,
        counts_noise=counts_noise,
    )
    return payload, ClientReport(
        client="c", model="cnn", modality="image", examples=int(counts_C.sum()), accuracy=0, loss=0, **told
    )


def test_votes_with_noise_that_an_honest_client_may_send_are_accepted():
    """Of class 1 there may be 1 + 8 images, which vote once for a sample, with noise of at most 16."""
    payload, report = private_answer([-15, 25, 1])

    payload.check_answers("b", 3, 2, votes=True)
    payload.check_possible(report, np.array([0, 1, -1]))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"votes_N": [0, 25.1, 0]}, "1 of 3 samples have more votes than images that may vote"),
        ({"votes_N": [27, 25, 27]}, r"79 votes of 4 images; allowed: 3 of each"),
        ({"votes_noise": None, "votes_N": [1, 1, 1]}, "tells of a privacy budget, and the answer of no noise"),
        ({"counts_noise": None}, "tells of a privacy budget, and the answer of no noise"),
        ({"epsilon": None, "budget": None, "delta": None}, "needs a report that tells of a privacy budget"),
    ],
)
def test_votes_that_noise_does_not_explain_are_refused(changes, text):
    payload, report = private_answer(**({"votes_N": [0, 0, 0]} | changes))

    with pytest.raises(PayloadError, match=text):
        payload.check_possible(report, np.array([0, 1, 0]))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"votes_N": [-16.1, 0, 0]}, "a vote is negative beyond noise"),
        ({"votes_N": [0, 0, 0], "votes_noise": float("inf")}, "votes_noise"),
        ({"votes_N": [0, 0, 0], "votes_noise": -1.0}, "votes_noise"),
        ({"votes_N": [0, 0, 0], "epsilon": None}, "epsilon, budget, delta come together"),
    ],
)
def test_noise_is_said_with_sense(fields, text):
    with pytest.raises(ValueError, match=text):
        private_answer(**fields)
