"""The LoRA adapter of the T2I's denoiser: creation, learning, merging on all devices, saving and loading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call

from fedmmkt.common.config import ConfigError, T2IConfig
from fedmmkt.common.files import replaced_folder
from fedmmkt.server_app.t2i.families import LORA_GROUPS, Conditioning, Family

UP = "lora_B"  # In peft's names of the tensors B, which are zero at first.
SMALL = 2**22  # Weights of all layers with an adapter, up to which a denoiser is small.


class Adapter:
    """One LoRA adapter on the denoiser of a family.

    It is trained in full precision. For generation, it is merged into the weights, so it does not slow generation down.

    Parameters
    ----------
    family : Family
        The family whose denoiser gets the adapter.
    copies : sequence of Family
        Copies of the family on other devices, which also generate. Their denoisers get the merged weights.
    config : T2IConfig
        Names the adapter's rank, alpha and layers.
    seed : int
        Seed of the adapter's initial weights.

    Raises
    ------
    ConfigError
        If ``t2i.lora-targets`` selects no layers of the model.
    """

    def __init__(self, family: Family, copies: Sequence[Family], config: T2IConfig, seed: int) -> None:
        self.family, self.copies, self.config = family, copies, config
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=_named_layers(family, config.lora_targets),
        )
        family.add_adapter(lora)
        cast_training_params(family.denoiser)  # To full precision: half precision loses small updates.
        self.parameters = [parameter for parameter in family.denoiser.parameters() if parameter.requires_grad]
        self._base: list[Tensor] = []  # The original weights in main memory, while merged.
        self._predictor = _Predictor(family)
        self._joins = self.is_small and self._can_join()

    @property
    def is_small(self) -> bool:
        """Whether the layers with an adapter have few weights."""
        return sum(layer.get_base_layer().weight.numel() for layer in self._layers().values()) <= SMALL

    def _can_join(self) -> bool:
        """Return whether layers can compute with the sum of base and adapter: in full precision, and in one place.

        Those of a checkpointed denoiser cannot: they compute again on the way back, when they have their own weights.
        Nor those of one that is offloaded, which is moved as a whole when it is called.
        """
        bases = [layer.get_base_layer() for layer in self._layers().values()]
        is_plain = all(base.weight.dtype == torch.float32 and getattr(base, "groups", 1) == 1 for base in bases)
        is_offloaded = hasattr(self.family.denoiser, "_hf_hook")  # From accelerate.
        return is_plain and not is_offloaded and not self.config.gradient_checkpointing

    def predict(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the family's prediction, through which gradients reach the adapter.

        In a small denoiser each layer computes with the sum of its weight and the adapter's update, in place of three
        products one after the other: this takes a quarter off a step of the starter. A large one would need too much
        memory for the gradients of its weights.
        """
        if not self._joins:
            return self.family.predict(noisy, times_B, conditioning)
        layers = self._layers()
        joined = {f"denoiser.{name}.base_layer.weight": _joined_weight(layer) for name, layer in layers.items()}
        for layer in layers.values():
            layer.merged_adapters.append("default")  # So that peft's layer calls its base layer alone.
        try:
            inputs = (noisy, times_B, conditioning)
            predicted: Tensor = functional_call(self._predictor, joined, inputs, tie_weights=False)
        finally:
            for layer in layers.values():
                layer.merged_adapters.clear()
        return predicted

    def merge(self) -> None:
        """Add the adapter to the weights on all devices, until `unmerge`; generation is then as fast as without it."""
        if self._base:
            return
        layers = self._layers()
        self._base = [layer.get_base_layer().weight.detach().to("cpu", copy=True) for layer in layers.values()]
        for name, layer in layers.items():
            layer.merge()
            for copy in self.copies:
                copy.denoiser.get_submodule(name).weight.data.copy_(layer.get_base_layer().weight)

    def unmerge(self) -> None:
        """Restore the original weights exactly, for training."""
        for layer, weight in zip(self._layers().values(), self._base, strict=False):
            # Not layer.unmerge(): it recomputes each layer's update to subtract it, which is slow and inexact.
            layer.merged_adapters.clear()
            layer.get_base_layer().weight.data.copy_(weight)
        self._base = []

    def _layers(self) -> dict[str, Any]:
        """Return the layers that have the adapter, by name."""
        return {name: m for name, m in self.family.denoiser.named_modules() if isinstance(m, BaseTunerLayer)}

    def state(self) -> dict[str, Tensor]:
        """Return the adapter's tensors by name, on the CPU."""
        tensors = get_peft_model_state_dict(self.family.denoiser)
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    @property
    def unadapted(self) -> dict[str, Tensor]:
        """The tensors of an adapter that changes nothing: those of `state` with B = 0."""
        return {name: torch.zeros_like(tensor) if UP in name else tensor for name, tensor in self.state().items()}

    @property
    def is_unadapted(self) -> bool:
        """Whether the adapter changes nothing."""
        return not any(bool(part.any()) for name, part in self.family.denoiser.named_parameters() if UP in name)

    def is_finite(self) -> bool:
        """Return whether no value of the adapter is NaN or infinite."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters)

    def load_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load tensors from `state`; the error text calls them ``source``.

        Raises
        ------
        ConfigError
            If names or shapes differ from those of this adapter, or a value is NaN or infinite.
        """
        present = self.state()
        if {name: tensor.shape for name, tensor in state.items()} != {n: t.shape for n, t in present.items()}:
            raise ConfigError(
                f"{source} is an adapter of another model, or of other LoRA targets or rank, than "
                f"t2i.model {self.config.model!r} with t2i.lora-targets {','.join(self.config.lora_targets)!r} and "
                f"t2i.lora-rank {self.config.lora_rank}; allowed: one that was made with these"
            )
        if broken := [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]:
            raise ConfigError(
                f"{source} has NaN or infinite values in {len(broken)} of {len(state)} tensors, such as {broken[0]!r}: "
                "an update diverged; allowed: finite values, as in an earlier round, or in a run with a lower "
                "t2i.adaptation-learning-rate"
            )
        self.unmerge()
        set_peft_model_state_dict(self.family.denoiser, dict(state))

    @contextmanager
    def holding(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Have another adapter inside the block, and after it the present one again, even if the block trains it."""
        present = {name: tensor.clone() for name, tensor in self.state().items()}
        self._change_to(state, "another adapter")
        try:
            yield
        finally:
            self._change_to(present, "the present adapter")

    def _change_to(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load an adapter, unless it is there already."""
        if any(not torch.equal(tensor, state[name]) for name, tensor in self.state().items()):
            self.load_state(state, source)

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Save the adapter, or an earlier ``state`` of it, in the format of its family.

        The folder is replaced atomically.

        Raises
        ------
        OSError
            If the disk is full. The folder is then unchanged.
        """
        with replaced_folder(folder) as temporary:
            self.family.save_adapter(temporary, dict(state or self.state()))

    def load(self, folder: Path) -> None:
        """Load an adapter from `save`; it replaces the current one.

        Raises
        ------
        ConfigError
            If it cannot be read, or does not fit this model and LoRA configuration.
        """
        try:
            state = self.family.load_adapter(folder)
        except (OSError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"run-config key 't2i.adapter' is {str(folder)!r}, which holds no adapter that can be read ({reason}); "
                "allowed: the folder `lora` of a run, or empty"
            ) from None
        self.load_state(state, f"run-config key 't2i.adapter': {folder}")


def _joined_weight(layer: Any) -> Tensor:
    """Return the weight of a linear layer or a convolution with its adapter's update, W + s B A (arXiv 2106.09685)."""
    weight, down, up = layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    joined = torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1), alpha=layer.scaling["default"])
    return joined.view_as(weight)


class _Predictor(nn.Module):
    """A family's prediction as a module, since `functional_call` calls modules with other weights."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family, self.denoiser = family, family.denoiser

    def forward(self, noisy: Tensor, times_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the denoiser's prediction."""
        return self.family.predict(noisy, times_B, conditioning)


def _named_layers(family: Family, targets: Sequence[str]) -> list[str]:
    """Return the names of the layers that the targets select.

    Each target is a group of the family, or the end of a layer name. A group without layers is ignored if another
    target selects layers. For example, transformers have no convolutions.
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
