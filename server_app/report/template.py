"""The templates of the pages: HTML with one style sheet, and the formats of numbers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import Environment, FileSystemLoader

from fedmmkt.common.installed import installed
from fedmmkt.server_app.report.charts import COLOURS
from fedmmkt.server_app.report.numbers import number, percent, points, seconds, size


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder; texts are escaped."""
    return _environment().get_template(template).render(colours=COLOURS, **values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """Return the templates; each is compiled once."""
    folder = installed("server_app/report/page.html").parent  # An app bundle contains no HTML.
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "number": number, "points": points, "size": size, "seconds": seconds}
    return environment
