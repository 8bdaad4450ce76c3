"""A node that goes wrong: a task model whose module, once imported, makes the client lie, each round in another way."""

import os

import numpy as np
from flwr.app import Array

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
