import json
import multiprocessing
import shutil
import signal

import numpy as np
import pytest

from fedmmkt.client_app.privacy.ledger import LedgerError, PrivacyLedger, SpentError, copy_ledger, create_ledger
from fedmmkt.common.privacy import Budget, epsilon_of, most_precision, plan_of
from tests.client_app.privacy.killing import kill_at_write

BUDGET = Budget(epsilon=8.0, delta=1e-5)
VALUES = np.array([5, 0, 3])


@pytest.fixture
def ledger(tmp_path):
    create_ledger(tmp_path / "ledger" / "node.jsonl", BUDGET)
    return PrivacyLedger(tmp_path / "ledger" / "node.jsonl", tmp_path / "state" / "privacy")


def answered(ledger, rounds, plan):
    return [ledger.answer(f"votes-{number}", VALUES, 1.0, plan.votes) for number in range(rounds)]


def test_a_run_spends_its_budget_and_no_more(ledger):
    _, plan = ledger.plan("run", (), rounds=3)
    ledger.answer("counts", VALUES, 1.0, plan.counts)
    answers = answered(ledger, 3, plan)

    with pytest.raises(SpentError, match=r"privacy budget of epsilon 8 is spent"):
        ledger.answer("votes-4", VALUES, 1.0, plan.votes)

    assert plan == plan_of(most_precision(8, 1e-5), 3)
    assert [answer.noise for answer in answers] == [plan.votes] * 3
    assert ledger.statement().noises == (plan.counts, *[plan.votes] * 3)
    assert ledger.statement().epsilon == pytest.approx(8)


def test_the_same_question_gets_the_same_answer_at_no_charge(ledger):
    _, plan = ledger.plan("run", (), rounds=100)

    first, *others = [ledger.answer("votes", VALUES, 1.0, plan.votes) for _ in range(5)]

    assert all(np.array_equal(first.values_N, other.values_N) for other in others)
    assert len(ledger.statement().noises) == 1


def test_noise_is_that_of_the_plan_times_the_sensitivity(ledger):
    zeros_N = np.zeros(4000, np.int64)

    values_N = ledger.answer("votes", zeros_N, sensitivity=3**0.5, noise=2.0).values_N

    # The standard deviation of 4000 values is within five of its standard errors.
    assert abs(values_N.std() / (2 * 3**0.5) - 1) < 5 / (2 * 4000) ** 0.5
    assert values_N.dtype == np.int64


def test_runs_divide_the_budget(tmp_path):
    create_ledger(tmp_path / "ledger", Budget(8.0, 1e-5, runs=2))
    ledger, whole = PrivacyLedger(tmp_path / "ledger", tmp_path / "heads"), most_precision(8, 1e-5)

    _, first = ledger.plan("first", (), rounds=1)
    ledger.answer("counts of first", VALUES, 1.0, first.counts)  # Its votes are not asked for.
    _, second = ledger.plan("second", (), rounds=2)
    for question, noise in (("counts", second.counts), ("votes-0", second.votes), ("votes-1", second.votes)):
        ledger.answer(question, VALUES, 1.0, noise)
    _, third = ledger.plan("third", (), rounds=1)

    assert first == plan_of(whole / 2, 1)
    assert second == plan_of(whole / 2, 2)
    assert third.precision == pytest.approx(whole / 2 - first.counts**-2)
    for question, noise in (("counts of third", third.counts), ("votes of third", third.votes)):
        ledger.answer(question, VALUES, 1.0, noise)
    with pytest.raises(SpentError):
        ledger.plan("fourth", (), rounds=1)
    with pytest.raises(SpentError):
        ledger.answer("votes of first", VALUES, 1.0, first.votes)


def content(ledger):
    return ledger.path.read_bytes(), {path.name: path.read_bytes() for path in ledger.heads.iterdir()}


def test_what_is_refused_is_not_written(ledger):
    origin, plan = ledger.plan("run", (), rounds=1)
    ledger.answer("counts", VALUES, 1.0, plan.counts, origin)
    ledger.answer("votes-0", VALUES, 1.0, plan.votes, origin)
    before = content(ledger)

    for number in range(3):
        with pytest.raises(SpentError, match="the node refused: its privacy budget of epsilon 8 is spent"):
            ledger.plan(f"other-{number}", ("unknown",), rounds=1)
        with pytest.raises(SpentError, match="is spent"):
            ledger.answer(f"votes-{number + 1}", VALUES, 1.0, plan.votes, origin)

    assert content(ledger) == before


