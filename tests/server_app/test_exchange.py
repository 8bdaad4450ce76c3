"""One exchange after another: who answered, who was late, rejected or gone, whatever the order of arrival."""

from collections import Counter
from dataclasses import dataclass

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmmkt.common.payloads import ClientReport, PayloadError, record_bytes
from fedmmkt.deploy.in_process import InProcessGrid
from fedmmkt.server_app import exchange as module
from fedmmkt.server_app.exchange import Answer, exchange, pause
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
        self.polls, self.fates = Counter(), {}

    def send_as(self, fates: list[Fate]) -> list[Message]:
        requests = [Message(RecordDict(), dst_node_id=node, message_type="evaluate") for node in self.contexts]
        self.coming = iter(fates)
        return requests

    def push_messages(self, messages):
        ids = list(super().push_messages(messages))
        for message_id in ids:
            fate = next(self.coming)
            self.fates[message_id] = fate.poll
            reply = self.pending[message_id]
            if fate.kind == "empty":
                reply.content.clear()
            elif fate.kind != "valid":
                code = ErrorCode.NODE_UNAVAILABLE if fate.kind == "offline" else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
                self.pending[message_id] = errors(reply, Error(code, "it failed"))
        return ids

    def pull_messages(self, message_ids):
        self.polls.update(message_ids := list(message_ids))
        return super().pull_messages([name for name in message_ids if self.fates[name] < self.polls[name]])


def errors(reply: Message, error: Error) -> Message:
    return Message(metadata=reply.metadata, error=error)


def read(reply: Message) -> Answer:
    return Answer(ClientReport.from_records(reply.content, "report"))


def exchanged(grid, messages, read=read, admit=None, quorum=1.0, deadline=60, overdue=None, least_valid=1):
    admit = admit or (lambda node_id, report: None)
    return exchange(grid, messages, read, admit, deadline, quorum, overdue or {}, 1_000_000, least_valid)


