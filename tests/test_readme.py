"""What the README shows, run."""

import re
from pathlib import Path

import numpy as np
from flwr.common.config import parse_config_args
from PIL import Image

from client_app import task_models
from common.config import RunConfig, to_flower
from server_app import aggregation
from server_app.app import build_strategy

README = (Path(__file__).parent.parent / "README.md").read_text()


def snippets():
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, names)
    return names


def test_the_snippets_run_in_a_federation(tiny_run, make_grid):
    names = snippets()
    task_models.register_task_model("linear")(names["linear"])
    try:
        run_config = tiny_run(rounds=1, client__models="linear,mlp,linear", t2i__aggregation="trimmed")
        strategy = build_strategy(RunConfig.from_flower(run_config), 1, names["OnlyAgreed"])
        strategy.start(make_grid(run_config, nodes=3))
    finally:
        del aggregation._RULES["trimmed"], task_models._FACTORIES["linear"]
    (line,) = strategy.run_folder.read_metrics()[1:]
    assert line["replies"]["received"] == 3
    scores_N = strategy.pool[-1][1]
    agreed_N = strategy.history[-1][1].probabilities_NC.argmax(1) == strategy.samples.prompted_N.numpy()
    assert not scores_N[~agreed_N].any()


def test_every_run_config_shown_is_accepted():
    shown = re.findall(r"RUN_CONFIG='([^']*)'", README) + re.findall(r"`'([a-z][^`]*)'`", README)
    assert len(shown) >= 6
    for overrides in shown:
        changed = parse_config_args([overrides])
        flat = {}
        for key, value in changed.items():
            flat |= (
                {f"{key}.{inner}": content for inner, content in value.items()}
                if isinstance(value, dict)
                else {key: value}
            )
        assert flat.keys() <= to_flower(RunConfig()).keys()
        RunConfig.from_flower(to_flower(RunConfig()) | flat)


def test_a_folder_of_images_runs_by_configuration_alone(tiny_run, make_grid, tmp_path):
    rng = np.random.default_rng(0)
    for index, species in enumerate(("robin", "wren", "owl")):
        for number in range(20):
            (tmp_path / "birds" / species).mkdir(parents=True, exist_ok=True)
            pixels = np.clip(rng.integers(0, 60, (40, 24, 3)) + index * 90, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "birds" / species / f"{number}.png")
    run_config = tiny_run(
        data__dataset=str(tmp_path / "birds"), data__partitioner="iid", client__models="cnn", rounds=1,
        t2i__prompt_templates="a photo of a {}",
    )  # fmt: skip
    strategy = build_strategy(RunConfig.from_flower(run_config), 1)
    strategy.start(make_grid(run_config, nodes=2))
    assert strategy.classes == ("owl", "robin", "wren")
    assert strategy.run_folder.read_metrics()[-1]["replies"]["received"] == 2
