"""The model card of a client's model; it holds only what may be shared with the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedmmkt.client_app.memory import DESCRIPTION, OWN
from fedmmkt.client_app.models.building import TRANSFORMERS, model_label
from fedmmkt.common.config import RunConfig
from fedmmkt.common.model_card import (
    METHOD,
    NO_LICENSE,
    TAGS,
    describe_dataset,
    describe_privacy,
    is_hub_id,
    write_card,
)
from fedmmkt.common.payloads import ClientReport, Modality

TASKS: dict[Modality, str] = {
    "image": "image-classification",
    "text": "text-classification",
    "image+text": "image-text-classification",
}
HUB_TASKS = ("image-classification", "text-classification")
OWN_CODE = """import json

from safetensors.torch import load_file
from fedmmkt.client_app.models.building import build_task_model

folder = "."  # this folder
with open(f"{folder}/model.json") as file:
    described = json.load(file)
classes = tuple(described["classes"])
model = build_task_model(described["model"], len(classes), described["image_size"], classes)
weights = load_file(f"{folder}/model.safetensors")
model.load_state_dict({name: weights[model.saved_name(name)] for name in model.state_dict()})
model.eval()
"""
TRANSFORMERS_CODE = """from transformers import pipeline

folder = "."  # this folder, or owner/name on the hub
classify = pipeline("{task}", model=folder)
"""


def write_client_card(
    folder: Path,
    model_name: str,
    classes: tuple[str, ...],
    report: ClientReport,
    measures: Mapping[str, float],
    config: RunConfig,
    rounds: int,
    has_own_data: bool,
) -> Path:
    """Write the model card into the folder of a client's model.

    It says nothing of the client's data but the accuracy on its test part: no name of the client, no path, and no
    number of examples.

    Parameters
    ----------
    folder : Path
        The folder of the model.
    model_name : str
        The model's name in the configuration.
    classes : tuple of str
        The class space.
    report : ClientReport
        The client's last report.
    measures : mapping of str to float
        ``accuracy`` and ``loss`` of the model, which the report may withhold.
    config : RunConfig
        The run's configuration.
    rounds : int
        Number of rounds in which the client may have learned.
    has_own_data : bool
        Whether the client has a dataset of its own, with its own test part.

    Returns
    -------
    Path
        The card.

    Raises
    ------
    OSError
        If the card could not be written.
    """
    from huggingface_hub import EvalResult, ModelCardData

    accuracy, loss = measures["accuracy"], measures["loss"]
    task, source = TASKS[report.modality], model_name.removeprefix(TRANSFORMERS)
    of_transformers = model_name.startswith(TRANSFORMERS)
    loads_alone = of_transformers and task in HUB_TASKS  # transformers has no class for two encoders with our head.
    on_hub = of_transformers and is_hub_id(source)
    name = source if on_hub else model_label(model_name).rpartition(":")[2]
    result = EvalResult(
        task_type=task,
        dataset_type="private",
        dataset_name="the client's own test data" if has_own_data else describe_dataset(config.data),
        metric_type="accuracy",
        metric_value=round(accuracy, 4),
    )
    header = ModelCardData(
        base_model=source if on_hub else None,
        library_name="transformers" if loads_alone else None,
        pipeline_tag=task if task in HUB_TASKS else None,
        tags=[*TAGS, task],
        license="other",
        license_name=NO_LICENSE,
        model_name=f"{name} taught by FedMMKT",
        eval_results=[result],
    )
    code = TRANSFORMERS_CODE.format(task=task) if loads_alone else OWN_CODE
    sections = {
        "": f"A model of the kind `{name}` for {report.modality.replace('+', ' and ')} that tells "
        f"{len(classes)} classes apart. One client of a federation trained it, on private data of its own and by "
        f"{METHOD}.",
        "How to load it": f"```python\n{code}```\n\nThe class names are in `model.json`, in the order of the logits.",
        "How it was trained": f"Rounds: {rounds}. Epochs on private data: {config.client.warmup_epochs} in the first "
        f"round, then {config.client.local_epochs} in each. Steps on generated samples per round: "
        f"{config.client.distillation_steps}. The private data are not described here.",
        "Results": f"Accuracy {100 * accuracy:.1f} %, cross entropy {loss:.3f}.",
        "How it was evaluated": _evaluation(has_own_data),
        "Privacy": f"{_privacy(report, config)} This model was trained on private data and never left the client; "
        "whoever shares it decides that. A model can give away examples that it was trained on.",
        "What to share": f"The weights and the JSON files but `{OWN}`. That one has the name of the client, its exact "
        "number of examples of each class, also where it has a privacy budget, and the columns of its tables; without "
        f"it, the model does all but `--prior own`. Read `{DESCRIPTION}` first: it has the names of the classes, the "
        "kind of the model and the place that its base model came from, the table `extra` of the run's settings, the "
        "size of the images, what was taken for white in those of more than eight bits, how the model was trained "
        "(balanced softmax, size of the text embeddings), and the last round. `optimizer.pt`, `manifest.json`, "
        "`batch-*.npz` and `targets-*.npz` are for training alone.",
    }
    return write_card(folder, header, f"{name} taught by FedMMKT", sections)


def _privacy(report: ClientReport, config: RunConfig) -> str:
    return describe_privacy(config, int(report.is_private), 1, report.epsilon or 0.0, report.delta or 0.0)


def _evaluation(has_own_data: bool) -> str:
    if not has_own_data:
        return "On the test part of the run's dataset, which no client trained on. All simulated clients share it."
    return (
        "On test data of the client, which it did not train on. They have the client's own mixture of classes: on data "
        "of another mixture, expect another accuracy."
    )
