"""What can be told of a run's settings before anything is started: `fedmmkt demo`, `federation` and `doctor` share it.

Each check returns nothing, or raises `ConfigError` with the problem and its solution. All problems are told at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from fedmmkt.client_app.models.building import check_task_model, modality_of
from fedmmkt.common.config import BUILT_IN, ConfigError, RunConfig, Setting
from fedmmkt.common.files import write_test_file
from fedmmkt.common.registry import importable
from fedmmkt.common.tables import ORIGIN
from fedmmkt.deploy.bundle import PROJECT, bundled_files, default_config, read_app, runs_fedmmkt
from fedmmkt.deploy.settings import earlier_nodes, right_part
from fedmmkt.server_app.record.trackers import check_trackers
from fedmmkt.server_app.rules.checks import check_rules

logger = logging.getLogger("flwr")

READ_WHOLE = (
    100_000_000  # Bytes of tables up to which they are read as the run reads them; of larger ones, the columns.
)

Check = Callable[[], object]


def check_run(app: Path, nodes: int, config: Mapping[str, Setting]) -> None:
    """Check the settings of a run before anything is started.

    Raises
    ------
    ConfigError
        If the configuration is wrong, a file that it names cannot be used, or the output folder cannot be written; the
        text names all problems, one a line.
    """
    if nodes < 1:
        raise ConfigError(f"--nodes is {nodes}; allowed: 1 or more")
    complete, checks = _checks_of_run(app, nodes, config)
    problems = _problems([partial(_check_same_nodes, nodes, config), *checks] if complete else checks)
    if complete:  # Settings are told first: what is wrong with them is told before photos are read.
        problems += _problems(checks_of_data(complete, nodes, whole=not problems))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    if complete:
        _tell_hints(complete)


def check_all(checks: Iterable[Check]) -> None:
    """Run all checks.

    Raises
    ------
    ConfigError
        If one of them fails; the text is that of all that do, one a line.
    """
    if problems := _problems(checks):
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _problems(checks: Iterable[Check]) -> list[str]:
    problems = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems.append(str(error))
    return problems


def checks_of_clients(app: Path, config: RunConfig) -> Iterator[Check]:
    """Yield a check of each client model; modules of one's own are imported from the app's folder."""
    for model in config.client.models:
        yield partial(_within, app, partial(check_task_model, model, config.extra.as_dict()))
    yield partial(_check_bundled, app, config.client.models)
    if config.client.vote_encoder:
        yield partial(_within, app, partial(_check_vote_encoder, config.client.vote_encoder))


def checks_of_server(app: Path, config: RunConfig) -> Iterator[Check]:
    """Yield a check of each rule and part that the server uses, and of each file that it reads."""
    yield partial(check_trackers, config.tracker)
    if config.judge_encoder:
        yield partial(_within, app, partial(_check_judge_encoder, config.judge_encoder))
    for check in (check_rules, _check_strategy, _check_family):
        yield partial(_within, app, partial(check, config))
    named = (config.t2i.aggregation, config.t2i.scores, config.t2i.update, config.strategy, config.t2i.family)
    yield partial(_check_bundled, app, named)
    from fedmmkt.common.datasets import read_class_names

    yield partial(read_class_names, config.data)
    if config.t2i.model != RunConfig().t2i.model:
        yield partial(_check_pipeline, config)
    yield partial(_check_sizes, config)
    if config.t2i.adapter:
        yield partial(_check_adapter, Path(config.t2i.adapter).expanduser())
    if config.t2i.prompts != RunConfig().t2i.prompts:
        yield partial(_check_prompts, config)
    if config.output_dir:
        yield partial(_check_unused, Path(config.output_dir).expanduser())
    if config.resume_from:
        yield partial(_check_resumed, Path(config.resume_from).expanduser(), config)


def checks_of_data(config: RunConfig, nodes: int | None = None, whole: bool = True) -> Iterator[Check]:
    """Yield a check of the dataset, and whether each client model that has a name finds in it what it reads.

    ``nodes`` is the number of simulated nodes, to which the models are given in turn; None for all models. Of a local
    dataset that is not to be read ``whole``, the header is.
    """
    from fedmmkt.common.partitioning import partition_rows

    try:
        columns = _columns(config, whole)
    except ConfigError as error:
        yield partial(_raise, error)
        return
    for model in config.client.models[:nodes] if columns else ():
        yield partial(_check_reads, model, columns, config)
    if columns and whole and _is_read_whole(config):
        yield partial(check_named_classes, config)
        yield partial(_check_starter, config)
        if nodes:
            yield partial(partition_rows, config.data, nodes, config.seed)


def check_named_classes(config: RunConfig) -> None:
    """Check that the classes that a run names are those of its dataset, as its judge needs them."""
    from fedmmkt.common.dataset_hints import check_classes
    from fedmmkt.common.datasets import load_splits

    if config.data.classes:
        check_classes(load_splits(config.data, config.seed), config.data, config.judge)


def _checks_of_run(app: Path, nodes: int, config: Mapping[str, Setting]) -> tuple[RunConfig | None, Iterable[Check]]:
    """Return the settings of a run of FedMMKT, as far as they are right, and a check of each but the data's."""
    project = read_app(app)
    defaults = default_config(project)
    checks: list[Check] = [partial(_check_nodes, nodes, config)]
    if folder := config.get("output-dir"):
        checks.append(partial(_check_writable, Path(str(folder)).expanduser()))
    if not runs_fedmmkt(project):
        name = str(project.get("project", {}).get("name", "the app"))
        return None, [*checks, partial(_check_keys, name, config.keys() - defaults)]
    complete, error = right_part({**defaults, **config})
    if error:
        checks.append(partial(_raise, error))
    return complete, chain(checks, checks_of_clients(app, complete), checks_of_server(app, complete))


