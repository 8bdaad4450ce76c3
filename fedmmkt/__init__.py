"""Federated multi-modal knowledge transfer: a text-to-image model and clients' task models teach each other.

All code of the project is imported from this package, for example ``from fedmmkt.common.config import RunConfig``. Its
subpackages are ``common``, ``server_app``, ``client_app``, ``deploy`` and ``starter``. In an installation, they are
folders inside this package. In a clone, and in an app bundle made from a clone, they are folders beside it.

``__all__`` lists the public interface. Its names are imported at first use, because a client is a new process for every
message and needs only few of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmmkt.client_app.models.task_model import Inputs, TaskModel, task_models
    from fedmmkt.client_app.trained import ClientModel, load_client_model
    from fedmmkt.common.config import ConfigError, NodeConfig, RunConfig
    from fedmmkt.common.image_encoders import image_encoders
    from fedmmkt.common.payloads import (
        ClassReport,
        ClientReport,
        DistillationPayload,
        Instructions,
        PayloadError,
        Request,
        SoftTargets,
        SyntheticBatch,
    )
    from fedmmkt.common.registry import Registry
    from fedmmkt.server_app.exchange import Answer
    from fedmmkt.server_app.prompts import Prompt
    from fedmmkt.server_app.publish.card import write_adapter_card
    from fedmmkt.server_app.publish.push import PushError, push_adapter
    from fedmmkt.server_app.report.compare import write_comparison
    from fedmmkt.server_app.rules.aggregation import aggregations
    from fedmmkt.server_app.rules.scores import Feedback, scores
    from fedmmkt.server_app.rules.streaming import by_sample
    from fedmmkt.server_app.rules.updates import UpdateRule, updates
    from fedmmkt.server_app.strategy import FedMMKT, strategies
    from fedmmkt.server_app.t2i.families import Family, FlowFamily, MaskedFamily, families
    from fedmmkt.server_app.t2i.generator import Generator
    from fedmmkt.server_app.t2i.samples import Samples
    from fedmmkt.server_app.trained import generate_folder, load_generator

_PUBLIC = {
    "server_app.strategy": ("FedMMKT", "strategies"),
    "server_app.exchange": ("Answer",),
    "server_app.prompts": ("Prompt",),
    "server_app.publish.card": ("write_adapter_card",),
    "server_app.publish.push": ("PushError", "push_adapter"),
    "server_app.report.compare": ("write_comparison",),
    "server_app.rules.aggregation": ("aggregations",),
    "server_app.rules.scores": ("Feedback", "scores"),
    "server_app.rules.streaming": ("by_sample",),
    "server_app.rules.updates": ("UpdateRule", "updates"),
    "server_app.t2i.families": ("Family", "FlowFamily", "MaskedFamily", "families"),
    "server_app.t2i.generator": ("Generator",),
    "server_app.t2i.samples": ("Samples",),
    "server_app.trained": ("generate_folder", "load_generator"),
    "client_app.models.task_model": ("Inputs", "TaskModel", "task_models"),
    "client_app.trained": ("ClientModel", "load_client_model"),
    "common.registry": ("Registry",),
    "common.image_encoders": ("image_encoders",),
    "common.config": ("ConfigError", "NodeConfig", "RunConfig"),
    "common.payloads": (
        "ClassReport",
        "ClientReport",
        "DistillationPayload",
        "Instructions",
        "PayloadError",
        "Request",
        "SoftTargets",
        "SyntheticBatch",
    ),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [
    "Answer",
    "ClassReport",
    "ClientModel",
    "ClientReport",
    "ConfigError",
    "DistillationPayload",
    "Family",
    "FedMMKT",
    "Feedback",
    "FlowFamily",
    "Generator",
    "Inputs",
    "Instructions",
    "MaskedFamily",
    "NodeConfig",
    "PayloadError",
    "Prompt",
    "PushError",
    "Registry",
    "Request",
    "RunConfig",
    "Samples",
    "SoftTargets",
    "SyntheticBatch",
    "TaskModel",
    "UpdateRule",
    "aggregations",
    "by_sample",
    "families",
    "generate_folder",
    "image_encoders",
    "load_client_model",
    "load_generator",
    "push_adapter",
    "scores",
    "strategies",
    "task_models",
    "updates",
    "write_adapter_card",
    "write_comparison",
]


def _folders(packages: Iterable[str]) -> Iterator[str]:
    """Yield the folders to search for subpackages: each package folder, and its parent if the subpackages are there.

    An app bundle has no weights and no page template, because Flower bundles only code and text. These files are found
    in the installation, which comes after the bundle in this list.
    """
    for package in packages:
        yield package
        if not (Path(package) / "common").is_dir():
            yield str(Path(package).parent)


__path__ = list(_folders(extend_path(__path__, __name__)))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public are: {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
