"""Encoding of prompts, for the denoiser and for the clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedmmkt.server_app.t2i.families import Conditioning, Family

PROMPTS_AT_ONCE = 256


class PromptEncoder:
    """Encodes prompts with the text encoders of a family.

    Parameters
    ----------
    family : Family
        The family whose text encoders are used.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.empty = family.encode_empty()

    @property
    def embedding_size(self) -> int:
        """Dimension D of the vectors from `text_embeddings`."""
        return int(self.empty["prompt_embeds"].shape[-1])

    def conditioning(self, prompts: Sequence[str]) -> Callable[[Tensor], tuple[Conditioning, Conditioning]]:
        """Encode each distinct prompt once; the encoded prompts wait in main memory until their samples are due.

        Returns
        -------
        callable
            Takes sample indices (B,). Returns the conditioning of these samples, and that of the empty prompt B times.
        """
        distinct = list(dict.fromkeys(prompts))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        rows_N = torch.tensor([row[prompt] for prompt in prompts])
        states = self._encode(distinct)

        def conditioning(index: Tensor) -> tuple[Conditioning, Conditioning]:
            encoded = {name: tensor[rows_N[index]].to(self.family.device) for name, tensor in states.items()}
            empty = {name: tensor.expand(len(index), *tensor.shape[1:]) for name, tensor in self.empty.items()}
            return encoded, empty

        return conditioning

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> np.ndarray:
        """Return text embeddings of unit length from the T2I's own encoder, float16 (N, D).

        Each is the mean over tokens, minus the mean over prompts (the part that all prompts share).
        """
        states = self._encode(list(prompts))
        states_NLD = states["prompt_embeds"].float()
        mask_NL = states.get("prompt_attention_mask")
        if mask_NL is None:
            states_ND = states_NLD.mean(1)
        else:
            mask_NL1 = mask_NL.unsqueeze(-1)
            states_ND = (states_NLD * mask_NL1).sum(1) / mask_NL1.sum(1).clamp_min(1)
        if len(prompts) > 1:
            states_ND = states_ND - states_ND.mean(0)
        return F.normalize(states_ND, dim=1).cpu().numpy().astype(np.float16)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        starts = range(0, len(prompts), PROMPTS_AT_ONCE)
        encoded = (self.family.encode(prompts[start : start + PROMPTS_AT_ONCE]) for start in starts)
        parts = [{name: tensor.cpu() for name, tensor in part.items()} for part in encoded]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
