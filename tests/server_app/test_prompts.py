"""Prompt sources."""

import json
from collections import Counter

import numpy as np
import pytest

from fedmmkt.common.config import ConfigError, T2IConfig
from fedmmkt.server_app.prompts import Prompt, build_prompt_source

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
