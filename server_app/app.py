"""The ServerApp: configuration, then the parts, then the strategy's rounds."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from logging import ERROR, INFO
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import log

from common.config import ConfigError, RunConfig
from common.datasets import Splits, load_splits, read_class_names, to_examples
from server_app.adaptation import get_scores, get_update
from server_app.aggregation import get_aggregation
from server_app.checkpoint import check_continues, drop_later, find_state
from server_app.class_space import FROM_CLIENTS, classes_of_clients
from server_app.evaluation import Judge
from server_app.generator import Generator
from server_app.prompts import build_prompt_source
from server_app.run_folder import RunFolder
from server_app.strategy import FedMMKT, RunError

app = ServerApp()

PACKAGES = ("flwr", "torch", "diffusers", "transformers", "peft")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedMMKT as the run-config says."""
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="diffusers")
    try:
        config = RunConfig.from_flower(context.run_config)
        asks = config.data.classes == FROM_CLIENTS and not config.resume_from
        classes = classes_of_clients(grid, config) if asks else ()
        build_strategy(config, context.run_id, classes=classes).start(grid)
    except (ConfigError, RunError, OSError) as error:
        log(ERROR, "%s", error)
        raise


def build_strategy(
    config: RunConfig, run_id: int, strategy: type[FedMMKT] = FedMMKT, classes: tuple[str, ...] = ()
) -> FedMMKT:
    """Build a strategy and its parts; whatever is wrong shows here, before anything is generated.

    Parameters
    ----------
    config : RunConfig
    run_id : int
        Flower's; names the run.
    strategy : type
        `FedMMKT` or a subclass.
    classes : tuple of str
        The class space, where clients were asked for it.

    Raises
    ------
    ConfigError
        If a setting cannot be used.
    """
    for get_rule, name in (
        (get_aggregation, config.t2i.aggregation),
        (get_scores, config.t2i.scores),
        (get_update, config.t2i.update),
    ):
        get_rule(name)
    earlier = RunFolder(Path(config.resume_from).expanduser())
    state = find_state(earlier) if config.resume_from else None
    classes, splits = _classes_and_splits(config, classes or (state.classes if state else ()))
    if state:
        check_continues(state, config, classes)
    path = Path(config.output_dir or config.resume_from or f"~/.fedmmkt/runs/{run_id}").expanduser()
    if state:
        run_folder = RunFolder.resume(path, config.tensorboard, earlier, state.metrics)
        drop_later(run_folder.checkpoints, state.round)
    else:
        run_folder = RunFolder.create(path, config.tensorboard)
    log(INFO, "Run folder: %s", run_folder.path)
    prompts = build_prompt_source(config.t2i, classes)
    generator = Generator(config.t2i, config.seed)
    judge = train_judge(config, splits) if splits else None
    run_folder.write_config(
        {
            "config": config.model_dump(mode="json", by_alias=True),
            "classes": list(classes),
            "versions": {package: version(package) for package in PACKAGES},
            "run_id": str(run_id),
            "threads": torch.get_num_threads(),
        }
        | ({"resumed": {"run": state.run_key, "after-round": state.round}} if state else {})
    )
    # Flower's ids have up to 20 digits; of one length, messages of equal runs have equally many bytes.
    built = strategy(config, classes, generator, prompts, run_folder, f"{run_id:020d}", judge)
    if state:
        built.resume(state)
    return built


def _classes_and_splits(config: RunConfig, known: tuple[str, ...]) -> tuple[tuple[str, ...], Splits | None]:
    """Take the class space from clients, the run-config or the dataset; the dataset too, for a judge to learn from."""
    asked = config.data.classes == FROM_CLIENTS
    if asked and not known:
        raise ConfigError("run-config key 'data.classes' is 'clients', and no client was asked: see classes_of_clients")
    named = known if asked else read_class_names(config.data)
    if named and not config.judge:
        return named, None
    splits = load_splits(config.data, config.seed)
    classes = named or splits.classes
    if set(classes) != set(splits.classes):
        raise ConfigError(
            f"run-config key 'data.classes' is {', '.join(classes)!r}, but the dataset {config.data.dataset!r} "
            f"has {', '.join(splits.classes)!r}; allowed: the dataset's classes, or empty; or judge=false"
        )
    return classes, splits if config.judge else None


def train_judge(config: RunConfig, splits: Splits) -> Judge | None:
    """Train the judge, if the dataset has images; it depends on the data and the seed alone."""
    if config.data.image_column not in splits.train.column_names:
        return None
    log(INFO, "Training the judge on %s images", len(splits.train))
    train, test = (to_examples(part, config.data, images=True, texts=False) for part in (splits.train, splits.test))
    if train.images_NHWC is None or test.images_NHWC is None:
        return None
    judge = Judge(train.images_NHWC, train.labels_N, test.images_NHWC, test.labels_N, len(splits.classes), config.seed)
    log(INFO, "The judge recognises %.1f%% of the real test images", 100 * judge.accuracy)
    return judge
