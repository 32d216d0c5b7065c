# SPDX-License-Identifier: Apache-2.0
"""The fused loss for the transducer models of Hugging Face's ``transformers``.

:func:`use_fused_loss` changes a ``ParakeetForRNNT``, ``ParakeetForTDT``,
``NemotronAsrStreamingForRNNT`` or ``Nemotron3_5AsrForRNNT``: given labels, the model computes the
loss without the logits of its joiner. Generation and weights stay as they are.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transducer_toolkit.compat.common import check_reduction_name, reduce_by_labels
from transducer_toolkit.losses.fused_joiner import FusedJoinerLoss, fused_joiner_loss
from transducer_toolkit.modules.joiner import is_plain_linear
from transducer_toolkit.ops.checks import check_int
from transducer_toolkit.optional import import_transformers

# Class -> its output class, and the default reduction of its loss. transformers has no loss for the
# Nemotron classes.
MODELS = {
    "ParakeetForRNNT": ("ParakeetRNNTOutput", "mean_volume"),
    "ParakeetForTDT": ("ParakeetRNNTOutput", "mean"),
    "NemotronAsrStreamingForRNNT": ("NemotronAsrStreamingRNNTOutput", "mean_volume"),
    "Nemotron3_5AsrForRNNT": ("Nemotron3_5AsrRNNTOutput", "mean_volume"),
}
# Name of an activation in a config -> its name here.
ACTIVATIONS = {
    "relu": "relu",
    "tanh": "tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "linear": "identity",
}


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The arguments of :func:`use_fused_loss`, and values from the model's config."""

    blank: int
    padding_ids: tuple[int, ...]
    pad_token_id: int | None
    reduction: str
    sigma: float
    options: dict[str, Any]
    output_class: Any


class FusedLossHandle:
    """Takes the fused loss of :func:`use_fused_loss` back; leaving a ``with`` block does so too."""

    def __init__(self, model: nn.Module, original: type[nn.Module]) -> None:
        self._model = model
        self._fused = type(model)
        self._original = original

    def undo(self) -> None:
        """Give the model its own loss back; a second call does nothing.

        Raises:
            RuntimeError: if another library has changed the class of the model since.
        """
        if type(self._model) is self._original:
            return
        if type(self._model) is not self._fused:
            raise RuntimeError(
                f"undo: expected a model of class {self._original.__name__}, got "
                f"{type(self._model).__name__}, which another library has made of it since"
            )
        self._model.__class__ = self._original
        del self._model._fused_loss

    def __enter__(self) -> nn.Module:
        return self._model

    def __exit__(self, *error: object) -> None:
        self.undo()


def use_fused_loss(
    model: nn.Module,
    *,
    reduction: str | None = None,
    sigma: float = 0.0,
    padding_ids: Sequence[int] | None = None,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    clamp: float = 0.0,
    dropped_mass: float = 1e-7,
    precision: str = "auto",
) -> FusedLossHandle:
    """Makes a transducer of transformers compute its loss with :func:`fused_joiner_loss`.

    With ``labels``, the model returns the loss of its class and no logits. Without labels, and in
    ``generate``, it does what it did before. ``decoder_input_ids`` may be left out: they are blank
    and the labels. Without an ``attention_mask``, all frames count. The arguments ``reduction`` and
    ``sigma`` of a call replace those given here.

    Call it on the model or on a wrapper around it (PEFT, DDP, ``torch.compile``), before or after
    the wrapper is made. ``Trainer`` then divides the loss by ``gradient_accumulation_steps``.

    Args:
        model: the model, or a module that contains one.
        reduction: ``"mean_volume"`` (the sum of the losses over the number of labels),
            ``"mean_batch"`` (the mean over utterances), ``"mean"`` (the mean of the losses per
            label), ``"sum"`` or ``"none"``. None: that of the class in transformers, "mean" for TDT
            and "mean_volume" for RNN-T.
        sigma: >= 0, subtracted from the token log-probabilities of a TDT model.
        padding_ids: ids that are padding at the end of a row of labels; negative ids always are.
            None: blank, and ``config.pad_token_id`` for TDT.
        fastemit_lambda: as in :func:`~transducer_toolkit.transducer_loss`.
        delay_penalty: as in :func:`~transducer_toolkit.transducer_loss`.
        clamp: as in :func:`~transducer_toolkit.transducer_loss`.
        dropped_mass: as in :func:`~transducer_toolkit.fused_joiner_loss`.
        precision: as in :func:`~transducer_toolkit.fused_joiner_loss`.

    Returns:
        A handle whose ``undo()`` restores the model; it is a context manager, too.

    Raises:
        ImportError: transformers is not installed.
        TypeError: there is no such model in ``model``, or an option has a wrong type.
        ValueError: the model has a fused loss already, an output layer that is not a plain
            ``nn.Linear`` (such as one with an adapter), or an activation that the fused loss lacks;
            an option has a wrong value.

    Example:
        >>> model = ParakeetForRNNT.from_pretrained("folder")  # doctest: +SKIP
        >>> handle = use_fused_loss(model)  # doctest: +SKIP
        >>> model(**processor(audio, text=text)).loss.backward()  # doctest: +SKIP
        >>> handle.undo()  # doctest: +SKIP
    """
    import_transformers("use_fused_loss")
    target = _find_model(model)
    config = target.config
    original: Any = type(target)
    output_name, default_reduction = MODELS[original.__name__]
    for layer in _layers_of_head(target.joint.head):
        if not is_plain_linear(layer):
            raise _head_error(layer)
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"config.hidden_act: expected one of {', '.join(ACTIVATIONS)}, "
            f"got {config.hidden_act!r}"
        )
    is_tdt = hasattr(config, "durations")
    blank, pad_token_id = config.blank_token_id, config.pad_token_id
    if padding_ids is None:
        padding_ids = (blank, pad_token_id) if is_tdt and pad_token_id is not None else (blank,)
    for padding_id in padding_ids:
        check_int(padding_id, "padding_ids")
    options: dict[str, Any] = {
        "activation": ACTIVATIONS[config.hidden_act],
        "fastemit_lambda": fastemit_lambda,
        "delay_penalty": delay_penalty,
        "clamp": clamp,
        "dropped_mass": dropped_mass,
        "precision": precision,
    }
    if is_tdt:
        options["durations"] = tuple(config.durations)
    settings = _Settings(
        blank,
        tuple(padding_ids),
        pad_token_id,
        default_reduction if reduction is None else reduction,
        sigma,
        options,
        getattr(sys.modules[original.__module__], output_name),
    )
    check_reduction_name(settings.reduction)
    FusedJoinerLoss(blank, **_loss_options(settings, sigma))  # raises errors for options
    target._fused_loss = settings
    target.__class__ = _fused_class(original)
    return FusedLossHandle(target, original)