def ask(grid, fates, quorum, ledger, round_):
    """Exchange once; return the replies, and the round in which the message of each was sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POLL_SECONDS", 0)
        replies = list(exchanged(grid, grid.send_as(fates), deadline=0, quorum=quorum, overdue=ledger.overdue))
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
    replies = exchanged(grid, grid.send_as([Fate(0, "valid"), Fate(5, "valid")]))

    assert next(replies).node_id == 1
    assert grid.polls.total() == 1
    assert [reply.node_id for reply in replies] == [2]


def test_an_exchange_that_needs_no_reply_closes_at_the_deadline_without_any():
    grid = FatefulGrid(1)

    replies = exchanged(grid, grid.send_as([Fate(NEVER, "valid")]), deadline=0, quorum=0, least_valid=0)

    assert [reply.kind for reply in replies] == ["unanswered"]


def test_a_node_that_is_not_admitted_is_refused_and_others_are_heard():
    grid = FatefulGrid(2)

    def admit(node_id, report):
        if report.client == "client-1":
            raise PayloadError("not under this name")

    replies = exchanged(grid, grid.send_as([Fate(0, "valid"), Fate(0, "valid")]), admit=admit)

    told = [(reply.node_id, reply.kind, reply.reason) for reply in replies]
    assert told == [(1, "rejected", "not under this name"), (2, "answered", "")]


def test_a_reply_that_cannot_be_pulled_costs_its_sender_alone():
    """Nor is it asked for again: Flower forgets a reply once it was asked for."""
    grid = FatefulGrid(3)
    pull = grid.pull_messages

    def pull_some(message_ids):
        replies = pull(message_ids)
        if any(reply.metadata.src_node_id == 2 for reply in replies):
            raise PayloadError("the reply cannot be put together: IndexError()")
        return replies

    grid.pull_messages = pull_some

    replies = list(exchanged(grid, grid.send_as([Fate(0, "valid")] * 3)))

    assert [(reply.node_id, reply.kind) for reply in replies] == [(1, "answered"), (2, "rejected"), (3, "answered")]
    assert replies[1].reason == "the reply cannot be put together: IndexError()"
    assert replies[1].bytes == 0


def test_the_text_of_an_error_is_one_line_of_bounded_length():
    grid = FatefulGrid(1)
    text = "first\nround 9/9 | \x1b[2Jforged\u202e" + "x" * 5_000_000
    push = grid.push_messages

    def push_failing(messages):
        ids = push(messages)
        grid.pending[ids[0]] = errors(grid.pending[ids[0]], Error(2, text))
        grid.fates[ids[0]] = 0
        return ids

    grid.push_messages = push_failing
    replies = exchanged(grid, grid.send_as([Fate(0, "valid")]), deadline=0, quorum=0)

    reason = next(replies).reason

    assert reason.startswith("first round 9/9 | [2Jforged xxx")
    assert reason.endswith(f"({len(text)} characters)")
    assert len(reason) < 600
    assert reason.isprintable()


def test_lack_of_memory_is_a_reason_of_one_line():
    grid = FatefulGrid(1)
    text = "<class 'ray.exceptions.OutOfMemoryError'>:<'1 worker(s) were killed due to the node running low on memory."
    push = grid.push_messages

    def push_failing(messages):
        ids = push(messages)
        grid.pending[ids[0]] = errors(grid.pending[ids[0]], Error(0, text + " Object store: 0" * 200))
        grid.fates[ids[0]] = 0
        return ids

    grid.push_messages = push_failing

    reply = next(exchanged(grid, grid.send_as([Fate(0, "valid")]), deadline=0, quorum=0))

    assert reply.kind == "rejected"
    assert reply.reason.startswith("a client's process was killed for lack of memory; close other programs")


@pytest.mark.parametrize("not_taken", ["", None])
def test_a_message_that_flower_does_not_take_is_told_at_once(not_taken):
    grid = FatefulGrid(2)
    push = grid.push_messages
    # Of what it does not take Flower gives no id, or, at the end of the list, nothing.
    grid.push_messages = lambda messages: [push(messages)[0], *([] if not_taken is None else [not_taken])]

    replies = list(exchanged(grid, grid.send_as([Fate(0, "valid"), Fate(0, "valid")])))

    assert [(reply.node_id, reply.kind, reply.message_id) for reply in replies[:1]] == [(2, "rejected", "")]
    assert replies[0].reason == "Flower did not take the message to the node"
    assert [(reply.node_id, reply.kind) for reply in replies[1:]] == [(1, "answered")]


def test_bytes_are_those_of_what_came():
    grid = FatefulGrid(2)

    valid, wrong = exchanged(grid, grid.send_as([Fate(0, "valid"), Fate(0, "error")]))

    assert valid.bytes == record_bytes(valid.message.content) > 0
    assert wrong.bytes == 0
    assert wrong.reason == "it failed"


# ---------------------------------------------------------------------- nodes that still owe an answer


def read_any(message_id, reply):
    return read(reply)


def overdue_of(grid, fate):
    """Send node 2 a message that stays unanswered; return it as overdue, to be answered by this fate later."""
    (message_id,) = grid.push_messages(grid.send_as([fate])[1:])
    return {message_id: 2}


def exchange_with(grid, overdue, fates, deadline=0.0, quorum=0.5):
    messages = grid.send_as(fates)
    admit = lambda node_id, report: None  # noqa: E731
    return exchange(grid, messages, read, admit, deadline, quorum, overdue, 1_000_000, read_late=read_any)


def test_a_busy_node_is_asked_when_it_has_answered(monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0)
    grid = FatefulGrid(2)
    overdue = overdue_of(grid, Fate(2, "valid"))

    replies = list(exchange_with(grid, overdue, [Fate(3, "valid"), Fate(1, "valid")], deadline=60))

    told = [(reply.kind, reply.node_id) for reply in replies]
    assert told == [("late", 2), ("answered", 1), ("answered", 2)]
    assert replies[0].answer.report.client == "client-2"


def test_a_busy_node_is_not_asked_if_the_others_are_done_before(monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0)
    grid = FatefulGrid(2)
    overdue = overdue_of(grid, Fate(NEVER, "valid"))

    replies = list(exchange_with(grid, overdue, [Fate(0, "valid"), Fate(0, "valid")], deadline=60))

    assert [(reply.kind, reply.node_id, reply.message_id) for reply in replies] == [
        ("answered", 1, "message-2"),
        ("busy", 2, ""),
    ]
    assert len(grid.fates) == 2  # Its first message, and that of the other.


def test_a_node_whose_message_ran_out_is_free_again(monkeypatch):
    """Flower answers for it with an error; so it does for a node that is gone."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0)
    grid = FatefulGrid(2)
    overdue = overdue_of(grid, Fate(0, "error"))

    replies = list(exchange_with(grid, overdue, [Fate(1, "valid"), Fate(0, "valid")], deadline=60))

    assert [(reply.kind, reply.node_id, reply.answer is None) for reply in replies] == [
        ("late", 2, True),
        ("answered", 1, False),
        ("answered", 2, False),
    ]


@pytest.mark.parametrize(
    ("waited", "swept", "expected"),
    [
        (0.0, 0.0, 0.1),
        (10.0, 0.0, 0.5),  # A twentieth of the time waited,
        (600.0, 0.0, 3.0),  # and at most as rare as Flower polls,
        (600.0, 4.0, 12.0),  # unless the poll itself takes long.
    ],
)
def test_polling_backs_off(waited, swept, expected):
    assert pause(waited, swept) == pytest.approx(expected)


def test_messages_whose_way_to_the_superlink_broke_are_sent_again_as_new_ones(caplog):
    grid = FatefulGrid(2)
    messages, pushed, push = grid.send_as([Fate(0, "valid")] * 2), [], grid.push_messages

    def breaking(sent):
        pushed.append(list(sent))
        if len(pushed) == 1:
            raise ObjectPushError("object", 1, "session")
        return push(pushed[-1])

    grid.push_messages = breaking

    replies = list(exchange(grid, messages, read, lambda node, told: None, 10, 1.0, {}, 1_000_000))

    assert sorted(reply.node_id for reply in replies if reply.kind == "answered") == [1, 2]
    assert [len(sent) for sent in pushed] == [2, 2]
    assert not set(map(id, pushed[0])) & set(map(id, pushed[1]))
    assert "broke while messages were sent" in caplog.text


def test_messages_that_break_twice_end_the_run():
    grid = FatefulGrid(1)
    messages = grid.send_as([])

    def breaking(sent):
        raise ObjectPushError("object", 1, "session")

    grid.push_messages = breaking

    with pytest.raises(ObjectPushError):
        list(exchange(grid, messages, read, lambda node, told: None, 10, 1.0, {}, 1_000_000))
