"""Registries of the parts that a configuration chooses by name: rules, models, families, strategies.

A name is either registered, or it is ``module:name`` for a part of the user's own. Each kind of part has its own
registry. All registries report wrong names in the same way.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from logging import getLogger
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from fedmmkt.common.config import ConfigError, Setting

logger = getLogger("flwr")

_Part = TypeVar("_Part", bound=Callable[..., Any])
_Registered = TypeVar("_Registered")


class Registry(Generic[_Part]):
    """The registered parts of one kind, by name.

    Parameters
    ----------
    kind : str
        The kind of the parts, such as ``aggregation rule``.
    key : str
        The run-config key that names the part.
    arguments : sequence of str, optional
        The names of the arguments that a part is called with; without them, nothing is checked.
    base : type, optional
        Base class of the parts. Without it, a part is a function.
    also : str
        Other allowed values of the key, for error texts.
    """

    def __init__(
        self, kind: str, key: str, arguments: Sequence[str] | None = None, base: type | None = None, also: str = ""
    ) -> None:
        self.kind = kind
        self.key = key
        self.arguments = arguments
        self.base = base
        self.also = also
        self._parts: dict[str, _Part] = {}

    def register(self, name: str) -> Callable[[_Registered], _Registered]:
        """Return a decorator that registers a part under a name; it replaces an earlier part of this name."""

        def decorate(part: _Registered) -> _Registered:
            self._check(part, f"{self.kind} {name!r}")
            self._parts[name] = cast(_Part, part)
            return part

        return decorate

    def unregister(self, name: str) -> None:
        """Remove a name."""
        del self._parts[name]

    def names(self) -> dict[str, str]:
        """Return the registered names in alphabetical order, each with the first docstring line of its part."""
        return {name: _first_line(self._parts[name]) for name in sorted(self._parts)}

    def get(self, name: str, extra: Mapping[str, Setting] | None = None, where: str = "") -> _Part:
        """Return the part of the given name, with the user's own settings bound to it.

        Parameters
        ----------
        name : str
            A registered name, or ``module:name`` to import.
        extra : mapping, optional
            The run's table ``extra``. Each keyword-only parameter of the part gets the setting with its name.
        where : str
            Where the name was given, for error texts; by default the run-config key.

        Raises
        ------
        ConfigError
            If there is no such part, if it is of the wrong kind, or if a setting does not fit it. The text says what
            was tried and what is allowed.
        """
        where = f"{where or f'run-config key {self.key!r}'} is {name!r}"
        if ":" in name:
            part = self._imported(name, where)
        elif name in self._parts:
            part = self._parts[name]
        else:
            own = " (a name of your own has a colon: module:name)" if "." in name else ""
            hint = own or _suggestion(name, self._parts)
            raise self._refused(where, f"no {self.kind} is registered under that name{hint}")
        return _configured(part, extra or {}, f"{self.key} {name!r}")

    def _imported(self, name: str, where: str) -> _Part:
        module_name, _, attribute = name.partition(":")
        if not module_name or not attribute:
            raise self._refused(where, "a name of your own needs both parts, module:name")
        if _is_standard(module_name):
            raise self._refused(where, f"the module {module_name!r} is of Python's standard library")
        try:
            found: Any = import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
                raise self._refused(where, f"there is no module {module_name!r} to import here") from None
            raise self._refused(where, f"importing the module {module_name!r} failed: {error}") from error
        except (Exception, SystemExit) as error:  # The user's module may raise anything.
            reason = f"{type(error).__name__}: {error}"
            raise self._refused(where, f"importing the module {module_name!r} failed: {reason}") from error
        for step in attribute.split("."):
            if not hasattr(found, step):
                problem = f"the module {module_name!r} has no {attribute!r}{_suggestion(step, vars(found))}"
                raise self._refused(where, problem)
            found = getattr(found, step)
            if _is_standard(_home(found)):
                raise self._refused(where, f"{step!r} is of Python's standard library")
        self._check(found, where)
        return cast(_Part, found)

    def _check(self, part: object, where: str) -> None:
        """Check that a part is of the right kind and takes the arguments that it is called with."""
        if self.base is None and not callable(part):
            raise self._refused(where, f"that is {_a(_kind_of(part))}, and not a function")
        if self.base is not None:
            if not (isinstance(part, type) and issubclass(part, self.base)):
                found = part.__name__ if isinstance(part, type) else _a(_kind_of(part))
                raise self._refused(where, f"that is {found}, and no subclass of {self.base.__name__}")
            if missing := sorted(getattr(part, "__abstractmethods__", ())):
                raise self._refused(where, f"that class lacks the method {', '.join(missing)}")
        positional = [item for item in _parameters(part) if item.kind is not inspect.Parameter.KEYWORD_ONLY]
        if self.arguments is None or not positional:
            return
        try:
            inspect.Signature(positional).bind(*self.arguments)
        except TypeError:
            taken, given = ", ".join(map(str, positional)), ", ".join(self.arguments)
            raise self._refused(where, f"that takes ({taken}), and is called with ({given})") from None

    def _refused(self, where: str, problem: str) -> ConfigError:
        choices = [*sorted(self._parts), *filter(None, [self.also]), "or module:name of your own"]
        return ConfigError(f"{where}, but {problem}; allowed: {', '.join(choices)}")


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Make the modules of a folder importable inside the block, as Flower does for an app."""
    path = str(folder.resolve())
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)


