"""Where a run was computed: versions, hardware, and the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from fedmmkt.common.installed import installed

PACKAGES = ("fedmmkt", "flwr", "torch", "diffusers", "transformers", "peft")


def describe_machine() -> dict[str, Any]:
    """Return versions, the commit if the code lies in a git clone, and the server's hardware."""
    code = installed("server_app/report/page.html").parent  # Not in an app bundle, which is tracked nowhere.
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "hardware": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory": f"{psutil.virtual_memory().total / 1024**3:.1f} GiB",
            "gpus": gpus,
        },
        "threads": torch.get_num_threads(),
    } | ({"commit": commit} if (commit := git_commit(code)) else {})


def git_commit(folder: Path) -> str:
    """Return the commit of a folder of tracked code, with ``-dirty`` if files were changed; empty without git.

    An installation inside another project's clone is not tracked there, and has no commit.
    """
    tracked, commit = (
        _git(folder, *command) for command in (("ls-files", "."), ("describe", "--always", "--dirty", "--abbrev=12"))
    )
    return commit if tracked else ""


def _git(folder: Path, *command: str) -> str:
    try:
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    """Return the processor's name; Linux tells it in a file."""
    source = Path("/proc/cpuinfo")
    lines = source.read_text(encoding="utf-8").splitlines() if source.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
