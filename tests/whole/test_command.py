"""One door: the command ``fedmmkt`` and the public interface ``import fedmmkt``."""

import importlib
import subprocess
import sys

import pytest

import fedmmkt
from fedmmkt.__main__ import COMMANDS, main


def test_help_names_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and line in shown for name, (_, line) in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fedmmkt {name} ")


def test_a_command_that_is_not_there_is_refused(capsys):
    assert main(["dmeo"]) == 2
    assert "there is no command 'dmeo'; allowed: demo, federation" in capsys.readouterr().err


def test_rules_lists_every_registered_name_with_what_it_is(capsys):
    assert main(["rules"]) == 0
    shown = capsys.readouterr().out
    for registry in ("aggregations", "scores", "updates", "families", "task_models", "strategies"):
        for name, line in getattr(fedmmkt, registry).names().items():
            assert line, f"{registry} {name} has no docstring"
            assert any(name in row and line in row for row in shown.splitlines())


@pytest.mark.parametrize("name", fedmmkt.__all__)
def test_every_public_name_is_there_and_documented(name):
    found = getattr(fedmmkt, name)
    assert found.__doc__


def test_a_name_that_is_not_public_is_refused():
    with pytest.raises(AttributeError, match="has no attribute 'Strategy'; public are: Answer"):
        fedmmkt.Strategy  # noqa: B018


def test_to_import_the_package_imports_no_heavy_library():
    code = "import sys, fedmmkt; print([name for name in ('torch', 'flwr', 'diffusers') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_the_rooms_import_one_way():
    """Apps import `common` and never each other; `common` imports neither."""
    forbidden = {
        "common": ("server_app", "client_app", "deploy", "starter"),
        "client_app": ("server_app", "deploy", "starter"),
        "server_app": ("client_app", "deploy", "starter"),
        "server_app/ledger.py": ("server_app.strategy", "server_app.loop", "server_app.record"),
        "server_app/loop.py": ("server_app.strategy",),
        "server_app/recorder.py": ("server_app.strategy", "server_app.loop"),
        "server_app/publish": ("server_app.strategy", "server_app.loop", "server_app.recorder"),
        "server_app/record": ("server_app.strategy", "server_app.loop"),
        "server_app/report": ("server_app.strategy", "server_app.loop", "server_app.t2i", "server_app.ledger"),
        "server_app/t2i": ("server_app.strategy", "server_app.loop", "server_app.ledger", "server_app.record"),
        "server_app/rules": ("server_app.strategy", "server_app.loop", "server_app.ledger", "server_app.t2i"),
        "client_app/models": ("client_app.client", "client_app.learning", "client_app.memory"),
    }
    root = importlib.import_module("tests").ROOT
    for room, others in forbidden.items():
        place = root / room
        for file in [place] if place.is_file() else place.rglob("*.py"):
            text = file.read_text()
            assert not [other for other in others if f"from fedmmkt.{other}" in text], (
                f"{file} imports what is above it"
            )
