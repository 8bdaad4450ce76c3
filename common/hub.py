"""The Hugging Face hub: one quick question whether it answers, so that nobody waits for retries of its library."""

from __future__ import annotations

import os
import sys
from functools import lru_cache

PATIENCE = 5.0  # seconds for the hub's first answer, whatever it says


@lru_cache(maxsize=1)
def unreachable_hub() -> str:
    """Ask the hub once per process; say why it cannot be reached, or return an empty text.

    If it does not answer, its libraries are told to work offline for the rest of this process and its children, as with
    ``HF_HUB_OFFLINE=1``: what is in the cache still loads, and the rest fails at once.
    """
    import httpx
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return ""  # Its own words say so.
    try:
        httpx.head(constants.ENDPOINT, timeout=PATIENCE)
        return ""
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later
        if "datasets" in sys.modules:
            import datasets

            datasets.config.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached: {str(error) or type(error).__name__}"
