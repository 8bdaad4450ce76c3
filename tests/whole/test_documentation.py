"""The pages: the site builds, links hold, and what pages name is there."""

import html
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec

import jupytext
import pytest
import yaml
from nbclient import NotebookClient

import fedmmkt
from docs.site_pages import configuration_page, linked_in_site
from fedmmkt.__main__ import COMMANDS
from fedmmkt.common.config import NodeConfig, RunConfig, to_flower
from tests import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CODE = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
# A dotted name of the package may end in a class, and that in a member.
MODULE = re.compile(r"\bfedmmkt(?:\.[a-z_0-9]+)+")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site as `make docs` does, and return its folder."""
    if shutil.which("make") is None:
        pytest.skip("no `make` here")
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(["make", "--silent", "layout"], cwd=ROOT, check=True)
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_home_page_is_the_readme(site):
    home = html.unescape((site / "index.html").read_text())
    assert "teach each other, and no image, text or weight leaves a client" in home
    assert 'href="deployment.html"' in home
    assert 'src="before-after.png"' in home


def test_every_block_of_code_is_one_on_the_site(site):
    assert [page.name for page in site.glob("*.html") if "```" in page.read_text()] == []
    assert '<span class="filename">clinic-a clinic-b</span>' in (site / "deployment.html").read_text()


def test_every_public_name_is_in_the_reference_of_the_api(site):
    page = (site / "api.html").read_text()
    assert [name for name in fedmmkt.__all__ if f'id="fedmmkt.{name}"' not in page] == []
    assert "Weight by votes" in (site / "configuration.html").read_text()  # what `fedmmkt rules` says of a rule


def test_the_reference_of_the_configuration_has_every_key_with_its_description():
    rows = dict(re.findall(r"^\| `([a-z0-9.-]+)` \| (.*) \|$", configuration_page(), re.MULTILINE))
    sections = {"": RunConfig, **{name: getattr(RunConfig(), name) for name in ("data", "client", "t2i")}}
    node_keys = [field.alias for field in NodeConfig.model_fields.values()]
    assert not to_flower(RunConfig()).keys() - rows.keys()
    assert not set(node_keys) - rows.keys()
    for prefix, section in sections.items():
        fields = section.model_fields if prefix == "" else type(section).model_fields
        for field in fields.values():
            key = f"{prefix}.{field.alias}".lstrip(".")
            if field.description:
                assert html.escape(field.description, quote=False) in rows[key]
    assert rows["rounds"] == "`8` | whole number from 1, up to 100,000 | number of rounds"
    assert rows["quorum"].startswith("`0.5` | number from 0, up to 1 | ")
    assert rows["data.test-fraction"].startswith("`0.2` | number above 0, below 1 | ")
    assert rows["client.trainable"].startswith("`all` | `all`, `head` | ")
    assert rows["client.models"].startswith("`cnn,mlp,vit,resnet,text,dual` | one or more texts, separated by commas |")
    assert rows["judge"].startswith("`true` | `true` or `false` | ")
    assert rows["partition-id"].startswith("empty | whole number from 0 | ")


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("README.md", "[a](docs/design.md#files)", "[a](design.md#files)"),
        ("README.md", "![a](docs/before-after.png)", "![a](before-after.png)"),
        ("docs/design.md", "[a](results.md)", "[a](results.md)"),
        ("docs/design.md", "[a](../README.md)", "[a](index.md)"),
        ("docs/design.md", "[deploy](../deploy/systemd)", "deploy"),
        ("docs/design.md", "[a](#files) [b](https://flower.ai/x)", "[a](#files) [b](https://flower.ai/x)"),
    ],
)
def test_links_between_files_become_links_between_pages(source, link, expected):
    assert linked_in_site(link, source, {"index.md", "design.md", "results.md", "before-after.png"}) == expected


def anchors(text):
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_hold(page):
    broken = []
    for address in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", TEXTS[page])):
        path, _, anchor = address.partition("#")
        if "://" in address:
            continue
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(address)
    assert not broken


@pytest.mark.parametrize("page", TEXTS)
def test_files_and_modules_that_a_page_names_are_there(page):
    text = TEXTS[page]
    rooms = ("common", "server_app", "client_app", "fedmmkt", "starter", "deploy", "benchmarks", "tests", "docs")
    files = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(rooms)})/[\w./-]*\w/?", text))
    missing = [
        file for file in sorted(files) if not (ROOT / file).exists() and not file.endswith("docs/tutorial.ipynb")
    ]
    missing += [name for name in re.findall(r"python -m (benchmarks\.[a-z_0-9]+)", text) if not find_spec(name)]
    missing += [name for name in MODULE.findall(text) if not is_there(name)]
    assert not missing


def is_there(name):
    """Whether a dotted name is a module, or what a module holds."""
    parent, _, last = name.rpartition(".")
    try:
        return bool(find_spec(name)) or hasattr(__import__(parent, fromlist=[last]), last)
    except ModuleNotFoundError:
        return False


# The changelog tells of what was; the tutorial is run.
@pytest.mark.parametrize("page", sorted(TEXTS.keys() - {"CHANGELOG.md", "docs/tutorial.md"}))
def test_commands_that_a_page_shows_exist(page):
    text = TEXTS[page]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"(?:bin/|`|^)fedmmkt ([a-z]+)", text, re.MULTILINE)
    made = re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE)
    assert not set(commands) - COMMANDS.keys()
    assert not set(made) - targets


def test_one_version_wherever_it_is_named():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    assert f"## [{PROJECT['version']}]" in TEXTS["CHANGELOG.md"]
    wheels = {version for text in TEXTS.values() for version in re.findall(r"fedmmkt-([\d.]+)-py3", text)}
    images = set(re.findall(r"fedmmkt-\w+:([\d.]+\d)", (ROOT / "deploy/docker/Dockerfile").read_text()))
    assert wheels == images == {PROJECT["version"]}


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch):
    """Two short runs, images drawn and predictions made."""
    monkeypatch.setenv("PATH", os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))  # noqa: PTH120
    notebook = jupytext.read(ROOT / "docs" / "tutorial.md")

    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()

    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "'data.alhpa' is unknown (did you mean 'data.alpha'?)" in printed
    drawn, before = (sorted((tmp_path / folder).glob("*.png")) for folder in ("drawn", "drawn-before"))
    assert len(drawn) == len(before) == 40
    assert all(new.read_bytes() != old.read_bytes() for new, old in zip(drawn, before, strict=True))
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 101
