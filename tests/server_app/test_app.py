import pytest
from flwr.app import Context, RecordDict
from flwr.supercore.logger import FLOWER_LOGGER

from fedmmkt.common.config import ConfigError
from fedmmkt.common.failures import RunError
from fedmmkt.server_app import app as server


@pytest.fixture(autouse=True)
def logger(caplog):
    """Flower's logger, in which a failed run leaves no filter for the next test."""
    before = list(FLOWER_LOGGER.filters)
    yield FLOWER_LOGGER
    FLOWER_LOGGER.filters[:] = before


def run(config):
    server.app(grid=None, context=Context(7, 0, {}, RecordDict(), config))


def log_as_flower(logger, error):
    """What Flower logs of an exception of a ServerApp."""
    logger.error("%s raised an exception", "ServerApp", exc_info=error)
    logger.error("Exit Code: 200\nAn unhandled exception\n\nFor more information, visit: <...>")
    logger.error("another error")


def test_a_wrong_setting_is_the_last_line(logger, caplog):
    with pytest.raises(ConfigError) as raised:
        run({"roundz": 3})

    log_as_flower(logger, raised.value)

    told, other = caplog.messages
    assert told.startswith("The run failed: run-config key 'roundz' is unknown (did you mean 'rounds'?)")
    assert other == "another error"


def test_a_full_disk_is_told_with_the_way_on(caplog, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, f"{tmp_path}/metrics.jsonl could not be written (No space left on device)")

    monkeypatch.setattr(server, "build_strategy", full)
    (tmp_path / "checkpoints" / "round-00001").mkdir(parents=True)

    with pytest.raises(RunError):
        run({"output-dir": str(tmp_path)})

    (told,) = caplog.messages
    assert f"The run failed: {tmp_path}/metrics.jsonl could not be written (No space left on device); once" in told
    assert told.endswith(f"it goes on with resume-from='{tmp_path}'")
    assert not (tmp_path / "traceback.txt").exists()


def test_an_error_that_nobody_expected_leaves_its_traceback_in_the_run_folder(logger, caplog, tmp_path, monkeypatch):
    def broken(*_):
        return {}["a"]

    monkeypatch.setattr(server, "build_strategy", broken)
    with pytest.raises(RunError) as raised:
        run({"output-dir": str(tmp_path / "run")})

    log_as_flower(logger, raised.value)

    file = tmp_path / "run" / "traceback.txt"
    assert caplog.messages == [f"The run failed: KeyError: 'a'; its traceback is in {file}", "another error"]
    assert 'return {}["a"]' in file.read_text()


def test_a_run_without_replies_is_told_with_the_way_on(caplog, tmp_path, monkeypatch):
    def lonely(*_):
        raise RunError("round 2: none of 2 nodes gave a valid reply\n2 of 2 clients: no memory")

    monkeypatch.setattr(server, "build_strategy", lonely)
    (tmp_path / "checkpoints" / "round-00001").mkdir(parents=True)

    with pytest.raises(RunError, match="no memory; once that is mended, it goes on with resume-from="):
        run({"output-dir": str(tmp_path)})

    assert caplog.messages[0].endswith(f"no memory; once that is mended, it goes on with resume-from='{tmp_path}'")
