# SPDX-License-Identifier: Apache-2.0
"""A callback that trains low-rank adapters of the encoder instead of its weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor, nn

from transducer_toolkit.ops.checks import check_at_least, check_probability
from transducer_toolkit.optional import import_peft

logger = logging.getLogger(__name__)
NAME = "default"  # of peft's only adapter


class LoraAdapters(Callback):
    """Trains low-rank adapters (LoRA) of the encoder with the library peft.

    All weights of the encoder stay as they are, and each chosen linear layer gets an adapter.
    Predictor and joiner are trained as usual.

    The ``state_dict`` of the module has the names of the module without adapters, and merged
    weights: a checkpoint is one of the plain model. The callback's own state, in the same
    checkpoint, has the adapters and the weights below them, so a resumed training goes on exactly.

    Args:
        rank: rank of an adapter.
        alpha: the product of the two factors of an adapter is multiplied by ``alpha / rank``.
        dropout: probability of zeroing an input of an adapter.
        target_modules: ends of the names of the encoder's linear layers that get an adapter.

    Raises:
        ImportError: peft is not installed.
        ValueError: (when the training starts) the encoder has no such layers or is frozen, or the
            weights are averaged.
    """

    def __init__(
        self,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        target_modules: Sequence[str] = ("q_proj", "v_proj"),
    ) -> None:
        check_at_least(1, rank=rank)
        check_probability(dropout, "dropout")
        self.peft = import_peft("adapters=lora")
        self.config = self.peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules)
        )
        self._layers: dict[str, Any] = {}  # by their names in the module

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._layers:  # a test after the training
            return
        if any(isinstance(it, WeightAveraging) for it in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "adapters=lora: expected averaging=none, got an average of the weights"
            )
        encoder: nn.Module = pl_module.model.encoder  # type: ignore[assignment, union-attr]
        if getattr(encoder, "frozen", False):
            raise ValueError("adapters=lora: expected model.encoder.frozen=false, got true")
        try:
            self.peft.inject_adapter_in_model(self.config, encoder)
        except ValueError as error:
            raise ValueError(f"adapters.target_modules: {error}") from error
        for name, weight in encoder.named_parameters():
            weight.requires_grad_("lora_" in name)
        for name, layer in pl_module.named_modules():
            if isinstance(layer, self.peft.tuners.lora.LoraLayer):
                self._layers[name] = layer
                layer.register_state_dict_post_hook(_merge)
                layer.register_load_state_dict_pre_hook(_unmerge)
        trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
        logger.info(
            "adapters in %d layers of the encoder, %.2f M trained parameters",
            len(self._layers),
            trained / 1e6,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the adapters and the weights below them."""
        return {
            f"{name}.{key}": value.detach().clone()
            for name, layer in self._layers.items()
            for key, value in layer.named_parameters()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the adapters of a training that goes on."""
        for name, layer in self._layers.items():
            for key, value in layer.named_parameters():
                value.data.copy_(state_dict[f"{name}.{key}"])


def _merge(layer: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Replace the weights of a layer and its adapter by the merged ones, under plain names."""
    own = [name for name in state if name.startswith(prefix)]
    found = {name.removeprefix(prefix): state.pop(name) for name in own}
    delta = layer.get_delta_weight(NAME).detach()
    for name, value in found.items():
        if name.startswith("base_layer."):
            plain = name.removeprefix("base_layer.")
            state[prefix + plain] = value + delta.to(value.dtype) if plain == "weight" else value


def _unmerge(layer: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Read plain weights into the layer below the adapter, which becomes zero."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}base_layer.{name.removeprefix(prefix)}"] = state.pop(name)
    state[f"{prefix}lora_A.{NAME}.weight"] = layer.lora_A[NAME].weight.detach().clone()
    state[f"{prefix}lora_B.{NAME}.weight"] = layer.lora_B[NAME].weight.detach() * 0
