"""The losses of a client: on private data, on soft targets, on prompts, and between features and texts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT_TEMPERATURE = 0.1
PROBABILITY_FLOOR, FLOOR_CLASSES = 1e-6, 10  # The floor of soft targets, and up to how many classes.
SMALLEST = 1e-37  # In single precision; zero has no logarithm.


def balanced_softmax_loss(logits_BC: Tensor, labels_B: Tensor, log_prior_C: Tensor) -> Tensor:
    """Return the cross entropy of logits shifted by the log class prior (balanced softmax, arXiv 2007.10740, eq. 3)."""
    return F.cross_entropy(logits_BC + log_prior_C, labels_B)


def log_prior(class_counts_C: Tensor) -> Tensor:
    """Return the log class prior of a client, from its number of examples of each class.

    A class without examples gets a tiny prior instead of zero, so that its logit stays bounded.
    """
    return ((class_counts_C + 0.05) / class_counts_C.sum()).log()


def distillation_loss(logits_BC: Tensor, probabilities_BC: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence to the soft targets, scaled by T^2 (arXiv 1503.02531).

    The soft targets are probabilities at temperature 1. They are softened here to the temperature of the logits, after
    zeros became `probability_floor`.
    """
    floor = probability_floor(probabilities_BC.shape[1], temperature)
    softened_BC = torch.softmax(probabilities_BC.clamp_min(floor).log() / temperature, dim=1)
    log_student_BC = torch.log_softmax(logits_BC / temperature, dim=1)
    return F.kl_div(log_student_BC, softened_BC, reduction="batchmean") * temperature**2


def probability_floor(classes: int, temperature: float) -> float:
    """Return the smallest probability of a soft target before it is softened.

    It is 1e-6 up to ten classes. With more, all classes but one together get as much after softening as the nine others
    of ten do, so that a target that is sure stays sure: at temperature 2 the floor leaves .991 on its class, with any
    number of classes; at 1e-6 it would leave .50 with 1,000, and .05 with 21,000.
    """
    share = min(1.0, (FLOOR_CLASSES - 1) / (classes - 1))
    return max(PROBABILITY_FLOOR * share**temperature, SMALLEST)


def prompt_loss(logits_BC: Tensor, prompted_B: Tensor) -> Tensor:
    """Return the cross entropy on the prompted class, over samples whose prompt names one; zero if none does."""
    named = prompted_B >= 0
    return F.cross_entropy(logits_BC[named], prompted_B[named]) if bool(named.any()) else logits_BC.sum() * 0


def alignment_loss(projected_BD: Tensor, anchors_BD: Tensor) -> Tensor:
    """Return a contrastive loss between features and the text embeddings of their prompts.

    This is InfoNCE (arXiv 1807.03748) from features to texts. Several prompts of a batch may mean the same and must not
    count as negatives. So the target of each row is spread over the batch by the similarity of the texts.
    """
    similarity_BB = F.normalize(projected_BD, dim=1) @ anchors_BD.T / ALIGNMENT_TEMPERATURE
    with torch.no_grad():
        target_BB = torch.softmax(anchors_BD @ anchors_BD.T / ALIGNMENT_TEMPERATURE, dim=1)
    return F.cross_entropy(similarity_BB, target_BB)
