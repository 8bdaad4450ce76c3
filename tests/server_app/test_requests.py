"""Requests: each node is sent what it lacks, and equal requests are one."""

import numpy as np
import torch

from fedmmkt.common.payloads import ClientReport, Instructions, Request, SoftTargets, SyntheticBatch
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app.exchange import Answer, Reply
from fedmmkt.server_app.ledger import Ledger, TargetsByClient
from fedmmkt.server_app.requests import make_requests
from fedmmkt.server_app.t2i.samples import Samples


def batch(round_):
    return SyntheticBatch(
        batch_id=f"run-{round_}",
        round=round_,
        prompts=("a cat",),
        prompted_N=np.array([0]),
        images=np.zeros(4, np.uint8),
        offsets=np.array([0, 4]),
    )


def instructions(is_known):
    ancestors = () if is_known else ("older",)
    return Instructions(
        run_key="run", round=2, classes=("cat", "dog"), votes=True, anchor_size=0, ancestors=ancestors,
        ancestor_rounds=(7,) * len(ancestors),
    )  # fmt: skip


def ledger_after_round_1():
    """Make a ledger of four nodes: 1 and 2 have images and batch 1, 3 reads texts and has it, 4 is not known."""
    ledger = Ledger("run", 3, 3)
    targets = SoftTargets(
        batch_id="run-1", probabilities_NC=np.array([[1, 0]], np.float16), weights_N=np.ones(1, np.float32)
    )
    samples = Samples(("a cat",), torch.tensor([0]), np.zeros((1, 2, 2, 3), np.uint8), torch.zeros(1, 4))
    ledger.serve(batch(1), samples)
    ledger.teach(1, TargetsByClient((targets,), {}, {"image": 0, "text": 0}), samples)
    for node_id, modality in ((1, "image"), (2, "image"), (3, "text")):
        told = ClientReport(
            client=f"client-{node_id}", model="any", modality=modality, examples=1, accuracy=0, loss=0,
            kept=("run-1",), awaiting=("run-1",),
        )  # fmt: skip
        ledger.record_reply(Reply("answered", node_id, f"message-{node_id}", answer=Answer(told)), 1)
    return ledger


def test_each_node_is_sent_what_it_lacks_and_texts_go_without_images():
    InProcessGrid("", {}, [])  # Flower's messages belong to a run.

    messages = list(make_requests([3, 4, 1], ledger_after_round_1(), instructions, "train", batch(2)))

    assert [message.metadata.dst_node_id for message in messages] == [1, 3, 4]
    assert {message.metadata.message_type for message in messages} == {"train"}
    requests = [Request.from_content(message.content) for message in messages]
    sent = [[(one.batch_id, one.images is not None) for one in request.batches] for request in requests]
    assert sent == [[("run-2", True)], [("run-2", False)], [("run-1", True), ("run-2", True)]]
    assert [[one.batch_id for one in request.targets] for request in requests] == [["run-1"]] * 3
    assert [request.instructions.ancestors for request in requests] == [(), (), ("older",)]


def test_equal_requests_are_one_object():
    InProcessGrid("", {}, [])

    first, second, third, _ = make_requests([1, 2, 3, 4], ledger_after_round_1(), instructions, "train", batch(2))

    assert first.content is second.content
    assert first.content is not third.content


def test_without_a_new_batch_only_what_is_due_is_sent():
    InProcessGrid("", {}, [])

    known, unknown = make_requests([1, 4], ledger_after_round_1(), instructions, "train.distill")

    requests = [Request.from_content(message.content) for message in (known, unknown)]
    assert [[one.batch_id for one in request.batches] for request in requests] == [[], ["run-1"]]
    assert [len(request.targets) for request in requests] == [1, 1]
