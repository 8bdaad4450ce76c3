"""The systemd units: what they start is what Flower's own parsers accept; no root, no secrets, restart on failure."""

import re
import shutil
import subprocess
import sysconfig

import pytest

from fedmmkt.common.config import NodeConfig
from fedmmkt.deploy.run_config_text import parse_run_config
from tests.services import NAMES, PARSERS, UNITS, command, environment, read_environment_file, read_unit


@pytest.fixture(params=NAMES)
def unit(request):
    return read_unit(request.param)


def example_of_node_env():
    """The environment file that the SuperNode's unit shows in its head."""
    text = (UNITS / "fedmmkt-supernode.service").read_text()
    return read_environment_file("\n".join(re.findall(r"^#   (\w+=.*)$", text, re.MULTILINE)))


def test_flower_accepts_the_command(unit):
    program, *arguments = command(unit, example_of_node_env())

    options = PARSERS[program.rpartition("/")[2]]().parse_args(arguments)

    assert program.startswith("/opt/fedmmkt/bin/")
    assert options.health_server_address.startswith("127.0.0.1:")


def test_the_superlink_authenticates_nodes_and_keeps_submitting_local():
    _, *arguments = command(read_unit("fedmmkt-superlink"), {})

    options = PARSERS["flower-superlink"]().parse_args(arguments)

    assert options.host == "127.0.0.1"
    assert options.enable_supernode_auth
    assert options.isolation == "process"
    assert "--disable-runtime-dependency-installation" in arguments
    assert not options.insecure


def test_the_node_config_shown_is_accepted():
    variables = example_of_node_env()

    node = NodeConfig.from_flower(parse_run_config([variables["NODE_CONFIG"]]))

    assert node.data_path == "/srv/xrays"


def test_a_service_has_a_user_and_folders_of_its_own_and_comes_back(unit):
    assert unit["User"] == ["fedmmkt"]
    assert unit["UMask"] == ["0077"]
    assert unit["StateDirectoryMode"] == ["0700"]
    assert unit["NoNewPrivileges"] == ["yes"]
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["Restart"][0] in {"on-failure", "always"}
    for variable in ("FLWR_HOME", "HF_HOME", "XDG_CACHE_HOME"):
        assert environment(unit).get(variable, "/var/lib/fedmmkt/").startswith("/var/lib/fedmmkt/")


def test_what_a_node_sends_or_a_run_does_cannot_take_the_hosts_memory(unit):
    assert unit["MemoryMax"][0].endswith("%")


def test_code_of_a_run_cannot_become_another_user_of_a_nodes_host():
    assert read_unit("fedmmkt-supernode")["PrivateUsers"] == ["yes"]


def test_systemd_finds_nothing_wrong(tmp_path):
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("systemd-analyze is not here")
    shutil.copytree(UNITS, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*.service"):
        path.write_text(path.read_text().replace("/opt/fedmmkt/bin", sysconfig.get_path("scripts")))

    units = [str(path) for path in sorted(tmp_path.glob("*.service"))]
    checked = subprocess.run([analyze, "verify", *units], capture_output=True, text=True, check=False)

    assert checked.stderr + checked.stdout == ""
    assert checked.returncode == 0
