"""The ServerApp: it reads the configuration, builds the parts, and runs the strategy's rounds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from logging import ERROR, INFO, LogRecord
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import log
from flwr.supercore.logger import FLOWER_LOGGER, update_console_handler

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.common.dataset_hints import check_classes
from fedmmkt.common.datasets import FROM_CLIENTS, Splits, load_splits, read_class_names
from fedmmkt.common.failures import RunError, one_line, write_traceback
from fedmmkt.server_app.class_space import classes_of_clients
from fedmmkt.server_app.ledger import Ledger
from fedmmkt.server_app.prompts import build_prompt_source
from fedmmkt.server_app.record.checkpoint import checkpoints, remove_later_checkpoints
from fedmmkt.server_app.record.judge import Judge
from fedmmkt.server_app.record.judge_training import train_judge
from fedmmkt.server_app.record.provenance import describe_machine
from fedmmkt.server_app.record.resuming import check_resumable, find_state, kept_metrics
from fedmmkt.server_app.record.run_folder import RunFolder
from fedmmkt.server_app.record.trackers import check_trackers
from fedmmkt.server_app.recorder import Recorder
from fedmmkt.server_app.rules.checks import check_rules
from fedmmkt.server_app.sizes import check_sizes, warn_of_sizes
from fedmmkt.server_app.strategy import FedMMKT, strategies
from fedmmkt.server_app.t2i.families import families
from fedmmkt.server_app.t2i.generator import Generator

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedMMKT with the given run-config."""
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="diffusers")
    update_console_handler(timestamps=True, colored=False)  # Flower passes the log on, to a file or to a terminal.
    configured = (context.run_config.get(key) for key in ("output-dir", "resume-from"))
    with _failing_in_one_line(_run_path(context.run_id, *configured)):
        config = RunConfig.from_flower(context.run_config)
        ask_clients = config.data.classes == FROM_CLIENTS and not config.resume_from
        classes = classes_of_clients(grid, config) if ask_clients else ()
        build_strategy(config, context.run_id, classes).start(grid)


@contextmanager
def _failing_in_one_line(folder: Path) -> Iterator[None]:
    """Log why the block fails, as the last line of the run; an error that nobody expected leaves its traceback there.

    Flower logs each traceback too, and an exit code of its own; both are silenced.
    """
    file = folder / "traceback.txt"
    try:
        file.unlink(missing_ok=True)  # It is that of an earlier run.
        yield
    except ConfigError as error:
        _tell_once(error)
        raise
    except RunError as error:
        failure = RunError(f"{error}{_way_on(folder)}")
        _tell_once(failure)
        raise failure from error
    except OSError as error:  # Such as a full disk; the text names the file.
        what = str(error).removeprefix(f"[Errno {error.errno}] ")
        failure = RunError(f"{what}{_way_on(folder)}")
        _tell_once(failure)
        raise failure from error
    except Exception as error:
        kept = f"its traceback is in {file}" if write_traceback(file, error) else "no traceback could be kept"
        failure = RunError(f"{one_line(error)}; {kept}")
        _tell_once(failure)
        raise failure from error


def _way_on(folder: Path) -> str:
    """Say how a run that failed goes on; nothing if it has no checkpoint."""
    is_resumable = any(checkpoints(RunFolder(folder).checkpoints))
    return f"; once that is mended, it goes on with resume-from={str(folder)!r}" if is_resumable else ""


def _tell_once(failure: Exception) -> None:
    log(ERROR, "The run failed: %s", failure)

    def is_new(record: LogRecord) -> bool:
        is_repeated = record.exc_info is not None and record.exc_info[1] is failure
        return not is_repeated and not record.getMessage().startswith("Exit Code:")

    FLOWER_LOGGER.addFilter(is_new)