def test_runs_without_end_fill_no_disk(ledger):
    """A run that continues another one is free, and gets a line; so their number is bounded."""
    _, plan = ledger.plan("run", (), rounds=1)
    for number in range(99):
        assert ledger.plan(f"again-{number}", ("run",), rounds=1) == ("run", plan)
    before = content(ledger)

    with pytest.raises(SpentError, match="the node refused: its privacy ledger has 100 runs already"):
        ledger.plan("one more", ("run",), rounds=1)

    assert content(ledger) == before
    assert ledger.plan("again-98", (), rounds=1) == ("run", plan)  # Those that have a line go on.


def test_a_run_after_another_that_spends_nothing_but_its_counts_is_refused_at_last(ledger):
    for run in range(44):
        origin, plan = ledger.plan(f"run-{run}", (), rounds=1)
        ledger.answer(f"counts-{run}", VALUES, 1.0, plan.counts, origin)

    # Each spends a tenth of what is left, until it is a hundredth: .9 ** 43 is .0108, and .9 ** 44 is .0097.
    with pytest.raises(SpentError):
        ledger.plan("run-44", (), rounds=1)


def test_a_full_ledger_refuses_and_writes_nothing(ledger, monkeypatch):
    origin, plan = ledger.plan("run", (), rounds=1)
    before = content(ledger)
    monkeypatch.setattr("fedmmkt.client_app.privacy.ledger.MOST_BYTES", len(before[0]) + 100)

    with pytest.raises(SpentError, match="the node refused: its privacy ledger is full"):
        ledger.answer("counts", VALUES, 1.0, plan.counts, origin)

    assert content(ledger) == before


def test_a_run_cannot_spend_what_other_runs_are_to_have(tmp_path):
    """It is asked more batches than it was planned for, as when a server resumes it with more rounds."""
    create_ledger(tmp_path / "ledger", Budget(8.0, 1e-5, runs=2))
    ledger, whole = PrivacyLedger(tmp_path / "ledger", tmp_path / "heads"), most_precision(8, 1e-5)
    origin, plan = ledger.plan("first", (), rounds=1)
    ledger.answer("counts", VALUES, 1.0, plan.counts, origin)
    ledger.answer("votes-0", VALUES, 1.0, plan.votes, origin)

    with pytest.raises(SpentError, match="the node refused: this run's part of its privacy budget of epsilon 8 is spe"):
        ledger.answer("votes-1", VALUES, 1.0, plan.votes, origin)
    again, _ = ledger.plan("resumed", ("first",), rounds=9)
    with pytest.raises(SpentError):
        ledger.answer("votes-1", VALUES, 1.0, plan.votes, again)

    assert ledger.plan("second", (), rounds=1)[1].votes == pytest.approx(plan_of(whole / 2, 1).votes)


def test_a_run_that_goes_on_keeps_the_plan(ledger):
    origin, plan = ledger.plan("run", (), rounds=4)

    assert ledger.plan("again", ("other", "run"), rounds=9) == (origin, plan) == ("run", plan)
    assert ledger.plan("again", (), rounds=9) == ("run", plan)  # Ancestors are named in the first message alone.
    assert ledger.plan("and again", ("run", "again"), rounds=9) == ("run", plan)
    assert ledger.statement().runs == ("run", "again", "and again")


def test_a_ledger_is_never_replaced(ledger):
    before = ledger.path.read_bytes()

    with pytest.raises(LedgerError, match=r"node.jsonl is there already; allowed: another name"):
        create_ledger(ledger.path, Budget(100.0))

    assert ledger.path.read_bytes() == before
    assert list(ledger.path.parent.iterdir()) == [ledger.path]
    assert oct(ledger.path.stat().st_mode)[-3:] == "600"


def test_missing_ledger(tmp_path):
    with pytest.raises(LedgerError, match=r"none.jsonl cannot be opened \(No such file or directory\); nothing is"):
        PrivacyLedger(tmp_path / "none.jsonl", tmp_path).plan("run", (), 1)

    assert not list(tmp_path.iterdir())


def changed_noise(text):
    return text.replace('"noise": 1', '"noise": 9')


