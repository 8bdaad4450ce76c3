"""Fuzz the parsing of a message from bytes: ``python -m tests.fuzz.messages NAME -runs=100000``.

Each name of `READERS` is a message. It is read as the app reads it, within 256 MB of memory; whatever the bytes are, it
is read, or it is a `PayloadError`. Most changes are made inside the message's fields, so that they get past
Flower's own parser, whose refusals do not count. It needs atheris, which CONTRIBUTING.md tells how to install.
"""

from __future__ import annotations

import contextlib
import random
import resource
import struct
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import atheris
import numpy as np
from flwr.app import Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

with atheris.instrument_imports(include=["fedmmkt.common", "fedmmkt.server_app.inbox"]):
    from fedmmkt.common.images import encode_images
    from fedmmkt.common.payloads import (
        CLASS_RECORDS,
        EVALUATION_RECORDS,
        PAYLOAD_RECORDS,
        REPORT_RECORDS,
        ClassReport,
        ClientReport,
        DistillationPayload,
        FinalEvaluation,
        Instructions,
        PayloadError,
        Request,
        SoftTargets,
        SyntheticBatch,
        check_keys,
        record_bytes,
    )
    from fedmmkt.server_app.inbox import inflate

MEMORY = 256 * 2**20  # Bytes beyond what the process has before the first input.
LONGEST = 20_000  # Bytes of an input.
NUMBERS = (0, 1, -1, 2**31 - 1, 2**62, -(2**63), 0.5, 1e308, float("nan"), float("inf"))
PROMPTED_N = np.array([0, 1, -1])
BATCH, CLASSES = "run-1", ("a", "b")


def read_request(content: RecordDict) -> None:
    """Read what the server sends, as a client does, and decode its images."""
    for batch in Request.from_content(content).batches:
        batch.decoded_NHWC(8)


def read_report(content: RecordDict) -> None:
    """Read what a client reports of itself."""
    check_keys(content, REPORT_RECORDS)
    ClientReport.from_records(content, "report")
    record_bytes(content)


def read_answer(content: RecordDict) -> None:
    """Read a client's answer to a batch."""
    check_keys(content, REPORT_RECORDS | PAYLOAD_RECORDS)
    payload = DistillationPayload.from_records(content, "payload")
    payload.check_answers(BATCH, len(PROMPTED_N), len(CLASSES), votes=True)
    payload.check_possible(ClientReport.from_records(content, "report"), PROMPTED_N)


def read_evaluation(content: RecordDict) -> None:
    """Read a client's measures by class."""
    check_keys(content, EVALUATION_RECORDS)
    FinalEvaluation.from_records(content, "evaluation").check_classes(len(CLASSES))
    ClientReport.from_records(content, "report")


def read_classes(content: RecordDict) -> None:
    """Read the classes that a client names."""
    check_keys(content, CLASS_RECORDS)
    ClassReport.from_records(content, "classes")


def honest_request() -> RecordDict:
    """Return a request with a batch of images, and soft targets."""
    data, offsets = encode_images(np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3))
    batch = SyntheticBatch(
        batch_id=BATCH,
        round=1,
        prompts=("an a", "a b", "a thing"),
        prompted_N=PROMPTED_N,
        images=data,
        offsets=offsets,
        anchors_UD=np.ones((2, 3), np.float16),
        anchor_index_N=np.array([0, 1, 1]),
    )
    probabilities_NC = np.array([[1, 0], [0, 1], [0.5, 0.5]], np.float16)
    targets = SoftTargets(batch_id=BATCH, probabilities_NC=probabilities_NC, weights_N=np.ones(3, np.float32))
    told = Instructions(
        run_key="run", round=1, classes=CLASSES, votes=True, anchor_size=3, ancestors=("old",), ancestor_rounds=(2,)
    )
    return Request(told, (batch,), (targets,)).to_content()


def honest_report(**budget: float) -> RecordDict:
    """Return a client's report."""
    report = ClientReport(
        client="c", model="cnn", modality="image", examples=4, accuracy=0.5, loss=1.0, kept=(BATCH,), **budget
    )
    return RecordDict(report.to_records("report"))


