"""What the documentation's site has beside the pages of this folder, made when it is built.

Pages of the repository's root, among them the README as the home page; a reference of the configuration, from its
pydantic models and registries; and a reference of the public interface, from its docstrings. MkDocs calls the functions
whose names begin with ``on_``.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import fedmmkt
from fedmmkt.common.config import NodeConfig, RunConfig
from fedmmkt.deploy.rules import registries

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
HOSTS = re.compile(r"^(```sh) ([a-z -]+)$", re.MULTILINE)  # a block of commands, and the hosts that it is for
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in this folder."""
    from mkdocs.structure.files import File

    pages = {page: (ROOT / source).read_text() for source, page in ROOT_PAGES.items()}
    pages |= {"configuration.md": configuration_page(), "api.md": api_page()}
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages, and hosts after a fence into its title."""
    sources = {uri: source for source, uri in ROOT_PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    titled = HOSTS.sub(r'\1 title="\2"', markdown)
    return linked_in_site(titled, source, {file.src_uri for file in files})


def linked_in_site(markdown: str, source: str, pages: set[str]) -> str:
    """Replace each link to a file of the repository by one to its page, or by its text if the site has no such page.

    Parameters
    ----------
    markdown : str
        Content of a page, with links that are relative to its source.
    source : str
        Path of the source in the repository, such as ``docs/design.md``.
    pages : set of str
        Pages and pictures of the site.
    """

    def replace(link: re.Match[str]) -> str:
        bang, label, address = link.groups()
        target = urlsplit(address)
        if target.scheme or not target.path:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target.path))
        page = ROOT_PAGES.get(path, path.removeprefix("docs/"))
        anchor = f"#{target.fragment}" if target.fragment else ""
        return f"{bang}[{label}]({page}{anchor})" if page in pages else label

    return LINK.sub(replace, markdown)


def configuration_page() -> str:
    """Return the reference of all configuration keys, and of the names that some of them take."""
    schema = RunConfig.model_json_schema()
    sections = {name: schema["$defs"][part["$ref"].rpartition("/")[2]] for name, part in _sections(schema)}
    general = {name: part for name, part in schema["properties"].items() if name not in sections}
    parts = [
        "# Configuration",
        "A **run-config** key is set for a run with `--run-config` or `RUN_CONFIG`, or in the table "
        "`[tool.flwr.app.config]` of an app's `pyproject.toml`. A **node-config** key is set on a node, with "
        "`flower-supernode --node-config`. Lists are written as one text with commas. A wrong key or value is refused "
        "before the run, with what is allowed.",
        "## Run-config",
        _keys(general),
    ]
    for name, section in sections.items():
        parts += [f"### {name}", section["description"], *_table_if_any(section.get("properties", {}), f"{name}.")]
    node = NodeConfig.model_json_schema()
    parts += ["## Node-config", node["description"], _keys(node["properties"]), "## Names", *_names()]
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """Return the page on which mkdocstrings shows every public name, grouped by module."""
    parts = ["# API", "All of it is imported from `fedmmkt`: `from fedmmkt import FedMMKT`."]
    modules: dict[str, list[str]] = {}
    for name in fedmmkt.__all__:
        modules.setdefault(fedmmkt._MODULES[name], []).append(name)
    for module, names in sorted(modules.items()):
        about = (import_module(f"fedmmkt.{module}").__doc__ or "").partition("\n\n")[0]
        parts += [f"## {module}", about.replace("\n", " "), *(f"::: fedmmkt.{name}" for name in names)]
    return "\n\n".join(parts) + "\n"


def _sections(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name, part) for name, part in schema["properties"].items() if "$ref" in part)


def _table_if_any(properties: Mapping[str, Any], prefix: str) -> list[str]:
    return [_keys(properties, prefix)] if properties else []


def _keys(properties: Mapping[str, Any], prefix: str = "") -> str:
    rows = [
        f"| `{prefix}{name}` | {_default(part)} | {_allowed(part)} | {html.escape(part['description'], quote=False)} |"
        for name, part in properties.items()
    ]
    return "\n".join(["| key | default | allowed | meaning |", "|---|---|---|---|", *rows])


def _default(part: Mapping[str, Any]) -> str:
    value = part["default"]
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    text = ",".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    return f"`{text}`" if text else "empty"


def _allowed(part: Mapping[str, Any]) -> str:
    """Say what a key may be, from its part of the JSON schema."""
    if "anyOf" in part:
        part = next(option for option in part["anyOf"] if option["type"] != "null")
    if "enum" in part:
        return ", ".join(f"`{value}`" for value in part["enum"])
    kind = part["type"]
    if kind == "array":
        few = "one or more" if part.get("minItems") else "any number of"
        return f"{few} {'numbers' if part['items']['type'] == 'number' else 'texts'}, separated by commas"
    if kind in ("integer", "number"):
        words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "up to", "exclusiveMaximum": "below"}
        bounds = [f"{word} {part[name]:,.10g}" for name, word in words.items() if name in part]
        return f"{'whole number' if kind == 'integer' else 'number'} {', '.join(bounds)}".rstrip()
    return {"boolean": "`true` or `false`", "string": "text"}[kind] + (", not empty" if part.get("minLength") else "")


def _names() -> Iterator[str]:
    yield "What `fedmmkt rules` lists. In place of a name, each key takes `module:name` of your own."
    for registry in registries():
        yield f"### {registry.key} names"
        rows = [f"| `{name}` | {about} |" for name, about in registry.names().items()]
        yield "\n".join([f"| {registry.kind} | |", "|---|---|", *rows])
        if registry.also:
            yield f"Or {registry.also}."
