import json
import subprocess
import sys

import pytest

from fedmmkt.common.privacy import epsilon_of
from tests import ROOT


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_node_that_is_killed_at_each_write_answers_no_more_than_it_accounts_for(tmp_path, step):
    """At every eleventh write, since each takes a process; at every one with ``-m slow``."""
    command = [sys.executable, "-m", "tests.client_app.privacy.killed_node", str(tmp_path), str(step)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]

    tried = json.loads(run.stdout.splitlines()[-1])

    assert len(tried) > 100 / step
    assert [len(one["answers"]) for one in tried] == sorted(len(one["answers"]) for one in tried)
    assert len(tried[0]["answers"]) == 0
    assert len(tried[-1]["answers"]) == 2
    for one in tried:
        accounted = [entry["answer"] for entry in one["killed"] if entry.get("question", "").startswith("votes")]
        assert [votes_N for _, _, votes_N in one["answers"]] == accounted[: len(one["answers"])]
        answered = [entry for entry in one["ledger"] if "question" in entry]
        # Class counts and two batches, each once, whatever was asked again after the kill.
        assert [entry["question"].partition("-")[0] for entry in answered] == ["counts", "votes", "votes"]
        assert epsilon_of([entry["noise"] for entry in answered], 1e-5) == pytest.approx(8)
        assert one["answers"] == one["again"][: len(one["answers"])]
        assert [votes_N for _, _, votes_N in one["again"]] == [entry["answer"] for entry in answered[1:]]
