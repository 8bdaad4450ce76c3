"""Parts that several tests need: tiny settings, and a whole federation in one process."""

import os
import signal

# Before anything imports torch: small models are slower on many threads. `make test` has a process per core.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from contextlib import contextmanager

import pytest
from hypothesis import settings

from fedmmkt.common.config import RunConfig, to_flower
from fedmmkt.deploy.in_process import InProcessGrid

# The same examples each time, so that an unlucky draw does not fail an unrelated change. FEDMMKT_EXAMPLES draws others.
settings.register_profile("repeatable", derandomize="FEDMMKT_EXAMPLES" not in os.environ)
settings.load_profile("repeatable")


def pytest_sessionstart():
    """Let a stop from outside end the tests as Ctrl-C does, so that the servers of a fixture are stopped too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


TINY = {
    "data.dataset": "digits",
    "rounds": 2,
    "tracker": "",
    "judge": False,
    "judge-cache": "none",
    "local-only-control": False,
    "client.warmup-epochs": 1,
    "client.local-epochs": 1,
    "client.distillation-steps": 4,
    "t2i.samples-per-round": 30,
    "t2i.evaluation-samples": 30,
    "t2i.inference-steps": 3,
    "t2i.adaptation-steps": 2,
    "t2i.guard": 0.0,  # Else the last round's update is not kept, and two steps are too few for a preference.
}


@contextmanager
def registered(registry, name, part):
    """Register a part while the block runs."""
    registry.register(name)(part)
    try:
        yield
    finally:
        registry.unregister(name)


@pytest.fixture
def tiny_run(tmp_path):
    """Return a function that gives the flat run-config of a tiny run in ``tmp_path``, with changes."""

    def make(name="run", **changes):
        settings = to_flower(RunConfig()) | TINY
        settings |= {"output-dir": str(tmp_path / name), "client.state-dir": str(tmp_path / f"{name}-clients")}
        return settings | {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}

    return make


@pytest.fixture
def make_grid():
    """Return a function that makes an in-process grid of simulated nodes."""

    def make(run_config, nodes=6, app="fedmmkt.client_app.app:app"):
        return InProcessGrid(app, run_config, [{"partition-id": i, "num-partitions": nodes} for i in range(nodes)])

    return make
