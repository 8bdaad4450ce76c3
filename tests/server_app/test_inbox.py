"""Replies are pulled one by one: what one node sent ends neither the run nor another node's reply."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid

from fedmmkt.common.payloads import PayloadError
from fedmmkt.server_app import inbox
from fedmmkt.server_app.inbox import pull_reply

LOGITS = np.arange(6, dtype=np.float16).reshape(3, 2)


class SuperLink:
    """In place of Flower's client of the Runtime API: it forgets a reply once it was asked for, as Flower does."""

    def __init__(self):
        self.replies = {}
        self.pulls = 0

    def receive(self, asked, message, forge=lambda content: content):
        """Take the upload of a node, with what it changes in the description of its arrays."""
        objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        forged = {name: forge(one) if one.startswith(b"Array ") else one for name, one in objects.items()}
        self.replies[asked] = (message_to_proto(message), get_object_tree(message), forged)
        self.objects = {name: one for *_, contents in self.replies.values() for name, one in contents.items()}

    def PullMessages(self, request):
        found = [self.replies.pop(asked) for asked in request.message_ids if asked in self.replies]
        return PullAppMessagesResponse(
            messages_list=[proto for proto, _, _ in found], message_object_trees=[tree for _, tree, _ in found]
        )

    def PullObject(self, request):
        self.pulls += 1
        content = self.objects.get(request.object_id)
        return PullObjectResponse(
            object_found=True, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request):
        """Forget nothing more."""


@pytest.fixture
def link():
    return SuperLink()


@pytest.fixture
def grid(link):
    grid = HttpGrid(token="token")
    grid._client = link
    grid._run = Run.create_empty(1)
    return grid


def reply_to(asked, records=None):
    records = records or {"payload.arrays": ArrayRecord({"logits_NC": Array(LOGITS)})}
    metadata = Metadata(
        run_id=1, message_id="", src_node_id=5, dst_node_id=1, reply_to_message_id=asked, group_id="",
        created_at=0.0, ttl=60.0, message_type="train",
    )  # fmt: skip
    message = make_message(metadata, RecordDict(records))
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def chunks(indices):
    """Return what replaces the chunks that an array names."""

    def forge(content):
        head, body = content.split(b"\0", 1)
        body = json.dumps(json.loads(body) | {"arraychunk_ids": indices}).encode()
        kind, children, _ = head.split(b" ")
        return b" ".join([kind, children, str(len(body)).encode()]) + b"\0" + body

    return forge


def test_a_reply_arrives_whole_and_an_absent_one_is_none(grid, link):
    link.receive("asked", reply_to("asked"))

    reply = pull_reply(grid, "asked", 10_000)

    assert np.array_equal(reply.content["payload.arrays"]["logits_NC"].numpy(), LOGITS)
    assert pull_reply(grid, "asked", 10_000) is None


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([9], "the reply cannot be put together: IndexError"),
        ([-1, 0, "x"], "the reply cannot be put together: TypeError"),
        ([], "the reply cannot be put together: ValueError"),
        ([0] * 10_000, r"the reply has more than 0\.1 MB, which is the run-config key 'reply-limit'"),
    ],
)
def test_an_array_that_names_wrong_or_too_many_chunks_is_refused_and_the_next_reply_arrives(
    grid, link, indices, message
):
    link.receive("lie", reply_to("lie"), chunks(indices))
    link.receive("truth", reply_to("truth", {"payload.arrays": ArrayRecord({"logits_NC": Array(LOGITS + 1)})}))

    with pytest.raises(PayloadError, match=message):
        pull_reply(grid, "lie", 100_000)

    assert pull_reply(grid, "truth", 100_000).metadata.reply_to_message_id == "truth"


def test_a_small_upload_that_claims_gigabytes_takes_no_memory(grid, link):
    """As 29 GB in 5 MB would; here one chunk of 120 kB, named a hundred thousand times."""
    big = {"a": ArrayRecord({"logits_NC": Array(np.zeros(60_000, np.float16))})}
    link.receive("lie", reply_to("lie", big), chunks([0] * 100_000))

    with pytest.raises(PayloadError, match="more than 256 MB"):
        pull_reply(grid, "lie", 256_000_000)


def test_a_large_upload_is_not_pulled_to_its_end(grid, link):
    link.receive("lie", reply_to("lie", {f"r{index}": ConfigRecord({"a": "x" * 1000}) for index in range(200)}))

    with pytest.raises(PayloadError, match=r"more than 0\.01 MB"):
        pull_reply(grid, "lie", 10_000)

    assert link.pulls < 200


def test_objects_and_records_have_bounds_of_their_own(grid, link, monkeypatch):
    many = reply_to("many", {f"r{index}": ConfigRecord({"a": index}) for index in range(20)})
    link.receive("many", many)
    monkeypatch.setattr(inbox, "MAX_OBJECTS", 10)
    with pytest.raises(PayloadError, match=r"the reply has 22 objects; allowed: up to 10"):
        pull_reply(grid, "many", 1_000_000)

    link.receive("large", reply_to("large", {"a": ConfigRecord({"a": "x" * 2000})}))
    monkeypatch.setattr(inbox, "MAX_RECORD_BYTES", 1000)
    with pytest.raises(PayloadError, match=r"the reply has a ConfigRecord of \d+ bytes; allowed: up to 1000"):
        pull_reply(grid, "large", 1_000_000)


def test_an_upload_that_never_ends_is_not_waited_for(grid, link, monkeypatch):
    monkeypatch.setattr(inbox, "UPLOAD_SECONDS", 0)
    link.receive("asked", reply_to("asked"))
    link.objects.clear()

    reply = pull_reply(grid, "asked", 10_000)

    assert "objects are unavailable" in reply.error.reason


def test_a_reply_that_says_it_answers_another_nodes_message_is_refused(grid, link):
    link.receive("asked", reply_to("of another node"))

    with pytest.raises(PayloadError, match="says that it answers another message"):
        pull_reply(grid, "asked", 10_000)


def test_flower_is_left_as_it_was(grid, link):
    from flwr.superlink.grid import http_grid

    before = http_grid.pull_objects, http_grid.inflate_object_from_contents
    link.receive("lie", reply_to("lie"), chunks([9]))

    with pytest.raises(PayloadError):
        pull_reply(grid, "lie", 10_000)

    assert (http_grid.pull_objects, http_grid.inflate_object_from_contents) == before
