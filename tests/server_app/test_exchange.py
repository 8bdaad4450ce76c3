"""One exchange after another: who answered, who was late, rejected or gone, whatever the order of arrival."""

from dataclasses import dataclass

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmmkt.common.payloads import ClientReport, record_bytes
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app import exchange as module
from fedmmkt.server_app.exchange import Answer, exchange
from fedmmkt.server_app.ledger import Ledger

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
        super().__init__("tests.server_app.test_exchange:app", {}, [{}] * nodes)
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


def read(reply: Message) -> Answer:
    return Answer(ClientReport.from_records(reply.content, "report"))


def ask(grid, fates, quorum, ledger, round_):
    """Exchange once; return the replies, and the round in which the message of each was sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POLL_SECONDS", 0)
        replies = list(exchange(grid, grid.send_as(fates), read, 0, quorum, ledger.overdue))
    return replies, [ledger.record_reply(reply, round_) for reply in replies]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4).flatmap(lambda n: st.tuples(*[st.lists(FATES, min_size=n, max_size=n)] * 2)), st.data())
def test_each_message_is_accounted_for_once(fates, data):
    """Exchanges close at once when the quorum is met; with all never answering, they would wait for ever."""
    nodes = len(fates[0])
    # One valid answer at least, and as many in time as the quorum asks for.
    fates = [[Fate(0, "valid"), *part[1:]] for part in fates]
    ended = min(sum(fate.poll < NEVER for fate in part) for part in fates)
    quorum = data.draw(st.integers(0, ended)) / nodes
    grid, ledger = FatefulGrid(nodes), Ledger("run", 1, 1)

    first, _ = ask(grid, fates[0], quorum, ledger, 1)
    overdue = ledger.overdue
    second, sent_in = ask(grid, fates[1], quorum, ledger, 2)

    for replies, part in ((first, fates[0]), (second, fates[1])):
        kinds = {reply.node_id: reply.kind for reply in replies if reply.kind != "late"}
        assert sorted(reply.node_id for reply in replies if reply.kind != "late") == list(range(1, nodes + 1))
        assert sum(kind != "unanswered" for kind in kinds.values()) >= quorum * nodes
        for node, fate in enumerate(part, start=1):
            assert (kinds[node] == "answered") <= (fate.kind == "valid")
            assert (kinds[node] == "rejected") <= (fate.kind in ("empty", "error"))
            assert (kinds[node] == "offline") <= (fate.kind == "offline")
        for reply in replies:
            assert (reply.answer is not None) == (reply.kind == "answered")
            assert bool(reply.reason) == (reply.kind in ("rejected", "offline", "unanswered"))
            assert reply.answer is None or reply.answer.report.client == f"client-{reply.node_id}"
    assert overdue == {reply.message_id: reply.node_id for reply in first if reply.kind == "unanswered"}
    assert not any(reply.kind == "late" for reply in first)
    late = {reply.message_id: reply.node_id for reply in second if reply.kind == "late"}
    assert late.items() <= overdue.items()
    assert late.keys().isdisjoint(ledger.overdue)
    assert sent_in == [1 if reply.kind == "late" else 2 for reply in second]


def test_replies_are_given_as_they_come():
    """Not once all are there: what a strategy shows of a slow round would come at its end."""
    grid = FatefulGrid(2)
    replies = exchange(grid, grid.send_as([Fate(0, "valid"), Fate(5, "valid")]), read, 60, 1.0, {})

    assert next(replies).node_id == 1
    assert grid.polls == 1
    assert [reply.node_id for reply in replies] == [2]


def test_a_name_belongs_to_the_node_that_was_first_to_answer_with_it():
    grid = FatefulGrid(2)

    def read_alike(reply: Message) -> Answer:
        answer = read(reply)
        return Answer(answer.report.model_copy(update={"client": "twin"}))

    replies = exchange(grid, grid.send_as([Fate(1, "valid"), Fate(0, "valid")]), read_alike, 60, 1.0, {})

    told = [(reply.node_id, reply.kind, reply.reason) for reply in replies]
    assert told == [(2, "answered", ""), (1, "rejected", "client name 'twin' is taken by another node")]


@pytest.mark.parametrize("not_taken", ["", None])
def test_a_message_that_flower_does_not_take_is_told_at_once(not_taken):
    grid = FatefulGrid(2)
    push = grid.push_messages
    # Of what it does not take Flower gives no id, or, at the end of the list, nothing.
    grid.push_messages = lambda messages: [push(messages)[0], *([] if not_taken is None else [not_taken])]

    replies = list(exchange(grid, grid.send_as([Fate(0, "valid"), Fate(0, "valid")]), read, 60, 1.0, {}))

    assert [(reply.node_id, reply.kind, reply.message_id) for reply in replies[:1]] == [(2, "rejected", "")]
    assert replies[0].reason == "Flower did not take the message to the node"
    assert [(reply.node_id, reply.kind) for reply in replies[1:]] == [(1, "answered")]


def test_bytes_are_those_of_what_came():
    grid = FatefulGrid(2)

    valid, wrong = exchange(grid, grid.send_as([Fate(0, "valid"), Fate(0, "error")]), read, 60, 1.0, {})

    assert valid.bytes == record_bytes(valid.message.content) > 0
    assert wrong.bytes == 0
    assert wrong.reason == f"error {ErrorCode.CLIENT_APP_RAISED_EXCEPTION}: it failed"
