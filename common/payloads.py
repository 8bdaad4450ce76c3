"""The messages between server and clients; both sides check them.

The server sends `SyntheticBatch` and `SoftTargets`. A client answers with a `DistillationPayload`. Each message is
converted to a Flower `RecordDict` and back. Invalid content raises a `PayloadError`: an invalid reply excludes its
sender from the round, but never stops the run.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedmmkt.common.images import decode_images
from fedmmkt.common.plain_text import is_plain

MAX_SAMPLES = 1_000_000
MAX_CLASSES = 100_000
MAX_ANCESTORS = 100
MAX_EXAMPLES = 10**12
LARGEST_LOGIT = 6e4  # Clients clamp their logits to this, within the range of half precision.
VOTES_PER_IMAGE = 3  # Synthetic samples that each private image votes for.
SURELY = 8.0  # Standard deviations that noise never exceeds: once in 10**15 values.
Modality = Literal["image", "text", "image+text"]


class PayloadError(ValueError):
    """A message is invalid; the text says what was found and what was expected."""


def _array(dtype: str, dimensions: int) -> BeforeValidator:
    def check(value: Any) -> np.ndarray:
        if not isinstance(value, np.ndarray) or value.dtype != np.dtype(dtype) or value.ndim != dimensions:
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"expected a {dtype} array of {dimensions} dimension(s), found {found}")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError(f"{np.count_nonzero(~np.isfinite(value))} of {value.size} values are not finite")
        return value

    return BeforeValidator(check)


def _check_name(name: str) -> str:
    if not is_plain(name):
        raise ValueError("expected a name without control characters")
    return name


Float16Matrix = Annotated[np.ndarray, _array("float16", 2)]
Float32Vector = Annotated[np.ndarray, _array("float32", 1)]
Int64Vector = Annotated[np.ndarray, _array("int64", 1)]
UInt8Vector = Annotated[np.ndarray, _array("uint8", 1)]
Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_check_name)]
# The keys of the records in a client's reply.
REPORT_RECORDS = frozenset({"report", "report.metrics"})
PAYLOAD_RECORDS = frozenset({"payload", "payload.arrays"})
EVALUATION_RECORDS = REPORT_RECORDS | {"evaluation", "evaluation.arrays"}
CLASS_RECORDS = frozenset({"classes", "classes.arrays"})
RunKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class _Message(BaseModel):
    """Base of all messages.

    Arrays are sent in an ArrayRecord, which Flower splits into chunks. All other fields are sent in a ConfigRecord.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    def parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Split the fields that are set into JSON-compatible values and arrays."""
        content = {name: value for name, value in self if value is not None}
        arrays = {name: value for name, value in content.items() if isinstance(value, np.ndarray)}
        return {name: _to_setting(value) for name, value in content.items() if name not in arrays}, arrays

    def to_records(self, prefix: str) -> dict[str, Any]:
        """Return Flower records with the keys ``<prefix>`` and ``<prefix>.arrays``."""
        settings, arrays = self.parts()
        arrays_record = ArrayRecord({name: Array(value) for name, value in arrays.items()})
        return {prefix: ConfigRecord(settings), f"{prefix}.arrays": arrays_record}

    @classmethod
    def from_records(cls, records: Mapping[str, Any], prefix: str) -> Self:
        """Parse and check records from `to_records`.

        Raises
        ------
        PayloadError
            If a record is missing, or a field is missing, unknown, of the wrong type, shape or range.
        """
        settings, arrays = records.get(prefix), records.get(f"{prefix}.arrays")
        if not isinstance(settings, ConfigRecord) or not isinstance(arrays, ArrayRecord):
            raise PayloadError(f"no {cls.__name__} in the records {sorted(records)}; expected {prefix!r}")
        try:
            if unknown := sorted(arrays.keys() - cls.model_fields.keys()):
                raise PayloadError(f"{cls.__name__} has no array {', '.join(unknown)}")
            content: dict[str, Any] = dict(settings)
            content |= {name: _to_numpy(array) for name, array in arrays.items()}
            return cls.model_validate(content)
        except PayloadError:
            raise
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "fields"
            raise PayloadError(f"{cls.__name__}.{field}: {first['msg'].removeprefix('Value error, ')}") from None
        except Exception as error:  # The bytes are not trusted: numpy's parser may raise anything.
            raise PayloadError(f"{cls.__name__} cannot be read: {error!r}") from None


def _to_numpy(array: Array) -> np.ndarray:
    """Parse an array, after a check that it is as large as its header claims; numpy would make room for any size."""
    header = io.BytesIO(array.data)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = reader[np.lib.format.read_magic(header)](header)
    claimed, present = math.prod(shape) * dtype.itemsize, len(array.data) - header.tell()
    if claimed != present:
        raise ValueError(f"an array of {claimed} bytes, of which {present} were sent")
    return array.numpy()


def _to_setting(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class Instructions(_Message):
    """What the server tells a client besides batches and soft targets.

    Attributes
    ----------
    run_key : str
        Key under which the client keeps its memory of the run.
    round : int
        Current round; 0 before any learning.
    classes : tuple of str
        The class space. Logits have one column per class, in this order.
    votes : bool
        Whether the run uses votes.
    rounds : int
        Number of rounds of the whole run, for which a node with a privacy budget plans its noise.
    anchor_size : int
        Dimension of the text embeddings (anchors) in batches; 0 if batches have none.
    ancestors, ancestor_rounds : tuple
        Keys of the earlier runs that this run continues, oldest first, and the round after which each was continued.
        A client without memory of this run starts from its memory of these runs. Sent only to clients that have not
        answered yet.
    """

    run_key: RunKey
    round: int = Field(ge=0)
    classes: tuple[Name, ...] = Field(min_length=2, max_length=MAX_CLASSES)
    votes: bool
    rounds: int = Field(1, ge=1, le=100_000)
    anchor_size: int = Field(ge=0, le=100_000)
    ancestors: tuple[RunKey, ...] = Field((), max_length=MAX_ANCESTORS)
    ancestor_rounds: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _require(len(self.ancestors) == len(self.ancestor_rounds), "each ancestor needs its round")
        _require(len(set(self.classes)) == len(self.classes), "classes are not distinct")
        return self


class SyntheticBatch(_Message):
    """Samples that the server's T2I model generated in one round.

    Attributes
    ----------
    batch_id : str
        Identifies the batch in later messages.
    round : int
        The round for which it was generated, from 1.
    prompts : tuple of str
        One prompt per sample.
    prompted_N : numpy.ndarray
        int64; the class that each prompt names, -1 if it names none.
    images, offsets : numpy.ndarray, optional
        Encoded images in one uint8 buffer, and int64 offsets (N + 1). Absent for text-only clients.
    anchors_UD, anchor_index_N : numpy.ndarray, optional
        float16 text embeddings of the U distinct prompts, and the int64 row of each sample's prompt.
    """

    batch_id: Name
    round: int = Field(ge=1)
    prompts: tuple[str, ...] = Field(min_length=1, max_length=MAX_SAMPLES)
    prompted_N: Int64Vector
    images: UInt8Vector | None = None
    offsets: Int64Vector | None = None
    anchors_UD: Float16Matrix | None = None
    anchor_index_N: Int64Vector | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        count = len(self.prompts)
        _require(len(self.prompted_N) == count, f"prompted_N has {len(self.prompted_N)} entries for {count} prompts")
        _require(_within(self.prompted_N, -1, MAX_CLASSES), "prompted_N names a class that is not there")
        _require((self.images is None) == (self.offsets is None), "images and offsets come together")
        if self.images is not None and self.offsets is not None:
            _require(len(self.offsets) == count + 1, f"{len(self.offsets)} offsets for {count} images")
            _require(_within(self.offsets, 0, len(self.images) + 1), "an offset lies outside the image buffer")
        _require((self.anchors_UD is None) == (self.anchor_index_N is None), "anchors and their index come together")
        if self.anchors_UD is not None and self.anchor_index_N is not None:
            _require(
                len(self.anchor_index_N) == count, f"{len(self.anchor_index_N)} anchor indices for {count} prompts"
            )
            _require(_within(self.anchor_index_N, 0, len(self.anchors_UD)), "an anchor index lies outside the anchors")
        return self

    def __len__(self) -> int:
        return len(self.prompts)

    def decoded_NHWC(self, size: int) -> np.ndarray | None:
        """Decode the images to RGB of ``size`` x ``size`` pixels; None without images, `PayloadError` if one is bad."""
        if self.images is None or self.offsets is None:
            return None
        try:
            return decode_images(self.images, self.offsets, size)
        except ValueError as error:
            raise PayloadError(f"batch {self.batch_id!r}: {error}") from error

    def without_images(self) -> SyntheticBatch:
        """Return the batch without images, for text-only clients."""
        return self.model_copy(update={"images": None, "offsets": None})


class SoftTargets(_Message):
    """Soft targets of a batch, aggregated from the clients' answers.

    Attributes
    ----------
    batch_id : str
        Id of the batch.
    probabilities_NC : numpy.ndarray
        float16; each row sums to one, within half precision.
    weights_N : numpy.ndarray
        float32, not negative; weight of each sample in distillation.
    """

    batch_id: Name
    probabilities_NC: Float16Matrix
    weights_N: Float32Vector

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _require(len(self.weights_N) == len(self.probabilities_NC), "weights_N does not match probabilities_NC")
        _require(bool((self.weights_N >= 0).all()), "a weight is negative")
        _require(_within(self.probabilities_NC, 0, 1.001), "a probability is outside [0, 1]")
        sums_N = self.probabilities_NC.astype(np.float64).sum(axis=1)
        _require(bool((np.abs(sums_N - 1) < 0.02).all()), "a row of probabilities does not sum to one")
        return self


class ClientReport(_Message):
    """The client's name, model and quality; part of every reply.

    Attributes
    ----------
    client : str
        Name of the client in logs and reports.
    model, modality : str
        Name of its model, and the kind of inputs that the model reads.
    examples : int
        Number of private training examples; with a privacy budget, the sum of the class counts with noise.
    accuracy, loss : float, optional
        Of its current model: on the shared test set in simulation, else on held-out private data. None if the client
        withholds them.
    epsilon, budget, delta : float, optional
        Only of a client with a privacy budget: the epsilon that all its answers have spent, the whole epsilon, and the
        delta of both.
    kept : tuple of str
        Ids of the batches that it has on disk; the server resends lost ones.
    awaiting : tuple of str
        Ids of the kept batches that have no soft targets yet.
    """

    client: Name
    model: Name
    modality: Modality
    examples: int = Field(ge=1, le=MAX_EXAMPLES)
    accuracy: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    loss: float | None = Field(None, ge=0, allow_inf_nan=False)
    epsilon: float | None = Field(None, ge=0, allow_inf_nan=False)
    budget: float | None = Field(None, gt=0, allow_inf_nan=False)
    delta: float | None = Field(None, gt=0, lt=1)
    kept: tuple[Name, ...] = Field((), max_length=1000)
    awaiting: tuple[Name, ...] = Field((), max_length=1000)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for names in (("accuracy", "loss"), ("epsilon", "budget", "delta")):
            given = {getattr(self, name) is not None for name in names}
            _require(len(given) == 1, f"{', '.join(names)} come together")
        return self

    @property
    def is_private(self) -> bool:
        """Whether the client has a privacy budget: what it answers has noise."""
        return self.epsilon is not None

    def to_records(self, prefix: str) -> dict[str, Any]:
        """Return Flower records; numbers go into a MetricRecord, where Flower's tools look for them."""
        records: dict[str, Any] = super().to_records(prefix)
        settings = dict(records[prefix])
        numbers = {name: settings.pop(name) for name in ("examples", "accuracy", "loss") if name in settings}
        return {prefix: ConfigRecord(settings), f"{prefix}.metrics": MetricRecord(numbers)}

    @classmethod
    def from_records(cls, records: Mapping[str, Any], prefix: str) -> Self:
        """Parse and check records from `to_records`; see `_Message.from_records`."""
        settings, numbers = records.get(prefix), records.get(f"{prefix}.metrics")
        if not isinstance(settings, ConfigRecord) or not isinstance(numbers, MetricRecord):
            raise PayloadError(f"no {cls.__name__} in the records {sorted(records)}; expected {prefix!r}")
        joined = {prefix: ConfigRecord({**settings, **numbers}), f"{prefix}.arrays": ArrayRecord()}
        return super().from_records(joined, prefix)


