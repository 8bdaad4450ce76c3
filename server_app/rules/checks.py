"""Check of all rules that a configuration names, before anything is loaded or generated."""

from __future__ import annotations

from fedmmkt.common.config import RunConfig
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