def honest_answer() -> RecordDict:
    """Return an answer without a privacy budget."""
    votes_N = np.array([1, 3, 4], np.float32)
    payload = DistillationPayload(
        batch_id=BATCH, logits_NC=np.zeros((3, 2), np.float16), class_counts_C=np.array([1, 3]), votes_N=votes_N
    )
    return RecordDict({**honest_report(), **payload.to_records("payload")})


def honest_private_answer() -> RecordDict:
    """Return an answer with a privacy budget."""
    payload = DistillationPayload(
        batch_id=BATCH,
        class_counts_C=np.array([1, 3]),
        counts_noise=1.5,
        votes_N=np.array([-2, 3, 4], np.float32),
        votes_noise=2.0,
    )
    report = honest_report(epsilon=1.0, budget=8.0, delta=1e-5)
    return RecordDict({**report, **payload.to_records("payload")})


def honest_evaluation() -> RecordDict:
    """Return measures by class."""
    evaluation = FinalEvaluation(examples_C=np.array([1, 3]), tested_C=np.array([2, 2]), correct_C=np.array([1, 2]))
    return RecordDict({**honest_report(), **evaluation.to_records("evaluation")})


def honest_classes() -> RecordDict:
    """Return the classes that a client names."""
    return RecordDict(dict(ClassReport(classes=CLASSES).to_records("classes")))


READERS: dict[str, tuple[Callable[[RecordDict], None], tuple[Callable[[], RecordDict], ...]]] = {
    "request": (read_request, (honest_request,)),
    "report": (read_report, (honest_report, partial(honest_report, epsilon=1.0, budget=8.0, delta=1e-5))),
    "answer": (read_answer, (honest_answer, honest_private_answer)),
    "evaluation": (read_evaluation, (honest_evaluation,)),
    "classes": (read_classes, (honest_classes,)),
    "upload": (read_answer, (honest_answer,)),  # As its objects, which the server puts together.
}


# ---------------------------------------------------------------------- bytes


def to_bytes(content: RecordDict) -> bytes:
    """Return the bytes of a content, as Flower has them."""
    return recorddict_to_proto(content).SerializeToString()


def from_bytes(data: bytes) -> RecordDict | None:
    """Return the content of bytes; None if Flower's parser refuses them, so that no app is given them."""
    try:
        return recorddict_from_proto(Proto.FromString(data))
    except Exception:
        return None


class Uploaded:
    """The objects of an honest answer, of which each has bytes of its own."""

    def __init__(self) -> None:
        metadata = Metadata(
            run_id=1, message_id="", src_node_id=5, dst_node_id=1, reply_to_message_id="asked", group_id="",
            created_at=0.0, ttl=60.0, message_type="train",
        )  # fmt: skip
        message = make_message(metadata, honest_answer())
        self.top = message.object_id
        objects = get_all_nested_objects(message)
        self.names = sorted(objects)
        self.honest = join([objects[name].deflate() for name in self.names])

    def read(self, data: bytes) -> RecordDict | None:
        """Put a message together as the server does; None if it is an error."""
        message = inflate(1_000_000, self.top, dict(zip(self.names, split(data, len(self.names)), strict=True)))
        assert isinstance(message, Message)
        return message.content if message.has_content() else None