def build_strategy(config: RunConfig, run_id: int, classes: tuple[str, ...] = ()) -> FedMMKT:
    """Build the configured strategy and its parts; wrong settings are found before the first round.

    Parameters
    ----------
    config : RunConfig
    run_id : int
        Flower's id of the run.
    classes : tuple of str
        The class space, if clients were asked for it.

    Raises
    ------
    ConfigError
        If a setting cannot be used.
    """
    extra = config.extra.as_dict()
    strategy = strategies.get(config.strategy, extra)
    check_rules(config)
    check_trackers(config.tracker)
    family = None if config.t2i.family == "auto" else families.get(config.t2i.family, extra)
    earlier = RunFolder(Path(config.resume_from).expanduser())
    state = find_state(earlier) if config.resume_from else None
    classes, splits = _classes_and_splits(config, classes or (state.classes if state else ()))
    if state:
        check_resumable(state, config, classes)
    check_sizes(config, len(classes))
    warn_of_sizes(config, len(classes))
    path = _run_path(run_id, config.output_dir, config.resume_from)
    if state:
        metrics_bytes, is_measured = kept_metrics(earlier, state)
        run_folder = RunFolder.resume(path, earlier, state.round, metrics_bytes)
        remove_later_checkpoints(run_folder.checkpoints, state.round)
    else:
        run_folder = RunFolder.create(path)
    log(INFO, "Run folder: %s", run_folder.path)
    prompts = build_prompt_source(config.t2i, classes)
    generator = Generator(config.t2i, config.seed, family)
    judge = train_judge(config, splits, generator.device) if splits else None
    described = (
        {"classes": list(classes), "run_id": str(run_id), "started": datetime.now().isoformat(timespec="seconds")}
        | describe_machine()
        | ({"judge": describe_judge(judge, config)} if judge else {})
        | ({"resumed": {"run": state.run_key, "after-round": state.round}} if state else {})
    )
    # Flower's ids have up to 20 digits. Padded to 20, they give messages of equal runs the same size.
    ledger = Ledger(f"{run_id:020d}", config.client.pool_rounds, config.t2i.pool_rounds)
    recorder = Recorder(config, classes, run_folder, generator, prompts, judge, described)
    if state:
        generator.adapter.load_state(state.adapter, f"the checkpoint of round {state.round}")
        ledger.restore(
            state.lineage(),
            state.clients,
            state.history,
            state.pool,
            state.identities,
            state.standings,
            state.drawn,
            state.guard,
            state.made_from,
        )
        recorder.restore(state, is_measured)
    return strategy(config, classes, generator, prompts, ledger, recorder)


def describe_judge(judge: Judge, config: RunConfig) -> dict[str, Any]:
    """Return what ``config.json`` says of the judge: its accuracy, the images measured, and each measure's floor."""
    images = {"generated": config.t2i.evaluation_samples, "real": len(judge.test_features_NF)}
    return {"accuracy": judge.accuracy, "images": images, "floors": judge.floors()}


def _run_path(run_id: int, *configured: object) -> Path:
    """Return the run folder: the first one that is configured, else one in the home folder."""
    return Path(str(next(filter(None, configured), f"~/.fedmmkt/runs/{run_id}"))).expanduser()


def _classes_and_splits(config: RunConfig, collected: tuple[str, ...]) -> tuple[tuple[str, ...], Splits | None]:
    """Return the class space, and the dataset if the judge needs it.

    The class space comes from clients, from the run-config or from the dataset. ``collected`` holds the classes that
    clients named, or those of a checkpoint.
    """
    from_clients = config.data.classes == FROM_CLIENTS
    if from_clients and not collected:
        raise ConfigError("run-config key 'data.classes' is 'clients', and no client was asked: see classes_of_clients")
    named = collected if from_clients else read_class_names(config.data)
    if named and not config.judge:
        return named, None
    splits = load_splits(config.data, config.seed)
    classes = named or splits.classes
    if config.judge and set(classes) != set(splits.classes):
        check_classes(splits, config.data.model_copy(update={"classes": classes}), are_all_held=True)
    return classes, splits if config.judge else None
