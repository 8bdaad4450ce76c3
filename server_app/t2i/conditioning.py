"""Encoding of prompts, for the denoiser and for the clients."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedmmkt.server_app.t2i.families import Conditioning, Family

PROMPTS_AT_ONCE = 256
KEPT_BYTES = 2**30  # Of encoded prompts, in main memory: 400 prompts of Stable Diffusion 3, 4,500 of 1.5.


class PromptEncoder:
    """Encodes prompts with the text encoders of a family, each once as long as it is kept.

    Encoded prompts are kept in main memory, and move to a device with the samples that need them. Beyond `KEPT_BYTES`,
    those that were used longest ago are forgotten, and encoded again when they are due.

    Parameters
    ----------
    family : Family
        The family whose text encoders are used.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.empty = family.encode_empty()
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()  # Each of one row; last used last.
        self._bytes = 0
        self._lock = threading.Lock()  # Several devices generate at the same time.

    @property
    def embedding_size(self) -> int:
        """Dimension D of the vectors from `text_embeddings`."""
        return int(self.empty["prompt_embeds"].shape[-1])

    def conditioning(self, prompts: Sequence[str]) -> Callable[[Tensor], tuple[Conditioning, Conditioning]]:
        """Encode the distinct prompts, as many as are kept; the others are encoded when their samples are due.

        Returns
        -------
        callable
            Takes sample indices (B,). Returns the conditioning of these samples, and that of the empty prompt B times.
        """
        distinct = list(dict.fromkeys(prompts))
        for start in range(0, len(distinct), PROMPTS_AT_ONCE):
            if self._bytes < KEPT_BYTES:
                self._rows(distinct[start : start + PROMPTS_AT_ONCE])

        def conditioning(index: Tensor) -> tuple[Conditioning, Conditioning]:
            rows = self._rows([prompts[position] for position in index.tolist()])
            encoded = {name: tensor.to(self.family.device) for name, tensor in rows.items()}
            empty = {name: tensor.expand(len(index), *tensor.shape[1:]) for name, tensor in self.empty.items()}
            return encoded, empty

        return conditioning

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> np.ndarray:
        """Return text embeddings of unit length from the T2I's own encoder, float16 (N, D).

        Each is the mean over tokens, minus the mean over prompts (the part that all prompts share).
        """
        parts = [prompts[start : start + PROMPTS_AT_ONCE] for start in range(0, len(prompts), PROMPTS_AT_ONCE)]
        states_ND = torch.cat([_mean_over_tokens(self._rows(part)) for part in parts])
        if len(prompts) > 1:
            states_ND = states_ND - states_ND.mean(0)
        return F.normalize(states_ND, dim=1).cpu().numpy().astype(np.float16)

    @torch.no_grad()
    def _rows(self, prompts: Sequence[str]) -> Conditioning:
        """Return the encoded prompts, one row for each, in main memory."""
        with self._lock:
            distinct = dict.fromkeys(prompts)
            missing = [prompt for prompt in distinct if prompt not in self._kept]
            for start in range(0, len(missing), PROMPTS_AT_ONCE):
                self._keep(missing[start : start + PROMPTS_AT_ONCE])
            for prompt in distinct:
                self._kept.move_to_end(prompt)
            rows = [self._kept[prompt] for prompt in prompts]
            self._forget()
            if len({row["prompt_embeds"].shape for row in rows}) > 1:
                # This family pads prompts to the longest of a call, so they have to be encoded in one.
                together = self.family.encode(list(prompts))
                return {name: tensor.cpu() for name, tensor in together.items()}
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _keep(self, prompts: list[str]) -> None:
        encoded = {name: tensor.cpu() for name, tensor in self.family.encode(prompts).items()}
        for position, prompt in enumerate(prompts):
            row = {name: tensor[position : position + 1].clone() for name, tensor in encoded.items()}
            self._kept[prompt] = row
            self._bytes += _bytes_of(row)

    def _forget(self) -> None:
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            _, row = self._kept.popitem(last=False)
            self._bytes -= _bytes_of(row)


def _bytes_of(row: Conditioning) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in row.values())


def _mean_over_tokens(states: Conditioning) -> Tensor:
    states_NLD = states["prompt_embeds"].float()
    mask_NL = states.get("prompt_attention_mask")
    if mask_NL is None:
        return states_NLD.mean(1)
    mask_NL1 = mask_NL.unsqueeze(-1)
    return (states_NLD * mask_NL1).sum(1) / mask_NL1.sum(1).clamp_min(1)
