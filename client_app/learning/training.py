"""Training of a client on its private data, on soft targets, and on the prompts of synthetic samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmmkt.client_app.learning.batches import call_on_rows, epoch_batches, has_lone_sample, learns_from_one
from fedmmkt.client_app.learning.losses import (
    alignment_loss,
    balanced_softmax_loss,
    distillation_loss,
    log_prior,
    prompt_loss,
)
from fedmmkt.client_app.models.task_model import Inputs, TaskModel
from fedmmkt.common.augmentation import augment
from fedmmkt.common.config import ClientConfig

logger = getLogger("flwr")

WIDEST_BATCH = 256 * 96  # tokens that are read at once without gradients, since memory grows with them


@dataclass(frozen=True)
class PrivateSet:
    """Private training samples: inputs and their labels."""

    inputs: Inputs
    labels_N: Tensor

    def class_counts(self, classes: int) -> Tensor:
        """Count examples per class, int64 (C,)."""
        return torch.bincount(self.labels_N, minlength=classes)


@dataclass(frozen=True)
class SyntheticSet:
    """Synthetic samples of one or several rounds, with their soft targets.

    Attributes
    ----------
    inputs : Inputs
        The samples, as the client's model reads them.
    probabilities_NC : torch.Tensor
        Soft targets.
    prompted_N : torch.Tensor
        int64 class that each prompt names, -1 for none.
    weights_N : torch.Tensor
        Sampling weights, not normalised.
    anchors_ND : torch.Tensor, optional
        Text embeddings of the prompts, with unit length.
    """

    inputs: Inputs
    probabilities_NC: Tensor
    prompted_N: Tensor
    weights_N: Tensor
    anchors_ND: Tensor | None = None


class AlignedModel(nn.Module):
    """A task model with a linear projection from its features to the space of the text embeddings.

    The projection is None if ``anchor_size`` is 0.
    """

    def __init__(self, task_model: TaskModel, anchor_size: int) -> None:
        super().__init__()
        self.task_model = task_model
        self.projection = nn.Linear(task_model.feature_size, anchor_size) if anchor_size else None


def parameter_groups(model: AlignedModel, config: ClientConfig) -> list[dict[str, Any]]:
    """Group parameters by learning rate: pretrained encoders, and everything else."""
    task_model = model.task_model
    encoders = [encoder for encoder in (task_model.image_encoder, task_model.text_encoder) if encoder is not None]
    found = [parameter for encoder in encoders for parameter in encoder.parameters() if task_model.is_pretrained]
    pretrained = list(dict.fromkeys(found))  # Both parts of a dual encoder are one model: list its parameters once.
    pretrained_set = set(pretrained)
    others = [parameter for parameter in model.parameters() if parameter not in pretrained_set]
    groups = [(others, config.learning_rate), (pretrained, config.pretrained_learning_rate)]
    return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]


def train(
    model: AlignedModel,
    optimizer: torch.optim.Optimizer,
    private: PrivateSet,
    synthetic: SyntheticSet | None,
    config: ClientConfig,
    epochs: int,
    generator: torch.Generator,
) -> float:
    """Train for ``epochs`` private epochs and for ``distillation_steps`` steps on synthetic samples.

    The shorter of the two is spread evenly over the longer. So a client with few private examples trains on as many
    synthetic samples as the others, and every client sees its private data equally often. A model that cannot learn
    from one sample alone, such as one with batch norm, gets no batch of one sample.

    Returns
    -------
    float
        Mean loss over the steps; 0 if there were no steps.
    """
    private_batches = _private_batches(model.task_model, private, config, epochs, generator)
    synthetic_batches = _drawn_batches(model.task_model, synthetic, config, generator)
    steps = max(len(private_batches), len(synthetic_batches))
    counts_C = private.class_counts(model.task_model.class_count).float()
    log_prior_C = log_prior(counts_C) if config.balanced_softmax else torch.zeros_like(counts_C)
    log_prior_C = log_prior_C.to(private.labels_N.device)
    model.train()
    total = 0.0
    for private_index, synthetic_index in zip(
        _spread(private_batches, steps), _spread(synthetic_batches, steps), strict=True
    ):
        loss = torch.zeros(())
        if private_index is not None:
            inputs, labels_B = (
                _augmented(private.inputs[private_index], config, generator),
                private.labels_N[private_index],
            )
            loss = loss + balanced_softmax_loss(model.task_model(inputs), labels_B, log_prior_C)
        if synthetic_index is not None and synthetic is not None:
            loss = loss + _synthetic_loss(model, synthetic, synthetic_index, config, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        total += float(loss.detach())
    return total / steps if steps else 0.0


def _synthetic_loss(
    model: AlignedModel, synthetic: SyntheticSet, index: Tensor, config: ClientConfig, generator: torch.Generator
) -> Tensor:
    inputs = _augmented(synthetic.inputs[index], config, generator)
    features_BF = model.task_model.features(inputs)
    logits_BC = model.task_model.head(features_BF)
    loss = config.distillation_weight * distillation_loss(
        logits_BC, synthetic.probabilities_NC[index], config.temperature
    )
    loss = loss + config.prompt_weight * prompt_loss(logits_BC, synthetic.prompted_N[index])
    if config.alignment_weight and model.projection is not None and synthetic.anchors_ND is not None:
        projected_BD = model.projection(features_BF)
        loss = loss + config.alignment_weight * alignment_loss(projected_BD, synthetic.anchors_ND[index])
    return loss


def _augmented(inputs: Inputs, config: ClientConfig, generator: torch.Generator) -> Inputs:
    if inputs.images_BCHW is None or not config.augmentation:
        return inputs
    return Inputs(augment(inputs.images_BCHW, generator), inputs.tokens_BL)


def _private_batches(
    model: TaskModel, private: PrivateSet, config: ClientConfig, epochs: int, generator: torch.Generator
) -> list[Tensor]:
    count = len(private.inputs)
    if not count:  # With a privacy ledger this is no error, since it would tell of the data.
        return []
    least = _smallest_batch(model, private.inputs, count, config.batch_size) if epochs else 1
    batches = list(epoch_batches(count, config.batch_size, epochs, generator, least))
    if epochs and not batches:
        logger.warning("The only private example is left out: the model cannot learn from one sample alone")
    return batches


def _smallest_batch(model: TaskModel, inputs: Inputs, count: int, size: int) -> int:
    """Return 2 if batches would hold one sample and the model cannot learn from it alone, else 1."""
    return 2 if has_lone_sample(count, size) and not learns_from_one(model, inputs) else 1


def _drawn_batches(
    model: TaskModel, synthetic: SyntheticSet | None, config: ClientConfig, generator: torch.Generator
) -> list[Tensor]:
    wanted = config.distillation_weight or config.prompt_weight or config.alignment_weight
    if synthetic is None or not wanted or not config.distillation_steps:
        return []
    size = config.synthetic_batch_size
    size = max(size, _smallest_batch(model, synthetic.inputs, size, size))
    count = config.distillation_steps * size
    drawn = torch.multinomial(synthetic.weights_N.cpu().double(), count, replacement=True, generator=generator)
    return list(drawn.split(size))


def _spread(batches: list[Tensor], steps: int) -> Iterator[Tensor | None]:
    """Yield ``steps`` items: the batches in order, evenly spread, and None in between."""
    for step in range(steps):
        before, after = step * len(batches) // steps, (step + 1) * len(batches) // steps
        yield batches[before] if after > before else None


@torch.no_grad()
def predict(model: TaskModel, inputs: Inputs, batch_size: int = 256) -> Tensor:
    """Return logits (N, C), in evaluation mode and without gradients."""
    model.eval()
    width = inputs.tokens_BL.shape[1] if inputs.tokens_BL is not None and inputs.tokens_BL.dim() > 1 else 1
    batch_size = max(1, min(batch_size, WIDEST_BATCH // width))
    indices = torch.arange(len(inputs)).split(batch_size)
    return torch.cat([call_on_rows(lambda index: model(inputs[index]), index) for index in indices])


def evaluate(model: TaskModel, inputs: Inputs, labels_N: Tensor) -> tuple[float, float]:
    """Return accuracy and mean cross entropy."""
    logits_NC = predict(model, inputs)
    accuracy = (logits_NC.argmax(1) == labels_N).double().mean()
    return float(accuracy), float(F.cross_entropy(logits_NC.double(), labels_N))
