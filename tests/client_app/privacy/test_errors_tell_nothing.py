"""What a run asks of a node with a privacy ledger: no record decides whether it gets an answer or an error.

An error costs no budget. If it depended on a record, it would be an exact test of membership, as often as one likes.
"""

import itertools

import numpy as np
import pytest
from flwr.app import Message
from PIL import Image

from fedmmkt.client_app.privacy.ledger import create_ledger
from fedmmkt.common.config import RunConfig, to_flower
from fedmmkt.common.datasets import _share_of
from fedmmkt.common.images import encode_images
from fedmmkt.common.payloads import DistillationPayload, Instructions, Request, SyntheticBatch
from fedmmkt.common.privacy import Budget
from fedmmkt.deploy.in_process import InProcessGrid

ROWS = [(f"note {row}", "ab"[row % 2]) for row in range(12)]
RARE = ("a rare note", "rare")
QUICK = {"client.warmup-epochs": 1, "client.distillation-steps": 0, "data.image-size": 8}
number = itertools.count()


def asked(tmp_path, data, classes, model="text", **settings):
    """Return the class counts and votes that a node with these data answers, with hardly any noise."""
    home = tmp_path / f"node-{next(number)}"
    create_ledger(home / "ledger.jsonl", Budget(1000.0))
    node = {"data-path": str(data), "privacy-ledger": str(home / "ledger.jsonl"), "state-dir": str(home / "state")}
    run_config = to_flower(RunConfig()) | QUICK | settings
    grid = InProcessGrid("fedmmkt.client_app.app:app", run_config, [node | {"model": model, "name": "ann"}])
    told = Instructions(run_key="run", round=1, rounds=1, classes=classes, votes=True, anchor_size=0)
    images, offsets = encode_images(
        np.zeros((4, 8, 8, 3), np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]
    )
    batch = SyntheticBatch(
        batch_id="b", round=1, prompts=("a",) * 4, prompted_N=np.full(4, -1), images=images, offsets=offsets
    )
    replies = []
    for kind, request in (
        ("train", Request(told, (batch,))),
        ("train.distill", Request(told)),
        ("evaluate", Request(told)),
    ):
        [reply] = grid.pull_messages(
            grid.push_messages([Message(request.to_content(), dst_node_id=1, message_type=kind)])
        )
        assert reply.has_content(), f"{kind}: {reply.error.reason}"
        replies.append(reply)
    payload = DistillationPayload.from_records(replies[0].content, "payload")
    return payload.class_counts_C.tolist(), payload.votes_N


def table(tmp_path, rows):
    path = tmp_path / f"table-{next(number)}.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


@pytest.mark.parametrize("classes", [("a", "b"), ("rare", "other"), ("other", "another")])
def test_a_class_space_without_a_records_class_or_with_it_alone(tmp_path, classes):
    without, _ = asked(tmp_path, table(tmp_path, ROWS), classes)
    having, _ = asked(tmp_path, table(tmp_path, [*ROWS, RARE]), classes)

    assert abs(np.array(having) - without).sum() <= 1


@pytest.mark.parametrize(("fraction", "seeds"), [(0.02, 3000), (0.9, 3000)])
def test_a_seed_and_a_fraction_that_single_out_a_record(tmp_path, fraction, seeds):
    """A run chooses both, so it can find a seed by which a record that it knows is held out alone, or never."""
    config = RunConfig().data

    def is_held(row, seed):
        return _share_of({"text": row[0], "label": row[1]}, config, seed) < fraction

    held = fraction < 0.5
    seed = next(
        seed for seed in range(seeds) if is_held(RARE, seed) == held and all(is_held(row, seed) != held for row in ROWS)
    )
    settings = {"data.test-fraction": fraction, "seed": seed}

    without, _ = asked(tmp_path, table(tmp_path, ROWS), ("a", "b", "rare"), **settings)
    having, _ = asked(tmp_path, table(tmp_path, [*ROWS, RARE]), ("a", "b", "rare"), **settings)

    assert sum(without) == (12 if held else 1)  # Of nobody, one is told, since no client is without an example.
    assert having[:2] == (without[:2] if held else [0, 0])


def test_no_label_is_the_number_of_a_class(tmp_path):
    counts, votes_N = asked(
        tmp_path, table(tmp_path, [("a note", 7)] * 3), ("cat", "dog"), **{"data.classes": "cat,dog"}
    )

    assert sum(counts) == 1
    assert votes_N is None


@pytest.mark.parametrize("label", ["7", "unknown", "-1", "1.5"])
def test_a_label_that_is_no_number_of_a_class_changes_no_other(tmp_path, label):
    rows, settings = [(f"note {row}", row % 2) for row in range(12)], {"data.classes": "cat,dog"}

    without, _ = asked(tmp_path, table(tmp_path, rows), ("cat", "dog"), **settings)
    having, _ = asked(tmp_path, table(tmp_path, [*rows, ("a note", label)]), ("cat", "dog"), **settings)

    assert without == having
    assert sum(without) > 6


@pytest.fixture
def images(tmp_path):
    for row in range(12):
        (folder := tmp_path / "images" / "ab"[row % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * row, np.uint8)).save(folder / f"{row}.png")
    return tmp_path / "images"


def deep(file):
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(file)


def broken(file):
    file.write_bytes(b"no image")


def negative(file):
    Image.fromarray(np.full((8, 8), -1.0, np.float32)).save(file.with_suffix(".tiff"))


@pytest.mark.parametrize("write", [deep, broken, negative])
@pytest.mark.parametrize("classes", [("a", "b", "c"), ("c", "d")])
def test_an_image_that_cannot_be_read_as_the_others(tmp_path, images, write, classes):
    settings = {"model": "mlp", "data.test-fraction": 1e-6}
    counts, votes_N = asked(tmp_path, images, classes, **settings)
    (images / "c").mkdir()
    write(images / "c" / "12.png")
    after, after_N = asked(tmp_path, images, classes, **settings)

    assert abs(np.array(after) - counts).sum() <= 1
    assert abs(after_N - votes_N).sum() <= 3
