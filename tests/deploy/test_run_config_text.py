"""The text of ``--run-config``: Flower reads what is written, and what it would drop or not read is refused."""

import pytest
from flwr.common.config import parse_config_args
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmmkt.common.config import ConfigError
from fedmmkt.common.flower_settings import format_run_config
from fedmmkt.deploy.run_config_text import parse_run_config

KEYS = st.from_regex(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", fullmatch=True)
VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)


@settings(deadline=None)
@given(st.dictionaries(KEYS, VALUES))
def test_flower_reads_what_is_written(config):
    text = format_run_config(config)
    read = parse_config_args([text])
    assert read == config
    assert [type(value) for value in read.values()] == [type(value) for value in config.values()]
    assert parse_run_config([text]) == config


def test_dotted_keys_stay_flat():
    config = {"t2i.lora-rank": 4, "t2i.device": "cpu", "rounds": 2}
    assert parse_run_config([format_run_config(config)]) == config


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["rounds = 2"], "'rounds = 2' is not of the form key=value"),
        (["rounds=2 oops"], "'oops' is not of the form key=value"),
        (["rounds=1 rounds=2"], "key 'rounds' is given twice"),
        (['data.dataset="C:\\data"'], "a backslash in a string is written twice"),
        (["data.dataset=digits rounds=2"], "'data.dataset' is digits, .* need quotes: data.dataset=.digits.$"),
        (
            ["data.dataset=/a/my data rounds=2"],
            "'data.dataset' is /a/my, .* ends at the space; .* needs quotes: data.dataset=./a/my data.$",
        ),
        (["judge=False rounds=2"], "key 'judge' is False, .* truth values are lower case: judge=false$"),
        (["rounds=2 data.alpha=0,5"], "key 'data.alpha' is 0,5, .* decimal point: data.alpha=0.5$"),
        (['data.dataset="a b rounds=2'], 'is "a, which cannot be read; the quote " that begins it is not closed$'),
        (["rounds=2, seed=1"], "no comma between settings, but a space: rounds=2$"),
        (['data.dataset="a", seed=1'], "is followed by ', seed=1'; allowed: a space .*, and no comma$"),
        (['data.dataset="\\new\\birds.csv"'], "in which .n would be a control character; a backslash in a string is w"),
        (['data.dataset="a"rounds=2'], '="a" is followed by .rounds=2.; allowed: a space between two settings'),
        (["rounds=2seed=1"], "'rounds' is 2seed=1, which cannot be read; a space between two settings"),
        (["judge=False data.alpha=0,5"], "'judge' is False[^\n]*\n[^\n]*'data.alpha' is 0,5"),
        (["nowhere.toml"], "nowhere.toml"),
    ],
)
def test_unreadable_run_config(texts, message):
    with pytest.raises(ConfigError, match=message):
        parse_run_config(texts)


def test_a_toml_file_is_read(tmp_path):
    path = tmp_path / "changes.toml"
    path.write_text("rounds = 2\n[t2i]\nlora-rank = 4\n")
    assert parse_run_config([str(path)]) == {"rounds": 2, "t2i.lora-rank": 4}
