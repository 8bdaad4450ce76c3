"""Parts by name: registered ones, the user's own, and what is said of a name that leads to none."""

import re
import sys
from abc import ABC, abstractmethod

import pytest
import torch

from fedmmkt.common.config import ConfigError
from fedmmkt.common.registry import Registry, importable

OWN = '''
VERSION = 3


def double(value):
    """Double it.

    And no more.
    """
    return 2 * value


class Tools:
    @staticmethod
    def triple(value):
        return 3 * value
'''


class Shape:
    """The base of shapes."""


class Square(Shape):
    """Has four sides."""

    def __init__(self, side, *, scale=1.0):
        self.area = (side * scale) ** 2


@pytest.fixture
def functions():
    registry = Registry("reducing rule", "t2i.reduce")

    @registry.register("total")
    def total(values):
        """Add them up.

        All of them.
        """
        return sum(values)

    registry.register("largest")(lambda values: max(values))
    return registry


@pytest.fixture
def shapes():
    registry = Registry("shape", "data.shape", base=Shape, also="auto")
    registry.register("square")(Square)
    return registry


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Return a function that writes a module which can be imported while the test runs."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


def error(registry, name, extra=None, where=""):
    with pytest.raises(ConfigError) as caught:
        registry.get(name, extra, where)
    return str(caught.value)


# ---------------------------------------------------------------------- registered names


def test_what_is_registered_is_found_until_it_is_unregistered(functions):
    total = functions.get("total")

    functions.unregister("total")

    assert total([1, 2, 3]) == 6
    assert "'total', but no reducing rule is registered under that name; allowed: largest" in error(functions, "total")


def test_register_returns_what_it_decorates_and_replaces_what_had_the_name(functions):
    def last(values):
        return values[-1]

    assert functions.register("total")(last) is last
    assert functions.get("total") is last


def test_names_are_in_order_with_their_first_lines(functions):
    assert list(functions.names().items()) == [("largest", ""), ("total", "Add them up.")]


def test_an_unknown_name_is_told_with_its_key_and_what_it_may_have_meant(functions, shapes):
    assert error(functions, "totl") == (
        "run-config key 't2i.reduce' is 'totl', but no reducing rule is registered under that name "
        "(did you mean 'total'?); allowed: largest, total, or module:name of your own"
    )
    assert error(shapes, "x") == (
        "run-config key 'data.shape' is 'x', but no shape is registered under that name; "
        "allowed: square, auto, or module:name of your own"
    )


def test_where_a_name_stands_is_told_if_it_is_not_the_run_config(functions):
    assert error(functions, "x", where="node-config key 'reduce'").startswith("node-config key 'reduce' is 'x', but no")


# ---------------------------------------------------------------------- module:name


def test_a_name_in_a_module_of_the_users_own_is_found(functions, modules):
    modules("mine", OWN)

    assert functions.get("mine:double")(4) == 8
    assert functions.get("mine:Tools.triple")(4) == 12
    assert "mine:double" not in functions.names()


def test_modules_of_a_folder_can_be_imported_while_the_block_runs(functions, tmp_path):
    (tmp_path / "of_a_folder.py").write_text(OWN)

    with importable(tmp_path):
        inside = functions.get("of_a_folder:double")(4)
    sys.modules.pop("of_a_folder")

    assert inside == 8
    assert "there is no module 'of_a_folder' to import here" in error(functions, "of_a_folder:double")


