"""One round's exchange with many nodes on one real SuperLink: ``python -m benchmarks.nodes --nodes 10 100 1000``.

The SuperLink, its database and the ServerApp are Flower's own processes, over TLS. The nodes are threads of one process
that speak the Fleet protocol as SuperNodes do, and train nothing: each takes its message with all objects, waits
``--work`` seconds, and answers with logits. So the seconds beyond ``--work`` are those of the exchange, and the CPU
seconds are what one SuperLink and one ServerApp need for so many nodes.

Three ways of waiting are compared: Flower's own (``grid.send_and_receive``: all replies in one call, every 3 s), the
constant pause of earlier versions, and the present one, which becomes rarer the longer a round takes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fedmmkt.common.config import Setting
from fedmmkt.common.payloads import ClientReport, DistillationPayload
from fedmmkt.deploy.federation import local_federation
from fedmmkt.deploy.submission import COMPLETED

SAMPLES, CLASSES, IMAGE_BYTES = 400, 10, 320  # As in the demo.
WAYS = ("flower", "constant", "present")
THREADS = 16

PROJECT = """
[project]
name = "manynodes"
version = "1.0.0"

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "manynodes.apps:server"
clientapp = "manynodes.apps:client"

[tool.flwr.app.config]
nodes = 10
superlink = 0
ways = ""
out = ""
"""
APPS = '''
"""Ask all nodes once for each way of waiting, and write what it took."""

import json
import os
import time
from pathlib import Path

import numpy as np
import psutil
from flwr.app import ArrayRecord, Array, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedmmkt.common.payloads import ClientReport, DistillationPayload
from fedmmkt.server_app import exchange as module
from fedmmkt.server_app.exchange import Answer, exchange
from benchmarks.nodes import IMAGE_BYTES, SAMPLES

client = ClientApp()
server = ServerApp()


def read(reply):
    payload = DistillationPayload.from_records(reply.content, "payload")
    return Answer(ClientReport.from_records(reply.content, "report"), payload)


def cpu_seconds(pid):
    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in [parent, *parent.children(recursive=True)]]
    return sum(time.user + time.system for time in times)


@server.main()
def main(grid, context):
    config = context.run_config
    while len(node_ids := list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(1)
    pause, pull = module.pause, grid.pull_messages
    calls = [0]

    def counted(message_ids):
        calls[0] += 1
        return pull(message_ids)

    grid.pull_messages = counted
    for way in config["ways"].split(","):
        images = np.random.default_rng(0).integers(0, 256, SAMPLES * IMAGE_BYTES, dtype=np.uint8)
        content = RecordDict({"batch": ArrayRecord({"images": Array(images)})})
        messages = [Message(content, dst_node_id=node, message_type="train", ttl=3600) for node in node_ids]
        module.pause = pause if way == "present" else lambda waited, swept: max(0.1, module.IDLE * swept)
        calls[0], began = 0, time.monotonic()
        before = cpu_seconds(config["superlink"]), cpu_seconds(os.getpid())
        if way == "flower":
            valid = sum(not reply.has_error() for reply in grid.send_and_receive(messages))
        else:
            replies = exchange(grid, messages, read, lambda node, report: None, 3600, 1.0, {}, 1_000_000)
            valid = sum(reply.kind == "answered" for reply in replies)
        seconds = time.monotonic() - began
        after = cpu_seconds(config["superlink"]), cpu_seconds(os.getpid())
        told = {
            "way": way,
            "valid": valid,
            "seconds": seconds,
            "superlink": after[0] - before[0],
            "serverapp": after[1] - before[1],
            "calls": calls[0],
        }
        with Path(config["out"]).open("a") as lines:
            lines.write(json.dumps(told) + "\\n")
'''


class FleetNode:
    """A node that speaks the Fleet protocol, and answers each message ``work`` seconds after it came."""

    def __init__(self, channel: Any, index: int, work: float) -> None:
        import grpc
        from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
        from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
        from flwr.proto.fleet_pb2_grpc import FleetStub
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
        from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

        private, public = generate_key_pairs()
        interceptors = (
            RuntimeVersionClientInterceptor(component_name="SuperNode"),
            NodeAuthClientInterceptor(private, public),
        )
        self.stub = FleetStub(grpc.intercept_channel(channel, *interceptors))
        key = public_key_to_bytes(public)
        self.stub.RegisterNode(RegisterNodeFleetRequest(public_key=key))
        # As rare as Flower allows: heartbeats are not measured.
        activated = self.stub.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=1800))
        self.node, self.index, self.work = Node(node_id=activated.node_id), index, work
        self.pending: tuple[float, Any] | None = None

    def step(self) -> None:
        """Poll once, or answer if the work is done."""
        if self.pending is None:
            self.pending = self._receive()
        elif time.monotonic() >= self.pending[0]:
            self._answer(self.pending[1])
            self.pending = None

    def _receive(self) -> tuple[float, Any] | None:
        from flwr.common.serde import message_from_proto
        from flwr.proto.fleet_pb2 import PullMessagesRequest
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_protobuf_utils import (
            make_confirm_message_received_fn_protobuf,
            make_pull_object_fn_protobuf,
        )
        from flwr.supercore.inflatable.inflatable_utils import pull_objects

        response = self.stub.PullMessages(PullMessagesRequest(node=self.node))
        if not response.messages_list:
            return None
        message = message_from_proto(response.messages_list[0])
        run_id, object_ids = message.metadata.run_id, iterate_object_tree(response.message_object_trees[0])
        pull = make_pull_object_fn_protobuf(self.stub.PullObject, self.node, run_id)
        pull_objects([tree.object_id for tree in object_ids], pull)
        confirm = make_confirm_message_received_fn_protobuf(self.stub.ConfirmMessageReceived, self.node, run_id)
        confirm(message.metadata.message_id)
        return time.monotonic() + self.work, message

    def _answer(self, message: Any) -> None:
        from flwr.app import Message, RecordDict
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import push_objects

        reply = Message(RecordDict(_records(self.index)), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = self.node.node_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
        request = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
            clientapp_runtime_list=[1.0],
        )
        response = self.stub.PushMessages(request)
        push = make_push_object_fn_protobuf(
            self.stub.PushObject, self.node, message.metadata.run_id, response.session_id
        )
        push_objects(objects, push, object_ids_to_push=set(response.objects_to_push))


def _records(index: int) -> dict[str, Any]:
    """Return the records of a node's answer: logits as in the demo."""
    logits_NC = np.random.default_rng(index).normal(size=(SAMPLES, CLASSES)).astype(np.float16)
    report = ClientReport(
        client=f"node-{index}", model="mlp", modality="image", examples=CLASSES, accuracy=0.5, loss=1.0
    )
    payload = DistillationPayload(batch_id="b", logits_NC=logits_NC, class_counts_C=np.ones(CLASSES, np.int64))
    return {**report.to_records("report"), **payload.to_records("payload")}


