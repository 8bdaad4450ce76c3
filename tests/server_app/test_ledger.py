"""The ledger by itself: what each client lacks, what is kept, and which message is still to be answered."""

import numpy as np
import pytest
import torch

from fedmmkt.common.payloads import ClientReport, PayloadError, SoftTargets, SyntheticBatch
from fedmmkt.server_app.exchange import Answer, Reply
from fedmmkt.server_app.ledger import Ledger, TargetsByClient
from fedmmkt.server_app.rules.reliability import Standing
from fedmmkt.server_app.t2i.samples import Samples

SOFT, OTHER = (np.array([row], np.float16) for row in ([0.75, 0.25], [0.25, 0.75]))


def report(client="ann", modality="image", kept=(), awaiting=()):
    return ClientReport(
        client=client, model="mlp", modality=modality, examples=1, accuracy=0, loss=0, kept=kept, awaiting=awaiting
    )


def batch(round_):
    return SyntheticBatch(batch_id=f"run-{round_}", round=round_, prompts=("a cat",), prompted_N=np.array([0]))


def samples(round_):
    return Samples(("a cat",), torch.tensor([0]), np.full((1, 2, 2, 3), round_, np.uint8), torch.full((1, 4), round_))


def targets(round_, probabilities_NC=SOFT):
    return SoftTargets(batch_id=f"run-{round_}", probabilities_NC=probabilities_NC, weights_N=np.ones(1, np.float32))


def for_all(round_):
    """Make soft targets that are the same for everybody."""
    return TargetsByClient((targets(round_),), {}, {"image": 0, "text": 0, "image+text": 0})


def answered(node_id, told):
    return Reply("answered", node_id, f"message-{node_id}", answer=Answer(told))


@pytest.fixture
def ledger():
    return Ledger("run", batches_kept=2, samples_kept=3)


def teach(ledger, round_, taught=None):
    ledger.serve(batch(round_), samples(round_))
    ledger.teach(round_, taught or for_all(round_), samples(round_).scored(torch.ones(1)))


def lacking(ledger, node_id):
    """Return what a node is due: the ids of batches, and of soft targets."""
    return tuple(tuple(one.batch_id for one in part) for part in ledger.missing_for(node_id))


# ---------------------------------------------------------------------- what is served and kept


def test_a_batch_is_open_from_when_it_is_served_until_it_is_taught(ledger):
    assert ledger.open_batch() is None

    ledger.serve(batch(1), samples(1))

    assert ledger.open_batch().batch_id == "run-1"
    assert ledger.served(1)[1].images_NHWC[0, 0, 0, 0] == 1
    assert lacking(ledger, 5) == ((), ())
    ledger.teach(1, for_all(1), samples(1).scored(torch.ones(1)))
    assert ledger.open_batch() is None
    with pytest.raises(KeyError):
        ledger.served(1)


def test_a_batch_that_was_never_taught_is_forgotten_with_the_next(ledger):
    ledger.serve(batch(1), samples(1))

    ledger.serve(batch(2), samples(2))

    assert ledger.open_batch().batch_id == "run-2"
    with pytest.raises(KeyError):
        ledger.served(1)


def test_the_last_rounds_alone_are_kept(ledger):
    for round_ in (1, 2, 3, 4):
        teach(ledger, round_)

    assert [one.batch_id for one, _ in ledger.history] == ["run-3", "run-4"]
    assert [int(part.latents_NCHW[0, 0]) for part in ledger.pool] == [2, 3, 4]


# ---------------------------------------------------------------------- what a client lacks


def test_an_unknown_node_is_due_all_that_is_kept(ledger):
    for round_ in (1, 2, 3):
        teach(ledger, round_)

    assert lacking(ledger, 5) == (("run-2", "run-3"), ("run-2", "run-3"))


@pytest.mark.parametrize(
    ("kept", "awaiting", "expected"),
    [
        ((), (), (("run-1", "run-2"), ("run-1", "run-2"))),  # It has lost its disk.
        (("run-1", "run-2"), (), ((), ())),
        (("run-1", "run-2"), ("run-2",), ((), ("run-2",))),  # As after each round.
        (("run-1",), (), (("run-2",), ("run-2",))),  # It has missed a round.
        (("run-1",), ("run-1",), (("run-2",), ("run-1", "run-2"))),
        (("run-0", "other-7"), ("run-0",), (("run-1", "run-2"), ("run-1", "run-2"))),
    ],
)
def test_a_known_node_is_due_what_its_report_lacks(ledger, kept, awaiting, expected):
    teach(ledger, 1)
    teach(ledger, 2)
    ledger.record_reply(answered(5, report(kept=kept, awaiting=awaiting)), 2)

    assert lacking(ledger, 5) == expected


def test_a_client_without_soft_targets_of_a_batch_is_due_the_batch_alone(ledger):
    teach(ledger, 1, TargetsByClient((targets(1),), {"ann": None, "bob": 0}, {"image": 0}))
    ledger.record_reply(answered(5, report("ann")), 1)
    ledger.record_reply(answered(6, report("bob")), 1)

    assert lacking(ledger, 5) == (("run-1",), ())
    assert lacking(ledger, 6) == (("run-1",), ("run-1",))


