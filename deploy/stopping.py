"""What a run that is stopped leaves: a report that says so, and how the run goes on."""

from __future__ import annotations

import sys
from pathlib import Path

from fedmmkt.deploy.processes import signals_ignored


def tell_stop(folder: Path, began: float) -> None:
    """Write into the report of a run's folder that the run was stopped; nothing if it had not yet begun.

    All processes of the run must have ended; what one of them wrote of a lost connection was the stop's work. A page
    that cannot be written is told, and nothing else.

    Parameters
    ----------
    folder : Path
        The run folder, or a folder that may hold an earlier run.
    began : float
        When the command began, in seconds since the epoch: what was written before is of an earlier run.
    """
    from fedmmkt.server_app.record.run_folder import STOPPED, RunFolder
    from fedmmkt.server_app.report.page import write_report

    run = RunFolder(folder)
    with signals_ignored():
        try:
            if not run.config.exists() or run.config.stat().st_mtime < began:
                return
            rounds = run.read_config()["config"]["rounds"]
            if max((line["round"] for line in run.read_lines()), default=-1) < rounds:
                run.write_failure(STOPPED)
            write_report(folder)
        except (OSError, ValueError, KeyError) as error:  # The run may have been cut off while it wrote.
            print(f"{run.report} does not say that the run was stopped: {error}", file=sys.stderr)