def _tell_hints(config: RunConfig) -> None:
    """Tell what is likely not what was meant: a T2I model of digits for other classes, splits that are none."""
    from fedmmkt.common.dataset_hints import shared_images, unused_splits
    from fedmmkt.common.datasets import load_splits
    from fedmmkt.server_app.prompts import warn_of_other_classes

    if config.data.dataset != RunConfig().data.dataset and _is_read_whole(config):
        splits = load_splits(config.data, config.seed)
        if hint := unused_splits(splits.train, config.data):
            logger.warning("%s: %s", config.data.dataset, hint)
        if shared := shared_images(splits, config.data):
            logger.warning("%s", shared)
    if config.t2i.model == RunConfig().t2i.model:
        warn_of_other_classes(_classes(config))


def _is_read_whole(config: RunConfig) -> bool:
    from fedmmkt.common.dataset_files import size_of_tables

    return size_of_tables(config.data) <= READ_WHOLE


def _raise(error: ConfigError) -> None:
    raise error


def _within(app: Path, check: Check) -> None:
    with importable(app):
        check()


def _check_nodes(nodes: int, config: Mapping[str, Setting]) -> None:
    needed = config.get("min-available-nodes", 1)
    if isinstance(needed, int) and needed > nodes:
        raise ConfigError(
            f"min-available-nodes is {needed}, but only {nodes} nodes are simulated: the run would never start"
        )


def _check_same_nodes(nodes: int, config: Mapping[str, Setting]) -> None:
    """Check that as many nodes are simulated as in the run to resume: the data would be divided in another way."""
    folder = config.get("resume-from")
    earlier = earlier_nodes(Path(str(folder))) if folder else None
    if earlier and earlier != nodes:
        raise ConfigError(
            f"--nodes is {nodes}, and the run that resume-from names has {earlier} nodes; with others, clients would "
            f"get other data than they have learned from; allowed: --nodes {earlier}, or no --nodes"
        )


def _check_keys(app: str, unknown: Iterable[str]) -> None:
    if unknown := sorted(unknown):
        raise ConfigError(f"run-config keys unknown to {app}: {', '.join(unknown)}")


def _check_vote_encoder(name: str) -> None:
    from fedmmkt.client_app.public_features import find_encoder

    find_encoder(name)


def _check_judge_encoder(name: str) -> None:
    from fedmmkt.server_app.record.public_measures import find_network

    find_network(name)


# The imports of our own parts take seconds and cannot fail, so they are skipped.
def _check_strategy(config: RunConfig) -> None:
    if config.strategy != RunConfig().strategy:
        from fedmmkt.server_app.strategy import strategies

        strategies.get(config.strategy, config.extra.as_dict())


def _check_family(config: RunConfig) -> None:
    if config.t2i.family != RunConfig().t2i.family:
        from fedmmkt.server_app.t2i.families import families

        families.get(config.t2i.family, config.extra.as_dict())


def _check_pipeline(config: RunConfig) -> None:
    """Check the files of the T2I model, and that a family is registered for it."""
    from fedmmkt.server_app.t2i.pipeline_folder import check_pipeline

    kind = check_pipeline(config.t2i.model)
    if config.t2i.family == RunConfig().t2i.family:
        from fedmmkt.server_app.t2i.families import family_called

        family_called(kind, config.t2i.model)


