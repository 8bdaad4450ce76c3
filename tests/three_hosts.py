"""A federation whose nodes are in other network namespaces than this process, which is in the server's.

``python -m tests.three_hosts FOLDER NAMESPACE...`` runs two tiny rounds and prints how the run ended.
"""

import sys
from pathlib import Path

from fedmmkt.common.config import DataConfig, RunConfig, to_flower
from fedmmkt.deploy.federation import local_federation
from fedmmkt.deploy.partition import write_partitions
from tests import ROOT
from tests.conftest import TINY
from tests.network import SERVER_ADDRESS, inside, node_address


def main(folder, namespaces):
    parts = write_partitions(DataConfig(alpha=1), len(namespaces), 0, folder / "data")
    config = to_flower(RunConfig()) | TINY | {"output-dir": str(folder / "run"), "min-available-nodes": len(namespaces)}
    with local_federation(address=SERVER_ADDRESS) as federation:
        for index, (namespace, model, part) in enumerate(zip(namespaces, ("cnn", "text"), parts, strict=True)):
            settings = {"name": model, "model": model, "data-path": str(part), "state-dir": str(part / "state")}
            federation.add_node(model, settings, own_address=node_address(index), prefix=inside(namespace))
        federation.wait_for_nodes()
        return federation.run(ROOT, config).status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]) != "finished:completed")