def without_an_answer(text):
    lines = text.splitlines(keepends=True)
    return "".join(lines[:2] + lines[3:])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (changed_noise, 3),
        (without_an_answer, 3),
        (lambda text: "\n" + text, 1),
        (lambda text: "", 1),
        (lambda text: "[1]\n", 1),
    ],
)
def test_damage_is_found(ledger, damage, line):
    _, plan = ledger.plan("run", (), 5)
    answered(ledger, 2, plan)
    before = ledger.path.read_text()
    ledger.path.write_text(damage(before))

    assert ledger.path.read_text() != before
    with pytest.raises(LedgerError, match=f"jsonl, line {line}, is damaged, or is none; nothing is answered until"):
        ledger.answer("votes-0", VALUES, 1.0, plan.votes)


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_an_older_copy_is_found(ledger, lost):
    """Also one whose last line is cut off, as if a process had been killed while it wrote the line."""
    _, plan = ledger.plan("run", (), 5)
    answered(ledger, 2, plan)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(lines[:-lost]) + lines[-lost][:-1])

    for _ in range(2):
        with pytest.raises(LedgerError, match=r"is older than the answers that .*json knows of"):
            ledger.plan("run", (), 5)


def test_a_new_ledger_in_place_of_a_lost_one(ledger):
    answered(ledger, 2, ledger.plan("run", (), 5)[1])
    ledger.path.unlink()
    create_ledger(ledger.path, BUDGET)

    assert ledger.statement().epsilon == 0
    assert ledger.plan("run", (), 5)[1] == plan_of(most_precision(8, 1e-5), 5)


def test_a_damaged_head_is_no_excuse(ledger):
    ledger.plan("run", (), 5)
    [head] = ledger.heads.iterdir()
    head.write_text("{")

    with pytest.raises(LedgerError, match="is older than the answers"):
        ledger.statement()


def test_a_head_that_cannot_be_read_is_no_excuse(ledger):
    ledger.plan("run", (), 5)
    [head] = ledger.heads.iterdir()
    head.unlink()
    head.mkdir()

    with pytest.raises(LedgerError, match=r"json, the head of privacy ledger .*, cannot be read \(Is a directory\)"):
        ledger.statement()


def test_a_statement_changes_nothing(ledger):
    ledger.plan("run", (), 5)
    [head] = ledger.heads.iterdir()
    head.unlink()
    with ledger.path.open("ab") as file:
        file.write(b'{"check": "12')
    before = ledger.path.read_bytes()
    ledger.path.chmod(0o400)

    told = ledger.statement()

    assert (told.budget, told.noises, told.runs) == (BUDGET, (), ("run",))
    assert ledger.path.read_bytes() == before
    assert not list(ledger.heads.iterdir())


def test_a_copy_goes_on_where_the_ledger_is_and_replaces_none(ledger, tmp_path):
    plan = ledger.plan("run", (), 5)[1]
    answer = ledger.answer("votes", VALUES, 1.0, plan.votes)
    copy = PrivacyLedger(tmp_path / "another" / "copy.jsonl")

    copy_ledger(ledger.path, copy.path)
    again = copy.answer("votes", VALUES, 1.0, plan.votes)
    copy.answer("more", VALUES, 1.0, plan.votes)
    with pytest.raises(LedgerError, match="is there already"):
        copy_ledger(ledger.path, copy.path)

    assert np.array_equal(again.values_N, answer.values_N)
    assert len(copy.statement().noises) == 2
    assert oct(copy.path.stat().st_mode)[-3:] == "600"


def test_what_a_killed_process_was_writing_is_left_out(ledger):
    _, plan = ledger.plan("run", (), 5)
    with ledger.path.open("ab") as file:
        file.write(b'{"check": "12')

    answered(ledger, 1, plan)

    assert [json.loads(line)["entry"].get("question") for line in ledger.path.open()] == [None, None, "votes-0"]


def ask_many(path, heads, number, results):
    ledger = PrivacyLedger(path, heads)
    _, plan = ledger.plan("run", (), rounds=20)
    for question in range(20):
        try:
            values_N = ledger.answer(f"votes-{question % 10}-{number % 2}", VALUES, 1.0, plan.votes).values_N.tolist()
        except SpentError:
            values_N = None
        results.put((question % 10, number % 2, values_N))


