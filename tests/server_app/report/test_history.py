"""What a run's pages need of its rounds; and the timeline."""

from fedmmkt.server_app.report.history import MOST_TROUBLES, History
from fedmmkt.server_app.report.timeline import timeline_of


def line(round, accuracies, missing=(), timeline=None):
    reports = {
        name: {"accuracy": accuracy, "modality": "image", "model": "cnn", "examples": 1}
        for name, accuracy in accuracies.items()
    }
    reasons = dict.fromkeys(missing, "no answer before the round closed")
    seconds = {"total": 1.0, "measure": 0.5} | ({"timeline": timeline} if timeline else {})
    replies = {"received": len(reports), "asked": sorted({*reports, *missing}), "reasons": reasons}
    return {"round": round, "clients": {"per_client": reports}, "seconds": seconds, "replies": replies}


def test_of_many_clients_the_first_the_newest_and_the_report_of_round_1_are_kept():
    names = [f"cnn-{index}" for index in range(40)]
    lines = [line(round, {name: round / 10 + index / 1000 for index, name in enumerate(names)}) for round in range(6)]
    lines[5]["clients"]["per_client"].pop("cnn-0")

    history = History.of(lines)

    kept = [set(kept["clients"]["per_client"]) for kept in history.lines]
    assert kept == [set(names), set(names), set(), set(), {"cnn-0"}, set(names) - {"cnn-0"}]
    spread = history.lines[3]["clients"]["spread"]
    assert [round(value, 4) for value in spread] == [0.3, 0.3039, 0.3351, 0.339]
    assert history.lines[5]["clients"]["counts"] == {"image": 39}
    assert len(lines[3]["clients"]["per_client"]) == 40  # The lines themselves are as they were.


def test_of_few_clients_all_is_kept():
    lines = [line(round, {"cnn-0": 0.5, "cnn-1": 0.7}) for round in range(6)]
    assert [set(kept["clients"]["per_client"]) for kept in History.of(lines).lines] == [{"cnn-0", "cnn-1"}] * 6


def test_many_troubles_are_counted_by_their_reason():
    names = [f"cnn-{index}" for index in range(50)]
    history = History.of(line(round, {"cnn-x": 0.5}, missing=names) for round in range(10))

    (reason,) = history.reasons.values()
    assert (reason.count, reason.first, reason.last) == (500, 0, 9)
    assert reason.names == names[:1] + names[1:2] + ["cnn-10", "cnn-11", "cnn-12"]
    assert len(history.troubles) == MOST_TROUBLES + 1
    assert history.causes() == [
        "50 of 51 clients (cnn-0, cnn-1, cnn-2, cnn-3, cnn-4, cnn-5, ...): no answer before the round closed"
    ]


def timeline(start, names):
    return {
        "server": [["generate", start, start + 2], ["clients", start + 2, start + 7], ["total", start, start + 9]],
        "beside": [["measure", start + 2, start + 5]],
        "clients": [[name, start + 2, start + 3 + index] for index, name in enumerate(names)],
    }


def test_the_timeline_shows_each_client_if_they_are_few():
    history = History.of(line(r, {"a$b": 0.5}, timeline=timeline(10 * r, ["a$b", "<c>"])) for r in range(5))

    chart = timeline_of(history.lines)

    # Only the last three rounds are drawn; the generation took 2 s in each.
    assert (
        'aria-label="Who did what when, rounds 2 to 4: generate 6.0 s, beside the clients measure 9.0 s, ' in chart.svg
    )
    assert "the longest answer 2.0 s, of &lt;c&gt;" in chart.svg
    assert "a$b" in chart.svg
    assert "beside clients" in chart.svg
    assert "<c>" not in chart.svg
    assert [entry.text for entry in chart.legend] == ["generate", "measure, beside the clients", "clients at work"]


def test_the_timeline_shows_what_is_generated_ahead():
    times = timeline(0, ["a"])
    ahead = times | {"beside": [*times["beside"], ["generate", 5, 6.5]]}

    usual, chart = (timeline_of(History.of([line(0, {"a": 0.5}, timeline=one)]).lines) for one in (times, ahead))

    assert "generate 2.0 s, beside the clients measure 3.0 s, beside the clients generate 1.5 s" in chart.svg
    assert chart.svg.count("var(--blue)") == usual.svg.count("var(--blue)") + 1


def test_the_timeline_shows_how_many_of_many_clients_work():
    names = [f"cnn-{index}" for index in range(30)]
    chart = timeline_of(History.of([line(0, {"cnn-0": 0.5}, timeline=timeline(0, names))]).lines)
    assert "how many of 30 clients work" in [entry.text for entry in chart.legend]
    assert "cnn-7" not in chart.svg


def test_a_run_of_an_earlier_version_has_no_timeline():
    assert timeline_of(History.of([line(0, {"cnn-0": 0.5})]).lines) is None
