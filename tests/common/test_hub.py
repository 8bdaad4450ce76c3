"""A hub that does not answer, in a process of its own, as its library reads the address when it is imported."""

import os
import subprocess
import sys
import time

import pytest

from fedmmkt.deploy.processes import free_port
from tests import ROOT

CHECK = """
import sys
from pathlib import Path
from fedmmkt.common.config import ConfigError
from fedmmkt.deploy.run_checks import check_run
try:
    check_run(Path(sys.argv[1]), 2, {"client.models": "cnn", sys.argv[2]: sys.argv[3]})
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.dataset", "no/data"), ("t2i.model", "no/model"), ("client.models", "transformers:no/model")],
)
def test_a_hub_that_cannot_be_reached_is_told_at_once_in_one_line(key, value, tmp_path):
    endpoint = f"http://127.0.0.1:{free_port()}"
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    del environment["HF_HUB_OFFLINE"]
    started = time.monotonic()

    ended = subprocess.run(
        [sys.executable, "-c", CHECK, str(ROOT), key, value],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )

    (line,) = (ended.stdout + ended.stderr).splitlines()
    assert value in line
    assert f"{endpoint} cannot be reached: " in line
    assert time.monotonic() - started < 20  # imports; the library's own retries alone take 23
