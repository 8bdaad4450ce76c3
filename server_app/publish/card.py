"""The model card of a run's adapter, rewritten after each round, or by ``fedmmkt card RUN``."""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.common.model_card import (
    METHOD,
    NO_LICENSE,
    TAGS,
    describe_dataset,
    describe_privacy,
    hub_dataset,
    is_hub_id,
    write_card,
)
from fedmmkt.server_app.prompts import templates_of
from fedmmkt.server_app.record.run_folder import STOPPED, RunFolder
from fedmmkt.server_app.report.history import History
from fedmmkt.server_app.report.measures import FROZEN, Line, of_generator, points_of
from fedmmkt.server_app.report.numbers import counted, number, percent
from fedmmkt.server_app.report.privacy import client_names, privacy_rows

SAMPLES = "samples.png"
DIFFUSERS_WEIGHTS, PEFT_WEIGHTS = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"


def write_adapter_card(folder: Path, history: History | None = None) -> Path:
    """Write the model card ``lora/README.md`` of a run's adapter, and the last round's picture beside it.

    The card says what a stranger needs and what the run's settings and measures tell. It holds no path, no name of a
    client, and no class name that came from clients.

    Parameters
    ----------
    folder : Path
        A run folder, of a run that is going on or has ended.
    history : History, optional
        Its rounds; by default they are read from the folder.

    Returns
    -------
    Path
        The card.

    Raises
    ------
    ConfigError
        If the folder holds no run with an adapter.
    OSError
        If the card could not be written.
    """
    from huggingface_hub import EvalResult, ModelCardData

    run = RunFolder(folder)
    config, classes, versions, lines = _read(run, history)
    base, data = config.t2i.model, config.data
    weights = weights_of(run.lora)
    pictures = list(run.pictures().values())
    if pictures:
        shutil.copyfile(pictures[-1], run.lora / SAMPLES)
    library = "peft" if weights.name == PEFT_WEIGHTS else "diffusers"
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type=hub_dataset(data) or "private",
            dataset_name=describe_dataset(data),
            metric_type=kind,
            metric_name=name,
            metric_value=round(points[-1][1], 4),
        )
        for kind, name, points in _measures(lines)
    ]
    header = ModelCardData(
        **({"base_model": base, "base_model_relation": "adapter"} if is_on_hub(base) else {}),
        library_name=library,
        pipeline_tag="text-to-image",
        tags=[*TAGS, "text-to-image", "lora"],
        datasets=hub_dataset(data),
        license="other",
        license_name=NO_LICENSE,
        model_name=f"FedMMKT adapter of {base_name(base)}",
        eval_results=results or None,
    )
    shown = f"![Generated in the last round]({SAMPLES})\n\nThe last round's images.\n\n" if pictures else ""
    prompts = _prompts(config, classes)
    has_failed = run.read_failure() not in ("", STOPPED)
    sections = {
        "": f"{shown}A LoRA adapter of {_described_base(base)}. {_learning(config, lines, has_failed)}",
        "How to load it": f"```python\n{loading_code(base, library, config, prompts[0])}```\n\n"
        f"{_prompt_text(prompts, 'run with' if _untrained(config, lines) else 'trained on')}",
        "The run" if _untrained(config, lines) else "How it was trained": _training(config, versions, lines),
        "Results": _results(lines),
        "How it was evaluated": _evaluation(config),
        "Privacy": describe_privacy(config, *_budgets(lines)),
    }
    return write_card(run.lora, header, f"FedMMKT adapter of {base_name(base)}", sections)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the card of the run that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="fedmmkt card", description="Write the model card of a run's adapter.")
    parser.add_argument("run", type=Path, help="the run folder")
    try:
        print(write_adapter_card(parser.parse_args(arguments).run))
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    return 0


def weights_of(adapter: Path) -> Path:
    """Return the file of an adapter's weights.

    Raises
    ------
    ConfigError
        If the folder holds none.
    """
    for name in (DIFFUSERS_WEIGHTS, PEFT_WEIGHTS):
        if (adapter / name).is_file():
            return adapter / name
    raise ConfigError(
        f"{str(adapter.parent)!r} holds no adapter: neither {DIFFUSERS_WEIGHTS} nor {PEFT_WEIGHTS} is in its folder "
        f"{adapter.name!r}; allowed: the folder of a run that has ended its round 0"
    )


def is_on_hub(model: str) -> bool:
    """Return whether a T2I model is named by a hub id."""
    return model != "starter" and is_hub_id(model)


