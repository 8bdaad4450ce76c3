"""The example of a step in `docs/your-own-app.md`; the app of that page runs in `test_installation`."""

import re

import pytest

from fedmmkt.common.config import RunConfig
from fedmmkt.server_app.app import build_strategy
from tests import ROOT

PAGE = (ROOT / "docs" / "your-own-app.md").read_text()


@pytest.fixture
def only_agreed(tmp_path, monkeypatch):
    """Write the example as a module, and return its name."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class OnlyAgreed" in code]
    (tmp_path / "only_agreed.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return "only_agreed:OnlyAgreed"


def test_only_agreed_samples_teach(only_agreed, tiny_run, make_grid):
    run_config = tiny_run(rounds=1, client__models="cnn,mlp,cnn", strategy=only_agreed)
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)

    strategy.start(make_grid(run_config, nodes=3))

    ((batch, targets),), (samples,) = strategy.ledger.history, strategy.ledger.pool
    agreed_N = targets.distinct[0].probabilities_NC.argmax(1) == batch.prompted_N
    assert 0 < agreed_N.sum() < len(batch)
    assert not samples.scores_N[~agreed_N].any()
    assert samples.scores_N[agreed_N].any()
