"""The list of names that a configuration can choose, each with a short description: ``fedmmkt rules``."""

from __future__ import annotations

import argparse
from typing import Any

from fedmmkt.common.registry import Registry


def registries() -> list[Registry[Any]]:
    """Return the registries of all parts that a configuration chooses by name."""
    import fedmmkt.client_app.models.building  # noqa: F401  These import torch and diffusers, which help does not need.
    from fedmmkt.client_app.models.task_model import task_models
    from fedmmkt.common.image_encoders import image_encoders
    from fedmmkt.server_app.rules.aggregation import aggregations
    from fedmmkt.server_app.rules.scores import scores
    from fedmmkt.server_app.rules.updates import updates
    from fedmmkt.server_app.strategy import strategies
    from fedmmkt.server_app.t2i.families import families

    return [strategies, aggregations, scores, updates, families, task_models, image_encoders]


def listing() -> str:
    """Return a list of all registered names with descriptions, grouped by configuration key."""
    parts = []
    for registry in registries():
        names = registry.names()
        width = max(map(len, names))
        lines = [f"  {name:{width}}  {line}" for name, line in names.items()]
        others = ", ".join(filter(None, [registry.also, "module:name of your own"]))
        parts.append("\n".join([f"{registry.key} ({registry.kind})", *lines, f"  or {others}"]))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Print the list; return the exit code."""
    argparse.ArgumentParser(prog="fedmmkt rules", description=__doc__).parse_args(arguments)
    print(listing())
    return 0