def base_name(model: str) -> str:
    """Return a T2I model's name for people: a hub id, or the name of its folder without the path."""
    return model if is_on_hub(model) else Path(model).name


def loading_code(base: str, library: str, config: RunConfig, prompt: str) -> str:
    """Return Python code that loads the adapter and generates an image.

    Parameters
    ----------
    base : str
        The base model: ``starter``, a hub id, or a folder, of which only the name is shown.
    library : str
        ``diffusers``, or ``peft`` for pipelines into which diffusers loads no LoRA.
    config : RunConfig
        Has the number of steps and the guidance scale.
    prompt : str
        A prompt to show.
    """
    lines = ["from diffusers import DiffusionPipeline"]
    place = f'"{base_name(base)}"' + ("" if is_on_hub(base) else "  # the folder of the base model")
    if base == "starter":
        lines.append("from fedmmkt.common.installed import installed")
        place = 'installed("starter/model")'
    if library == "peft":
        lines.append("from peft import PeftModel")
    lines += ["", 'adapter = "."  # this folder, or owner/name on the hub', f"base = {place}"]
    lines.append("pipeline = DiffusionPipeline.from_pretrained(base)")
    if library == "peft":
        lines.append("pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, adapter)")
    else:
        lines.append("pipeline.load_lora_weights(adapter)")
    steps, guidance = config.t2i.inference_steps, config.t2i.evaluation_guidance
    call = f"{json.dumps(prompt, ensure_ascii=False)}, num_inference_steps={steps}, guidance_scale={guidance:g}"
    lines.append(f"image = pipeline({call}).images[0]")
    return "\n".join(lines) + "\n"


def _read(run: RunFolder, history: History | None) -> tuple[RunConfig, Sequence[str], Mapping[str, str], list[Line]]:
    try:
        described, lines = run.read_config(), (history or History.of(run.read_lines())).lines
        known = RunConfig.model_fields  # A run of an earlier version may have other keys.
        config = RunConfig.model_validate({key: v for key, v in described["config"].items() if key in known})
        return config, described["classes"], described["versions"], lines
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{str(run.path)!r} holds no run that can be read ({error}); allowed: the folder of a run"
        ) from None


def _described_base(model: str) -> str:
    if model == "starter":
        return "`starter`, the small text-to-image model of digits that comes with fedmmkt"
    return f"[{model}](https://huggingface.co/{model})" if is_on_hub(model) else f"a model named `{base_name(model)}`"


def _untrained(config: RunConfig, lines: list[Line]) -> str:
    """Say why the adapter has not been trained; empty if it has."""
    if config.t2i.scores == FROZEN:
        return "the run left the model as it is (`t2i.scores` was `none`)"
    if not lines or lines[-1]["round"] == 0:
        return "no round of training has ended"
    if config.t2i.guard and not any(line.get("guard", {}).get("verdict") == "accepted" for line in lines):
        return "the clients accepted none of its updates (`t2i.guard`)"
    return ""


def _learning(config: RunConfig, lines: list[Line], has_failed: bool) -> str:
    """Say what the adapter has learned, and of which round it is if the run has not ended well."""
    done = lines[-1]["round"] if lines else 0
    if why := _untrained(config, lines):
        unchanged = "is the adapter that the run began with" if config.t2i.adapter else "has no effect"
        text = f"**It was not trained**: {why}, so that it {unchanged}. The method: {METHOD}."
    else:
        text = f"It was trained by {METHOD}."
    if has_failed:
        return f"{text} **The run failed**; this is the adapter after round {done} of {config.rounds}."
    return text if done >= config.rounds else f"{text} This is the adapter after round {done} of {config.rounds}."


def _prompts(config: RunConfig, classes: Sequence[str]) -> list[str]:
    """Return prompts like those of training; none of them names a class that came from clients."""
    if config.t2i.prompts != "templates" or config.data.classes == ("clients",):
        return ["a picture"]
    return [template.format(name) for name in classes for template in templates_of(config.t2i)[:1]]


def _prompt_text(prompts: Sequence[str], done: str, most: int = 10) -> str:
    if len(prompts) == 1:
        return f"It was {done} prompts that are not published with it."
    shown = ", ".join(f"*{prompt}*" for prompt in prompts[:most])
    return f"It was {done} prompts such as: {shown}{', ...' if len(prompts) > most else '.'}"


