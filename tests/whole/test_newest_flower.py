"""The app on the newest Flower that the registry has, although the project stays within one release of it."""

import json
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.environments import fresh_environment, run

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

BRIEF = (
    'rounds=1 min-available-nodes=2 judge=false tracker="" t2i.samples-per-round=12 t2i.inference-steps=2 '
    't2i.adaptation-steps=1 t2i.evaluation-samples=10 client.models="cnn,text" client.warmup-epochs=1 '
    "client.distillation-steps=2"
)


@pytest.mark.slow
def test_a_simulation_runs_unchanged(tmp_path):
    home = fresh_environment(tmp_path, "--upgrade", "flwr[simulation]")
    shown = run(home, "python", "-c", "import flwr; print(flwr.__version__)", cwd=tmp_path).stdout
    needed = map(Requirement, tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"])
    own = next(requirement.specifier for requirement in needed if requirement.name == "flwr")
    if shown.strip() in own:
        pytest.skip(f"the registry has no newer Flower than {shown.strip()}")

    ran = run(home, "fedmmkt", "demo", "--nodes", "2", "--out", "out", "--run-config", BRIEF, cwd=tmp_path)

    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["versions"]["flwr"] == shown.strip()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["replies"]["received"] for line in lines] == [2, 2]
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
