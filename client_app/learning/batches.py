"""Batches of samples, for models that cannot learn from one sample alone, or cannot read one alone.

Batch norm refuses to learn from a batch of one sample, and a ``squeeze()`` in an encoder then also drops the batch's
dimension. A last batch of one sample is met by chance, so no model may fail because of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedmmkt.client_app.models.dry_run import unchanged
from fedmmkt.client_app.models.task_model import Inputs, TaskModel


def epoch_batches(count: int, size: int, epochs: int, generator: torch.Generator, least: int = 1) -> Iterator[Tensor]:
    """Yield the indices of each batch of some epochs, in random order.

    Parameters
    ----------
    count : int
        Number of samples.
    size : int
        Samples per batch.
    epochs : int
        How often each sample is seen.
    generator : torch.Generator
        Draws the order.
    least : int
        Smallest batch. A smaller last one joins the batch before it, and is left out if there is none.
    """
    for _ in range(epochs):
        batches = list(torch.randperm(count, generator=generator).split(max(size, least)))
        if len(batches[-1]) < least:
            rest = batches.pop()
            batches[-1:] = [torch.cat([last, rest]) for last in batches[-1:]]
        yield from batches


def has_lone_sample(count: int, size: int) -> bool:
    """Return whether batches of ``size`` out of ``count`` samples leave one sample alone."""
    return bool(count) and (size == 1 or count % size == 1)


def learns_from_one(model: TaskModel, inputs: Inputs) -> bool:
    """Try whether a model, as it is set for training, gives features of one sample; the model is left as it was."""
    first = Inputs(inputs.images_BCHW, inputs.tokens_BL)[torch.tensor([0])]  # Not read as a sample of an epoch.
    with unchanged(model):
        model.train()
        try:
            features_1F = model.features(first)
        except Exception:  # Whatever else is wrong shows when larger batches fail.
            return False
        return _is_one_row(features_1F)


def call_on_rows(call: Callable[[Tensor], Tensor], index: Tensor) -> Tensor:
    """Call a model with indices of samples; if it cannot read a single one, that is read twice.

    Parameters
    ----------
    call : callable
        Maps indices (B,) to one row for each.
    index : torch.Tensor
        Indices of the samples.
    """
    if len(index) != 1:
        return call(index)
    try:
        rows = call(index)
    except Exception:  # Whatever else is wrong shows when two samples fail.
        rows = torch.empty(0)
    return rows if _is_one_row(rows) else call(index.repeat(2))[:1]


def _is_one_row(rows: Tensor) -> bool:
    return rows.dim() > 1 and len(rows) == 1 and bool(rows.isfinite().all())
