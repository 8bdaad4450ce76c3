"""The command ``fedmmkt``, with one subcommand for each task."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module

# For each subcommand: the module whose ``main`` gets the arguments, and a description.
COMMANDS = {
    "demo": ("deploy.simulation", "run clients and a text-to-image model in simulation, on this machine"),
    "federation": ("deploy.federation", "run real processes over gRPC with TLS, on this machine"),
    "generate": ("deploy.generate", "draw a labelled folder of images with a run's text-to-image model"),
    "predict": ("deploy.predict", "predict classes with a client's trained model"),
    "doctor": ("deploy.doctor", "check a deployment from any of its hosts"),
    "certificates": ("deploy.certificates", "make a CA, the server's certificate, and nodes' keys"),
    "budget": ("deploy.budget", "make a node's privacy budget, or show what is spent"),
    "partition": ("deploy.partition", "divide a dataset into a folder for each node"),
    "pretrain": ("starter.public", "pre-train a small text-to-image model on the public part of a dataset"),
    "report": ("server_app.report.page", "rewrite the report of a run folder"),
    "compare": ("server_app.report.compare", "write one page that compares several runs"),
    "card": ("server_app.publish.card", "write the model card of a run's adapter"),
    "push": ("server_app.publish.push", "upload a run's adapter with its model card to the Hugging Face hub"),
    "rules": ("deploy.rules", "list the rules, models, families and strategies that a configuration can name"),
}


def usage() -> str:
    """Return the help text of the command."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items())
    return (
        "usage: fedmmkt COMMAND [OPTIONS]\n\n"
        "Federated multi-modal knowledge transfer: a text-to-image model and clients' task models teach each other.\n\n"
        f"commands:\n{listed}\n\n"
        "fedmmkt COMMAND --help describes a command; fedmmkt --version prints the version."
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; return its exit code, or 2 if there is no such subcommand."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        from importlib.metadata import version

        print(f"fedmmkt {version('fedmmkt')}")
        return 0
    if command not in COMMANDS:
        print(f"fedmmkt: there is no command {command!r}; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[command]
    # Both are read when torch is imported. Threads that wait in a loop for each other make small models many times
    # slower where others use the cores too; threads that sleep at once, twice as slow where nobody does.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        return int(import_module(f"fedmmkt.{module}").main(rest) or 0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
