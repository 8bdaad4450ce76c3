import stat

import pytest
from flwr.app import Message
from flwr.common.constant import ErrorCode

from fedmmkt.common.dataset_files import DIGIT_NAMES
from fedmmkt.common.payloads import Instructions, Request

INSTRUCTIONS = Instructions(
    run_key="1", round=0, classes=DIGIT_NAMES, votes=False, anchor_size=0, ancestors=(), ancestor_rounds=()
)


def asked(grid):
    """Ask all nodes for a report, and return what they answer."""
    content = Request(INSTRUCTIONS).to_content()
    messages = [Message(content, dst_node_id=node_id, message_type="evaluate") for node_id in grid.get_node_ids()]
    return list(grid.send_and_receive(messages))


def test_a_wrong_setting_is_answered_in_its_own_words(tiny_run, make_grid):
    config = tiny_run(client__models="no-such-model")

    (reply,) = asked(make_grid(config, nodes=1))

    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert reply.error.reason.startswith("run-config key 'client.models' is 'no-such-model', but no task model")


def test_the_traceback_of_a_client_lies_in_its_state_folder(tiny_run, make_grid, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("a\nb")

    monkeypatch.setattr("fedmmkt.client_app.client.evaluate", broken)
    config = tiny_run(client__models="text")

    (reply,) = asked(make_grid(config, nodes=1))

    file = tmp_path / "run-clients" / "errors" / "node-0.txt"
    assert reply.error.reason == r"KeyError: 'a\nb'"
    assert "Traceback (most recent call last)" in file.read_text()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("config", [{"partition-id": 0}, {}])
def test_a_node_whose_settings_cannot_be_read_answers_too(tiny_run, make_grid, config, tmp_path, monkeypatch):
    monkeypatch.setattr("fedmmkt.client_app.app.DEFAULT_FOLDER", tmp_path)
    grid = make_grid(tiny_run(), nodes=1)
    grid.contexts[1].node_config = config

    (reply,) = asked(grid)

    assert "a node needs `data-path`, or `partition-id` with `num-partitions`" in reply.error.reason
    assert len(list((tmp_path / "errors").glob("node-*.txt"))) == 1
