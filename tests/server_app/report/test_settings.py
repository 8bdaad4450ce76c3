"""What differs from the defaults, and the command that repeats a run."""

import shlex

from fedmmkt.common.config import RunConfig
from fedmmkt.deploy.run_config_text import parse_run_config
from fedmmkt.server_app.report.settings import ShownSetting, repeating_run_config, settings_of


def described(**changes):
    return RunConfig.from_flower({key.replace("__", "."): value for key, value in changes.items()}).model_dump(
        mode="json", by_alias=True
    )


def test_changed_settings_come_first_with_their_default():
    settings = settings_of(described(seed=3, data__alpha=0.5))

    assert settings[:2] == [ShownSetting("seed", "3", "0"), ShownSetting("data.alpha", "0.5", "0.1")]
    assert all(setting.default is None for setting in settings[2:])


def test_the_default_settings_need_no_option():
    assert repeating_run_config(described()) == ""


def test_flower_reads_the_command_as_the_run_was_configured():
    changes = {
        "seed": 3,
        "judge": False,
        "client.models": "cnn,mlp",
        "data.dataset": '/data/it\'s \\ "new" 🐦\x7f',
        "extra.trim_share": 0.25,
    }
    config = described(**{key.replace(".", "__"): value for key, value in changes.items()}, output_dir="/runs/7")

    option, pairs = shlex.split(repeating_run_config(config))

    assert option == "--run-config"
    assert parse_run_config([pairs]) == changes