class FinalEvaluation(_Message):
    """A client's measures by class after the last round, with its report; only numbers of examples.

    Attributes
    ----------
    examples_C, tested_C : numpy.ndarray
        int64; private training examples and test examples of each class.
    correct_C : numpy.ndarray
        int64; the test examples of each class that the client's model recognises.
    alone_correct_C : numpy.ndarray, optional
        int64; the same for the local-only control, a model of the same kind that learned from the client's private data
        alone, in as many private epochs. Only from simulated clients, and only if the run has the control.
    """

    examples_C: Int64Vector
    tested_C: Int64Vector
    correct_C: Int64Vector
    alone_correct_C: Int64Vector | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("examples_C", "correct_C", "alone_correct_C"):
            values_C = getattr(self, name)
            if values_C is None:
                continue
            _require(
                len(values_C) == len(self.tested_C),
                f"{name} has {len(values_C)} classes, tested_C {len(self.tested_C)}",
            )
            _require(_within(values_C, 0, np.inf), f"{name} has a negative count")
            _require(name == "examples_C" or bool((values_C <= self.tested_C).all()), f"{name} exceeds tested_C")
        _require(bool(self.tested_C.sum() > 0), "no test example")
        _require(bool(self.examples_C.sum() > 0), "no private example")
        return self

    def check_classes(self, classes: int) -> None:
        """Check that the measures are of the run's class space; ``PayloadError`` if not."""
        if len(self.tested_C) != classes:
            raise PayloadError(f"final evaluation has {len(self.tested_C)} classes; expected {classes}")


