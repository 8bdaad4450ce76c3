"""Three hosts with a network between them that is slow and loses packets."""

import json
import subprocess
import sys

import pytest

from tests import ROOT
from tests.network import SERVER_ADDRESS, inside, node_address, star, unavailable

DELAY, LOSS = 0.05, 0.01

WHY_NOT = unavailable()

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

ROUND_TRIP = """
import socket, sys, time
start = time.monotonic()
try:
    socket.create_connection((sys.argv[1], 9), 30)
except ConnectionRefusedError:
    print(time.monotonic() - start)
"""


def test_a_link_delays_and_leads_to_the_server_only():
    with star(2, DELAY, 0.0) as (namespaces, links):
        command = [*inside(namespaces[1]), sys.executable, "-c", ROUND_TRIP]
        to_server = subprocess.run([*command, SERVER_ADDRESS], capture_output=True, text=True, check=True)
        to_node = subprocess.run([*command, node_address(1)], capture_output=True, text=True, check=False)

        assert float(to_server.stdout) >= 2 * DELAY
        assert links[0].counts()[0] >= 2
        assert "Network is unreachable" in to_node.stderr


@pytest.mark.slow
def test_a_run_over_a_slow_and_lossy_network_completes(tmp_path):
    with star(2, DELAY, LOSS) as (namespaces, links):
        command = [*inside(namespaces[0]), sys.executable, "-m", "tests.three_hosts", str(tmp_path), *namespaces[1:]]

        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

        assert ran.returncode == 0, ran.stdout + ran.stderr
        carried, lost = map(sum, zip(*(link.counts() for link in links), strict=True))
        assert carried > 1000  # 922 and more a link; that none of them is lost is all but impossible
        assert lost > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["replies"]["received"] for line in lines] == [2, 2, 2]
    assert sorted(lines[-1]["clients"]["per_client"]) == ["cnn", "text"]
