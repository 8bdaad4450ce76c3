"""The report of a run that is stopped says so, and how it goes on."""

import signal
import time

import pytest

from fedmmkt.deploy.command import run_command
from fedmmkt.deploy.stopping import tell_stop
from fedmmkt.server_app.report.compare import write_comparison
from fedmmkt.server_app.report.page import write_report
from tests.server_app.report.test_page import make_line, make_run, text_of


def interrupted_after(lines, rounds, stop):
    """Return a runner whose run writes these lines, with a checkpoint, and is stopped."""

    def run(app, nodes, out, run_config):
        folder = make_run(out, lines, rounds)
        (folder.checkpoints / "round-00001").mkdir(parents=True)
        write_report(folder.path)
        raise stop

    return run


@pytest.mark.parametrize(
    ("stop", "code"),
    [(KeyboardInterrupt(), 128 + signal.SIGINT), (SystemExit(128 + signal.SIGTERM), 128 + signal.SIGTERM)],
)
def test_a_run_that_is_stopped_says_after_which_round_and_how_it_goes_on(stop, code, tmp_path):
    lines = [make_line(number, {"cnn-0": 0.5}) for number in range(2)]
    runner, out = interrupted_after(lines, 3, stop), tmp_path / "run"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        left = run_command("demo", "", 6, out, runner, [])
    except SystemExit as error:
        left = error.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    html = (out / "report.html").read_text()
    assert left == code
    assert "(stopped)</title>" in html
    assert "<progress" not in html
    assert "location.reload()" not in html
    page = text_of(html).replace("&#39;", "'").replace("&#34;", '"')
    assert "Stopped after round 1 of 3" in page
    assert f"The run was stopped. To go on after its last whole round: --run-config 'resume-from=\"{out}\"'" in page


def test_an_earlier_run_and_one_whose_rounds_are_done_were_not_stopped(tmp_path):
    earlier = make_run(tmp_path / "earlier", [make_line(0, {"cnn-0": 0.5})], rounds=1)
    done = make_run(tmp_path / "done", [make_line(number, {"cnn-0": 0.5}) for number in range(2)], rounds=1)

    tell_stop(earlier.path, began=time.time() + 60)
    tell_stop(done.path, began=0)
    tell_stop(tmp_path / "none", began=0)

    assert not earlier.report.exists()
    assert earlier.read_failure() == done.read_failure() == ""
    assert "Finished: 1 of 1 rounds" in done.report.read_text()


def test_a_failed_run_says_how_it_goes_on_and_a_comparison_which_was_stopped(tmp_path):
    folders = [make_run(tmp_path / name, [make_line(0, {"cnn-0": 0.5})]) for name in ("failed", "stopped")]
    (folders[0].checkpoints / "round-00000").mkdir(parents=True)
    folders[0].write_failure("round 1: the disk is full")
    tell_stop(folders[1].path, began=0)

    page = text_of(write_report(folders[0].path).read_text())
    comparison = text_of(write_comparison([folder.path for folder in folders], tmp_path / "page.html").read_text())

    assert "The run failed: round 1: the disk is full Once that is mended, to go on after its last whole round:" in page
    assert "after round 0 of 2: round 1: the disk is full stopped after round 0 of 2" in comparison
    assert "To go on" not in folders[1].report.read_text()  # It has no checkpoint.
