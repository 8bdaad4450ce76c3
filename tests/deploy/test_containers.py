"""The container files: pinned, without root, secrets or writable images; their commands run, outside a container."""

import json
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from fedmmkt.common.config import DataConfig, NodeConfig
from fedmmkt.deploy.certificates import make_ca, make_node_key, make_server_certificate, make_superexec_secret
from fedmmkt.deploy.connection_checks import is_healthy
from fedmmkt.deploy.federation import connect
from fedmmkt.deploy.partition import write_partitions
from fedmmkt.deploy.processes import FlowerProcesses, flower_environment, free_port, stop_together
from fedmmkt.deploy.run_config_text import parse_run_config
from fedmmkt.deploy.submission import Submitter
from tests import ROOT
from tests.services import PARSERS

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SERVER, GPU, EDGE = (DOCKER / f"compose{name}.yaml" for name in ("", ".gpu", ".edge"))


def interpolate(text):
    """Put defaults in place of variables, as Compose does."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def compose(path):
    return yaml.safe_load(interpolate(path.read_text()))


SERVICES = compose(SERVER)["services"] | compose(EDGE)["services"]


@pytest.fixture(params=sorted(SERVICES))
def service(request):
    return SERVICES[request.param]


def test_images_and_packages_are_pinned():
    pinned = dict(line.split("==") for line in (DOCKER / "constraints.txt").read_text().splitlines() if "==" in line)
    bases = re.findall(r"^FROM (\S+:\S+)", DOCKERFILE, re.MULTILINE)
    (torch,) = (entry for entry in PROJECT["dependencies"] if entry.startswith("torch=="))

    assert bases
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base) for base in bases)
    assert f"pip install {torch} " in DOCKERFILE
    for requirement in map(Requirement, PROJECT["dependencies"]):
        if requirement.name != "torch":
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_the_image_runs_as_a_user_of_its_own_and_tells_its_health():
    before, _, after = DOCKERFILE.partition("USER 10001:10001")

    assert "useradd --system --uid 10001" in before
    assert "USER root" not in after
    assert "HEALTHCHECK" in after
    assert re.findall(r"^FROM base AS (\w+)", after, re.MULTILINE) == ["server", "client"]


def test_nothing_but_code_and_the_starter_model_goes_into_an_image():
    ignored, *allowed = [
        line for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert ignored == "*"
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        assert all(any(line.startswith(f"!{source}") for line in allowed) for source in sources.split())
    assert not any(line.startswith("!") and re.search(r"key|pem|crt|\*\*$", line) for line in allowed)


def test_flower_accepts_the_command_and_the_secrets_are_there(service):
    program, *arguments = service["command"]

    options = PARSERS[program]().parse_args(arguments)

    assert options.health_server_address == "127.0.0.1:9101"  # where the image's health check asks
    assert set(re.findall(r"/run/secrets/(\S+)", " ".join(arguments))) == set(service["secrets"])


def test_a_container_has_no_rights_that_it_does_not_need(service):
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["image"].endswith(f":{PROJECT['version']}")
    mounts = [volume.rpartition(":") for volume in service["volumes"]]
    assert all(target == "/var/lib/fedmmkt" or target == "ro" for _, _, target in mounts)


def test_submitting_is_for_the_host_itself():
    assert SERVICES["superlink"]["ports"] == ["127.0.0.1:9091:9091", "9092:9092"]


def test_a_node_beside_the_server_shares_no_network_with_the_submit_api():
    assert SERVICES["supernode"]["networks"] == ["node"]
    assert all("networks" not in SERVICES[name] for name in ("superlink", "superexec"))  # so the default one
    assert "--superlink=host.docker.internal:9092" in SERVICES["supernode"]["command"]


def test_the_edge_clients_node_config_is_accepted():
    (text,) = (word for word in SERVICES["supernode"]["command"] if word.startswith("--node-config="))

    node = NodeConfig.from_flower(parse_run_config([text.removeprefix("--node-config=")]))

    assert (node.device, node.data_path) == ("cpu", "/data")
    assert not node.share_votes
    assert not node.share_classes


@pytest.mark.parametrize("path", [SERVER, GPU, EDGE], ids=lambda path: path.name)
def test_the_schema_of_compose_accepts_the_file(path):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]

    checked = subprocess.run(command, capture_output=True, text=True, check=False)

    assert checked.returncode == 0, checked.stdout + checked.stderr


def compose_2():
    """Return the command of Compose 2, as docker's plugin or alone; None if there is neither."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            asked = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
            if asked.returncode == 0 and not asked.stdout.startswith(("1.", "v1.")):
                return command
    return None


