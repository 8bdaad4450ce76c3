"""Prompt sources."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from fedmmkt.common.config import ConfigError, RunConfig, T2IConfig
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.prompts import Prompt, build_prompt_source, classes_of_round, templates_of

CLASSES = ("cat", "dog", "cow")


def source(tmp_path, *lines):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return build_prompt_source(T2IConfig(prompts=str(file)), CLASSES)


def test_templates_give_each_class_its_share():
    prompts = build_prompt_source(T2IConfig(prompt_templates=("a {}", "one {}")), CLASSES)(9, np.random.default_rng(0))
    assert Counter(prompt.class_index for prompt in prompts) == {0: 3, 1: 3, 2: 3}
    assert {prompt.text for prompt in prompts} <= {f"{word} {name}" for word in ("a", "one") for name in CLASSES}
    assert all(prompt.text.endswith(CLASSES[prompt.class_index]) for prompt in prompts)


def test_as_many_of_each_class_as_are_wanted_come_class_by_class(tmp_path):
    lines = [json.dumps({"prompt": f"{name} {number}", "class": name}) for name in CLASSES for number in (1, 2)]
    from_file = source(tmp_path, *lines, '{"prompt": "anything"}').per_class(4, np.random.default_rng(0))
    templates = build_prompt_source(T2IConfig(prompt_templates=("a {}", "one {}")), CLASSES)

    assert [prompt.class_index for prompt in from_file] == [0] * 4 + [1] * 4 + [2] * 4
    assert Counter(prompt.text for prompt in from_file) == {f"{name} {n}": 2 for name in CLASSES for n in (1, 2)}
    assert [prompt.class_index for prompt in templates.per_class(2, np.random.default_rng(0))] == [0, 0, 1, 1, 2, 2]


def test_a_class_without_a_prompt_is_named(tmp_path):
    with pytest.raises(ConfigError, match="has no prompt of the class 'dog'; allowed: prompts of every class"):
        source(tmp_path, '{"prompt": "a", "class": "cat"}').per_class(1, np.random.default_rng(0))


def texts(config, classes=CLASSES):
    return {prompt.text for prompt in build_prompt_source(config, classes)(60, np.random.default_rng(0))}


def test_the_starter_has_templates_for_digits_and_any_other_model_one_for_anything():
    digits = ("the digit {}", "the number {}", "a picture of the digit {}", "an image of a {}")
    assert templates_of(T2IConfig()) == digits
    assert texts(T2IConfig(), ("one", "two")) == {t.format(name) for t in digits for name in ("one", "two")}
    assert texts(T2IConfig(model="/data/birds")) == {"a picture of a cat", "a picture of a dog", "a picture of a cow"}
    for model in ("starter", "/data/birds"):
        assert templates_of(T2IConfig(model=model, prompt_templates="my {}")) == ("my {}",)


def test_templates_may_have_commas_and_doubled_braces():
    templates = RunConfig.from_flower({"t2i.prompt-templates": "a {}, high quality, {{sharp}}"}).t2i
    assert texts(templates) == {f"a {name}, high quality, {{sharp}}" for name in CLASSES}


def test_class_names_may_have_braces():
    names = ("{style}", "{0}", "{", "a}{b", "{}")
    prompts = build_prompt_source(T2IConfig(model="m", prompt_templates=("a {}, big",)), names)
    drawn = prompts(10, np.random.default_rng(0))
    assert Counter(drawn) == {Prompt(f"a {name}, big", index): 2 for index, name in enumerate(names)}


@pytest.mark.parametrize(
    ("classes", "warned"),
    [
        (("zero", "one", "nine"), ""),
        (tuple("0123456789"), ""),
        (("Three", "FOUR"), ""),
        (("disc", "two"), r"'starter', .*: its images of 1 of 2 classes \('disc'\) will show digits; name"),
        (("10", "ten"), r"images of 2 of 2 classes \('10', 'ten'\)"),
        (tuple("abcdefg"), r"7 of 7 classes \('a', 'b', 'c', 'd', 'e', \.\.\.\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prompts", ["templates", "a file"])
def test_classes_that_the_starter_cannot_draw_are_warned_of(classes, warned, prompts, tmp_path, caplog):
    caplog.set_level("WARNING", "flwr")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a thing"}')
    config = T2IConfig(prompts=prompts if prompts == "templates" else str(tmp_path / "prompts.jsonl"))

    build_prompt_source(config, classes)
    assert re.search(warned, caplog.text) if warned else not caplog.text

    caplog.clear()
    build_prompt_source(config.model_copy(update={"model": "/data/things"}), classes)
    assert not caplog.text


def test_the_warning_is_among_the_first_lines_of_a_run(tiny_run, caplog):
    caplog.set_level("INFO", "flwr")
    build_strategy(RunConfig.from_flower(tiny_run(data__classes="disc,square")), 1)
    assert any("will show digits" in record.message for record in caplog.records[:3])


def test_a_file_gives_prompts_with_and_without_class(tmp_path):
    prompts = source(tmp_path, json.dumps({"prompt": "ein Hund", "class": "dog"}), "", json.dumps({"prompt": "fog"}))
    drawn = prompts(4, np.random.default_rng(0))
    assert Counter(drawn) == {Prompt("ein Hund", 1): 2, Prompt("fog", -1): 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a bird", "class": "bird"}', r"line 1 names class 'bird'; allowed: cat, dog, cow"),
        ("a bird", r"line 1 is no JSON"),
        ('{"text": "a bird"}', r"line 1 is .*; allowed: \{\"prompt\": text"),
        ("", "holds no prompt"),
    ],
)
def test_a_bad_file_is_named(tmp_path, line, message):
    with pytest.raises(ConfigError, match=message):
        source(tmp_path, line)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'t2i.prompts' is .*missing.jsonl', which cannot be read"):
        build_prompt_source(T2IConfig(prompts=str(tmp_path / "missing.jsonl")), CLASSES)


def test_the_classes_of_rounds_come_in_turn(tmp_path):
    """Of five classes two a round: after five rounds each has come twice, in the same order again."""
    rounds = [classes_of_round(range(5), 2, 7, server_round) for server_round in range(1, 11)]

    assert all(len(set(classes)) == 2 for classes in rounds)
    assert Counter(index for classes in rounds[:5] for index in classes) == dict.fromkeys(range(5), 2)
    assert rounds[5:] == rounds[:5]
    assert rounds != [classes_of_round(range(5), 2, 8, server_round) for server_round in range(1, 11)]
    assert [classes_of_round(range(5), count, 7, 1) for count in (0, 5, 9)] == [None] * 3


def test_prompts_of_some_classes_name_these_or_none(tmp_path):
    lines = [json.dumps({"prompt": name, "class": name}) for name in ("cat", "cow")]
    from_file = source(tmp_path, *lines, '{"prompt": "anything"}')
    templates = build_prompt_source(T2IConfig(prompt_templates=("a {}",)), CLASSES)

    assert from_file.named_classes == [0, 2]
    assert {prompt.text for prompt in from_file(8, np.random.default_rng(0), [2])} == {"cow", "anything"}
    drawn = templates(6, np.random.default_rng(0), [0, 1])
    assert Counter(prompt.text for prompt in drawn) == {"a cat": 3, "a dog": 3}


def test_a_run_shows_as_many_classes_a_round_as_is_set(tiny_run):
    settings = tiny_run(t2i__classes_per_round=4)
    strategy = build_strategy(RunConfig.from_flower(settings), 1)

    rounds = [{prompt.class_index for prompt in strategy.make_prompts(number)} for number in (1, 2, 3)]

    assert [len(classes) for classes in rounds] == [4, 4, 4]
    assert set.union(*rounds) == set(range(10))
