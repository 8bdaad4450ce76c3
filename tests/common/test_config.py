"""Configuration: the defaults of pyproject.toml, and errors that name key, value and what is allowed."""

import tomllib

import pytest

from fedmmkt.common.config import ConfigError, NodeConfig, RunConfig, to_flower
from tests import ROOT


def flatten(table, prefix=""):
    flat = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def test_pyproject_holds_every_key_with_its_default():
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert flatten(app["config"]) == to_flower(RunConfig())


def test_flat_settings_come_back_as_they_were():
    config = RunConfig.from_flower({"t2i.guidance": "3, 1.5", "client.models": "cnn", "data.alpha": 1, "extra.a_b": 3})
    assert config.t2i.guidance == (3.0, 1.5)
    assert config.client.models == ("cnn",)
    assert config.data.alpha == 1.0
    assert RunConfig.from_flower(to_flower(config)) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"roundz": 3},
            r"'roundz' is unknown \(did you mean 'rounds'\?\); allowed: strategy, .*; a setting of your own",
        ),
        ({"t2i.rank": 3}, r"'t2i.rank' is unknown \(did you mean 't2i.lora-rank'\?\); allowed: model, family, adapter"),
        ({"min-nodes": 3}, r"'min-nodes' is now 'min-available-nodes'; allowed: the new name"),
        ({"fraction-train": 0}, r"'fraction-train' is 0; allowed: above 0, up to 1"),
        ({"rounds": 0}, r"'rounds' is 0; allowed: from 1, up to 100000"),
        ({"rounds": "many"}, r"'rounds' is 'many'; allowed: a whole number from 1, up to 100000"),
        ({"judge": "maybe"}, r"'judge' is 'maybe'; allowed: true or false"),
        ({"data.dataset": 3}, r"'data.dataset' is 3; allowed: a text, in quotes"),
        ({"t2i.model": ""}, r"'t2i.model' is ''; allowed: a text that is not empty"),
        ({"client.models": ""}, r"'client.models' is \[\]; allowed: at least one"),
        ({"data.alpha": -0.5}, r"'data.alpha' is -0.5; allowed: above 0, up to 1000000"),
        ({"feedback": "gradients"}, r"'feedback' is 'gradients'; allowed: 'logits' or 'logits\+votes'"),
        ({"data.partitioner": "random"}, r"'data.partitioner' is 'random'; allowed: .*'iid', 'dirichlet'"),
        ({"t2i.guidance": "3,high"}, r"'t2i.guidance' is 'high'"),
        ({"client.temperature": float("nan")}, r"'client.temperature' is nan"),
        ({"t2i.prompt-templates": "a picture"}, r"each prompt template needs exactly one \{\}, and 'a picture'"),
        (
            {"t2i.prompt-templates": "a {} in {style}"},
            r"'t2i.prompt-templates' is .* has {} and {style}$",
        ),
        ({"t2i.prompt-templates": "a {0}"}, r"exactly one \{\}, and 'a \{0\}' has \{0\}$"),
        ({"t2i.prompt-templates": "a {!r:>3}"}, r"and 'a {!r:>3}' has {!r:>3}"),
        (
            {"t2i.prompt-templates": "a {, {}"},
            r"'a {, {}' has a brace without its partner; .* {{ or }}; a comma",
        ),
        (
            {"t2i.prompt-templates": "a {}, b {}, c"},
            r"'a {}, b {}, c' has {} and {}; a comma separates",
        ),
        ({"t2i.prompt-templates": ","}, r"'t2i.prompt-templates' is ','; .*, and ',' has none"),
        ({"t2i.prompt-templates": 5}, r"'t2i.prompt-templates' is 5; allowed: a text, in quotes, with commas between"),
        ({"client.models": 3}, r"'client.models' is 3; allowed: a text, in quotes, with commas between several"),
        ({"data.classes": 0.5}, r"'data.classes' is 0.5; allowed: a text, in quotes"),
        ({"t2i.device": True}, r"'t2i.device' is True; allowed: a text, in quotes"),
        ({"t2i.guidance": True}, r"'t2i.guidance' is True; allowed: a number, or several in quotes"),
        ({"t2i.guidance": ""}, r"'t2i.guidance' is ''; allowed: at least one number"),
        ({"t2i.guidance": "1,nan"}, r"'t2i.guidance' is 'nan'; allowed: a finite number"),
        ({"output-dir": "runs/demo"}, r"output-dir is 'runs/demo'; allowed: an absolute path"),
    ],
)
def test_bad_run_config_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_flower(settings)


@pytest.mark.parametrize(("written", "read"), [(5.0, (5.0,)), (5, (5.0,)), ("5", (5.0,)), ("3, 1.5", (3.0, 1.5))])
def test_a_number_is_a_list_of_one(written, read):
    assert RunConfig.from_flower({"t2i.guidance": written}).t2i.guidance == read


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("", ()),
        ("a {}", ("a {}",)),
        ("the digit {},the number {}", ("the digit {}", "the number {}")),
        (" a {} , the {},", ("a {}", "the {}")),
        ("a photo of a {}, high quality", ("a photo of a {}, high quality",)),
        ("oil, canvas, a {}", ("oil, canvas, a {}",)),
        ("a {{b}} {}, c", ("a {{b}} {}, c",)),
    ],
)
def test_a_comma_separates_prompt_templates_where_each_part_takes_a_name(written, read):
    config = RunConfig.from_flower({"t2i.prompt-templates": written})
    assert config.t2i.prompt_templates == read
    assert RunConfig.from_flower(to_flower(config)) == config


def test_settings_of_ones_own_are_taken_in_the_table_extra_however_they_are_written():
    config = RunConfig.from_flower({"extra.trim-part": 0.2, "extra.label_name": "x", "extra.on": True})

    assert config.extra["trim_part"] == 0.2
    assert config.extra.as_dict() == {"trim_part": 0.2, "label_name": "x", "on": True}
    assert RunConfig.from_flower(to_flower(config)) == config
    with pytest.raises(KeyError, match="missing"):
        config.extra["missing"]


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flower({"roundz": 3, "rounds": 0, "client.batch-size": 0})
    assert len(str(caught.value).splitlines()) == 3


def test_a_node_needs_data():
    assert NodeConfig.from_flower({"partition-id": 0, "num-partitions": 2}).partition_id == 0
    assert NodeConfig.from_flower({"data-path": "/data"}).data_path == "/data"
    with pytest.raises(ConfigError, match="a node needs `data-path`, or `partition-id` with `num-partitions`"):
        NodeConfig.from_flower({"name": "hospital"})
    with pytest.raises(ConfigError, match="node-config key 'modle' is unknown"):
        NodeConfig.from_flower({"data-path": "/data", "modle": "cnn"})


def test_variations_that_would_be_copies_are_refused():
    still = {"t2i.explore-warp": 0.0, "t2i.explore-strength": 0.0}

    with pytest.raises(
        ConfigError, match=r"variations would be copies; allowed: one of them above 0, or t2i.explore 0"
    ):
        RunConfig.from_flower(still)

    assert RunConfig.from_flower(still | {"t2i.explore": 0.0}).t2i.explore == 0
