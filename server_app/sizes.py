"""Sizes that cannot work, or teach nothing, told before anything is generated."""

from __future__ import annotations

import logging

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.common.payloads import VOTES_PER_IMAGE

logger = logging.getLogger("flwr")

BYTES_PER_LOGIT = 2
BYTES_BESIDE = 100_000  # Of a reply: report, class counts and framing, up to some thousand classes.


def check_sizes(config: RunConfig, classes: int) -> None:
    """Check that a round's samples and classes fit each other, and a client's reply its limit.

    Parameters
    ----------
    config : RunConfig
        The settings of the run.
    classes : int
        Size of the class space.

    Raises
    ------
    ConfigError
        If a client's logits would exceed ``reply-limit``, or a round has fewer samples than classes to show; the text
        has the numbers.
    """
    samples, chosen = config.t2i.samples_per_round, config.t2i.classes_per_round
    if chosen > samples:
        raise ConfigError(
            f"run-config key 't2i.classes-per-round' is {chosen}, and 't2i.samples-per-round' {samples}; allowed: as "
            "many samples as classes, or more"
        )
    reply = reply_bytes(samples, classes)
    if reply > config.reply_limit * 1e6:
        most = max(0, int((config.reply_limit * 1e6 - reply_bytes(0, classes)) / (BYTES_PER_LOGIT * classes)))
        raise ConfigError(
            f"run-config key 'reply-limit' is {config.reply_limit:g} MB, and a client's logits of {samples} samples "
            f"and {classes} classes take {reply / 1e6:.0f} MB; allowed: 't2i.samples-per-round' up to {most}, or a "
            f"limit of {reply / 1e6:.0f}"
        )


def warn_of_sizes(config: RunConfig, classes: int) -> None:
    """Warn if a class has too few samples a round for votes to tell one from another; ``classes`` as `check_sizes`."""
    samples, least = config.t2i.samples_per_round, VOTES_PER_IMAGE + 1
    shown = min(config.t2i.classes_per_round or classes, classes)
    if config.t2i.prompts == "templates" and config.t2i.scores == "votes" and samples < least * shown:
        logger.warning(
            "%s samples a round of %s classes are %.3g of each: with less than %s, a private image votes for all of "
            "its class, so that votes say nothing of them; set t2i.classes-per-round to %s or less, or raise "
            "t2i.samples-per-round", samples, shown, samples / shown, least, max(1, samples // least),
        )  # fmt: skip


def reply_bytes(samples: int, classes: int) -> int:
    """Return about how many bytes a client's answer to a batch has."""
    return BYTES_PER_LOGIT * samples * classes + 4 * samples + 8 * classes + BYTES_BESIDE
