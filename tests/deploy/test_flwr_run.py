"""Flower's own command `flwr run`, with a SuperLink that nobody runs: what it says before it looks for it."""

import subprocess

import click
import pytest

from fedmmkt.deploy.flwr_run import check_command
from fedmmkt.deploy.processes import flower_environment, script
from tests import ROOT

UNREACHED = "Connection to the SuperLink is unavailable"
APP = """
[project]
name = "mine"
version = "1.0.0"
license = {{ text = "mine" }}
dependencies = ["fedmmkt"]

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.components]
serverapp = "{server}:app"
clientapp = "fedmmkt.client:app"

[tool.flwr.app.config]
rounds = 2
"""


@pytest.fixture
def flwr_run(tmp_path):
    """Return a function that gives the command to Flower, from a folder without an app."""
    environment = flower_environment(tmp_path / "flwr", 9) | {"COLUMNS": "1000"}
    (tmp_path / "flwr").mkdir()
    connection = '[superlink]\ndefault = "closed"\n[superlink.closed]\naddress = "127.0.0.1:9"\ninsecure = true\n'
    (tmp_path / "flwr" / "config.toml").write_text(connection)

    def run(app, *options):
        command = [script("flwr"), "run", str(app), *options]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return ended.returncode, " ".join((ended.stdout + ended.stderr).split())

    return run


def write_app(folder, server):
    folder.mkdir()
    (folder / "pyproject.toml").write_text(APP.format(server=server))
    (folder / "own.py").write_text("import fedmmkt\nfrom fedmmkt.common.config import RunConfig\napp = None\n")
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--run-config", "rouns=3"], ["'rouns' is unknown (did you mean 'rounds'?)"]),
        (["-c", 'rounds=-1 t2i.guidance="abc"'], ["'rounds' is -1; allowed: from 1", "'t2i.guidance' is 'abc'"]),
        (["-c", "seed=1", "-c", "rounds=-1"], ["'rounds' is -1; allowed: from 1"]),
        (
            ["-c", 'client.models="cnn,transformers:a/b,own:f,cnnn" t2i.scores="voted"'],
            ["'client.models' is 'cnnn', but no", "'t2i.scores' is 'voted', but no score rule"],
        ),
        (["--run-config", "rounds = 3"], ["'rounds = 3' is not of the form key=value"]),
        (["--run-config", "wrong.toml"], ["'clent' is unknown (did you mean 'client'?)"]),
    ],
)
def test_a_wrong_key_or_value_is_named_before_the_superlink_is_asked(flwr_run, tmp_path, options, said):
    (tmp_path / "wrong.toml").write_text('[clent]\nmodels = "cnn"\n')

    code, answer = flwr_run(ROOT, *options)

    assert code == 1
    assert all(text in answer for text in said), answer
    assert UNREACHED not in answer


@pytest.mark.parametrize("options", [[], ["-c", "rounds=1 extra.mine=2.5", "-c", 't2i.guidance="2,1"'], ["--stream"]])
def test_a_right_run_gets_to_the_superlink(flwr_run, tmp_path, options):
    app = ROOT if "extra" not in str(options) else write_app(tmp_path / "app", "fedmmkt.flower.server")
    if app != ROOT:
        with (app / "pyproject.toml").open("a") as file:
            file.write('t2i.guidance = "1"\nextra.mine = 1.0\n')

    code, answer = flwr_run(app, *options)

    assert UNREACHED in answer, answer
    assert code == 1


def test_a_key_that_ones_own_app_lacks_is_told_with_the_line_to_write(flwr_run, tmp_path):
    app = write_app(tmp_path / "app", "fedmmkt.flower.server")

    code, answer = flwr_run(app, "-c", "rounds=3 seed=7")

    assert code == 1
    assert "which lacks 'seed'; write seed = 7 there, or use fedmmkt demo --app" in answer


def test_an_app_that_only_depends_on_the_package_is_left_alone(flwr_run, tmp_path):
    _, answer = flwr_run(write_app(tmp_path / "app", "own"), "-c", "rouns=3")

    assert UNREACHED in answer, answer


@pytest.mark.parametrize(
    "params",
    [{}, {"app": str(ROOT)}, {"app": ROOT, "run_config_overrides": ["rouns=3"]}, {"run_config_overrides": "rouns=3"}],
)
def test_a_flower_that_reads_its_command_line_otherwise_is_left_alone(params):
    command = click.Context(click.Command("run"), info_name="run")
    command.params = params

    check_command(command)  # raises nothing