# ---------------------------------------------------------------------- late answers


def unanswered(node_id):
    return Reply("unanswered", node_id, f"message-{node_id}")


def late(node_id, told):
    return Reply("late", node_id, f"message-{node_id}", answer=Answer(told))


def test_answers_are_kept_only_while_a_node_owes_one_and_the_batch_is_taught(ledger):
    answers = [Answer(report("ann"))]
    teach(ledger, 1)
    ledger.keep_answers(1, answers)
    assert ledger.taught(1) is None  # Nobody owes one.
    ledger.record_reply(unanswered(6), 2)
    teach(ledger, 2)
    ledger.keep_answers(2, answers)
    assert (ledger.taught(1), ledger.taught(2).batch_id) == (None, "run-2")
    assert ledger.answers(2) is answers

    for round_ in (3, 4):  # Two batches are kept.
        teach(ledger, round_)
        ledger.keep_answers(round_, answers)

    assert ledger.taught(2) is None


def test_answers_are_forgotten_once_the_last_has_come(ledger):
    ledger.record_reply(unanswered(6), 1)
    teach(ledger, 1)
    ledger.keep_answers(1, [Answer(report("ann"))])

    assert ledger.record_reply(late(6, report("bob")), 2) == 1
    ledger.keep_answers(1, [Answer(report("ann")), Answer(report("bob"))])

    assert ledger.taught(1) is None
    assert ledger.reports[6].client == "bob"


def test_what_was_taught_again_goes_once_to_all_that_had_it_before(ledger):
    """Ann answers in time; bob's answer to round 1 comes in round 2."""
    ledger.record_reply(unanswered(6), 1)
    teach(ledger, 1)
    ledger.record_reply(answered(5, report("ann", kept=("run-1", "run-2"), awaiting=("run-2",))), 2)
    ledger.record_reply(late(6, report("bob", kept=("run-1",), awaiting=("run-1",))), 2)
    again = TargetsByClient((targets(1, OTHER),), {}, {"image": 0, "text": 0, "image+text": 0})

    ledger.teach_again(2, 1, again, torch.full((1,), 3.0))
    teach(ledger, 2)

    assert lacking(ledger, 5) == ((), ("run-1", "run-2"))
    assert ledger.missing_for(5)[1][0] is again.distinct[0]
    assert lacking(ledger, 6) == (("run-2",), ("run-1", "run-2"))
    assert [float(samples_.scores_N[0]) for samples_ in ledger.pool] == [3.0, 1.0]
    ledger.record_reply(answered(5, report("ann", kept=("run-1", "run-2"))), 3)
    assert lacking(ledger, 5) == ((), ())


def test_a_node_that_was_drawn_before_it_told_its_name_had_its_turn(ledger):
    ledger.drawn = frozenset(["node 5", "bob"])

    ledger.record_reply(answered(5, report("ann")), 1)

    assert ledger.drawn == {"ann", "bob"}


# ---------------------------------------------------------------------- soft targets by client


@pytest.fixture
def differing():
    """Make soft targets of which ann gets the first, text clients the second, and bob none."""
    return TargetsByClient(
        (targets(1, SOFT), targets(1, OTHER)), {"ann": 0, "bob": None}, {"image": 0, "text": 1, "image+text": None}
    )


@pytest.mark.parametrize(
    ("told", "index"),
    [
        (report("ann", "image"), 0),
        (report("ann", "text"), 0),  # By name first.
        (report("bob", "text"), None),
        (report("new", "text"), 1),  # One that was not known, by what it reads.
        (report("new", "image+text"), None),
        (None, None),  # Of one that has said nothing yet, it is not known which are its.
    ],
)
def test_a_client_gets_the_soft_targets_of_its_name_or_else_of_its_modality(differing, told, index):
    assert differing.for_client(told) is (None if index is None else differing.distinct[index])


def test_a_node_that_has_said_nothing_gets_what_all_modalities_get():
    same = for_all(1)
    none = TargetsByClient((), {}, {"image": None, "text": None, "image+text": None})

    assert same.for_client(None) is same.distinct[0]
    assert none.for_client(None) is None


# ---------------------------------------------------------------------- clients


def test_a_node_is_named_by_its_client_once_it_has_answered(ledger):
    before = ledger.name(5)

    ledger.record_reply(answered(5, report("ann")), 1)

    assert (before, ledger.name(5), ledger.name(6)) == ("node 5", "ann", "node 6")


def test_the_newest_report_of_each_client_is_known_by_name(ledger):
    ledger.record_reply(answered(5, report("bob", kept=("run-1",))), 1)
    ledger.record_reply(answered(6, report("ann")), 1)
    ledger.record_reply(answered(5, report("bob", kept=("run-2",))), 2)

    assert [(one.client, one.kept) for one in ledger.known_clients()] == [("ann", ()), ("bob", ("run-2",))]