def _check_adapter(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        found = "has no *.safetensors" if folder.is_dir() else "is no folder"
        raise ConfigError(
            f"run-config key 't2i.adapter' is {str(folder)!r}, which {found}; allowed: the folder `lora` of a run, or "
            "empty"
        )


def _cheap_classes(config: RunConfig) -> tuple[str, ...]:
    """Return the class space where it is known without the data, else none."""
    from fedmmkt.common.dataset_files import DIGIT_NAMES
    from fedmmkt.common.datasets import FROM_CLIENTS, read_class_names

    if config.data.classes == FROM_CLIENTS:
        return ()
    return read_class_names(config.data) or (DIGIT_NAMES if config.data.dataset in BUILT_IN else ())


def _classes(config: RunConfig) -> tuple[str, ...]:
    """Return the class space, from the data if need be; none if it is the clients', or the data are large."""
    from fedmmkt.common.datasets import FROM_CLIENTS, load_splits

    if (classes := _cheap_classes(config)) or config.data.classes == FROM_CLIENTS or not _is_read_whole(config):
        return classes
    return load_splits(config.data, config.seed).classes


def _check_starter(config: RunConfig) -> None:
    """Refuse the starter for classes of which it draws none."""
    from fedmmkt.server_app.prompts import check_starter_draws

    if config.t2i.model == RunConfig().t2i.model:
        check_starter_draws(_classes(config))


def _check_sizes(config: RunConfig) -> None:
    from fedmmkt.server_app.sizes import check_sizes

    if classes := _cheap_classes(config):
        check_sizes(config, len(classes))


def _check_prompts(config: RunConfig) -> None:
    """Check a file of prompts; their classes too where these are known without the data."""
    from fedmmkt.server_app.prompts import FilePrompts, read_prompts

    classes = _cheap_classes(config)
    path = Path(config.t2i.prompts).expanduser()
    if classes:
        FilePrompts(path, classes)
    else:
        read_prompts(path)


def _check_unused(folder: Path) -> None:
    from fedmmkt.server_app.record.run_folder import RunFolder

    if folder.is_dir():
        RunFolder(folder).check_is_free()
        with RunFolder(folder).in_use():
            return


def _check_resumed(folder: Path, config: RunConfig) -> None:
    """Check that there is a checkpoint, that it is one of these settings, and that rounds are left."""
    from fedmmkt.server_app.record.checkpoint import checkpoints
    from fedmmkt.server_app.record.resuming import check_same_settings, check_unfinished, nothing_to_resume
    from fedmmkt.server_app.record.run_folder import RunFolder

    if not checkpoints(RunFolder(folder).checkpoints):
        raise nothing_to_resume(folder)
    try:
        earlier = RunFolder(folder).read_config()["config"]
    except (OSError, ValueError, KeyError):
        return  # The checkpoint has the settings too, but to read it takes long.
    check_same_settings(earlier, config)
    check_unfinished(RunFolder(folder), config)


def _columns(config: RunConfig, whole: bool) -> Sequence[str]:
    """Return the columns of a dataset, checked as far as that is cheap; none if only reading it all would tell."""
    from fedmmkt.common.dataset_files import HUB_ID
    from fedmmkt.common.datasets import check_header, check_image_files, load_splits

    if config.data.dataset == RunConfig().data.dataset:
        return ("image", "text", "label")
    is_there = Path(config.data.dataset).expanduser().exists()
    if not _is_read_whole(config) or (not whole and is_there):
        return check_header(config.data)
    if not whole and HUB_ID.fullmatch(config.data.dataset):
        return ()
    splits = load_splits(config.data, config.seed)
    for part in (splits.train, splits.test):
        check_image_files(part, config.data)
    return tuple(splits.train.column_names)


def _check_reads(model: str, columns: Sequence[str], config: RunConfig) -> None:
    for kind, field in (("image", "image_column"), ("text", "text_column")):
        # The model is built for this, which takes a second.
        if (column := getattr(config.data, field)) not in columns and kind in modality_of(model):
            named = ", ".join(name for name in columns if name != ORIGIN)
            raise ConfigError(
                f"{config.data.key(field)} is {column!r}, and the dataset has no such column, which client model "
                f"{model!r} reads; allowed: {named}, or client.models without it"
            )


def _check_bundled(app: Path, names: Sequence[str]) -> None:
    """Check that modules which lie in the app's folder travel with it."""
    bundled = None
    for module in {name.partition(":")[0] for name in names if ":" in name and not name.startswith("transformers:")}:
        file = Path(getattr(sys.modules.get(module), "__file__", None) or "/")
        if not file.is_relative_to(app.resolve()):
            continue
        bundled = bundled_files(app) if bundled is None else bundled
        if (own := file.relative_to(app.resolve()).as_posix()) not in bundled:
            raise ConfigError(
                f"{own} lies in the app {str(app.resolve())!r}, but is no part of its bundle (fab-include in its "
                f"{PROJECT}), so that the run would not find {module!r}; put it into an app of your own, and name "
                "that with --app"
            )


def _check_writable(folder: Path) -> None:
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    try:
        write_test_file(there)
    except OSError as error:
        raise ConfigError(f"output folder {str(folder)!r} cannot be written: {error.strerror}") from None