@pytest.mark.parametrize("name", ["no_such_module:rule", "numpy.no_such_module:rule", "no_such_module.sub:rule"])
def test_a_module_that_is_not_there_is_named(functions, name):
    told = error(functions, name)

    assert told.startswith(f"run-config key 't2i.reduce' is '{name}', but there is no module '{name.split(':')[0]}'")
    assert told.endswith("to import here; allowed: largest, total, or module:name of your own")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def rule(:", "SyntaxError: "),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_the_reason(functions, modules, text, reason):
    modules("broken", text)
    assert f"'broken:rule', but importing the module 'broken' failed: {reason}" in error(functions, "broken:rule")


def test_an_attribute_that_is_not_there_is_named_with_what_it_may_have_meant(functions, modules):
    modules("mine", OWN)

    assert "but the module 'mine' has no 'dubble' (did you mean 'double'?); allowed:" in error(functions, "mine:dubble")
    assert "but the module 'mine' has no 'Tools.twice'; allowed:" in error(functions, "mine:Tools.twice")


def test_what_is_of_another_kind_is_refused(functions, shapes, modules):
    modules("mine", OWN)

    assert "'mine:VERSION', but that is an int, and not a function; allowed:" in error(functions, "mine:VERSION")
    assert "'mine:double', but that is a function, and no subclass of Shape; allowed: square, auto," in error(
        shapes, "mine:double"
    )
    assert "'mine:Tools', but that is Tools, and no subclass of Shape" in error(shapes, "mine:Tools")


def test_what_is_of_another_kind_cannot_be_registered(functions, shapes):
    with pytest.raises(ConfigError, match="reducing rule 'three', but that is an int, and not a function"):
        functions.register("three")(3)
    with pytest.raises(ConfigError, match="shape 'sum', but that is a function, and no subclass of Shape"):
        shapes.register("sum")(sum)
    with pytest.raises(ConfigError, match="shape 'one', but that is a Square, and no subclass of Shape"):
        shapes.register("one")(Square(1))
    assert list(functions.names()) == ["largest", "total"]
    assert list(shapes.names()) == ["square"]


# ---------------------------------------------------------------------- the user's own settings


@pytest.fixture
def trimmed(functions):
    """Register a rule with settings of every kind."""

    @functions.register("trimmed")
    def trimmed(values, *, trim: int, scale=1.0, name="sum", signed=True, anything=None):
        return sum(values[: len(values) - trim]) * scale, name, signed, anything

    return functions


def test_keyword_only_parameters_take_the_settings_of_their_names(trimmed):
    extra = {"trim": 1, "scale": 0.5, "name": "half", "signed": False, "anything": "else", "unrelated": 9}

    assert trimmed.get("trimmed", extra)([2, 4, 6]) == (3.0, "half", False, "else")


def test_parameters_without_a_setting_have_their_defaults(trimmed):
    assert trimmed.get("trimmed", {"trim": 0})([2, 4]) == (6.0, "sum", True, None)


def test_a_part_without_settings_is_given_as_it_is(functions):
    def first(values, n=1):
        return values[:n]

    functions.register("first")(first)

    assert functions.get("first", {"number": 5, "values": 3}) is first


def test_an_integer_serves_for_a_float(trimmed):
    scaled, *_ = trimmed.get("trimmed", {"trim": 0, "scale": 2})([1])

    assert (scaled, type(scaled)) == (2.0, float)


def test_a_class_takes_settings_too(shapes):
    assert shapes.get("square", {"scale": 2})(3).area == 36.0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "run-config key 'extra.trim' is missing; t2i.reduce 'trimmed' needs it"),
        (
            {"trim": 0, "scale": "big"},
            "run-config key 'extra.scale' is 'big'; allowed: a float, for t2i.reduce 'trimmed'",
        ),
        (
            {"trim": 0, "scale": True},
            "run-config key 'extra.scale' is True; allowed: a float, for t2i.reduce 'trimmed'",
        ),
        ({"trim": 0, "name": 3}, "run-config key 'extra.name' is 3; allowed: a str, for t2i.reduce 'trimmed'"),
        ({"trim": 0, "signed": 1}, "run-config key 'extra.signed' is 1; allowed: a bool, for t2i.reduce 'trimmed'"),
    ],
)
def test_settings_that_do_not_suit_a_part_are_named(trimmed, extra, message):
    assert error(trimmed, "trimmed", extra) == message


def test_settings_are_named_as_they_are_written(functions):
    functions.register("cut")(lambda values, *, cut_off: values[cut_off:])

    assert error(functions, "cut") == "run-config key 'extra.cut-off' is missing; t2i.reduce 'cut' needs it"


def test_a_function_without_a_signature_takes_no_settings():
    rules = Registry("rule", "t2i.rule")
    assert rules.get("torch:max", {"key": 1}) is torch.max


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("os:kill", "the module 'os' is of Python's standard library"),
        ("os.path:join", "the module 'os.path' is of Python's standard library"),
        ("builtins:exec", "the module 'builtins' is of Python's standard library"),
        ("fedmmkt.common.files:os.remove", "'os' is of Python's standard library"),
        ("fedmmkt.common.files:Path", "'Path' is of Python's standard library"),
    ],
)
def test_names_of_the_standard_library_are_refused_however_they_are_reached(name, problem):
    with pytest.raises(ConfigError, match=re.escape(f"run-config key 't2i.rule' is {name!r}, but {problem}; allowed")):
        Registry("rule", "t2i.rule").get(name)


def test_a_module_that_ends_the_program_on_import_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="importing the module 'leaves' failed: SystemExit: 3"):
        Registry("rule", "t2i.rule").get("leaves:rule")


def test_a_part_must_take_what_it_is_called_with():
    rules = Registry("rule", "t2i.rule", ("logits", "counts"))
    rules.register("fits")(lambda logits, counts, *, trim=0.1: logits)

    with pytest.raises(
        ConfigError, match=r"rule 'short', but that takes \(logits\), and is called with \(logits, counts\)"
    ):
        rules.register("short")(lambda logits: logits)


def test_a_class_that_lacks_a_method_is_refused(shapes):
    class Unfinished(Shape, ABC):
        @abstractmethod
        def area(self): ...

    with pytest.raises(ConfigError, match="shape 'unfinished', but that class lacks the method area"):
        shapes.register("unfinished")(Unfinished)


@pytest.mark.parametrize(
    ("name", "message"),
    [("mine.total", "a name of your own has a colon"), ("mine:", "needs both parts"), (":total", "needs both parts")],
)
def test_half_a_name_of_ones_own_is_told(functions, name, message):
    assert message in error(functions, name)


def test_a_setting_for_a_parameter_that_is_not_keyword_only_is_refused():
    rules = Registry("rule", "t2i.rule")
    rules.register("own")(lambda logits, trim=0.1: logits)
    with pytest.raises(
        ConfigError, match=r"'extra.trim' cannot reach t2i.rule 'own': write its parameter after a star"
    ):
        rules.get("own", {"trim": 0.2})


def test_a_setting_that_was_perhaps_meant_for_a_part_is_told(caplog):
    rules = Registry("rule", "t2i.rule")
    rules.register("own")(lambda logits, *, trim=0.1: logits)
    rules.get("own", {"trimm": 0.2, "other": 1})
    assert [record.message for record in caplog.records] == [
        "run-config key 'extra.trimm' is no parameter of t2i.rule 'own'; did you mean 'trim'?"
    ]
