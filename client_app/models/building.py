"""Construction of a task model by its name in the configuration."""

from __future__ import annotations

from collections.abc import Mapping

import fedmmkt.client_app.models.small  # noqa: F401  Registers the built-in models.
from fedmmkt.client_app.models.task_model import TaskModel, TaskModelFactory, task_models
from fedmmkt.common.config import ConfigError, Setting

TRANSFORMERS = "transformers:"


def check_task_model(name: str, extra: Mapping[str, Setting] | None = None, where: str = "") -> None:
    """Check that a model has a valid name; nothing is built, and names of transformers models are not checked.

    Raises
    ------
    ConfigError
        If the name is not registered and does not lead to a function.
    """
    if not name.startswith(TRANSFORMERS):
        task_models.get(name, extra, where)


def build_task_model(
    name: str,
    classes: int,
    image_size: int,
    labels: tuple[str, ...] = (),
    extra: Mapping[str, Setting] | None = None,
    where: str = "",
) -> TaskModel:
    """Build a task model by registered name, by ``transformers:SOURCE``, or by ``module:function``.

    Parameters
    ----------
    name : str
        Name of the model.
    classes : int
        Size of the class space.
    image_size : int
        Side of the images that the model will read, in pixels.
    labels : tuple of str
        Names of the classes; a transformers model stores them in its configuration.
    extra : mapping, optional
        The user's own settings.
    where : str
        Where the name was given, for error texts; by default the run-config key.

    Raises
    ------
    ConfigError
        If the name has none of these forms, the model cannot be loaded, or the result is not a `TaskModel`.
    """
    if name.startswith(TRANSFORMERS):
        from fedmmkt.client_app.models.pretrained import build_transformers_model  # Slow to import.

        labels = labels or tuple(map(str, range(classes)))
        return build_transformers_model(name.removeprefix(TRANSFORMERS), labels, image_size)
    factory: TaskModelFactory = task_models.get(name, extra, where)
    model = factory(classes, image_size)
    if not isinstance(model, TaskModel):
        where = where or f"run-config key {task_models.key!r}"
        raise ConfigError(f"{where} is {name!r}, which built a {type(model).__name__}; allowed: a TaskModel")
    return model


def model_label(name: str) -> str:
    """Return a model's name for logs and reports, without the folder that it was loaded from."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(TRANSFORMERS) else name