def _layers_of_head(head: nn.Module) -> list[nn.Module]:
    """Returns the output layer, or the copies that PEFT's modules_to_save makes of it.

    The weight and bias of PEFT's wrapper are those of the copy in use.
    """
    if type(head).__name__ != "ModulesToSaveWrapper":
        return [head]
    wrapper: Any = head
    return [wrapper.original_module, *wrapper.modules_to_save.values()]


def _head_error(layer: nn.Module) -> ValueError:
    kind = type(layer)
    return ValueError(
        f"joint.head: expected a plain torch.nn.Linear, got {kind.__module__}.{kind.__qualname__}, "
        "or one with hooks; leave it out of the target_modules of adapters and of quantization. "
        "modules_to_save of PEFT may name it"
    )


def _find_model(model: nn.Module) -> Any:
    """Returns the transducer of transformers in a module."""
    names = ", ".join(MODELS)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected one of {names}, got {type(model).__name__}")
    found = [
        module
        for module in model.modules()
        if type(module).__name__ in MODELS and type(module).__module__.startswith("transformers.")
    ]
    if len(found) != 1:
        raise TypeError(
            f"model: expected one of {names}, or a module that contains one, got "
            f"{type(model).__name__} with {len(found)} of them"
        )
    if hasattr(found[0], "_fused_loss"):
        raise ValueError("model: has the fused loss already; call undo() of its handle first")
    return found[0]


