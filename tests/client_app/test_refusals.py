"""What a node with data of its own tells of its errors, answers and keeps: a run may ask, and not set it."""

from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from fedmmkt.client_app.models.building import chosen_model
from fedmmkt.client_app.refusals import refused_as
from fedmmkt.common.config import ConfigError, NodeConfig, RunConfig, to_flower
from fedmmkt.common.payloads import ClassReport, Instructions, Request
from fedmmkt.deploy.in_process import InProcessGrid

SECRETS = ("ssn", "123-45", "miller", "patients")
TABLE = "text,label,ssn\n" + "".join(f"note {row},{'ab'[row % 2]},123-45-{row}\n" for row in range(20))


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "patients" / "miller.csv"
    path.parent.mkdir()
    path.write_text(TABLE)
    return path


@pytest.fixture
def ask(table, tmp_path):
    """Return a function that sends a node with its own data one message, and returns its reply."""

    def ask(message_type, node=(), content=None, **run):
        run_config = to_flower(RunConfig()) | {key.replace("__", "."): value for key, value in run.items()}
        own = {"data-path": str(table), "model": "text", "state-dir": str(tmp_path / "state"), **dict(node)}
        grid = InProcessGrid("fedmmkt.client_app.app:app", run_config, [own])
        (message_id,) = grid.push_messages([Message(content or RecordDict(), dst_node_id=1, message_type=message_type)])
        return next(iter(grid.pull_messages([message_id])))

    return ask


def evaluation(classes=("a", "b")):
    return Request(Instructions(run_key="run", round=0, classes=classes, votes=True, anchor_size=0)).to_content()


def test_a_node_names_its_classes_only_if_its_own_configuration_says_so(ask):
    refused = ask("query.classes")
    told = ask("query.classes", {"share-classes": True})

    assert refused.error.reason == "the node refused: its node-config has no share-classes=true"
    assert ClassReport.from_records(told.content, "classes").classes == ("a", "b")


def test_a_run_cannot_have_another_column_named(ask):
    told = ask("query.classes", {"share-classes": True}, **{"data__label-column": "ssn"})

    assert ClassReport.from_records(told.content, "classes").classes == ("a", "b")


@pytest.mark.parametrize(
    ("node", "content", "run", "kind"),
    [
        ({"label-column": "lable"}, evaluation(), {}, "data"),
        ({"label-column": "ssn"}, evaluation(), {}, "data"),
        ({"data-path": "/patients/miller.csv"}, evaluation(), {}, "data"),
        ({"model": "patients:miller"}, evaluation(), {}, "model"),
        ({"modle": "miller"}, evaluation(), {}, "configuration"),
        ({}, RecordDict(), {}, "error"),
        ({"model": "", "label-column": "label"}, evaluation(), {"client__models": "patients:miller"}, "model"),
    ],
)
def test_the_text_of_an_error_stays_on_the_node(ask, caplog, node, content, run, kind):
    """The server learns its kind and a number, and the node's log has the text under this number."""
    reason = ask("evaluate", node, content, **run).error.reason

    start, _, number = reason.rpartition(", ")
    assert start == f"the node refused: {kind} (see the node's log"
    assert not any(secret in reason for secret in SECRETS)
    assert f"refused, {kind}, {number.rstrip(')')}: " in caplog.text


def test_in_a_simulation_texts_stay_whole():
    with pytest.raises(ConfigError, match="miller"), refused_as("data", {"partition-id": 0, "num-partitions": 2}):
        raise ConfigError("miller")


@pytest.mark.parametrize("name", ["os:kill", "mine:model", "transformers:/srv/model"])
def test_a_run_chooses_built_in_models_alone_on_a_node_with_data_of_its_own(name):
    run = RunConfig.from_flower({"client.models": name})

    with pytest.raises(ConfigError, match="allowed on a node with data of its own: built-in models"):
        chosen_model(run, NodeConfig(data_path="/data"))

    assert chosen_model(run, NodeConfig(data_path="/data", run_models=True)) == name
    assert chosen_model(run, NodeConfig(data_path="/data", model="cnn")) == "cnn"
    assert chosen_model(run, NodeConfig(partition_id=0, num_partitions=1)) == name


def test_a_run_cannot_choose_where_private_data_are_kept(ask, tmp_path):
    elsewhere = tmp_path / "elsewhere"

    reply = ask("evaluate", content=evaluation(), **{"client__state-dir": str(elsewhere), "output-dir": str(elsewhere)})

    assert reply.has_content()
    assert not elsewhere.exists()
    assert list((tmp_path / "state" / "data").rglob("examples.npz"))
    modes = {Path(folder).stat().st_mode & 0o777 for folder in (tmp_path / "state", *(tmp_path / "state").iterdir())}
    assert modes == {0o700}
