"""Sizes that cannot work are refused with the numbers; those that teach little are named."""

import logging

import pytest

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.server_app.app import build_strategy
from fedmmkt.server_app.sizes import check_sizes, reply_bytes, warn_of_sizes


def config(**t2i):
    return RunConfig.from_flower({f"t2i.{key.replace('_', '-')}": value for key, value in t2i.items()})


def test_a_reply_beyond_its_limit_is_refused_with_the_numbers():
    """Two bytes for each of 10,000 x 21,000 logits are 420 MB; 256 MB hold 6,000 samples and some more."""
    check_sizes(config(samples_per_round=6000), 21_000)
    with pytest.raises(ConfigError, match=r"256 MB, .* 10000 samples and 21000 classes take 420 MB; .* up to 60\d\d,"):
        check_sizes(config(samples_per_round=10_000), 21_000)
    assert reply_bytes(10_000, 21_000) == pytest.approx(420e6, rel=1e-3)


def test_more_classes_than_samples_a_round_are_refused_before_anything_is_generated(tiny_run):
    settings = tiny_run(t2i__samples_per_round=5, t2i__classes_per_round=6)
    with pytest.raises(ConfigError, match=r"'t2i\.classes-per-round' is 6, and 't2i.samples-per-round' 5; allowed"):
        build_strategy(RunConfig.from_flower(settings), 1)


def test_a_run_with_too_few_samples_of_a_class_is_told_how_many_classes_suit(caplog):
    caplog.set_level(logging.WARNING, "flwr")
    warn_of_sizes(config(samples_per_round=400), 100)
    assert not caplog.text
    warn_of_sizes(config(samples_per_round=400), 1000)
    assert "400 samples a round of 1000 classes are 0.4 of each" in caplog.text
    assert "set t2i.classes-per-round to 100 or less" in caplog.text