def _configured(part: _Part, extra: Mapping[str, Setting], name: str) -> _Part:
    """Bind the settings to the keyword-only parameters of a part that have the same names."""
    chosen: dict[str, Setting] = {}
    for parameter in _parameters(part):
        key, default = f"run-config key 'extra.{parameter.name.replace('_', '-')}'", parameter.default
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            if parameter.name in extra and default is not inspect.Parameter.empty:
                raise ConfigError(
                    f"{key} cannot reach {name}: write its parameter after a star, (*, {parameter.name}=...)"
                )
            continue
        if parameter.name in extra:
            value = extra[parameter.name]
            if isinstance(default, float) and type(value) is int:
                value = float(value)
            if default not in (None, inspect.Parameter.empty) and type(value) is not type(default):
                raise ConfigError(f"{key} is {value!r}; allowed: {_a(type(default).__name__)}, for {name}")
            chosen[parameter.name] = value
        elif default is inspect.Parameter.empty:
            raise ConfigError(f"{key} is missing; {name} needs it")
    keywords = [item.name for item in _parameters(part) if item.kind is inspect.Parameter.KEYWORD_ONLY]
    for key in extra.keys() - set(keywords):
        if close := get_close_matches(key, keywords, n=1, cutoff=0.8):
            logger.warning("run-config key 'extra.%s' is no parameter of %s; did you mean %r?", key, name, close[0])
    return cast(_Part, partial(part, **chosen)) if chosen else part


def _parameters(part: Any) -> Iterable[inspect.Parameter]:
    try:
        return inspect.signature(part).parameters.values()
    except (TypeError, ValueError):  # Functions written in C may have no signature, and then no settings.
        return ()


def _is_standard(module_name: str) -> bool:
    return module_name.partition(".")[0] in sys.stdlib_module_names


def _home(part: object) -> str:
    """Return the name of the module that a module, function or class is, or comes from; else an empty text."""
    if inspect.ismodule(part):
        return part.__name__
    is_defined = inspect.isroutine(part) or isinstance(part, type)
    return str(getattr(part, "__module__", None) or "") if is_defined else ""


def _kind_of(part: object) -> str:
    return "function" if inspect.isroutine(part) else type(part).__name__


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _suggestion(name: str, candidates: Mapping[str, object]) -> str:
    close = get_close_matches(name, candidates, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _first_line(part: object) -> str:
    return (inspect.getdoc(part) or "").strip().partition("\n")[0]
