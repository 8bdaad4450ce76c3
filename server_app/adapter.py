"""The LoRA of the T2I's denoiser: made, served on all devices, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor

from common.config import ConfigError, T2IConfig
from common.files import replaced_folder
from server_app.families import LORA_GROUPS, Family


class Adapter:
    """One LoRA on the denoiser of a family.

    It learns in full precision. To generate, it is merged into the weights, where it costs nothing.

    Parameters
    ----------
    family : Family
        Whose denoiser gets it.
    twins : sequence of Family
        Copies that generate too; their denoisers get the merged weights.
    config : T2IConfig
        Its rank and layers.
    seed : int
        Seed of its initial weights.

    Raises
    ------
    ConfigError
        If ``t2i.lora-targets`` names no layers of the model.
    """

    def __init__(self, family: Family, twins: Sequence[Family], config: T2IConfig, seed: int) -> None:
        self.family, self.twins, self.config = family, twins, config
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=_named_layers(family, config.lora_targets),
        )
        family.add_adapter(lora)
        self.parameters = [parameter for parameter in family.denoiser.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()  # Small updates are lost in half precision.
        self._base: list[Tensor] = []  # While it is merged, the weights as they were, in main memory.

    def merge(self) -> None:
        """Add it to the weights, to generate at the bare model's speed on all devices, until `unmerge`."""
        if self._base:
            return
        layers = self._layers()
        self._base = [layer.get_base_layer().weight.detach().to("cpu", copy=True) for layer in layers.values()]
        for name, layer in layers.items():
            layer.merge()
            for twin in self.twins:
                twin.denoiser.get_submodule(name).weight.data.copy_(layer.get_base_layer().weight)

    def unmerge(self) -> None:
        """Put the weights back bit for bit, to learn."""
        for layer, weight in zip(self._layers().values(), self._base, strict=False):
            # Not layer.unmerge(), which computes each layer's update again only to subtract it, inexactly.
            layer.merged_adapters.clear()
            layer.get_base_layer().weight.data.copy_(weight)
        self._base = []

    def _layers(self) -> dict[str, Any]:
        """Find the layers that have it, by name."""
        return {name: m for name, m in self.family.denoiser.named_modules() if isinstance(m, BaseTunerLayer)}

    def state(self) -> dict[str, Tensor]:
        """Return its tensors by name, on the CPU."""
        tensors = get_peft_model_state_dict(self.family.denoiser)
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def load_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take over what `state` returned; ``source`` names it in the error, as in `load`."""
        present = self.state()
        if {name: tensor.shape for name, tensor in state.items()} != {n: t.shape for n, t in present.items()}:
            raise ConfigError(
                f"{source} is an adapter of another model, or of other LoRA targets or rank, than "
                f"t2i.model {self.config.model!r} with t2i.lora-targets {','.join(self.config.lora_targets)!r} and "
                f"t2i.lora-rank {self.config.lora_rank}; allowed: one that was made with these"
            )
        self.unmerge()
        set_peft_model_state_dict(self.family.denoiser, dict(state))

    def save(self, folder: Path) -> None:
        """Save it as its family's plain diffusers reads it; the folder is replaced whole.

        Raises
        ------
        OSError
            If the disk is full; the folder is then what it was.
        """
        with replaced_folder(folder) as temporary:
            self.family.save_adapter(temporary, self.state())

    def load(self, folder: Path) -> None:
        """Load what `save` saved, in place of the present one.

        Raises
        ------
        ConfigError
            If it cannot be read, or its tensors are not those of this model and LoRA configuration.
        """
        try:
            state = self.family.load_adapter(folder)
        except (OSError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"run-config key 't2i.adapter' is {str(folder)!r}, which holds no adapter that can be read ({reason}); "
                "allowed: the folder `lora` of a run, or empty"
            ) from None
        self.load_state(state, str(folder))


def _named_layers(family: Family, targets: Sequence[str]) -> list[str]:
    """List the layers that the targets name, each a group of the family or the end of layer names.

    A group that a family lacks, as transformers have no convolutions, is left out if another names layers.
    """
    modules = family.denoiser.named_modules()
    layers = [name for name, layer in modules if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    chosen: list[str] = []
    for target in targets:
        endings = family.lora_groups.get(target, () if target in LORA_GROUPS else (target,))
        found = [name for name in layers if any(name == end or name.endswith("." + end) for end in endings)]
        if not found and target not in LORA_GROUPS:
            raise ConfigError(
                f"run-config key 't2i.lora-targets' has {target!r}, which names no layer of the model; "
                f"allowed: {', '.join(LORA_GROUPS)}, or the end of a layer's name such as {layers[-1]!r}"
            )
        chosen += found
    if not chosen:
        raise ConfigError(
            f"run-config key 't2i.lora-targets' is {', '.join(targets)!r}, of which the model has no layers; "
            f"allowed: {', '.join(family.lora_groups)}, or the end of a layer's name such as {layers[-1]!r}"
        )
    return sorted(set(chosen))