def join(parts: list[bytes]) -> bytes:
    """Join parts, each after its length."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def split(data: bytes, count: int) -> list[bytes]:
    """Split what `join` joined; of any other bytes, make as many parts."""
    parts = []
    for _ in range(count):
        (length,) = struct.unpack("<I", data[:4].ljust(4, b"\0"))
        parts.append(data[4 : 4 + length])
        data = data[4 + length :]
    return parts


# ---------------------------------------------------------------------- changes


def leaves(proto: object) -> list[tuple[object, str, int | None]]:
    """Return where the numbers, texts and bytes of a protobuf message are: message, field, and place in a list."""
    found: list[tuple[object, str, int | None]] = []
    for field, value in proto.ListFields():  # type: ignore[attr-defined]
        many = value if hasattr(value, "append") or hasattr(value, "add") else None
        if field.message_type:
            for one in many if many is not None else [value]:
                found += leaves(one)
        else:
            found += [(proto, field.name, place) for place in (range(len(many)) if many is not None else [None])]
    return found


def changed(data: bytes, max_size: int, seed: int) -> bytes:
    """Change one field of a message, or take an item away or twice; or change the bytes as they are."""
    draw = random.Random(seed)
    proto = Proto()
    with contextlib.suppress(Exception):
        proto.ParseFromString(data)
    found = leaves(proto)
    if not found or draw.random() < 0.2:
        return atheris.Mutate(data, max_size)
    owner, name, place = draw.choice(found)
    many = getattr(owner, name)
    old = many if place is None else many[place]
    with contextlib.suppress(Exception):  # What a field cannot hold.
        new = _changed_value(old, draw)
        if place is None:
            setattr(owner, name, new)
        elif draw.random() < 0.7:
            many[place] = new
        elif draw.random() < 0.5:
            del many[place]
        else:
            many.append(old)
    return proto.SerializeToString()[:max_size]


def changed_upload(count: int, data: bytes, max_size: int, seed: int) -> bytes:
    """Change one of the objects of an upload: mostly its body, whose length its head then says."""
    draw, parts = random.Random(seed), split(data, count)
    index = draw.randrange(count)
    head, _, body = parts[index].partition(b"\0")
    if draw.random() < 0.8:
        body = atheris.Mutate(body, len(body) + 64)
        words = head.split(b" ")
        parts[index] = b" ".join([*words[:-1], str(len(body)).encode()]) + b"\0" + body
    else:
        parts[index] = atheris.Mutate(parts[index], len(parts[index]) + 64)
    return join(parts)[:max_size]


def _changed_value(old: object, draw: random.Random) -> object:
    if isinstance(old, bool):
        return not old
    if isinstance(old, (int, float)):
        return type(old)(draw.choice([*NUMBERS, old + 1, -old]))
    if isinstance(old, str):
        return atheris.Mutate(old.encode(), len(old) + 64).decode(errors="replace")
    assert isinstance(old, bytes)
    return atheris.Mutate(old, len(old) + 64)


# ---------------------------------------------------------------------- main


def check(read: Callable[[bytes], RecordDict | None], reader: Callable[[RecordDict], None], data: bytes) -> None:
    """Read a message; raise if it is refused otherwise than by a `PayloadError`, or for lack of memory."""
    try:
        content = read(data)
        if content is not None:
            reader(content)
    except PayloadError as error:
        if "MemoryError" in str(error):
            raise AssertionError(f"more than {MEMORY} bytes of memory") from error


def limit_memory() -> None:
    """Refuse the process more than `MEMORY` bytes from now on."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(arguments: list[str]) -> None:
    """Fuzz the message that the first argument names; the others are libFuzzer's."""
    name, *options = arguments
    reader, seeds = READERS[name]
    uploaded = Uploaded()
    read = uploaded.read if name == "upload" else from_bytes
    honest = [uploaded.honest] if name == "upload" else [to_bytes(make()) for make in seeds]
    for data in honest:
        content = read(data)
        assert content is not None
        reader(content)  # It is read whole, so that changes of it get far.
    corpus = tempfile.mkdtemp(prefix=f"fuzz-{name}-")
    for number, data in enumerate(honest):
        (Path(corpus) / f"honest-{number}").write_bytes(data)
    mutator = partial(changed_upload, len(uploaded.names)) if name == "upload" else changed
    libfuzzer = [f"-max_len={LONGEST}", "-rss_limit_mb=0", f"-artifact_prefix={corpus}/", "-verbosity=0", *options]
    atheris.Setup([sys.argv[0], *libfuzzer, corpus], partial(check, read, reader), custom_mutator=mutator)
    limit_memory()
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