def serve(address: str, authority: Path, count: int, work: float, poll: float) -> None:
    """Be so many nodes, until this process is stopped; each polls every ``poll`` seconds, as a SuperNode every 3."""
    from flwr.supercore.grpc import GRPC_MAX_MESSAGE_LENGTH, create_channel
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0  # Flower's Message needs it.
    channel = create_channel(
        server_address=address,
        insecure=False,
        root_certificates=authority.read_bytes(),
        max_message_length=GRPC_MAX_MESSAGE_LENGTH,
    )
    with ThreadPoolExecutor(THREADS) as pool:
        nodes = list(pool.map(lambda index: FleetNode(channel, index, work), range(count)))

    def keep_on(share: Sequence[FleetNode]) -> None:
        while True:
            began = time.monotonic()
            for node in share:
                with contextlib.suppress(Exception):  # The run is over, or the SuperLink is busy.
                    node.step()
            time.sleep(max(0.0, poll - (time.monotonic() - began)))

    threads = min(THREADS, count)
    for first in range(threads):
        threading.Thread(target=keep_on, args=(nodes[first::threads],), daemon=True).start()
    print("ready", flush=True)
    threading.Event().wait()


def measure(count: int, ways: Sequence[str], work: float, poll: float) -> list[dict[str, Any]]:
    """Start a SuperLink with so many nodes, and exchange once for each way of waiting."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        federation = stack.enter_context(local_federation(node_authentication=False))
        arguments = [federation.fleet, str(federation.pki / "ca.crt"), str(count), str(work), str(poll)]
        nodes = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.nodes", "--serve", *arguments], stdout=subprocess.PIPE, text=True
        )
        stack.callback(nodes.wait)
        stack.callback(nodes.kill)
        assert nodes.stdout is not None
        if nodes.stdout.readline().strip() != "ready":
            raise RuntimeError("the nodes did not start")
        package = folder / "manynodes"
        package.mkdir()
        (folder / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        (package / "__init__.py").touch()
        (package / "apps.py").write_text(APPS, encoding="utf-8")
        out, log = folder / "told.jsonl", io.StringIO()
        config: dict[str, Setting] = {"nodes": count, "superlink": federation.superlink.pid, "out": str(out)}
        outcome = federation.run(folder, config | {"ways": ",".join(ways)}, log)
        if outcome.status != COMPLETED:
            raise RuntimeError(log.getvalue())
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nodes", description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--work", type=float, default=30.0, help="seconds that each node works on a message")
    parser.add_argument("--poll", type=float, default=3.0, help="seconds between a node's polls; a SuperNode's are 3")
    parser.add_argument("--serve", nargs=5, metavar="X", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        address, authority, count, work, poll = options.serve
        serve(address, Path(authority), int(count), float(work), float(poll))
        return 0
    root = str(Path(__file__).parent.parent)  # Where Flower's processes find this module.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    print(f"one exchange with nodes that work {options.work:g} s and poll every {options.poll:g} s\n")
    print("| nodes | waiting | seconds beyond the work | SuperLink CPU s | ServerApp CPU s | calls for replies |")
    print("|---|---|---|---|---|---|", flush=True)
    for count in options.nodes:
        for told in measure(count, options.ways, options.work, options.poll):
            if told["valid"] != count:
                raise RuntimeError(f"{told['valid']} of {count} nodes answered")
            seconds = told["seconds"] - options.work
            row = f"{seconds:.1f} | {told['superlink']:.1f} | {told['serverapp']:.1f} | {told['calls']}"
            print(f"| {count} | {told['way']} | {row} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
