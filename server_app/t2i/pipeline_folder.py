"""The folder of a diffusers pipeline: whether all its files are there and whole, and which variant of its weights.

diffusers and transformers name the broken file only sometimes, and load a pipeline without its tokenizer silently.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from fedmmkt.common.config import ConfigError
from fedmmkt.common.hub import unreachable_hub
from fedmmkt.common.installed import installed
from fedmmkt.common.table_files import is_lfs_pointer

KEY = "run-config key 't2i.model'"
WEIGHTS = (
    *(("diffusion_pytorch_model", "safetensors"), ("model", "safetensors")),
    *(("diffusion_pytorch_model", "bin"), ("pytorch_model", "bin")),
)
LARGEST_HEADER = 100_000_000  # Bytes; safetensors itself reads no larger one.
UNMERGED_PART = 0.1  # Largest part of a vocabulary that no merge makes, but for single characters.
AGAIN = "allowed: the whole folder; download it again"
PULL = "allowed: the file itself; run `git lfs pull` in its repository"


class BrokenFolderError(ValueError):
    """A pipeline's folder is not whole; the text names the file or component, and what helps."""


def local_folder(model: str) -> Path | None:
    """Return the folder of ``t2i.model``; None if it is a hub id.

    Raises
    ------
    ConfigError
        If the folder holds no pipeline.
    """
    path = installed("starter/model") if model == "starter" else Path(model).expanduser()
    if not path.exists() and not model.startswith(("/", "~", ".")):
        return None
    if not (path / "model_index.json").is_file():
        raise ConfigError(
            f"{KEY} is {model!r}, and {path} {'holds no model_index.json' if path.is_dir() else 'is no folder'}; "
            "allowed: 'starter', a diffusers pipeline folder, or a hub id"
        )
    return path


def check_pipeline(model: str) -> str:
    """Check that the files of ``t2i.model`` are there, without loading them; return the name of its pipeline's class.

    Of a model on the hub, only the description is fetched.

    Raises
    ------
    ConfigError
        If a file is missing or broken, or the hub does not have the model.
    """
    folder = local_folder(model)
    try:
        if folder is not None:
            variant_to_load(folder)
            index = folder / "model_index.json"
        else:
            from huggingface_hub import hf_hub_download

            unreachable_hub()
            index = Path(hf_hub_download(model, "model_index.json"))
        return str(json.loads(index.read_text(encoding="utf-8")).get("_class_name"))
    except Exception as error:  # The hub's library raises many kinds of errors.
        raise cannot_load(model, error) from None


def cannot_load(model: str, error: Exception) -> ConfigError:
    """Return the error of a model that cannot be loaded; its text says why, and what helps."""
    if isinstance(error, BrokenFolderError):
        return ConfigError(f"{KEY} is {model!r}, but {error}")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    remedy = "; a folder that diffusers saved is whole if it loads with DiffusionPipeline.from_pretrained"
    if local_folder(model) is None:
        reason = unreachable_hub() or f"{reason} (HF_HUB_OFFLINE is {os.environ.get('HF_HUB_OFFLINE', 'not set')})"
        remedy = (
            "; allowed: 'starter', a folder, or "
            "a hub id that this machine can reach (a gated one needs `hf auth login`) or has in its cache"
        )
    return ConfigError(f"{KEY} is {model!r}, which diffusers cannot load: {reason}{remedy}")


def variant_to_load(folder: Path) -> str | None:
    """Check that the folder of a pipeline is whole, and return the variant of its weights, such as ``fp16``.

    Parameters
    ----------
    folder : Path
        A folder with a ``model_index.json``.

    Returns
    -------
    str or None
        None for the plain weights. A variant is chosen only where a component lacks these.

    Raises
    ------
    BrokenFolderError
        If a component or file is missing, cut off, empty, or a git-lfs pointer.
    """
    components = _components(folder)
    models = [folder / name for name, kind in components.items() if _is_model(kind)]
    variant = _variant(models)
    for name, kind in components.items():
        if _is_model(kind):
            _check_model(folder / name, kind, variant)
        else:
            _check_files(sorted(path for path in (folder / name).iterdir() if path.is_file()))
        if "Tokenizer" in kind.__name__:
            _check_tokenizer(folder / name, kind)
        if "Scheduler" in kind.__name__:
            _check_files([folder / name / "scheduler_config.json"])
    return variant


def _components(folder: Path) -> dict[str, type]:
    """Return the classes of a pipeline's components by name; `object` stands for a class that is not known here."""
    index = folder / "model_index.json"
    _check_files([index])
    described = json.loads(index.read_text(encoding="utf-8"))
    if not isinstance(described, dict):
        raise BrokenFolderError(f"{index} does not describe a pipeline; {AGAIN}")
    named = {name: value for name, value in described.items() if isinstance(value, list) and len(value) == 2}
    if lacking := _lacking(named):
        raise BrokenFolderError(f"{index} names no {lacking!r}; allowed: a pipeline with all components that it needs")
    kinds = {name: _class(*value) for name, value in named.items() if all(isinstance(part, str) for part in value)}
    for name in kinds:
        if not (folder / name).is_dir():
            raise BrokenFolderError(f"its component {name!r} is missing: {folder / name} is no folder; {AGAIN}")
    return kinds


def _lacking(named: dict[str, list[Any]]) -> str:
    """Return the first component that generation needs and that is null in an index; empty if there is none."""
    encoders = [name for name in named if name.startswith("text_encoder")]
    used = [name for name in encoders if named[name][1]] or encoders  # Some pipelines do without some of them.
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in used]
    needed = ("scheduler", "vae", "unet", "transformer", *used, *tokenizers)
    return next((name for name in needed if name in named and not named[name][1]), "")