@pytest.mark.parametrize("files", [[SERVER], [SERVER, GPU], [EDGE], [SERVER, EDGE]], ids=len)
def test_compose_accepts_the_overlays(files):
    compose = compose_2()
    if compose is None:
        pytest.skip("Compose 2 is not here, neither as docker compose nor as docker-compose")
    options = [word for path in files for word in ("--file", str(path))]

    checked = subprocess.run([*compose, *options, "config", "--quiet"], capture_output=True, text=True, check=False)

    assert checked.returncode == 0, checked.stderr


def test_hadolint_finds_nothing():
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"

    checked = subprocess.run([str(hadolint), str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)

    assert checked.stdout == ""
    assert checked.returncode == 0


@pytest.mark.slow
def test_the_commands_run_outside_a_container(tmp_path):
    keys = tmp_path / "keys"
    make_ca(keys)
    make_server_certificate(keys, ["superlink"])
    make_superexec_secret(keys)
    private, public = make_node_key(keys, "edge")
    shutil.copy(private, keys / "node.key")
    (data,) = write_partitions(DataConfig(partitioner="iid"), 1, 0, tmp_path / "data")
    ports = {port: str(free_port()) for port in ("9091", "9092")}
    started = {}
    try:
        for name in ("superlink", "superexec", "supernode"):
            home = tmp_path / name
            own_ports = ports | {"9101": str(free_port())}
            places = {"/run/secrets": keys, "/var/lib/fedmmkt": home, '"/data"': f'"{data}"'}
            program, *arguments = [outside(word, places, own_ports) for word in SERVICES[name]["command"]]
            if name == "supernode":
                connect(home_of_submitter(tmp_path), "server", f"127.0.0.1:{ports['9091']}", keys / "ca.crt")
                submitter = Submitter(tmp_path, flower_environment(tmp_path / "submitter", free_port()))
                assert json.loads(submitter.flwr("supernode", "register", str(public), "server", "--format", "json"))
                arguments += ["--port", str(free_port())]  # in a container, nobody else has the default one
            home.mkdir()
            started[name] = FlowerProcesses(home, flower_environment(home, free_port()))
            started[name].start(name, program, *arguments)
            wait_for(lambda port=own_ports["9101"]: is_healthy(f"127.0.0.1:{port}"))
            (check,) = re.findall(r"^    CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
            check = [word.replace("9101", own_ports["9101"]) for word in json.loads(check)]
            assert subprocess.run([sys.executable, "-m", *check], cwd=ROOT, check=False).returncode == 0
        wait_for(lambda: '"status": "online"' in submitter.flwr("supernode", "list", "server", "--format", "json"))
        assert stat.S_IMODE((keys / "node.key").stat().st_mode) == 0o600
    finally:
        stop_together(list(started.values()))


def outside(word, places, ports):
    for inside, place in places.items():
        word = word.replace(inside, str(place))
    word = (
        word.replace("0.0.0.0", "127.0.0.1")
        .replace("superlink:", "127.0.0.1:")
        .replace("host.docker.internal:", "127.0.0.1:")
    )
    return re.sub(r"(?<=:|=)9\d\d\d\b", lambda match: ports[match[0]], word)


def home_of_submitter(folder):
    (folder / "submitter").mkdir()
    return folder / "submitter"


def wait_for(condition):
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)
