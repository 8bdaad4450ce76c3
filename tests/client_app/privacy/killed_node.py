"""A node in private mode that is killed before each write of a round in turn, with real files.

Run as a process of its own, so that the node's processes can be forked from one that has imported everything, and that
has no threads.
"""

import importlib
import json
import multiprocessing
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message
from PIL import Image

from fedmmkt.client_app import memory
from fedmmkt.client_app.privacy.ledger import create_ledger
from fedmmkt.common.config import RunConfig, to_flower
from fedmmkt.common.images import encode_images
from fedmmkt.common.payloads import DistillationPayload, Instructions, Request, SyntheticBatch
from fedmmkt.common.privacy import Budget
from fedmmkt.deploy.in_process import InProcessGrid
from tests.client_app.privacy.killing import kill_at_write

ROUNDS = 2


def write_data(folder):
    rng = np.random.default_rng(1)
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for number in range(12):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / label / f"{number}.png")


def batch_of(round_):
    images_NHWC = np.random.default_rng(round_).integers(0, 256, (6, 8, 8, 3), np.uint8)
    data, offsets = encode_images(images_NHWC)
    prompted_N = np.array([0, 0, 0, 1, 1, 1])
    return SyntheticBatch(
        batch_id=f"run-{round_}", round=round_, prompts=("a",) * 6, prompted_N=prompted_N, images=data, offsets=offsets
    )


def take_part(folder, data, kill_at, pipe):
    """Take part in a run, and send each answer as it would leave; be killed before the write of this number."""
    kill_at_write(kill_at, (torch, "save"), (memory, "save_file"))
    quick = {"client.warmup-epochs": 0, "client.local-epochs": 0, "client.distillation-steps": 0, "data.image-size": 8}
    own = {"data-path": str(data), "privacy-ledger": str(folder / "ledger.jsonl"), "state-dir": str(folder / "state")}
    node = own | {"model": "mlp", "name": "ann"}
    grid = InProcessGrid("fedmmkt.client_app.app:app", to_flower(RunConfig()) | quick, [node])
    for round_ in range(1, ROUNDS + 1):
        told = Instructions(run_key="run", round=round_, rounds=ROUNDS, classes=("a", "b"), votes=True, anchor_size=0)
        message = Message(Request(told, (batch_of(round_),)).to_content(), dst_node_id=1, message_type="train")
        [reply] = grid.pull_messages(grid.push_messages([message]))
        assert reply.has_content(), reply.error.reason
        payload = DistillationPayload.from_records(reply.content, "payload")
        pipe.send((round_, payload.class_counts_C.tolist(), payload.votes_N.tolist()))
    pipe.send(None)


def answers_of(folder, data, kill_at):
    """Return the answers that left the node, and whether it came to the end."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=take_part, args=(folder, data, kill_at, writer))
    process.start()
    writer.close()
    received = []
    while True:
        try:
            received.append(reader.recv())
        except EOFError:
            break
    process.join()
    done = bool(received) and received[-1] is None
    assert done or process.exitcode == -signal.SIGKILL, process.exitcode
    return [one for one in received if one is not None], done


def entries(ledger):
    """Return what the whole lines of a ledger say; what a killed process was writing has no end."""
    lines = ledger.read_bytes().splitlines(keepends=True)
    return [json.loads(line)["entry"] for line in lines if line.endswith(b"\n")]


def main(folder, step):
    for library in ("datasets", "dp_accounting.rdp", "opendp.prelude", "sklearn.model_selection"):
        importlib.import_module(library)  # Once, and not in each process, which imports them when it needs them.
    torch.set_num_threads(1)
    write_data(folder / "data")
    tried = []
    done, kill_at = False, 1
    while not done:
        home = folder / f"killed-{kill_at}"
        create_ledger(home / "ledger.jsonl", Budget(8.0))
        first, done = answers_of(home, folder / "data", kill_at)
        killed = entries(home / "ledger.jsonl")
        again, _ = answers_of(home, folder / "data", 0)
        tried.append({"answers": first, "killed": killed, "again": again, "ledger": entries(home / "ledger.jsonl")})
        kill_at += step
    print(json.dumps(tried))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