def test_processes_share_a_ledger(ledger):
    """Four processes ask 20 different questions, 80 times; the budget is for exactly 20 (the counts are not asked)."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=ask_many, args=(ledger.path, ledger.heads, number, results)) for number in range(4)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in range(80)]
    for process in processes:
        process.join()

    answers = {}
    for question, kind, values_N in found:
        assert answers.setdefault((question, kind), values_N) == values_N
    assert len(ledger.statement().noises) == 20
    assert ledger.statement().epsilon <= 8


def take_part(path, heads, run, turns, results):
    """Ask what a run of nine rounds asks, a question at each turn."""
    ledger = PrivacyLedger(path, heads)
    turns.get()
    origin, plan = ledger.plan(run, (), rounds=9)
    for number, noise in enumerate([plan.counts, *[plan.votes] * 9]):
        try:
            ledger.answer(f"{run}-{number}", VALUES, 1.0, noise, origin)
            results.put((run, True))
        except SpentError:
            results.put((run, False))
        turns.get()


def answered_in_turns(ledger, order):
    """Have runs in processes of their own ask in this order; return how many answers each got."""
    context = multiprocessing.get_context("fork")
    results, turns = context.Queue(), {run: context.Queue() for run in set(order)}
    processes = [
        context.Process(target=take_part, args=(ledger.path, ledger.heads, run, turns[run], results)) for run in turns
    ]
    for process in processes:
        process.start()
    counted = dict.fromkeys(turns, 0)
    for run in order:
        turns[run].put("go")
        _, is_answered = results.get(timeout=60)
        counted[run] += is_answered
    for run, process in zip(turns, processes, strict=True):
        turns[run].put("go")
        process.join()
    return counted


def test_two_runs_at_once_do_not_starve_each_other(tmp_path):
    create_ledger(tmp_path / "ledger", Budget(8.0, 1e-5, runs=2))
    ledger = PrivacyLedger(tmp_path / "ledger", tmp_path / "heads")

    counted = answered_in_turns(ledger, [*["first"] * 4, *["second", "first"] * 6, *["second"] * 4])

    assert counted == {"first": 10, "second": 10}
    assert ledger.statement().epsilon == pytest.approx(8)


def test_a_run_too_many_starves_one_under_way_and_both_stay_within_the_budget(ledger):
    """The budget is for one run; the second one is planned with what the first one has not spent."""
    counted = answered_in_turns(ledger, [*["first"] * 4, *["second"] * 10, *["first"] * 6])

    assert counted == {"first": 4, "second": 10}
    assert ledger.statement().epsilon == pytest.approx(8)


# ---------------------------------------------------------------------- killed at each write


def answer_until_killed(path, heads, kill_at, pipe):
    """Answer what a run is asked, and be killed before the write of this number."""
    kill_at_write(kill_at)
    ledger = PrivacyLedger(path, heads)
    _, plan = ledger.plan("run", (), rounds=3)
    for question in ("counts", "votes-1", "votes-2", "votes-3"):
        noise = plan.counts if question == "counts" else plan.votes
        pipe.send((question, ledger.answer(question, VALUES, 1.0, noise).values_N.tolist()))
    pipe.send(None)


def test_killed_at_each_write_never_more_is_answered_than_accounted_for(tmp_path):
    context = multiprocessing.get_context("fork")
    kills = 0
    for kill_at in range(1, 200):
        path, heads = tmp_path / f"{kill_at}.jsonl", tmp_path / f"heads-{kill_at}"
        create_ledger(path, BUDGET)
        answers, done = {}, False
        for at in (kill_at, kill_at, 0):  # Killed twice, then it goes on to the end.
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=answer_until_killed, args=(path, heads, at, writer))
            process.start()
            writer.close()
            while True:
                try:
                    received = reader.recv()
                except EOFError:
                    break
                if received is None:
                    done = done or at > 0
                    break
                question, values = received
                assert answers.setdefault(question, values) == values  # Never twice with other noise.
            process.join()
            copy = tmp_path / "copy.jsonl"
            shutil.copyfile(path, copy)
            ledger = PrivacyLedger(copy)
            accounted = {json.loads(line)["entry"].get("question") for line in whole_lines(copy)}
            assert set(answers) <= accounted
            assert ledger.statement().epsilon <= 8
            kills += process.exitcode == -signal.SIGKILL
        assert len(answers) == 4
        assert epsilon_of(ledger.statement().noises, 1e-5) == pytest.approx(8)
        if done:
            break
    assert done
    assert kills > 2 * 20


def whole_lines(path):
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
