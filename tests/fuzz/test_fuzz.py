import importlib.util
import os
import subprocess
import sys

import pytest

from tests import ROOT

MESSAGES = ("request", "report", "answer", "evaluation", "classes", "upload")


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed; see CONTRIBUTING.md")
@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_from_any_bytes_is_read_or_refused(message, tmp_path):
    command = [sys.executable, "-m", "tests.fuzz.messages", message, "-runs=2000", "-seed=1"]

    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False
    )

    assert run.returncode == 0, run.stderr[-3000:]
