"""Construction of a task model by its name in the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import fedmmkt.client_app.models.small  # noqa: F401  Registers the built-in models.
from fedmmkt.client_app.models.dry_run import check_dry_run
from fedmmkt.client_app.models.task_model import TaskModel, TaskModelFactory, task_models
from fedmmkt.common.config import ConfigError, NodeConfig, RunConfig, Setting
from fedmmkt.common.failures import one_line

TRANSFORMERS = "transformers:"


def check_task_model(name: str, extra: Mapping[str, Setting] | None = None, where: str = "") -> None:
    """Check that a model has a valid name, and that transformers finds its description; nothing is built.

    Raises
    ------
    ConfigError
        If the name is not registered, does not lead to a function of the number of classes and the image size, or
        names nothing that transformers could load.
    """
    if name.startswith(TRANSFORMERS):
        from fedmmkt.client_app.models.pretrained import check_on_hub, check_source

        source = name.removeprefix(TRANSFORMERS)
        if not check_source(source).is_dir():
            check_on_hub(source)
    else:
        _find_factory(name, extra, where)


def modality_of(name: str) -> str:
    """Return what a registered model reads; an empty text for others, which would have to be loaded."""
    return task_models.get(name)(2, 32).modality if name in task_models.names() else ""


def build_task_model(
    name: str,
    classes: int,
    image_size: int,
    labels: tuple[str, ...] = (),
    extra: Mapping[str, Setting] | None = None,
    where: str = "",
) -> TaskModel:
    """Build a task model by registered name, by ``transformers:SOURCE``, or by ``module:function``.

    Models of functions are tried on examples, so that one whose parts do not fit is refused before it learns.

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
        If the name has none of these forms, the model cannot be loaded, or the result is not a `TaskModel` for these
        classes and this image size.
    """
    if name.startswith(TRANSFORMERS):
        from fedmmkt.client_app.models.pretrained import build_transformers_model  # Slow to import.

        labels = labels or tuple(map(str, range(classes)))
        return build_transformers_model(name.removeprefix(TRANSFORMERS), labels, image_size)
    factory = _find_factory(name, extra, where)
    model = _called(factory, classes, image_size, name)
    if not isinstance(model, TaskModel):
        found = "nothing" if model is None else f"a {type(model).__name__}"
        raise ConfigError(f"client model {name!r} returned {found}; allowed: a function that returns a TaskModel")
    check_dry_run(model, classes, image_size, name)
    return model


def _find_factory(name: str, extra: Mapping[str, Setting] | None, where: str) -> TaskModelFactory:
    """Return the function of a name; what is wrong with it is told in one line, since it may come from a node's log."""
    try:
        factory: TaskModelFactory = task_models.get(name, extra, where)
    except ConfigError as error:
        raise ConfigError(" ".join(str(error).split())) from error.__cause__
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # Functions written in C may have none.
        return factory
    try:
        signature.bind(0, 0)
    except TypeError:
        raise ConfigError(
            f"client model {name!r} takes {signature}; allowed: a function of the number of classes and the image size"
        ) from None
    return factory


def _called(factory: TaskModelFactory, classes: int, image_size: int, name: str) -> object:
    """Call a function that builds a model; any error of it is told in one line."""
    try:
        return factory(classes, image_size)
    except ConfigError:
        raise
    except Exception as error:  # The user's function may raise anything.
        raise ConfigError(
            f"client model {name!r} cannot be built for {classes} classes and images of {image_size} x {image_size} "
            f"pixels ({one_line(error)}); allowed: a function that returns a TaskModel for them"
        ) from error


def chosen_model(config: RunConfig, node: NodeConfig) -> str:
    """Return the name of a client's task model: that of its node-config, else one of the run's.

    Raises
    ------
    ConfigError
        If the run chooses a model that is not built in, and the node has data of its own and does not allow that.
    """
    if node.model:
        return node.model
    models = config.client.models
    name = models[(node.partition_id or 0) % len(models)]
    if node.has_own_data and not node.run_models and ":" in name:
        raise ConfigError(
            f"run-config key 'client.models' names {name!r}; allowed on a node with data of its own: built-in models, "
            "or any with the node-config key 'run-models=true', or one in the node-config key 'model'"
        )
    return name


def model_label(name: str) -> str:
    """Return a model's name for logs and reports, without the folder that it was loaded from."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(TRANSFORMERS) else name
