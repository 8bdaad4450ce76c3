"""Checks of one host: versions, a node's data and model, the server's T2I model, folders and disk.

Each check returns a text with its result, or raises `ConfigError` with the problem and its solution.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedmmkt.common.config import ConfigError, DataConfig, NodeConfig, RunConfig

if TYPE_CHECKING:
    from fedmmkt.client_app.models.task_model import TaskModel
    from fedmmkt.common.datasets import Examples, Splits

PACKAGE = "fedmmkt"
SHOWN = ("flwr", "torch", "diffusers", "transformers", "datasets")
GIB = 2**30


def check_versions() -> str:
    """Check the versions of Python and of all packages against the requirements of the installed project."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"{PACKAGE} is not installed for {sys.executable}; pip install it there") from None
    wrong = []
    if platform.python_version() not in SpecifierSet(metadata["Requires-Python"]):
        wrong.append(f"python {platform.python_version()} ({metadata['Requires-Python']})")
    for requirement in map(Requirement, importlib.metadata.requires(PACKAGE) or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            wrong += mismatch(requirement)
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: pip install --upgrade the package, wheel or folder, of {PACKAGE}")
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
    return f"{PACKAGE} {metadata['Version']}, python {platform.python_version()}, {shown}"


def mismatch(requirement: Requirement) -> list[str]:
    """Return the mismatch between an installed package and a requirement; an empty list if it fits."""
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return [f"{wanted} is missing"]
    fits = requirement.specifier.contains(version, prereleases=True)
    return [] if fits else [f"{requirement.name} {version} is not {wanted}"]


def check_model(config: RunConfig, node: NodeConfig) -> str:
    """Check that a node's task model can be built, that its parts fit each other, and that it runs on its device."""
    from fedmmkt.client_app.models.building import chosen_model
    from fedmmkt.client_app.models.dry_run import check_dry_run
    from fedmmkt.common.devices import pick_device

    device, name = pick_device(node.device), chosen_model(config, node)
    classes = _named_classes(config) or ("one class", "another")
    model = _build_model(config, node, classes).to(device)
    check_dry_run(model, len(classes), config.data.image_size, name)
    return f"{name} reads {model.modality}, runs on {device}"


def check_data(config: RunConfig, node: NodeConfig) -> str:
    """Check that a node's data can be read, as its client does, and count the examples per class.

    The class space is that of the run-config if it names classes, else that of the data. With a privacy ledger, a node
    whose data have none of them tells the server nothing of it: so it is told here.
    """
    from fedmmkt.client_app.data.private_data import load_private_data
    from fedmmkt.common.dataset_hints import shared_images
    from fedmmkt.common.datasets import load_splits
    from fedmmkt.common.tables import some

    own = node.own_data(config.data)
    splits = load_splits(own, config.seed)
    if shared := shared_images(splits, own):
        raise ConfigError(shared)
    classes = _named_classes(config) or splits.classes
    modality = _build_model(config, node, classes).modality
    data = load_private_data(config, node, classes, "image" in modality, "text" in modality)
    counted = _counted(node.data_path, data.train, data.test, classes)
    if not len(data.train):
        raise ConfigError(
            f"{counted}; the run's classes are {some(classes)} ('data.classes'): a node with these data would answer "
            "with noise alone, and the server is told nothing of it"
        )
    return counted


def check_ledger(ledger: Path, state: Path) -> str:
    """Check that a node's privacy ledger can be used, and is not spent; say what is spent."""
    from fedmmkt.client_app.privacy.ledger import PrivacyLedger
    from fedmmkt.client_app.privacy.mode import HEADS

    told = PrivacyLedger(ledger, state / HEADS).statement()
    if not os.access(ledger.expanduser(), os.W_OK):
        raise ConfigError(f"{ledger} cannot be written by this user; run as the service's user, or chown it")
    spent = (
        f"{ledger} has spent epsilon {told.epsilon:.3g} of {told.budget.epsilon:g} at delta {told.budget.delta:g}, in "
        f"{len(told.runs)} run(s)"
    )
    if told.is_spent:
        raise ConfigError(f"{spent}: a new run is refused, until there is a new ledger from `fedmmkt budget new`")
    return spent


def check_dataset(config: RunConfig) -> str:
    """Check that a simulation's dataset can be read, with its images and texts, and count the examples per class."""
    from fedmmkt.common.dataset_hints import check_classes, shared_images, unused_splits
    from fedmmkt.common.datasets import load_splits, to_examples

    data, splits = config.data, load_splits(config.data, config.seed)
    check_classes(splits, data, config.judge)
    if shared := shared_images(splits, data):
        raise ConfigError(shared)
    counted, hints = {}, [unused_splits(splits.train, data)]
    for kind, column in (("images", data.image_column), ("texts", data.text_column)):
        if column in splits.train.column_names:  # Apart, since a model that reads one needs not the other.
            train, test = (
                to_examples(part, data, images=kind == "images", texts=kind == "texts")
                for part in (splits.train, splits.test)
            )
            counted[kind] = _counted(data.dataset, train, test, splits.classes)
            if kind == "images":
                hints.append(_repeated(train, test))
    said = [f"for models that read {kind}: {text}" for kind, text in counted.items()]
    if len(set(counted.values())) == 1:
        said = [next(iter(counted.values()))]
    return "; ".join([*said, *filter(None, [_read(splits, data), *hints])])


def check_t2i(config: RunConfig) -> str:
    """Check all that the server uses and reads, and that its T2I model can be loaded and is of a supported family."""
    from fedmmkt.common.devices import pick_devices
    from fedmmkt.deploy.bundle import app_folder
    from fedmmkt.deploy.run_checks import check_all, checks_of_server
    from fedmmkt.server_app.t2i.families import families, family_of
    from fedmmkt.server_app.t2i.generator import load_pipeline

    with app_folder(None) as app:
        check_all(checks_of_server(app, config))
    devices = pick_devices(config.t2i.device)
    pipeline = load_pipeline(config.t2i.model)
    name = config.t2i.family
    family = family_of(pipeline, config.t2i.model) if name == "auto" else families.get(name, config.extra.as_dict())
    size = family(pipeline, devices[0]).image_size
    named = ", ".join(map(str, devices))
    return f"{config.t2i.model} is a {type(pipeline).__name__} of {size} pixels, runs on {named}"


def check_folder(folder: Path, private: bool = True) -> str:
    """Check that this user can write to a folder and, if ``private``, that nobody else can read it."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there; install -d -m 700 {folder}, owned by the service's user")
    mode = stat.S_IMODE(folder.stat().st_mode)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{folder} cannot be written by this user; run as the service's user, or chown it to that user"
        )
    if private and mode & 0o077:
        raise ConfigError(f"{folder} has mode {mode:04o}, so that others may look into it; chmod 700 {folder}")
    return f"{folder} is writable" + (" and for its owner only" if private else "")


def check_disk(folder: Path, least: float) -> str:
    """Check that a folder's disk has at least ``least`` GiB free."""
    free = shutil.disk_usage(folder).free / GIB
    if free < least:
        raise ConfigError(
            f"{folder} has {free:.1f} GiB free, less than {least:g}; remove old runs, or use another disk"
        )
    return f"{folder} has {free:.1f} GiB free"


def _counted(place: str, train: Examples, test: Examples, classes: tuple[str, ...]) -> str:
    """Say how many training examples of each class and test examples a client has, and which rows are left out."""
    from fedmmkt.common.tables import some

    counts_C = np.bincount(train.labels_N, minlength=len(classes))
    held = ", ".join(f"{name} {count}" for name, count in zip(classes, counts_C, strict=True) if count)
    lines = (*train.left_out, *test.left_out)
    left_out = f"; left out: {some(lines)}" if lines else ""
    return f"{place} has {len(train)} examples to learn ({held}) and {len(test)} to test{left_out}"


def _read(splits: Splits, data: DataConfig) -> str:
    """Say which tables of a folder are read, and what for; empty for other datasets."""
    from fedmmkt.common.tables import files_of, some

    train, test = files_of(splits.train), files_of(splits.test)
    if not train or not Path(data.dataset).expanduser().is_dir():
        return ""
    return f"read are {some(train)}" + ("" if splits.is_held_out else f" to learn, and {some(test)} to test")


def _repeated(train: Examples, test: Examples) -> str:
    """Say how many images, as a model reads them, are the same as another; empty if none is."""
    parts = [
        [] if part.images_NHWC is None else [image.tobytes() for image in part.images_NHWC] for part in (train, test)
    ]
    count = sum(map(len, parts)) - len(set().union(*parts))
    shared = len(set(parts[0]).intersection(parts[1]))
    return f"{count} images are the same as another, {shared} of them to learn and to test" if count else ""


def _named_classes(config: RunConfig) -> tuple[str, ...]:
    """Return the class names of the run-config; none if they come from the dataset or the clients."""
    from fedmmkt.common.datasets import FROM_CLIENTS, read_class_names

    return () if config.data.classes == FROM_CLIENTS else read_class_names(config.data)


def _build_model(config: RunConfig, node: NodeConfig, classes: tuple[str, ...]) -> TaskModel:
    from fedmmkt.client_app.models.building import build_task_model, chosen_model

    name, extra = chosen_model(config, node), config.extra.as_dict()
    named_in = "node-config key 'model'" if node.model else ""
    return build_task_model(name, len(classes), config.data.image_size, classes, extra, named_in)
