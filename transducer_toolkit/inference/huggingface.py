# SPDX-License-Identifier: Apache-2.0
"""Folders of transformers' transducers, read as if they were checkpoints of this toolkit."""

from __future__ import annotations

import os
from typing import Any

from hydra.utils import instantiate
from torch import Tensor

from transducer_toolkit.data.huggingface_tokenizer import HuggingFaceTokenizer
from transducer_toolkit.modules.huggingface_features import HuggingFaceFeatures
from transducer_toolkit.modules.huggingface_files import check_shapes, read_config, read_weights
from transducer_toolkit.modules.weight_checks import check_sizes, shapes_only
from transducer_toolkit.ops.checks import one_line
from transducer_toolkit.ops.topology import tdt_topology

# model_type of the folders that can be read.
TRANSDUCERS = ("parakeet_rnnt", "parakeet_tdt", "nemotron_asr_streaming")
# Beginning of the names of weights in transformers -> here.
NAMES = {
    "encoder.": "encoder.model.",
    "encoder_projector.": "joiner.encoder_projection.",
    "decoder.embedding.": "predictor.embedding.",
    "decoder.lstm.": "predictor.lstm.",
    "decoder.decoder_projector.": "joiner.predictor_projection.",
    "joint.head.": "joiner.output.",
}
# transformers adds a bias to both projections; their sum is the bias of the encoder's here.
EXTRA_BIAS, _BIAS = "decoder.decoder_projector.bias", "joiner.encoder_projection.bias"


def read_recipe(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the recipe of the recognizer of a folder; no weights are read.

    Args:
        folder: written by ``save_pretrained`` of a ``ParakeetForRNNT``, ``ParakeetForTDT`` or
            ``NemotronAsrStreamingForRNNT`` and of its processor: ``config.json``,
            ``model.safetensors``, ``tokenizer.json``, and ``preprocessor_config.json`` or
            ``processor_config.json``.

    Returns:
        The entries of :func:`~transducer_toolkit.inference.recognizer.recognizer_recipe` but for
        the version of the format.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the model is of another kind.
    """
    config = _checked_config(folder)
    topology = "regular"
    if config["model_type"] == "parakeet_tdt":
        try:
            topology = tdt_topology(config["durations"]).name
        except ValueError as error:
            raise ValueError(f"{os.fspath(folder)}/config.json: {error}") from error
    features = HuggingFaceFeatures.load(folder)
    tokenizer = HuggingFaceTokenizer.load(folder)
    return {
        "model": _model_config(config, features),
        "symbols": list(tokenizer.symbols),
        "tokenizer": tokenizer.state(),
        "num_mel_bins": features.num_mel_bins,
        "max_symbols_per_frame": config.get("max_symbols_per_step", 10),
        "topology": topology,
    }


def _checked_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    where, config = f"{os.fspath(folder)}/config.json", read_config(folder)
    if config["model_type"] not in TRANSDUCERS:
        raise ValueError(
            f"{where}: expected a model_type of {', '.join(TRANSDUCERS)}, got "
            f"{config['model_type']!r}"
        )
    for name in ("vocab_size", "decoder_hidden_size", "num_decoder_layers", "blank_token_id"):
        if not isinstance(config.get(name), int):
            value = repr(config.get(name))[:100]
            raise ValueError(f"{where}: {name}: expected an int, got {value}")
    if not isinstance(config.get("encoder_config"), dict):
        raise ValueError(f"{where}: expected an encoder_config")
    if config["model_type"] == "parakeet_tdt" and not isinstance(config.get("durations"), list):
        raise ValueError(
            f"{where}: durations: expected a list, got {repr(config.get('durations'))[:100]}"
        )
    return config


def _model_config(config: dict[str, Any], features: HuggingFaceFeatures) -> dict[str, Any]:
    """Return the Hydra config of the transducer, with its vocabulary."""
    package, width = "transducer_toolkit.modules", config["decoder_hidden_size"]
    return {
        "_target_": f"{package}.transducer.Transducer.build",
        "encoder": {
            "_target_": f"{package}.huggingface.HuggingFaceEncoder",
            "config": config["encoder_config"],
            "features": {"kind": features.kind, "options": features.options},
            "frozen": False,
            "gradient_checkpointing": False,
        },
        "predictor": {
            "_target_": f"{package}.predictor.LstmPredictor",
            "_partial_": True,
            "embedding_dim": width,
            "hidden_dim": width,
            "num_layers": config["num_decoder_layers"],
        },
        "joiner": {
            "_target_": f"{package}.joiner.Joiner",
            "_partial_": True,
            "joiner_dim": width,
            "activation": config.get("hidden_act", "relu"),
            "num_extra": len(config.get("durations", [])),
        },
        "vocab_size": config["vocab_size"],
        "blank": config["blank_token_id"],
    }


def read_model_weights(folder: str | os.PathLike[str], config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the float32 weights of a folder under the names of this toolkit.

    Args:
        folder: as for :func:`read_recipe`.
        config: the model of its recipe.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the weights do not fit the config.
    """
    weights = read_weights(folder)
    try:
        check_sizes(config, weights)
        with shapes_only():  # names and shapes only
            own = instantiate(config, _convert_="all").state_dict()
    except Exception as error:  # a wrong config can raise any error
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"{os.fspath(folder)}/config.json: {reason}") from error
    expected = {
        theirs + name.removeprefix(ours): value
        for name, value in own.items()
        for theirs, ours in NAMES.items()
        if name.startswith(ours)
    }
    expected[EXTRA_BIAS] = own[_BIAS]
    check_shapes(weights, expected, folder)
    bias = weights.pop(EXTRA_BIAS).float()
    renamed = {}
    for name, value in weights.items():
        theirs = next(it for it in NAMES if name.startswith(it))
        value = value.float() if value.is_floating_point() else value
        renamed[NAMES[theirs] + name.removeprefix(theirs)] = value
    renamed[_BIAS] = renamed[_BIAS] + bias
    return renamed
