"""Check of all rules that a configuration names, before anything is loaded or generated."""

from __future__ import annotations

from torch import Tensor

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.server_app.rules.aggregation import aggregations
from fedmmkt.server_app.rules.scores import scores
from fedmmkt.server_app.rules.updates import updates


def check_rules(config: RunConfig) -> None:
    """Check that each rule exists and accepts the user's own settings.

    Raises
    ------
    ConfigError
        If a rule fails the check; the text names the first one.
    """
    extra = config.extra.as_dict()
    aggregations.get(config.t2i.aggregation, extra)
    scores.get(config.t2i.scores, extra)
    updates.get(config.t2i.update, extra)


def check_result(result: object, shape: tuple[int, ...], key: str, name: str) -> Tensor:
    """Check what a rule returned: a tensor of the given shape, finite and not negative.

    Raises
    ------
    ConfigError
        If it is anything else. The text names the key and the rule.
    """
    where = f"run-config key {key!r} is {name!r}, which returned"
    if not isinstance(result, Tensor):
        raise ConfigError(f"{where} a {type(result).__name__}; allowed: a tensor of shape {shape}")
    if tuple(result.shape) != shape:
        raise ConfigError(f"{where} a tensor of shape {tuple(result.shape)}; allowed: {shape}")
    wrong = int((~result.isfinite() | (result < 0)).sum())
    if wrong:
        raise ConfigError(f"{where} {wrong} of {result.numel()} values that are negative or not finite")
    return result
