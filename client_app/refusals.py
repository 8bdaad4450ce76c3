"""What a node tells of its errors.

The text of an error may hold what is private: names of columns and files, labels, rows. A node with data of its own
keeps it in its own log, and tells the server what kind of thing went wrong, and a number by which to find the text.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from logging import getLogger
from typing import Any

from flwr.app import Context, Message

from fedmmkt.common.config import ConfigError

logger = getLogger("flwr")

Handler = Callable[[Message, Context], Message]


class RefusedError(ConfigError):
    """A node with data of its own refused; the text tells nothing of them."""


@contextmanager
def refused_as(kind: str, node_config: Mapping[str, Any]) -> Iterator[None]:
    """Replace errors of the block by a `RefusedError` of this kind, if the node has data of its own.

    In a simulation the data are the run's own, so errors stay as they are.

    Parameters
    ----------
    kind : str
        What went wrong: a word that tells nothing of the data.
    node_config : mapping
        Flower's node-config. It may be invalid, so it is read as it is.
    """
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:
        if not node_config.get("data-path"):
            raise
        number = secrets.token_hex(2)
        logger.error("refused, %s, %s: %s", kind, number, error)
        raise RefusedError(f"the node refused: {kind} (see the node's log, {number})") from error


def discreet(handler: Handler) -> Handler:
    """Wrap the handler of a message, so that its errors tell nothing private."""

    @wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        with refused_as("error", context.node_config):
            return handler(message, context)

    return handle
