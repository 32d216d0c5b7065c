# SPDX-License-Identifier: Apache-2.0
"""Folders of transformers' transducers, read as if they were checkpoints of this toolkit."""

from __future__ import annotations

import os
from typing import Any

from transducer_toolkit.data.huggingface_files import read_config
from transducer_toolkit.data.huggingface_tokenizer import HuggingFaceTokenizer
from transducer_toolkit.modules.parakeet import transducer_config, transducer_weights


def recipe_and_weights(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the recipe of the recognizer of a folder, and the weights of its model.

    Args:
        folder: written by ``save_pretrained`` of a ``ParakeetForRNNT`` or
            ``NemotronAsrStreamingForRNNT`` and of its processor: ``config.json``,
            ``model.safetensors``, ``tokenizer.json``, and ``preprocessor_config.json`` or
            ``processor_config.json``.

    Returns:
        The entries of :func:`~transducer_toolkit.inference.recognizer.recognizer_recipe` but for
        the version of the format, and the state dict of the model.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the model is of another kind.
    """
    config = transducer_config(folder)
    tokenizer = HuggingFaceTokenizer.load(folder)
    recipe = {
        "model": config,
        "symbols": list(tokenizer.symbols),
        "tokenizer": tokenizer.state(),
        "num_mel_bins": config["encoder"]["features"]["options"].get("feature_size", 80),
        "max_symbols_per_frame": read_config(folder).get("max_symbols_per_step", 10),
        "topology": "regular",
    }
    return recipe, transducer_weights(folder)
