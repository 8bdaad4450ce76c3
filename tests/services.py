"""The systemd units of `deploy/systemd`, read as systemd reads them, and Flower's own parsers of what they start."""

import re
import shlex

from flwr.supercore.cli.flower_superexec import _parse_args as superexec_parser
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink as superlink_parser
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode as supernode_parser

from tests import ROOT

PARSERS = {
    "flower-superlink": superlink_parser,
    "flower-superexec": superexec_parser,
    "flower-supernode": supernode_parser,
}
UNITS = ROOT / "deploy" / "systemd"
NAMES = ("fedmmkt-superlink", "fedmmkt-superexec", "fedmmkt-supernode")


def read_unit(name):
    """Return the settings of a unit and of what all share, each with all its values."""
    settings = {}
    for path in (UNITS / f"{name}.service", *sorted((UNITS / "fedmmkt-.service.d").glob("*.conf"))):
        text = path.read_text().replace("\\\n", " ")
        for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
            settings.setdefault(key, []).append(value.strip())
    return settings


def environment(unit):
    """Return the variables that a unit sets by itself."""
    return dict(value.split("=", 1) for value in unit["Environment"])


def command(unit, variables):
    """Return the words of a unit's command; a variable is one word, whatever is in it."""
    (line,) = unit["ExecStart"]
    return [re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], word) for word in shlex.split(line)]


def read_environment_file(text):
    """Return the variables of an environment file."""
    return dict(word.split("=", 1) for word in shlex.split(text))