def test_all_nodes_are_sent_images_but_those_that_said_they_read_texts_alone(ledger):
    for node_id, modality in ((1, "image"), (2, "text"), (3, "image+text")):
        ledger.record_reply(answered(node_id, report(f"client-{node_id}", modality)), 0)

    assert [ledger.sees_images(node_id) for node_id in (1, 2, 3, 4)] == [True, False, True, True]


def test_clients_that_took_part_are_remembered(ledger):
    ledger.add_participants(["ann", "bob"])
    ledger.add_participants(["bob", "cy"])

    assert ledger.clients == {"ann", "bob", "cy"}


# ---------------------------------------------------------------------- requests


def test_a_message_without_an_answer_is_overdue_until_it_is_late(ledger):
    sent_in = [ledger.record_reply(Reply("unanswered", node_id, f"message-{node_id}"), node_id) for node_id in (1, 2)]

    assert sent_in == [1, 2]
    assert ledger.overdue == {"message-1": 1, "message-2": 2}
    assert ledger.record_reply(Reply("late", 1, "message-1"), 7) == 1
    assert ledger.overdue == {"message-2": 2}


@pytest.mark.parametrize("kind", ["answered", "rejected", "offline"])
def test_other_messages_are_not_overdue(ledger, kind):
    assert (
        ledger.record_reply(Reply(kind, 1, "message-1", answer=Answer(report()) if kind == "answered" else None), 4)
        == 4
    )
    assert ledger.overdue == {}
    assert (1 in ledger.reports) == (kind == "answered")


# ---------------------------------------------------------------------- going on with a run


def test_a_run_that_goes_on_keeps_its_own_key_and_asks_who_is_there(ledger):
    teach(ledger, 1)
    later = Ledger("later", batches_kept=2, samples_kept=3)

    later.restore((("run", 1),), ["ann"], ledger.history, ledger.pool, ledger.identities, {"ann": Standing(0.5)})

    assert (later.run_key, later.ancestors, later.clients) == ("later", (("run", 1),), {"ann"})
    assert later.standings == {"ann": Standing(0.5)}
    assert lacking(later, 5) == (("run-1",), ("run-1",))
    assert len(later.pool) == 1
    assert later.reports == {}
    assert later.open_batch() is None


def test_a_client_that_comes_back_under_another_node_id_is_one_client(ledger):
    ledger.record_reply(answered(1, report("ann", kept=("run-1",))), 1)
    ledger.record_reply(answered(7, report("ann")), 2)

    assert [(known.client, known.kept) for known in ledger.known_clients()] == [("ann", ())]


# ---------------------------------------------------------------------- whose name it is


def test_a_name_stays_with_the_node_that_was_first_to_answer_with_it(ledger):
    ledger.admit(1, report("ann"), {1, 2})

    with pytest.raises(PayloadError, match="client name 'ann' belongs to another node"):
        ledger.admit(2, report("ann"), {1, 2})

    ledger.admit(1, report("ann"), {1, 2})


def test_a_node_keeps_the_name_model_and_modality_with_which_it_began(ledger):
    ledger.admit(1, report("ann"), {1})

    with pytest.raises(PayloadError, match="says that it is ben, mlp, image, and was ann, mlp, image before"):
        ledger.admit(1, report("ben"), {1})
    with pytest.raises(PayloadError, match="says that it is ann, mlp, text, and was ann, mlp, image before"):
        ledger.admit(1, report("ann", "text"), {1})


def test_a_node_with_a_new_id_has_its_old_name_once_the_old_node_is_gone_and_gives_it_back(ledger):
    """Node 2 is the same clinic with a new key; or a thief, who loses the name when its owner is back."""
    ledger.admit(1, report("ann"), {1})

    with pytest.raises(PayloadError, match="belongs to another node"):
        ledger.admit(2, report("ann"), {1, 2})  # The SuperLink still believes that node 1 is there.
    ledger.admit(2, report("ann", "text"), {2})
    ledger.admit(1, report("ann"), {1, 2})

    with pytest.raises(PayloadError, match="belongs to another node"):
        ledger.admit(2, report("ann", "text"), {1, 2})


def test_names_stay_bound_when_a_run_is_resumed(ledger):
    ledger.admit(1, report("ann"), {1})
    later = Ledger("later", 1, 1)

    later.restore((("run", 1),), ["ann"], [], [], ledger.identities)

    with pytest.raises(PayloadError, match="belongs to another node"):
        later.admit(2, report("ann"), {1, 2})
    later.admit(9, report("ann"), {8, 9})  # With another database of Flower, ids are others.


def test_the_newest_report_of_a_name_is_that_of_who_answered_last(ledger):
    for node_id, examples in ((1, 1), (2, 2), (1, 3)):
        told = report("ann").model_copy(update={"examples": examples})
        ledger.record_reply(answered(node_id, told), 1)

    assert [told.examples for told in ledger.known_clients()] == [3]