class ClassReport(_Message):
    """The classes of which a client holds examples; used if only the clients know the class space."""

    classes: tuple[Name, ...] = Field(min_length=1, max_length=MAX_CLASSES)


class DistillationPayload(_Message):
    """A client's whole answer to a batch: no image, no text, no model weight, no gradient.

    Attributes
    ----------
    batch_id : str
        Id of the batch.
    logits_NC : numpy.ndarray, optional
        float16, samples x classes. None if the client sends none, since it has a privacy budget.
    class_counts_C : numpy.ndarray
        int64; number of private examples per class. The default aggregation rule ignores the client on a class with
        count zero.
    votes_N : numpy.ndarray, optional
        float32; how often each sample is among the nearest synthetic neighbours of the client's private images
        (arXiv 2305.15560). Negative only with noise. Only from clients that read images, and only if the run uses
        votes.
    votes_noise, counts_noise : float, optional
        Standard deviation of the noise of each vote, and of each class count; None without noise.
    """

    batch_id: Name
    logits_NC: Float16Matrix | None = None
    class_counts_C: Int64Vector
    votes_N: Float32Vector | None = None
    votes_noise: float | None = Field(None, gt=0, le=MAX_EXAMPLES)
    counts_noise: float | None = Field(None, gt=0, le=MAX_EXAMPLES)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.logits_NC is not None:
            classes = self.logits_NC.shape[1]
            _require(bool((np.abs(self.logits_NC) <= LARGEST_LOGIT).all()), f"a logit is beyond {LARGEST_LOGIT:g}")
            _require(
                len(self.class_counts_C) == classes, f"{len(self.class_counts_C)} class counts for {classes} logits"
            )
        _require(_within(self.class_counts_C, 0, np.inf), "a class count is negative")
        _require(_within(self.class_counts_C, 0, MAX_EXAMPLES), f"a class count is above {MAX_EXAMPLES}")
        _require(bool(self.class_counts_C.sum() > 0), "no class has a private example")
        if self.votes_N is not None:
            if self.logits_NC is not None:
                samples = len(self.logits_NC)
                _require(len(self.votes_N) == samples, f"{len(self.votes_N)} votes for {samples} samples")
            lowest = -SURELY * (self.votes_noise or 0)
            _require(_within(self.votes_N, lowest, np.inf), "a vote is negative" + (" beyond noise" if lowest else ""))
        else:
            _require(self.votes_noise is None, "votes_noise is of no votes")
        return self

    def check_answers(self, batch_id: str, samples: int, classes: int, votes: bool) -> None:
        """Check that the payload answers the right batch.

        Raises
        ------
        PayloadError
            If the batch id, the number of samples or of classes differs, or if the run uses no votes and it has some.
        """
        if self.batch_id != batch_id:
            raise PayloadError(f"answers batch {self.batch_id!r}; expected {batch_id!r}")
        if self.logits_NC is not None and self.logits_NC.shape != (samples, classes):
            raise PayloadError(f"logits have shape {self.logits_NC.shape}; expected ({samples}, {classes})")
        if len(self.class_counts_C) != classes:
            raise PayloadError(f"{len(self.class_counts_C)} class counts; expected {classes}")
        if self.votes_N is not None and len(self.votes_N) != samples:
            raise PayloadError(f"{len(self.votes_N)} votes; expected {samples}")
        if self.votes_N is not None and not votes:
            raise PayloadError("votes were sent where the run asks for logits alone")

    def check_possible(self, report: ClientReport, prompted_N: np.ndarray) -> None:
        """Check that a client with this report can have made the payload.

        Its class counts are of its training examples. Each of its images votes for `VOTES_PER_IMAGE` samples, of its
        own class or of none, and once for each. Noise can add to that what is at most `SURELY` standard deviations.
        Only a client with a privacy budget has noise, and only such a client sends no logits.

        Parameters
        ----------
        report : ClientReport
            The report in the same reply.
        prompted_N : numpy.ndarray
            int64; the class that each sample's prompt names, -1 if it names none.

        Raises
        ------
        PayloadError
            If it cannot be.
        """
        examples = int(self.class_counts_C.sum())
        if examples != report.examples:
            raise PayloadError(f"class counts are of {examples} examples, and the report says {report.examples}")
        noises = self.counts_noise is not None, self.votes_N is None or self.votes_noise is not None
        if report.is_private and not all(noises):
            raise PayloadError("the report tells of a privacy budget, and the answer of no noise")
        if not report.is_private and (self.logits_NC is None or self.counts_noise or self.votes_noise):
            raise PayloadError("an answer with noise or without logits needs a report that tells of a privacy budget")
        if self.votes_N is None:
            return
        if report.modality == "text":
            raise PayloadError("votes were sent by a client that reads no images")
        votes_noise = SURELY * (self.votes_noise or 0)
        if wrong := int((self.votes_N > self.voters_N(prompted_N, SURELY) + votes_noise).sum()):
            raise PayloadError(f"{wrong} of {len(self.votes_N)} samples have more votes than images that may vote")
        most = VOTES_PER_IMAGE * self._examples(SURELY) + votes_noise * len(self.votes_N) ** 0.5
        if (cast := float(self.votes_N.sum(dtype=np.float64))) > most:
            raise PayloadError(f"{cast:g} votes of {examples} images; allowed: {VOTES_PER_IMAGE} of each")

    def voters_N(self, prompted_N: np.ndarray, deviations: float) -> np.ndarray:
        """Return how many of the client's images may vote for each sample at most (samples,).

        Parameters
        ----------
        prompted_N : numpy.ndarray
            int64; the class that each sample's prompt names, -1 if it names none.
        deviations : float
            How many standard deviations of noise in the class counts are granted.
        """
        of_class_N = self.class_counts_C[prompted_N] + deviations * (self.counts_noise or 0)
        return np.where(prompted_N < 0, self._examples(deviations), of_class_N)

    def _examples(self, deviations: float) -> float:
        """Return the number of examples at most, if the class counts have noise."""
        noise = (self.counts_noise or 0) * len(self.class_counts_C) ** 0.5
        return float(self.class_counts_C.sum() + deviations * noise)


