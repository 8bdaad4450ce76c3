"""What all model cards of the project have in common: their form, the method, its source, and how private it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedmmkt.common.config import BUILT_IN, DataConfig, RunConfig
from fedmmkt.common.files import write_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = "README.md"  # The hub's name of a model card.
NO_LICENSE = "to-be-filled-in"
TAGS = ("fedmmkt", "federated-learning", "knowledge-distillation")
METHOD = (
    "[FedMMKT](https://arxiv.org/abs/2510.12254), Federated Multi-modal Knowledge Transfer: a server's text-to-image "
    "model generates images for prompts, clients answer them with logits of their own models, and the aggregated "
    "answers teach both the clients and the text-to-image model"
)
LICENSE_SECTION = (
    "**To be filled in** by whoever publishes this model: `license` in the header of this file, and this section. "
    "The licence of the base model holds for what is made from it."
)
CITATION = """```bibtex
@misc{he2025fedmmkt,
  title = {{FedMMKT}: Co-Enhancing a Server Text-to-Image Model and Client Task Models in Multi-Modal Federated
           Learning},
  author = {He, Ningxin and Liu, Yang and Sun, Wei and Ye, Xiaozhou and Ouyang, Ye and Gao, Tiegang and Zhang, Zehui},
  year = {2025},
  eprint = {2510.12254},
  archivePrefix = {arXiv}
}
```"""
DATA_FILES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".txt")


def write_card(folder: Path, data: ModelCardData, title: str, sections: Mapping[str, str]) -> Path:
    """Write a model card, with sections on licence and citation at the end.

    Parameters
    ----------
    folder : Path
        The folder of the model.
    data : huggingface_hub.ModelCardData
        The header.
    title : str
        The heading of the card.
    sections : mapping
        Text of each section by its heading; the text before the first heading has an empty one.

    Returns
    -------
    Path
        The card.

    Raises
    ------
    OSError
        If it could not be written.
    """
    from huggingface_hub import ModelCard

    named = {**sections, "Licence": LICENSE_SECTION, "Citation": CITATION}
    parts = [f"## {heading}\n\n{text}" if heading else text for heading, text in named.items()]
    body = "\n\n".join([f"# {title}", *parts])
    write_text(folder / CARD, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")))
    return folder / CARD


def is_hub_id(name: str) -> bool:
    """Return whether a name is a hub id, and no path of this machine; nothing is asked of the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name.startswith(("/", "~", ".")) or name.endswith(DATA_FILES) or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_dataset(data: DataConfig) -> str | None:
    """Return the hub id of a run's dataset; None if it is built in or lies in files."""
    return data.dataset if data.dataset not in BUILT_IN and is_hub_id(data.dataset) else None


def describe_dataset(data: DataConfig) -> str:
    """Describe a run's dataset in a few words, without paths and names of files."""
    return BUILT_IN.get(data.dataset) or hub_dataset(data) or "private data"


def describe_privacy(
    config: RunConfig, private: int = 0, clients: int = 1, epsilon: float = 0.0, delta: float = 0.0
) -> str:
    """Say what left the clients in a run, and what of it is differentially private.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    private, clients : int
        How many clients have a privacy budget, and how many there are.
    epsilon, delta : float
        The most that one of the former has spent.
    """
    if not private:
        return _without_budget(config)
    votes = " and votes" if config.feedback == "logits+votes" else ""
    text = (
        f"{private} of {clients} clients had a privacy budget: they sent class counts{votes} with discrete Gaussian "
        "noise, and no logits, so that all their answers together are differentially private for each example (added "
        f"or removed), with epsilon of at most {epsilon:.3g} at delta {delta:g} (Renyi accounting, as clients said). "
        "Errors and the times of answers are not covered. "
    )
    if config.client.epsilon:
        text += (
            "It was a simulation, in which clients also told their accuracy on a common test set; that is not covered. "
        )
    return text if private == clients else f"{text}Of the other clients: {_without_budget(config)}"


def _without_budget(config: RunConfig) -> str:
    sent = ["logits for generated images (float16)", "the number of its examples of each class and in all"]
    if config.feedback == "logits+votes":
        sent.append("votes: for each generated image, how many of its private images have it among their nearest")
    sent.append("its accuracy and loss, its name, model and modality, and which generated batches it holds")
    if config.data.classes == ("clients",):
        sent.append("the names of its classes")
    return (
        f"A client sent the server: {'; '.join(sent)}. No private image or text, no weight and no gradient left it. "
        "**Nothing is differentially private**: no noise was added. What was sent, and so the models, may tell "
        "something about private data."
    )
