"""What is submitted: our packages alone, and an app's folder with every key that the run changes."""

import subprocess
import sys
import tomllib
import zipfile

import pytest

from fedmmkt.common.config import ConfigError, RunConfig, to_flower
from fedmmkt.deploy.bundle import app_folder, default_config, folder_to_submit, read_app
from fedmmkt.deploy.run_checks import check_run
from tests import ROOT

PROJECT = """
[project]
name = "my-app"
version = "1.0.0"

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.components]
serverapp = "fedmmkt.server:app"
clientapp = "fedmmkt.client:app"

[tool.flwr.app.config]
rounds = 2

[tool.flwr.app.config.t2i]
aggregation = "my_rules:own"
"""


@pytest.fixture
def own_app(tmp_path):
    folder = tmp_path / "my-app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "my_rules.py").write_text("def own(logits_KNC, class_counts_KC, prompted_N, *, trim: float = 0.1): ...")
    yield folder
    sys.modules.pop("my_rules", None)


def flwr(*arguments, cwd):
    command = [sys.executable, "-c", "from flwr.cli.app import app; app()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_bundle_of_a_clone_holds_our_packages_alone_whatever_lies_in_it(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    for room in ("fedmmkt", "pyproject.toml"):  # As they are now, committed or not.
        subprocess.run(["cp", "-r", str(ROOT / room), str(clone)], check=True)
    (clone / "notes.json").write_text("{}")
    (clone / "secrets.yaml").write_text("password: x")
    (clone / "client_app" / "patients.jsonl").write_text("{}")
    (clone / "data").mkdir()
    (clone / "data" / "train.py").write_text("")

    built = flwr("build", "--app", str(clone), cwd=tmp_path)

    assert built.returncode == 0, built.stdout + built.stderr
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        names = archive.namelist()
        app = tomllib.loads(archive.read("pyproject.toml").decode())["tool"]["flwr"]["app"]
    assert app["fab-format-version"] == 1
    code = {name for name in names if name.endswith(".py")}
    assert {name.partition("/")[0] for name in code} == {"fedmmkt", "common", "server_app", "client_app"}
    assert set(names) - code == {"pyproject.toml", "LICENSE", ".info/CONTENT"}


def test_an_app_of_ones_own_is_submitted_with_every_key_that_is_changed(own_app):
    with folder_to_submit(own_app, {"rounds": 5, "data.alpha": 0.5, "extra.trim": 0.3}) as folder:
        config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
        code = (folder / "my_rules.py").read_text()

    assert config == {
        "rounds": 5,
        "data": {"alpha": 0.5},
        "t2i": {"aggregation": "my_rules:own"},
        "extra": {"trim": 0.3},
    }
    assert code == (own_app / "my_rules.py").read_text()


def test_an_app_that_has_all_keys_is_submitted_as_it_is(own_app):
    with folder_to_submit(own_app, {"rounds": 5}) as folder:
        assert folder == own_app


def test_defaults_of_an_app_of_ones_own_are_ours_but_for_what_it_says(own_app):
    expected = to_flower(RunConfig()) | {"rounds": 2, "t2i.aggregation": "my_rules:own"}
    assert default_config(read_app(own_app)) == expected


def test_a_folder_without_an_app_runs_the_app_that_comes_with_the_package(tmp_path, monkeypatch, own_app):
    monkeypatch.chdir(tmp_path)
    with app_folder(None) as folder:
        assert default_config(read_app(folder)) == to_flower(RunConfig())
    monkeypatch.chdir(own_app)
    with app_folder(None) as folder:
        assert folder.resolve() == own_app


def test_a_broken_project_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app\n")
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"pyproject.toml cannot be read .*; mend it, or name an app with --app"),
        app_folder(None),
    ):
        pass


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"t2i.aggregation": "my_rules:owm"}, r"'my_rules:owm', but the module 'my_rules' has no 'owm' \(did you mean"),
        ({"t2i.scores": "my_scores:own"}, r"'t2i.scores' is 'my_scores:own', but there is no module 'my_scores'"),
        ({"t2i.update": "my_rules:own"}, "that is a function, and no subclass of UpdateRule"),
        ({"strategy": "my_rules:own"}, "that is a function, and no subclass of FedMMKT"),
        ({"t2i.family": "sdxl"}, "no T2I family is registered under that name"),
        ({"client.models": "cnn,my_rules:net"}, r"'client.models' is 'my_rules:net', but the module 'my_rules' has no"),
        ({"extra.trim": "much"}, r"'extra.trim' is 'much'; allowed: a float, for t2i.aggregation 'my_rules:own'"),
        ({"trim": 0.2}, r"'trim' is unknown; .*a setting of your own belongs in the table 'extra'"),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_started(own_app, changed, message):
    check_run(own_app, 2, {})
    with pytest.raises(ConfigError, match=message):
        check_run(own_app, 2, changed)


def test_a_module_beside_an_app_that_does_not_bundle_it_is_refused(own_app):
    project = own_app / "pyproject.toml"
    project.write_text(project.read_text().replace('publisher = "me"', 'publisher = "me"\nfab-include = ["other.py"]'))
    (own_app / "other.py").write_text("")
    with pytest.raises(ConfigError, match=r"my_rules.py lies in the app .*, but is no part of its bundle .*--app"):
        check_run(own_app, 2, {})