@dataclass(frozen=True)
class Request:
    """The content of one message from the server to a client.

    Attributes
    ----------
    instructions : Instructions
    batches : tuple of SyntheticBatch
        Batches that the client does not have yet, oldest first. In training, the client answers the last one.
    targets : tuple of SoftTargets
        Soft targets of these batches, or of earlier batches that the client keeps.
    """

    instructions: Instructions
    batches: tuple[SyntheticBatch, ...] = ()
    targets: tuple[SoftTargets, ...] = ()

    def to_content(self) -> RecordDict:
        """Return the content of a Flower message."""
        content = RecordDict(self.instructions.to_records("instructions"))
        for name, messages in (("batch", self.batches), ("targets", self.targets)):
            for index, message in enumerate(messages):
                for key, record in message.to_records(f"{name}-{index}").items():
                    content[key] = record
        return content

    @classmethod
    def from_content(cls, content: RecordDict) -> Self:
        """Parse and check the content of a Flower message.

        Raises
        ------
        PayloadError
            If any part is invalid.
        """
        return cls(
            Instructions.from_records(content, "instructions"),
            tuple(SyntheticBatch.from_records(content, name) for name in _numbered(content, "batch")),
            tuple(SoftTargets.from_records(content, name) for name in _numbered(content, "targets")),
        )


def check_keys(content: RecordDict, asked: frozenset[str]) -> None:
    """Check that a reply has only records that were asked for; raise `PayloadError` otherwise."""
    if unknown := sorted(map(str, content.keys() - asked)):
        raise PayloadError(f"records that nobody asked for: {', '.join(unknown)}; allowed: {', '.join(sorted(asked))}")


def _numbered(content: RecordDict, name: str) -> list[str]:
    found = (re.fullmatch(rf"{name}-(\d{{1,4}})", key) for key in content)
    return [match[0] for match in sorted((match for match in found if match), key=lambda match: int(match[1]))]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _within(values: np.ndarray, low: float, high: float) -> bool:
    return bool(((values >= low) & (values < high)).all())


def record_bytes(records: RecordDict) -> int:
    """Return the size in bytes of a message's content as Flower sends it, without framing."""
    total = 0
    for record in records.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
        else:
            total += len(json.dumps(dict(record), default=str).encode())
    return total
