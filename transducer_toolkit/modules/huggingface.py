# SPDX-License-Identifier: Apache-2.0
"""Encoders of Hugging Face's transformers, by config or from a local folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from transducer_toolkit.modules.encoder import Encoder, try_encoder
from transducer_toolkit.modules.encoder_frontend import NumFrames, frame_mask
from transducer_toolkit.modules.huggingface_features import (
    FRAME_SAMPLES,
    NEMOTRON,
    PARAKEET,
    SEAMLESS,
    WAVEFORM,
    WHISPER,
    HuggingFaceFeatures,
)
from transducer_toolkit.modules.huggingface_files import (
    CONFIG,
    check_shapes,
    read_config,
    read_weights,
)
from transducer_toolkit.modules.weight_checks import check_sizes, shapes_only
from transducer_toolkit.ops.checks import check_flag, one_line
from transducer_toolkit.optional import import_transformers

# model_type of a config -> class of the encoder, class of its feature extractor.
MODELS = {
    "parakeet_encoder": ("ParakeetEncoder", PARAKEET),
    "nemotron_asr_streaming_encoder": ("NemotronAsrStreamingEncoder", NEMOTRON),
    "wav2vec2": ("Wav2Vec2Model", WAVEFORM),
    "hubert": ("HubertModel", WAVEFORM),
    "wavlm": ("WavLMModel", WAVEFORM),
    "wav2vec2-bert": ("Wav2Vec2BertModel", SEAMLESS),
    "whisper": ("WhisperModel", WHISPER),
}
OF_WAVEFORMS = ("wav2vec2", "hubert", "wavlm")
SUBSAMPLED_BY_CONVOLUTIONS = ("parakeet_encoder", "nemotron_asr_streaming_encoder")
# Options of transformers' loaders, not of a model. The weights become float32.
_OF_LOADERS = {"dtype", "return_dict", "output_hidden_states", "output_attentions"}
WHISPER_FRAMES = 3000  # 30 seconds, of which a Whisper encoder has positions
# Whisper's features lie within this of the largest one of an utterance.
WHISPER_RANGE = 2.0


class HuggingFaceEncoder(Encoder):
    """An encoder of transformers with its own features.

    Parakeet, Nemotron, wav2vec 2.0, HuBERT, WavLM, w2v-BERT 2.0 and Whisper. Layer drop and the
    masking of wav2vec 2.0 and its relatives during training are switched off: use ``dropout`` of
    the config and ``data.waveform_perturbation``. A Whisper encoder always computes 30 seconds, and
    takes no longer utterances.

    Args:
        folder: folder of a model of transformers, whose config, weights and feature extractor are
            taken. A folder of a whole transducer or CTC model works too: its encoder is taken.
        config: instead of a folder, the config: ``model_type`` and the options that differ from the
            defaults. The weights are random.
        features: with ``config``, ``kind`` and ``options`` of the features
            (:class:`~transducer_toolkit.modules.huggingface_features.HuggingFaceFeatures`); by
            default those of the model type.
        frozen: whether the encoder is left as it is; it then needs no memory for gradients.
        gradient_checkpointing: whether backward computes the activations of each layer again.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: the folder lacks a file.
        ValueError: a config that is not of these models, weights that do not fit it, or both
            ``folder`` and ``config``.

    Example:
        >>> config = {"model_type": "parakeet_encoder", "hidden_size": 32, "num_hidden_layers": 1}
        >>> encoder = HuggingFaceEncoder(config=config)  # doctest: +SKIP
        >>> encoder.subsampling_factor  # doctest: +SKIP
        8
    """

    def __init__(
        self,
        *,
        folder: str | None = None,
        config: Mapping[str, Any] | None = None,
        features: Mapping[str, Any] | None = None,
        frozen: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_flag(frozen, "frozen")
        check_flag(gradient_checkpointing, "gradient_checkpointing")
        if (folder is None) == (config is None):
            raise ValueError(
                "HuggingFaceEncoder: expected a folder or a config, got "
                f"{'neither' if folder is None else 'both'}; set model.encoder.folder=FOLDER"
            )
        transformers = import_transformers("HuggingFaceEncoder")
        whole = read_config(folder) if folder is not None else dict(config or {})
        where = "HuggingFaceEncoder" if folder is None else f"{os.fspath(folder)}/{CONFIG}"
        options = whole.get("encoder_config", whole)
        kind = options.get("model_type") if isinstance(options, Mapping) else None
        if not isinstance(kind, str) or kind not in MODELS:
            raise ValueError(
                f"{where}: expected a model_type of {', '.join(MODELS)}, got {repr(kind)[:100]}"
            )
        self.kind: str = kind
        class_name, features_kind = MODELS[kind]
        made = _make_config(getattr(transformers, class_name).config_class, options, where)
        if getattr(made, "add_adapter", False):
            raise ValueError(f"{where}: expected add_adapter of the config to be false")
        self.model = _make_model(getattr(transformers, class_name), made, kind, folder, whole)
        self.config: Any = self.model.config
        self.output_dim = self.config.hidden_size
        if features is not None:
            found = HuggingFaceFeatures(features["kind"], features.get("options"))
        elif folder is not None:
            found = _features_of_folder(folder, features_kind, self.config)
        else:
            found = HuggingFaceFeatures(features_kind, _feature_options(features_kind, self.config))
        self._features = found
        self.num_features = found.num_mel_bins
        self.frozen, self.gradient_checkpointing = frozen, gradient_checkpointing
        if folder is not None:
            try:
                try_encoder(self, found)
            except Exception as error:  # a wrong config can raise any error
                raise ValueError(f"{where}: its model cannot be used: {one_line(error)}") from error
            self.train()
        if frozen:
            self.model.requires_grad_(False)
            self.model.eval()
        if gradient_checkpointing:
            _enable_checkpointing(self.model)

    @property
    def plain_config(self) -> dict[str, Any]:
        """The config of a checkpoint in plain values, which makes this encoder without a folder."""
        config = json.loads(self.config.to_json_string(use_diff=True))
        features = {"kind": self._features.kind, "options": self._features.options}
        return {
            "_target_": f"{type(self).__module__}.{type(self).__qualname__}",
            "config": {**config, "model_type": self.kind},
            "features": json.loads(json.dumps(features)),
            "frozen": self.frozen,
            "gradient_checkpointing": self.gradient_checkpointing,
        }

    def make_features(self) -> HuggingFaceFeatures:
        return self._features

    def train(self, mode: bool = True) -> HuggingFaceEncoder:
        super().train(mode)
        if self.frozen:  # no dropout, and the statistics of batch normalization stay
            self.model.eval()
        return self

    def num_output_frames(self, num_frames: NumFrames) -> NumFrames:
        config, length = self.config, num_frames
        if self.kind in OF_WAVEFORMS:
            length = length * FRAME_SAMPLES
            for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
                length = _at_least_zero((length - kernel) // stride + 1)
            return length
        if self.kind == "wav2vec2-bert":
            return length // 2
        if self.kind == "whisper":
            return (length - 1) // 2 + 1
        kernel, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
        is_causal = self.kind != "parakeet_encoder"
        padding = kernel + stride - 2 if is_causal else (kernel - 1) // 2 * 2
        for _ in range(config.subsampling_factor.bit_length() - 1):
            length = (length + padding - kernel) // stride + 1
        return length

    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        self.check_input(features, feature_lengths)
        mask = frame_mask(feature_lengths, features.size(1), features.device)
        features = features.masked_fill(~mask.unsqueeze(-1), 0.0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.kind in OF_WAVEFORMS:
                encoded = self._encode_waveforms(features, feature_lengths)
            elif self.kind == "wav2vec2-bert":
                encoded = self._encode_pairs(features, feature_lengths)
            elif self.kind == "whisper":
                encoded = self._encode_whisper(features, mask)
            else:
                encoded = self._encode_mel(features, mask)
        lengths = self.num_output_frames(feature_lengths)
        return encoded[:, : int(lengths.max())], lengths

    def _encode_mel(self, features: Tensor, mask: Tensor) -> Tensor:
        options = {}
        if self.kind != "parakeet_encoder":
            options["num_lookahead_tokens"] = self.config.default_num_lookahead_tokens
        return self.model(input_features=features, attention_mask=mask, **options).last_hidden_state

    def _encode_waveforms(self, features: Tensor, feature_lengths: Tensor) -> Tensor:
        """Run the parts of the model, because its own forward lets padding reach group norms."""
        waveforms = features.flatten(1)  # (B, T_in, 160) -> (B, samples)
        lengths = self.num_output_frames(feature_lengths).to(features.device)
        if self.config.feat_extract_norm == "group":  # its statistics are of the whole utterance
            shortest = sum(self.config.conv_kernel) * 2
            pieces = []
            for waveform, length in zip(waveforms, feature_lengths.tolist(), strict=True):
                samples = waveform[: length * FRAME_SAMPLES]
                missing = max(0, shortest - len(samples))
                samples = torch.nn.functional.pad(samples, (0, missing))
                pieces.append(self.model.feature_extractor(samples[None])[0].T)
            extracted = pad_sequence(pieces, batch_first=True)
        else:
            extracted = self.model.feature_extractor(waveforms).transpose(1, 2)
        projected = self.model.feature_projection(extracted)
        hidden = projected[0] if isinstance(projected, tuple) else projected
        mask = torch.arange(hidden.size(1), device=hidden.device) < lengths[:, None]
        return self.model.encoder(hidden, attention_mask=mask).last_hidden_state

    def _encode_pairs(self, features: Tensor, feature_lengths: Tensor) -> Tensor:
        # Two frames of 10 ms make one: (B, T, F) -> (B, T / 2, 2 F)
        features = features[:, : features.size(1) // 2 * 2]
        stacked = features.unflatten(1, (-1, 2)).flatten(2)
        mask = frame_mask(feature_lengths // 2, stacked.size(1), stacked.device)
        return self.model(input_features=stacked, attention_mask=mask).last_hidden_state

    def _encode_whisper(self, features: Tensor, mask: Tensor) -> Tensor:
        if features.size(1) > WHISPER_FRAMES:
            raise ValueError(
                f"a Whisper encoder takes {WHISPER_FRAMES} feature frames (30 s), got "
                f"{features.size(1)}; leave longer utterances out with data.max_duration_s, or "
                "transcribe with --window-s 30 or less"
            )
        is_padding = ~mask.unsqueeze(-1)
        # What silence becomes in Whisper's features
        floor = features.masked_fill(is_padding, -torch.inf).amax((1, 2), keepdim=True)
        floor = floor - WHISPER_RANGE
        features = torch.where(is_padding, floor, features)
        missing = floor.expand(-1, WHISPER_FRAMES - features.size(1), features.size(2))
        features = torch.cat((features, missing), 1)
        return self.model(features.transpose(1, 2)).last_hidden_state


def _make_config(config_class: Any, options: Mapping[str, Any], where: str) -> Any:
    """Make the config of the encoder; options that its class does not know are left out.

    Among those are names of other files and of code, which loaders of transformers follow.
    """
    if options.get("quantization_config") is not None:
        raise ValueError(f"{where}: the weights are quantized, which is not supported")
    attention = options.get("attn_implementation")
    if attention not in (None, "eager", "sdpa"):  # others are code, perhaps downloaded
        raise ValueError(
            f"{where}: attn_implementation: expected 'eager' or 'sdpa', got {repr(attention)[:100]}"
        )
    default = config_class()
    known = {*vars(default), *default.attribute_map, "attn_implementation"} - _OF_LOADERS
    own = {
        name: value for name, value in options.items() if name in known and not name.startswith("_")
    }
    try:
        return config_class(**own | {"layerdrop": 0.0, "apply_spec_augment": False})
    except Exception as error:  # a wrong value can raise any error
        raise ValueError(f"{where}: {one_line(error)}") from error


def _make_model(
    kind_class: Any, config: Any, kind: str, folder: str | None, whole: Mapping[str, Any]
) -> Any:
    """Make the encoder with the weights of the folder, or random ones."""
    if folder is None:
        model = kind_class(config)
        return model.encoder if kind == "whisper" else model.float()
    weights = read_weights(folder)
    try:
        check_sizes(config.to_dict(), weights)
        # Shapes only: weights that the files lack may be larger than the memory.
        with shapes_only():
            expected = kind_class(config).state_dict()
        if kind in SUBSAMPLED_BY_CONVOLUTIONS:
            prefix = "encoder." if "encoder_config" in whole else ""
            own = {
                name.removeprefix(prefix): value
                for name, value in weights.items()
                if name.startswith(prefix)
            }
            check_shapes(own, expected, folder)
            model = kind_class(config)
            model.load_state_dict(own)
        else:
            model = _load(kind_class, config, weights, expected)
    except Exception as error:  # a wrong config can raise any error
        if isinstance(error, ValueError) and str(error).startswith(os.fspath(folder)):
            raise  # of check_shapes
        where = os.fspath(folder)
        raise ValueError(f"{where}: its weights cannot be used: {one_line(error)}") from error
    return model.encoder if kind == "whisper" else model.float()


def _load(
    kind_class: Any, config: Any, weights: dict[str, Tensor], expected: Mapping[str, Tensor]
) -> Any:
    """Make a model with weights whose names transformers converts; reads no files."""
    num_expected = sum(
        value.numel() for name, value in expected.items() if "masked_spec" not in name
    )
    num_given = sum(value.numel() for value in weights.values())
    if num_expected > 2 * num_given:  # if fewer are missing, the error below names one
        raise ValueError(
            f"{CONFIG} asks for {num_expected} numbers, and the weights are {num_given}"
        )
    for name, value in weights.items():
        if not value.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise ValueError(f"the weight {name[:100]} is of {value.dtype}")
    model, report = kind_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(name for name in report["missing_keys"] if "masked_spec" not in name)
    if missing:
        raise ValueError(f"they lack {missing[0]}, which its {CONFIG} asks for")
    return model


def _features_of_folder(folder: str, kind: str, config: Any) -> HuggingFaceFeatures:
    try:
        found = HuggingFaceFeatures.load(folder)
    except FileNotFoundError:
        return HuggingFaceFeatures(kind, _feature_options(kind, config))
    if found.kind != kind:
        raise ValueError(f"{folder}: expected the feature extractor {kind}, got {found.kind}")
    return found


def _feature_options(kind: str, config: Any) -> dict[str, Any]:
    if kind in (WAVEFORM, SEAMLESS):
        return {}
    return {"feature_size": config.num_mel_bins}


def _enable_checkpointing(model: Any) -> None:
    name = "activation_checkpointing_enable"  # the name before transformers 5.2x
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable()


def _at_least_zero(length: NumFrames) -> NumFrames:
    return length.clamp(min=0) if isinstance(length, Tensor) else max(0, length)