def _training(config: RunConfig, versions: Mapping[str, str], lines: list[Line]) -> str:
    t2i = config.t2i
    clients = list(lines[-1]["clients"]["per_client"].values()) if lines else []
    kinds = Counter(client["modality"] for client in clients)
    rows = {
        "Rounds": str(lines[-1]["round"]) if lines else "0",
        "Clients": f"{len(clients)} ({', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))})",
        "Clients' models": ", ".join(sorted({client["model"] for client in clients})),
        "Data": f"{describe_dataset(config.data)}; clients that have data of their own keep them to themselves",
        "Images per round": str(t2i.samples_per_round),
        "LoRA": f"rank {t2i.lora_rank}, alpha {t2i.lora_alpha:g}, on {', '.join(t2i.lora_targets)}",
        "Update per round": ""
        if t2i.scores == FROZEN
        else f"{counted(t2i.adaptation_steps, 'step')} of {t2i.adaptation_batch_size} samples, "
        f"learning rate {t2i.adaptation_learning_rate:g}",
        "Rules": f"aggregation {t2i.aggregation}, scores {t2i.scores}, update {t2i.update}",
        "Feedback": config.feedback,
        "Seed": str(config.seed),
        "Versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
    }
    return _table(("", ""), [(f"**{key}**", value) for key, value in rows.items() if value])


def _budgets(lines: list[Line]) -> tuple[int, int, float, float]:
    """Return how many clients have a privacy budget, of how many, and the largest epsilon and delta of them."""
    rows = privacy_rows(lines)
    largest = max((row.epsilon for row in rows), default=0.0), max((row.delta for row in rows), default=0.0)
    return len(rows), len(client_names(lines)), *largest


def _measures(lines: list[Line]) -> list[tuple[str, str, list[tuple[int, float]]]]:
    """Return kind, name and values by round of each measure that the run has."""
    found = [
        ("accuracy", "Mean accuracy of the clients", points_of(lines, lambda line: line["clients"]["accuracy"])),
        ("alignment", "Alignment of images and prompts", points_of(lines, of_generator("alignment"))),
        ("frechet", "Fréchet distance to real images (lower is better)", points_of(lines, of_generator("frechet"))),
        ("recall", "Recall of real images (how various the images are)", points_of(lines, of_generator("recall"))),
    ]
    return [measure for measure in found if measure[2]]


def _results(lines: list[Line]) -> str:
    if not lines:
        return "Nothing is measured yet."
    first, last = lines[0], lines[-1]
    rows = [("clients' accuracy, all", *(_spread(line, None) for line in (first, last)))]
    modalities = sorted({client["modality"] for client in last["clients"]["per_client"].values()})
    if len(modalities) > 1:
        rows += [(f"clients' accuracy, {kind}", _spread(first, kind), _spread(last, kind)) for kind in modalities]
    for kind, name, points in _measures(lines):
        if kind != "accuracy":
            show = percent if kind in ("alignment", "recall") else number
            rows.append((name, show(points[0][1]), show(points[-1][1])))
    head = ("", f"before (round {first['round']})", f"after (round {last['round']})")
    return f"{_table(head, rows)}\n\nOver clients: mean ± standard deviation (lowest to highest). One run, one seed."


def _spread(line: Line, modality: str | None) -> str:
    """Return mean, standard deviation, lowest and highest accuracy of the clients of a modality, or of all."""
    clients = line["clients"]["per_client"].values()
    told = [client for client in clients if client["accuracy"] is not None]
    values = [100 * client["accuracy"] for client in told if modality in (None, client["modality"])]
    if not values:
        return "–"
    return f"{np.mean(values):.1f} ± {np.std(values):.1f} % ({min(values):.1f} to {max(values):.1f})"


def _evaluation(config: RunConfig) -> str:
    text = (
        "Each client measured its own model on data that it did not train on: simulated clients on the test part of "
        "the dataset, which all share, and clients with data of their own on a test part of these."
    )
    if not config.judge:
        return f"{text} The text-to-image model was not measured."
    return (
        f"{text} The text-to-image model was measured on {config.t2i.evaluation_samples} images with fixed prompts and "
        f"seeds and guidance scale {config.t2i.evaluation_guidance:g}, from which nobody learned. A classifier "
        "that was trained on the real dataset judged them: alignment is the part that it recognises as what the prompt "
        "names, and the Fréchet distance compares its features of generated and of real images. It is no FID of "
        "Inception features, and cannot be compared with one. Recall is the part of the real images that lie among "
        "generated ones in these features (arXiv 1904.06991); it falls where images become alike."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
