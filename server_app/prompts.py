"""Sources of prompts: templates filled with class names, or a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from logging import WARNING
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flwr.supercore import log

from fedmmkt.common.config import ConfigError, T2IConfig
from fedmmkt.common.dataset_files import DIGIT_NAMES
from fedmmkt.common.installed import installed
from fedmmkt.common.tables import some

STARTER_TEMPLATES = ("the digit {}", "the number {}", "a picture of the digit {}", "an image of a {}")
OTHER_TEMPLATES = ("a picture of a {}",)
STARTER_DRAWS = {*DIGIT_NAMES, *map(str, range(10))}
_KEY = "run-config key 't2i.prompts'"
NAMED_CLASSES = 5  # Most classes that a warning names.


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the index of the class that it names; -1 if it names none."""

    text: str
    class_index: int = -1


class PromptSource(Protocol):
    """A source of prompts."""

    @property
    def named_classes(self) -> Sequence[int]:
        """The classes that prompts can name."""

    def __call__(self, count: int, rng: np.random.Generator, classes: Sequence[int] | None = None) -> list[Prompt]:
        """Return ``count`` prompts for a round, of some classes or of all."""

    def per_class(self, count: int, rng: np.random.Generator) -> list[Prompt]:
        """Return ``count`` prompts of each class, class by class."""


def build_prompt_source(config: T2IConfig, classes: tuple[str, ...]) -> PromptSource:
    """Build the prompt source that ``t2i.prompts`` names; warn of classes that the starter cannot draw.

    Raises
    ------
    ConfigError
        If the file cannot be read, or names a class that is not in ``classes``.
    """
    if config.model == "starter":
        warn_of_other_classes(classes)
    if config.prompts == "templates":
        return TemplatePrompts(templates_of(config), classes)
    return FilePrompts(Path(config.prompts).expanduser(), classes)


def templates_of(config: T2IConfig) -> tuple[str, ...]:
    """Return the prompt templates of a configuration; if it names none, those that suit its T2I model."""
    return config.prompt_templates or (STARTER_TEMPLATES if config.model == "starter" else OTHER_TEMPLATES)


def check_starter_draws(classes: tuple[str, ...]) -> None:
    """Check that the starter can draw some of the classes.

    Raises
    ------
    ConfigError
        If it can draw none of them; no class at all is no error.
    """
    if not classes or any(_is_drawn(name) for name in classes):
        return
    raise ConfigError(
        "run-config key 't2i.model' is 'starter', which draws nothing but the digits zero to nine, and the classes are "
        f"{some(classes, NAMED_CLASSES)}; allowed: another model, such as a small one from `fedmmkt pretrain`, or, if "
        f"images of digits are meant for these classes, the starter's folder, {str(installed('starter/model'))!r}"
    )


def _is_drawn(name: str) -> bool:
    return name.strip().lower() in STARTER_DRAWS


def warn_of_other_classes(classes: tuple[str, ...]) -> None:
    """Warn of classes that the starter cannot draw."""
    others = [name for name in classes if not _is_drawn(name)]
    if others:
        named = ", ".join(map(repr, others[:NAMED_CLASSES])) + (", ..." if len(others) > NAMED_CLASSES else "")
        log(
            WARNING,
            "run-config key 't2i.model' is 'starter', which draws nothing but the digits zero to nine: its images of "
            "%s of %s classes (%s) will show digits; name another model, or make a small one with `fedmmkt pretrain`",
            len(others),
            len(classes),
            named,
        )


class TemplatePrompts:
    """Fills templates with class names, equally often for each class (at most one apart), in random order."""

    def __init__(self, templates: tuple[str, ...], classes: tuple[str, ...]) -> None:
        self.templates = templates
        self.classes = classes

    @property
    def named_classes(self) -> Sequence[int]:
        """The classes that prompts can name: all."""
        return range(len(self.classes))

    def __call__(self, count: int, rng: np.random.Generator, classes: Sequence[int] | None = None) -> list[Prompt]:
        """Return ``count`` prompts, of some classes or of all."""
        drawn_N = _balanced(np.array(self.named_classes if classes is None else classes), count, rng)
        chosen = rng.integers(len(self.templates), size=count)
        return [
            Prompt(self.templates[template].format(self.classes[index]), int(index))
            for template, index in zip(chosen, drawn_N, strict=True)
        ]

    def per_class(self, count: int, rng: np.random.Generator) -> list[Prompt]:
        """Return ``count`` prompts of each class, class by class."""
        return sorted(self(count * len(self.classes), rng), key=lambda prompt: prompt.class_index)


