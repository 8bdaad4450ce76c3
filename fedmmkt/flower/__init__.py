"""The app's ServerApp as ``flwr run`` names it; in that command alone, importing this package checks the run-config.

``flwr run`` imports the package around a component before it submits anything, and nothing else of an app. The
SuperLink refuses a wrong key too, but without naming it. See `deploy.flwr_run`.
"""

from contextlib import suppress

import click

_command = click.get_current_context(silent=True)  # None in a ServerApp, and in most programs.
if _command is not None and _command.info_name == "run":
    with suppress(ImportError):  # An earlier version is installed than that of the app.
        from fedmmkt.deploy.flwr_run import check_command

        check_command(_command)
