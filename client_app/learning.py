"""How a client learns: from its private data, from soft targets, and from the prompts of synthetic samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client_app.task_models import Inputs, TaskModel
from common.augmentation import augment
from common.config import ClientConfig

ALIGNMENT_TEMPERATURE = 0.1


@dataclass(frozen=True)
class PrivateSet:
    """Private training samples: inputs and their labels."""

    inputs: Inputs
    labels_N: Tensor

    def class_counts(self, classes: int) -> Tensor:
        """Count examples by class, int64 (C,)."""
        return torch.bincount(self.labels_N, minlength=classes)


@dataclass(frozen=True)
class SyntheticSet:
    """Synthetic samples of one or several rounds with what the federation says of them.

    Attributes
    ----------
    inputs : Inputs
        What the client's model reads of them.
    probabilities_NC : torch.Tensor
        Soft targets.
    prompted_N : torch.Tensor
        int64 prompted class, -1 for none.
    weights_N : torch.Tensor
        Chances at which samples are drawn, not normalised.
    anchors_ND : torch.Tensor, optional
        Unit text embeddings of the prompts.
    """

    inputs: Inputs
    probabilities_NC: Tensor
    prompted_N: Tensor
    weights_N: Tensor
    anchors_ND: Tensor | None = None


class AlignedModel(nn.Module):
    """A task model with the projection that its features need to be compared with text embeddings."""

    def __init__(self, task_model: TaskModel, anchor_size: int) -> None:
        super().__init__()
        self.task_model = task_model
        self.projection = nn.Linear(task_model.feature_size, anchor_size) if anchor_size else None


def parameter_groups(model: AlignedModel, config: ClientConfig) -> list[dict[str, Any]]:
    """Group what is learned by learning rate: encoders that were trained before, and all else."""
    own = model.task_model
    encoders = [encoder for encoder in (own.image_encoder, own.text_encoder) if encoder is not None]
    trained = [parameter for encoder in encoders for parameter in encoder.parameters() if own.is_pretrained]
    pretrained = list(dict.fromkeys(trained))  # The encoders of a dual encoder are one model.
    known = set(pretrained)
    fresh = [parameter for parameter in model.parameters() if parameter not in known]
    groups = [(fresh, config.learning_rate), (pretrained, config.pretrained_learning_rate)]
    return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]


def balanced_softmax_loss(logits_BC: Tensor, labels_B: Tensor, log_prior_C: Tensor) -> Tensor:
    """Cross entropy of logits shifted by the log class prior (balanced softmax, arXiv 2007.10740, eq. 3)."""
    return F.cross_entropy(logits_BC + log_prior_C, labels_B)


def distillation_loss(logits_BC: Tensor, probabilities_BC: Tensor, temperature: float) -> Tensor:
    """T^2-scaled KL divergence to soft targets (arXiv 1503.02531).

    The soft targets are probabilities at temperature 1 and are softened here to the same temperature.
    """
    softened_BC = torch.softmax(probabilities_BC.clamp_min(1e-6).log() / temperature, dim=1)
    log_student_BC = torch.log_softmax(logits_BC / temperature, dim=1)
    return F.kl_div(log_student_BC, softened_BC, reduction="batchmean") * temperature**2


def prompt_loss(logits_BC: Tensor, prompted_B: Tensor) -> Tensor:
    """Cross entropy on the prompted class, over the samples whose prompt names one; zero if none does."""
    named = prompted_B >= 0
    return F.cross_entropy(logits_BC[named], prompted_B[named]) if bool(named.any()) else logits_BC.sum() * 0


def alignment_loss(projected_BD: Tensor, anchors_BD: Tensor) -> Tensor:
    """Contrast of features with the prompts' text embeddings, where alike prompts are no negatives.

    InfoNCE (arXiv 1807.03748) from features to texts; a row's target is spread over the batch by the
    similarity of the texts themselves, since several prompts of a batch may say the same.
    """
    similarity_BB = F.normalize(projected_BD, dim=1) @ anchors_BD.T / ALIGNMENT_TEMPERATURE
    with torch.no_grad():
        target_BB = torch.softmax(anchors_BD @ anchors_BD.T / ALIGNMENT_TEMPERATURE, dim=1)
    return F.cross_entropy(similarity_BB, target_BB)


def train(
    model: AlignedModel,
    optimizer: torch.optim.Optimizer,
    private: PrivateSet,
    synthetic: SyntheticSet | None,
    config: ClientConfig,
    epochs: int,
    generator: torch.Generator,
) -> float:
    """Train for ``epochs`` private epochs, and ``distillation_steps`` steps with synthetic samples.

    The shorter of the two is spread evenly over the longer, so that a client with few private examples
    learns as much from synthetic ones as others, and every client sees its private data equally often.

    Returns
    -------
    float
        Mean loss over the steps; 0 if there was none.
    """
    private_batches = list(_epoch_batches(len(private.inputs), config.batch_size, epochs, generator))
    synthetic_batches = _drawn_batches(synthetic, config, generator)
    steps = max(len(private_batches), len(synthetic_batches))
    counts_C = private.class_counts(model.task_model.head.out_features).float()
    # A class without examples gets a tiny prior, not none: its logit must not run away.
    log_prior_C = ((counts_C + 0.05) / counts_C.sum()).log() if config.balanced_softmax else torch.zeros_like(counts_C)
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


def _epoch_batches(count: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(size)


def _drawn_batches(synthetic: SyntheticSet | None, config: ClientConfig, generator: torch.Generator) -> list[Tensor]:
    wanted = config.distillation_weight or config.prompt_weight or config.alignment_weight
    count = config.distillation_steps * config.synthetic_batch_size
    if synthetic is None or not wanted or not count:
        return []
    drawn = torch.multinomial(synthetic.weights_N.cpu().double(), count, replacement=True, generator=generator)
    return list(drawn.split(config.synthetic_batch_size))


def _spread(batches: list[Tensor], steps: int) -> Iterator[Tensor | None]:
    """Yield ``steps`` items, the batches in order and evenly between them None."""
    for step in range(steps):
        before, after = step * len(batches) // steps, (step + 1) * len(batches) // steps
        yield batches[before] if after > before else None


@torch.no_grad()
def predict(model: TaskModel, inputs: Inputs, batch_size: int = 256) -> Tensor:
    """Return logits (N, C) without changing the model."""
    model.eval()
    indices = torch.arange(len(inputs)).split(batch_size)
    return torch.cat([model(inputs[index]) for index in indices])


def evaluate(model: TaskModel, inputs: Inputs, labels_N: Tensor) -> tuple[float, float]:
    """Return accuracy and mean cross entropy."""
    logits_NC = predict(model, inputs)
    accuracy = (logits_NC.argmax(1) == labels_N).double().mean()
    return float(accuracy), float(F.cross_entropy(logits_NC.double(), labels_N))
