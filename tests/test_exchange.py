"""One exchange after another: who answered, who was late, rejected or gone, whatever the order of arrival."""

from dataclasses import dataclass

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from hypothesis import given, settings
from hypothesis import strategies as st

from common.payloads import ClientReport
from deploy.in_process import InProcessGrid
from server_app import exchange as module
from server_app.exchange import Answer, exchange

NEVER = 1_000
app = ClientApp()


@app.evaluate()
def report(message: Message, context: Context) -> Message:
    name = f"client-{context.node_id}"
    told = ClientReport(client=name, model="mlp", modality="image", examples=1, accuracy=0.5, loss=1.0)
    return Message(RecordDict(told.to_records("report")), reply_to=message)


@dataclass(frozen=True)
class Fate:
    """What becomes of one message: the poll at which its reply is there, and what that says."""

    poll: int
    kind: str


FATES = st.builds(Fate, st.sampled_from([0, 1, 2, 5, NEVER]), st.sampled_from(["valid", "empty", "error", "offline"]))


class FatefulGrid(InProcessGrid):
    """A grid whose replies come when and as they are told."""

    def __init__(self, nodes: int) -> None:
        super().__init__("tests.test_exchange:app", {}, [{}] * nodes)
        self.polls, self.fates = 0, {}

    def send_as(self, fates: list[Fate]) -> list[Message]:
        requests = [Message(RecordDict(), dst_node_id=node, message_type="evaluate") for node in self.contexts]
        self.coming = iter(fates)
        return requests

    def push_messages(self, messages):
        ids = list(super().push_messages(messages))
        for message_id in ids:
            fate = next(self.coming)
            self.fates[message_id] = self.polls + fate.poll
            reply = self.pending[message_id]
            if fate.kind == "empty":
                reply.content.clear()
            elif fate.kind != "valid":
                code = ErrorCode.NODE_UNAVAILABLE if fate.kind == "offline" else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
                self.pending[message_id] = errors(reply, Error(code, "it failed"))
        return ids

    def pull_messages(self, message_ids):
        self.polls += 1
        return super().pull_messages([name for name in message_ids if self.fates[name] < self.polls])


def errors(reply: Message, error: Error) -> Message:
    return Message(metadata=reply.metadata, error=error)


def parse(reply: Message) -> Answer:
    return Answer(reply.metadata.src_node_id, ClientReport.from_records(reply.content, "report"))


def ask(grid, fates, quorum, overdue=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POLL_SECONDS", 0)
        return exchange(grid, grid.send_as(fates), parse, str, 0, quorum, overdue, lambda *_: None, lambda *_: None)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4).flatmap(lambda n: st.tuples(*[st.lists(FATES, min_size=n, max_size=n)] * 2)), st.data())
def test_each_message_is_accounted_for_once(fates, data):
    """Exchanges close at once when the quorum is met; with all never answering, they would wait for ever."""
    nodes = len(fates[0])
    # One valid answer at least, and as many in time as the quorum asks for.
    fates = [[Fate(0, "valid"), *part[1:]] for part in fates]
    ended = min(sum(fate.poll < NEVER for fate in part) for part in fates)
    quorum = data.draw(st.integers(0, ended)) / nodes
    grid = FatefulGrid(nodes)

    first = ask(grid, fates[0], quorum)
    second = ask(grid, fates[1], quorum, first.overdue)

    for replies, part in ((first, fates[0]), (second, fates[1])):
        answered = [str(answer.node_id) for answer in replies.answers]
        names = [*answered, *replies.rejected, *replies.missing]
        assert sorted(names) == [str(node) for node in range(1, nodes + 1)]
        assert answered == sorted(answered)
        assert nodes - len(replies.overdue) >= quorum * nodes
        for node, fate in enumerate(part, start=1):
            assert (str(node) in answered) <= (fate.kind == "valid")
            assert (str(node) in replies.rejected) <= (fate.kind in ("empty", "error"))
            assert (str(node) in replies.gone) <= (fate.kind == "offline")
            assert (str(node) in replies.missing) == (str(node) in replies.gone or node in replies.overdue.values())
    assert not first.late
    late = {reply.metadata.reply_to_message_id for reply in second.late}
    assert late <= first.overdue.keys()
    assert late.isdisjoint(second.overdue)