@functools.cache
def _fused_class(original: Any) -> Any:
    """Returns a subclass of the same name whose forward computes the fused loss.

    The class of the object is changed, and not its attribute ``forward``, because copies and the
    replicas of ``DataParallel`` would call a method of the first object.
    """
    transformers = import_transformers("use_fused_loss")

    def forward(
        self: Any,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_cache: Any = None,
        use_decoder_cache: bool | None = None,
        encoder_outputs: Any = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return original.forward(
                self,
                input_features=input_features,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_cache=decoder_cache,
                use_decoder_cache=use_decoder_cache,
                encoder_outputs=encoder_outputs,
                **kwargs,
            )
        if decoder_cache is not None or use_decoder_cache:
            raise ValueError("decoder_cache: expected none with labels; it is for generation")
        return _forward_with_labels(
            self, input_features, attention_mask, decoder_input_ids, encoder_outputs, labels, kwargs
        )

    members = {
        "forward": transformers.utils.can_return_tuple(functools.wraps(original.forward)(forward)),
        # Trainer divides the loss of such a model by gradient_accumulation_steps. The losses of
        # these classes are means over a micro batch, so it must.
        "accepts_loss_kwargs": False,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__reduce_ex__": lambda self, protocol: (_new_fused, (original,), self.__getstate__()),
    }
    return type(original.__name__, (original,), members)


def _new_fused(original: Any) -> Any:
    """Makes an empty object for pickle and copy."""
    return copyreg.__newobj__(_fused_class(original))  # type: ignore[attr-defined]


def _forward_with_labels(
    model: Any,
    input_features: Tensor | None,
    attention_mask: Tensor | None,
    decoder_input_ids: Tensor | None,
    encoder_outputs: Any,
    labels: Tensor,
    kwargs: dict[str, Any],
) -> Any:
    settings: _Settings = model._fused_loss
    reduction = kwargs.pop("reduction", settings.reduction)
    check_reduction_name(reduction)
    options = _loss_options(settings, kwargs.pop("sigma", settings.sigma))
    kwargs.pop("num_items_in_batch", None)  # transformers' losses ignore it, too
    if encoder_outputs is None:
        encoder_outputs = model.get_audio_features(
            input_features=input_features, attention_mask=attention_mask, **kwargs
        )
    loss = _loss(model, encoder_outputs, decoder_input_ids, labels, reduction, options)
    return settings.output_class(
        loss=loss,
        last_hidden_state=encoder_outputs.last_hidden_state,
        pooler_output=encoder_outputs.pooler_output,
        hidden_states=encoder_outputs.hidden_states,
        attentions=encoder_outputs.attentions,
    )


@torch.compiler.disable  # sizes depend on the lengths
def _loss(
    model: Any,
    encoder_outputs: Any,
    decoder_input_ids: Tensor | None,
    labels: Tensor,
    reduction: str,
    options: dict[str, Any],
) -> Tensor:
    settings: _Settings = model._fused_loss
    for layer in _layers_of_head(model.joint.head):  # adapters may have come since
        if type(layer) is not nn.Linear and not hasattr(layer, "parametrizations"):
            raise _head_error(layer)
    enc = encoder_outputs.pooler_output
    mask = encoder_outputs.attention_mask
    if mask is None:
        mask = torch.ones(enc.shape[:2], dtype=torch.int64, device=enc.device)
    targets, logit_lengths, target_lengths = _targets_and_lengths(settings, labels, mask)
    num_columns = targets.size(1) + 1
    if decoder_input_ids is None:
        is_padding = _is_padding(settings, targets)
        decoder_input_ids = nn.functional.pad(
            targets.masked_fill(is_padding, settings.blank), (1, 0), value=settings.blank
        )
    elif decoder_input_ids.dim() != 2 or decoder_input_ids.size(1) < num_columns:
        raise ValueError(
            f"decoder_input_ids: expected shape ({len(labels)}, {num_columns}), blank and the "
            f"labels, got {tuple(decoder_input_ids.shape)}; leave them out to have them made"
        )
    losses = fused_joiner_loss(
        enc,
        model.decoder(decoder_input_ids[:, :num_columns]),
        model.joint.head.weight,
        model.joint.head.bias,
        targets,
        logit_lengths,
        target_lengths,
        settings.blank,
        reduction="none",
        **options,
    )
    return reduce_by_labels(losses, target_lengths, reduction)


def _targets_and_lengths(
    settings: _Settings, labels: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the labels without common padding, and both lengths on the CPU."""
    if labels.dim() != 2:
        raise ValueError(f"labels: expected shape (B, U), got {tuple(labels.shape)}")
    labels = labels.to(mask.device)
    columns = torch.arange(1, labels.size(1) + 1, device=labels.device)
    if labels.size(1) > 0:
        target_lengths = (columns * ~_is_padding(settings, labels)).amax(1)
    else:
        target_lengths = labels.new_zeros(len(labels))
    ends_in_pad = labels.new_zeros(len(labels), dtype=torch.bool)
    if settings.pad_token_id not in (None, *settings.padding_ids) and labels.size(1) > 1:
        last = (target_lengths - 1).clamp(min=1)[:, None]
        both = labels.gather(1, torch.cat((last - 1, last), 1).long())
        pad: Any = settings.pad_token_id
        ends_in_pad = torch.eq(both, pad).all(1)
    # one transfer for all that decides sizes
    counts = torch.stack((mask.sum(-1).long(), target_lengths.long(), ends_in_pad.long())).cpu()
    logit_lengths, target_lengths, ends_in_pad = counts.unbind()
    if bool(ends_in_pad.any()):
        index = int(ends_in_pad.nonzero()[0])
        warnings.warn(
            f"labels[{index}] end with {settings.pad_token_id}, which is config.pad_token_id, and "
            "the RNN-T models of transformers count it as a label; if it is padding, call "
            f"use_fused_loss with padding_ids=({settings.blank}, {settings.pad_token_id})",
            stacklevel=2,
        )
    return labels[:, : int(target_lengths.max())], logit_lengths, target_lengths


def _is_padding(settings: _Settings, labels: Tensor) -> Tensor:
    is_padding = labels < 0
    for padding_id in settings.padding_ids:
        is_padding = is_padding | (labels == padding_id)
    return is_padding


def _loss_options(settings: _Settings, sigma: float) -> dict[str, Any]:
    if "durations" in settings.options:
        return {**settings.options, "sigma": sigma}
    if sigma != 0:
        raise ValueError(f"sigma: expected 0 for an RNN-T model, got {sigma}; it is for TDT models")
    return settings.options