class FilePrompts:
    """Draws prompts from a JSONL file with lines ``{"prompt": text}`` or ``{"prompt": text, "class": name}``."""

    def __init__(self, path: Path, classes: tuple[str, ...]) -> None:
        self.path, self.classes = path, classes
        self.prompts = [
            _with_class(f"{_KEY}: {path}, line {number}", text, name, classes)
            for number, text, name in read_prompts(path)
        ]

    @property
    def named_classes(self) -> Sequence[int]:
        """The classes that prompts of the file name."""
        return sorted({prompt.class_index for prompt in self.prompts if prompt.class_index >= 0})

    def __call__(self, count: int, rng: np.random.Generator, classes: Sequence[int] | None = None) -> list[Prompt]:
        """Return ``count`` prompts; all prompts of the file are used equally often (at most one apart).

        With ``classes``, these are the prompts that name one of them, or no class.
        """
        allowed = None if classes is None else {*classes, -1}
        rows = [row for row, prompt in enumerate(self.prompts) if allowed is None or prompt.class_index in allowed]
        return [self.prompts[index] for index in _balanced(np.array(rows), count, rng)]

    def per_class(self, count: int, rng: np.random.Generator) -> list[Prompt]:
        """Return ``count`` prompts of each class, class by class; those of a class are used equally often.

        Raises
        ------
        ConfigError
            If the file has no prompt of a class.
        """
        chosen: list[Prompt] = []
        for class_index, name in enumerate(self.classes):
            own = [prompt for prompt in self.prompts if prompt.class_index == class_index]
            if not own:
                raise ConfigError(
                    f"run-config key 't2i.prompts': {self.path} has no prompt of the class {name!r}; allowed: prompts "
                    "of every class, or 'templates'"
                )
            chosen += [own[index] for index in _balanced(np.arange(len(own)), count, rng)]
        return chosen


def classes_of_round(classes: Sequence[int], per_round: int, seed: int, server_round: int) -> Sequence[int] | None:
    """Choose the classes of a round (from 1), so that all come in turn; None if there is no need to choose.

    Parameters
    ----------
    classes : sequence of int
        All classes.
    per_round : int
        Number of classes of a round; 0 for all.
    seed : int
        Seed of their order, which is the same in each turn.
    server_round : int
        The round.
    """
    if not 0 < per_round < len(classes):
        return None
    order = np.random.default_rng(seed).permutation(np.array(classes))
    first = (server_round - 1) * per_round
    return sorted(order[np.arange(first, first + per_round) % len(order)].tolist())


def read_prompts(path: Path) -> list[tuple[int, str, Any]]:
    """Read a file of prompts: for each, the number of its line, its text, and the class that it names, if any.

    Raises
    ------
    ConfigError
        If the file cannot be read, a line is no prompt, or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{_KEY} is {str(path)!r}, which cannot be read ({error}); "
            "allowed: 'templates', or the absolute path of a JSONL file"
        ) from None
    prompts = [_parse_line(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise ConfigError(f"{_KEY}: {path} holds no prompt")
    return prompts


def _parse_line(path: Path, number: int, line: str) -> tuple[int, str, Any]:
    where = f"{_KEY}: {path}, line {number}"
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is no JSON ({error})") from None
    text = content.get("prompt") if isinstance(content, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f'{where} is {line!r}; allowed: {{"prompt": text, "class": name}}, the class optional')
    return number, text, content.get("class")


def _with_class(where: str, text: str, name: Any, classes: tuple[str, ...]) -> Prompt:
    if name is None:
        return Prompt(text)
    if name not in classes:
        raise ConfigError(f"{where} names class {name!r}; allowed: {', '.join(classes)}")
    return Prompt(text, classes.index(name))


def _balanced(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return ``count`` of the values in random order, each equally often (at most one apart)."""
    repeats = -(-count // len(values))
    drawn = np.concatenate([rng.permutation(values) for _ in range(repeats)])[:count]
    return rng.permutation(drawn)