def _class(library: str, name: str) -> type:
    try:
        found = getattr(import_module(library), name, object)
    except ImportError:  # Such as `stable_diffusion`, where diffusers has a pipeline's own classes.
        return object
    return found if isinstance(found, type) else object


def _is_model(kind: type) -> bool:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    return issubclass(kind, ModelMixin | PreTrainedModel)


def _variant(models: list[Path]) -> str | None:
    """Return the variant that is needed, if any, and that all components have which lack plain weights."""
    if all(_are_there(model, None) for model in models):
        return None
    found = {variant for model in models for variant in _variants(model)}
    for variant in sorted(found, key=lambda name: (name != "fp16", name)):
        if all(_are_there(model, variant) or _are_there(model, None) for model in models):
            return variant
    return None


def _variants(model: Path) -> Iterator[str]:
    stems = "|".join(dict.fromkeys(stem for stem, _ in WEIGHTS))
    for path in model.iterdir():
        single = re.fullmatch(rf"(?:{stems})\.([^.]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)", path.name)
        index = re.fullmatch(rf"(?:{stems})\.(?:safetensors|bin)\.index\.([^.]+)\.json", path.name)
        yield from (match[1] for match in (single, index) if match)


def _are_there(model: Path, variant: str | None) -> bool:
    files = _weight_files(model, variant)
    return bool(files) and all(path.is_file() and not is_lfs_pointer(path) for path in files)


def _weight_files(model: Path, variant: str | None) -> list[Path]:
    """Return the files of a component's weights: one, or shards with their index; none if there are none."""
    infix = f".{variant}" if variant else ""
    for stem, ending in WEIGHTS:
        if (single := model / f"{stem}{infix}.{ending}").is_file():
            return [single]
        if (index := model / f"{stem}.{ending}.index{infix}.json").is_file():
            return [index, *_shards(index)]
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # `_problem` tells what is wrong with the index itself.
    return sorted(index.parent / str(name) for name in names)


def _check_model(model: Path, kind: type, variant: str | None) -> None:
    found = [variant, None, *sorted(_variants(model))]
    files = next(filter(None, (_weight_files(model, name) for name in found)), [])
    if not files:
        raise BrokenFolderError(f"its component {model.name!r} ({kind.__name__}) has no weights in {model}; {AGAIN}")
    _check_files([model / "config.json", *files])


def _check_tokenizer(folder: Path, kind: type) -> None:
    """Check that a tokenizer's files are there; transformers makes an empty tokenizer of what is missing."""
    _check_files([folder / "tokenizer_config.json"])
    named = dict(getattr(kind, "vocab_files_names", {}))
    whole, parts = named.pop("tokenizer_file", "tokenizer.json"), list(named.values())
    if (folder / whole).is_file():
        return
    missing = [name for name in parts if not (folder / name).is_file()]
    if missing or not parts:
        needed = " or ".join(filter(None, [whole, " with ".join(parts)]))
        raise BrokenFolderError(f"its component {folder.name!r} has no vocabulary: {folder} lacks {needed}; {AGAIN}")
    if {"vocab.json", "merges.txt"} <= set(parts):
        _check_merges(folder / "vocab.json", folder / "merges.txt")


def _check_merges(vocabulary: Path, merges: Path) -> None:
    """Check that merges make the vocabulary; a list that is cut off at the end of a line reads well."""
    lines = merges.read_text(encoding="utf-8").splitlines()
    made = {"".join(line.split()) for line in lines if not line.startswith("#version")}
    tokens = list(json.loads(vocabulary.read_text(encoding="utf-8")))
    unmade = [token for token in tokens if token not in made and len(token.removesuffix("</w>")) > 1]
    if len(unmade) > UNMERGED_PART * len(tokens):
        raise BrokenFolderError(
            f"{merges} is cut off: {len(unmade)} of {len(tokens)} tokens in {vocabulary.name} lack a merge; {AGAIN}"
        )


def _check_files(paths: list[Path]) -> None:
    for path in paths:
        if problem := _problem(path):
            raise BrokenFolderError(f"{path} {problem}")


def _problem(path: Path) -> str:
    """Say what is wrong with a file, and what helps; an empty text if nothing is."""
    if not path.is_file():
        return f"is missing; {AGAIN}"
    if is_lfs_pointer(path):
        return f"is a git-lfs pointer and not the file itself; {PULL}"
    size = path.stat().st_size
    if not size:
        return f"is empty; {AGAIN}"
    if path.suffix == ".json":
        return _json_problem(path)
    if path.suffix == ".safetensors":
        return _safetensors_problem(path, size)
    return _torch_problem(path) if path.suffix == ".bin" else ""


def _json_problem(path: Path) -> str:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"is no JSON, or cut off ({error}); {AGAIN}"
    return ""


def _safetensors_problem(path: Path, size: int) -> str:
    """Compare a file's size with what its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            return f"is no safetensors file; {AGAIN}"
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"is cut off within its header, or no safetensors file; {AGAIN}"
    needed = 8 + length + max(ends, default=0)
    return f"is cut off: it has {size} of {needed} bytes; {AGAIN}" if size < needed else ""


def _torch_problem(path: Path) -> str:
    """Check that the archive has its end; files from before PyTorch 1.6 are none, and are left to torch."""
    with path.open("rb") as file:
        start = file.read(2)
    return f"is cut off; {AGAIN}" if start == b"PK" and not zipfile.is_zipfile(path) else ""
