# SPDX-License-Identifier: Apache-2.0
"""Parakeet and Nemotron RNN-T models of transformers as models of this toolkit."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transducer_toolkit.data.huggingface_features import HuggingFaceFeatures
from transducer_toolkit.data.huggingface_files import check_shapes, read_config, read_weights
from transducer_toolkit.modules.huggingface import HuggingFaceEncoder
from transducer_toolkit.modules.joiner import Joiner
from transducer_toolkit.modules.predictor import LstmPredictor
from transducer_toolkit.modules.transducer import Transducer

# model_type of the folders that can be read.
TRANSDUCERS = ("parakeet_rnnt", "nemotron_asr_streaming")
# Beginning of the names of weights in transformers -> here.
_NAMES = {
    "encoder.": "encoder.model.",
    "encoder_projector.": "joiner.encoder_projection.",
    "decoder.embedding.": "predictor.embedding.",
    "decoder.lstm.": "predictor.lstm.",
    "decoder.decoder_projector.": "joiner.predictor_projection.",
    "joint.head.": "joiner.output.",
}
# transformers adds a bias to both projections; their sum is the bias of the encoder's here.
_EXTRA_BIAS, _BIAS = "decoder.decoder_projector.bias", "joiner.encoder_projection.bias"


class Parakeet(Transducer):
    """A transducer with the config, and by default the weights, of a folder of transformers.

    Args:
        folder: folder of a ``ParakeetForRNNT`` or ``NemotronAsrStreamingForRNNT``.
        vocab_size: number of symbols with blank, V; that of the folder.
        blank: id of blank; that of the folder.
        frozen: as in :class:`~transducer_toolkit.modules.huggingface.HuggingFaceEncoder`.
        gradient_checkpointing: as in that class.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the model is of another kind, its weights do not fit its
            config, or the tokenizer is another one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        vocab_size: int,
        blank: int,
        frozen: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        config = transducer_config(folder)
        expected = config["vocab_size"], config["blank"]
        if (vocab_size, blank) != expected:
            raise ValueError(
                f"{os.fspath(folder)} has {expected[0]} symbols and blank {expected[1]}, the "
                f"tokenizer {vocab_size} and {blank}; set data/tokenizer=huggingface"
            )
        config["encoder"] |= {"frozen": frozen, "gradient_checkpointing": gradient_checkpointing}
        parts = transducer_of(config)
        super().__init__(parts.encoder, parts.predictor, parts.joiner)
        self.load_state_dict(transducer_weights(folder, parts))
        self._config = config

    @property
    def plain_config(self) -> dict[str, Any]:
        """What makes this model without the folder, in plain values, for a checkpoint."""
        return {**self._config, "encoder": self.encoder.plain_config}


def transducer_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the Hydra config of the transducer that a folder holds, with its vocabulary.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the model is of another kind.
    """
    where, config = os.fspath(folder), read_config(folder)
    if config["model_type"] not in TRANSDUCERS:
        raise ValueError(
            f"{where}/config.json: expected a model_type of {', '.join(TRANSDUCERS)}, got "
            f"{config['model_type']!r}"
        )
    needed = ("vocab_size", "decoder_hidden_size", "num_decoder_layers", "blank_token_id")
    for name in needed:
        if not isinstance(config.get(name), int):
            raise ValueError(
                f"{where}/config.json: {name}: expected an int, got {config.get(name)}"
            )
    if not isinstance(config.get("encoder_config"), dict):
        raise ValueError(f"{where}/config.json: expected an encoder_config")
    features = HuggingFaceFeatures.load(folder)
    width = config["decoder_hidden_size"]
    package = "transducer_toolkit.modules"
    return {
        "_target_": f"{package}.transducer.Transducer.build",
        "encoder": {
            "_target_": f"{package}.huggingface.HuggingFaceEncoder",
            "config": config["encoder_config"],
            "features": {"kind": features.kind, "options": features.options},
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
        },
        "vocab_size": config["vocab_size"],
        "blank": config["blank_token_id"],
    }


def transducer_of(config: dict[str, Any]) -> Transducer:
    """Build the model of :func:`transducer_config`, with random weights."""

    def options(part: str) -> dict[str, Any]:
        return {name: value for name, value in config[part].items() if not name.startswith("_")}

    return Transducer.build(
        HuggingFaceEncoder(**options("encoder")),
        partial(LstmPredictor, **options("predictor")),
        partial(Joiner, **options("joiner")),
        vocab_size=config["vocab_size"],
        blank=config["blank"],
    )


def transducer_weights(
    folder: str | os.PathLike[str], model: Transducer | None = None
) -> dict[str, Tensor]:
    """Return the weights of a folder under the names of this toolkit, as float32.

    Args:
        folder: a folder for :class:`Parakeet`.
        model: a model of its config; None makes one without memory.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: they are damaged, or do not fit the config.
    """
    if model is None:
        with torch.device("meta"):
            model = transducer_of(transducer_config(folder))
    own = model.state_dict()
    expected = {
        theirs + name.removeprefix(ours): value
        for name, value in own.items()
        for theirs, ours in _NAMES.items()
        if name.startswith(ours)
    }
    expected[_EXTRA_BIAS] = own[_BIAS]
    weights = read_weights(folder)
    check_shapes(weights, expected, folder)
    bias = weights.pop(_EXTRA_BIAS).float()
    renamed = {}
    for name, value in weights.items():
        theirs = next(it for it in _NAMES if name.startswith(it))
        value = value.float() if value.is_floating_point() else value
        renamed[_NAMES[theirs] + name.removeprefix(theirs)] = value
    renamed[_BIAS] = renamed[_BIAS] + bias
    return renamed
