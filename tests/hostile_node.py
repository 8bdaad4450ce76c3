"""A node that goes wrong: a task model whose module, once imported, makes the client lie, each round in another way."""

import json
import os

import numpy as np
from flwr.app import Array
from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body

from fedmmkt.client_app.models.building import build_task_model
from fedmmkt.common.payloads import DistillationPayload

honest_records = DistillationPayload.to_records


def lying_records(payload, prefix):
    """Replace the logits by random bytes, then by 100 MB of them; name a wrong batch; then send NaN."""
    records = honest_records(payload, prefix)
    arrays, shape = records[f"{prefix}.arrays"], payload.logits_NC.shape
    round_ = int(payload.batch_id.rpartition("-")[2])
    if round_ == 1:
        arrays["logits_NC"] = Array("float16", shape, "numpy.ndarray", os.urandom(payload.logits_NC.nbytes))
    if round_ == 2:
        arrays["logits_NC"] = Array("float16", shape, "numpy.ndarray", os.urandom(100_000_000))
    if round_ == 3:
        records[prefix]["batch_id"] = "another"
    if round_ >= 4:
        arrays["logits_NC"] = Array(np.full(shape, np.nan, np.float16))
    return records


def model(classes, image_size):
    """Build a task model that is honest in itself."""
    DistillationPayload.to_records = lying_records
    return build_task_model("mlp", classes, image_size)


class ForgedArray(Array):
    """An array whose description names other chunks than it has."""

    def deflate(self):
        described = {"dtype": self.dtype, "shape": self.shape, "stype": self.stype, "arraychunk_ids": self.claimed}
        return add_header_to_object_body(json.dumps(described).encode(), self)


ForgedArray.__qualname__ = "Array"  # What the upload says that it is.


def forged_records(payload, prefix):
    """Name a chunk that is not there; then upload 5 MB that claim 25 GB."""
    records = honest_records(payload, prefix)
    round_ = int(payload.batch_id.rpartition("-")[2])
    logits = payload.logits_NC if round_ == 1 else np.zeros(2_500_000, np.float16)
    forged = ForgedArray(logits)
    forged.__dict__["claimed"] = [7] if round_ == 1 else [0] * 5000
    records[f"{prefix}.arrays"]["logits_NC"] = forged
    return records


def forger(classes, image_size):
    """Build a task model that is honest in itself, of a node whose uploads cannot be put together."""
    DistillationPayload.to_records = forged_records
    return build_task_model("mlp", classes, image_size)
