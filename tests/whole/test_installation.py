"""The package as a user installs it: one name at the top, beside somebody else's `common`; and an app of their own."""

import re
from pathlib import Path

import flwr
import pytest

from tests import ROOT
from tests.environments import fresh_environment, packages_of, run

PAGE = (ROOT / "docs" / "your-own-app.md").read_text()
BRIEF = (
    'rounds=1 judge=false tracker="" '
    "t2i.samples-per-round=12 t2i.inference-steps=2 t2i.adaptation-steps=1 "
    'client.models="mlp,text,dual" client.warmup-epochs=1 client.distillation-steps=2'
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh environment with our wheel, in which another package has the name `common`."""
    flower = ["--no-deps", "--ignore-installed", f"flwr=={flwr.__version__}", "ray"]
    home = fresh_environment(tmp_path_factory.mktemp("installed"), *flower)
    foreign = packages_of(home) / "common"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("OWNER = 'somebody else'\n")
    (foreign / "config.py").write_text("OWNER = 'somebody else'\n")
    return home


def write_app(folder: Path) -> Path:
    """Write the app that the page shows."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1])
    (folder / "my_method.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    return folder


def test_the_wheel_has_one_name_at_the_top(environment):
    listed = run(environment, "python", "-m", "pip", "show", "--files", "fedmmkt", cwd=environment).stdout
    files = [line.strip() for line in listed.partition("Files:")[2].splitlines() if line.strip()]
    tops = {file.partition("/")[0] for file in files if not file.startswith("../")}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fedmmkt"}


def test_the_doctor_finds_the_installation_well(environment, tmp_path):
    checked = run(environment, "fedmmkt", "doctor", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.startswith("ok    versions: fedmmkt ")


def test_an_app_of_ones_own_runs_as_the_page_shows_it(environment, tmp_path):
    app = write_app(tmp_path / "my-app")
    options = ["--nodes", "3", "--out", "runs/mine", "--run-config", f"{BRIEF} extra.trim=0.34"]

    ran = run(environment, "fedmmkt", "demo", "--app", str(app), *options, cwd=tmp_path)

    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    config = (tmp_path / "runs" / "mine" / "config.json").read_text()
    assert '"strategy": "my_method:TextAlone"' in config
    assert '"trim": 0.34' in config
    assert "Starting TextAlone" in ran.stdout
    assert (tmp_path / "runs" / "mine" / "report.html").stat().st_size > 10_000


def test_the_other_package_is_whole_after_all_of_it(environment):
    """Last: it removes the package."""
    foreign = packages_of(environment) / "common"
    removed = run(environment, "python", "-m", "pip", "uninstall", "--yes", "fedmmkt", cwd=environment)
    assert removed.returncode == 0
    assert not (packages_of(environment) / "fedmmkt").exists()
    assert {file.name: file.read_text() for file in foreign.glob("*.py")} == {
        "__init__.py": "OWNER = 'somebody else'\n",
        "config.py": "OWNER = 'somebody else'\n",
    }
