# SPDX-License-Identifier: Apache-2.0
"""Writes a fine-tuned Parakeet model as a folder of Hugging Face's transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from transducer_toolkit.data.huggingface_tokenizer import HuggingFaceTokenizer
from transducer_toolkit.inference.huggingface import EXTRA_BIAS, NAMES
from transducer_toolkit.modules.huggingface_features import HuggingFaceFeatures
from transducer_toolkit.modules.joiner import Joiner
from transducer_toolkit.modules.predictor import LstmPredictor
from transducer_toolkit.ops.topology import get_topology
from transducer_toolkit.optional import import_transformers

if TYPE_CHECKING:
    from transducer_toolkit.inference.recognizer import Recognizer


def export_for_transformers(recognizer: Recognizer, folder: str | os.PathLike[str]) -> list[Path]:
    """Write a folder that ``from_pretrained`` of ``ParakeetForRNNT`` or ``ParakeetForTDT`` reads.

    The model computes the same logits. Special tokens but blank and ``<unk>``, and settings of
    generation, are those that transformers' conversion of NeMo's models writes.

    Args:
        recognizer: with the parts of a Parakeet model: a ``parakeet_encoder``, an
            :class:`~transducer_toolkit.modules.LstmPredictor` and a
            :class:`~transducer_toolkit.modules.Joiner` of one width, and the tokenizer of the
            folder that the training started from.
        folder: made if it does not exist.

    Returns:
        The files of the folder.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the model has other parts.
    """
    transformers = import_transformers("export_for_transformers")
    _check_parts(recognizer)
    model, tokenizer, features = recognizer.model, recognizer.tokenizer, recognizer.fbank
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert isinstance(features, HuggingFaceFeatures)
    assert isinstance(model.predictor, LstmPredictor)
    topology = get_topology(recognizer.topology)
    is_tdt, kind = topology.num_durations > 0, "TDT" if topology.num_durations else "RNNT"
    encoder: Any = model.encoder
    encoder_config = encoder.config.to_dict()
    encoder_config.pop("apply_spec_augment")  # of other encoders
    options: dict[str, Any] = {"durations": list(topology.label_durations)} if is_tdt else {}
    config = getattr(transformers, f"Parakeet{kind}Config")(
        vocab_size=tokenizer.vocab_size,
        decoder_hidden_size=model.predictor.output_dim,
        num_decoder_layers=model.predictor.lstm.num_layers,
        hidden_act=model.joiner.activation,
        max_symbols_per_step=recognizer.max_symbols_per_frame,
        blank_token_id=tokenizer.blank,
        encoder_config=encoder_config,
        **options,
    )
    exported = getattr(transformers, f"ParakeetFor{kind}")(config)
    exported.load_state_dict(_their_weights(model))
    exported.generation_config.decoder_start_token_id = tokenizer.blank
    if is_tdt:  # durations are no tokens
        ids = range(tokenizer.vocab_size, tokenizer.vocab_size + topology.num_durations)
        exported.generation_config.suppress_tokens = list(ids)
    exported.save_pretrained(folder)
    processor = transformers.ParakeetProcessor(
        getattr(transformers, features.kind)(**features.options),
        _their_tokenizer(tokenizer),
        blank_token=tokenizer.symbols[tokenizer.blank],
        decoder_type=kind.lower(),
    )
    processor.save_pretrained(folder)
    return sorted(path for path in Path(folder).iterdir() if path.is_file())


def _check_parts(recognizer: Recognizer) -> None:
    model, topology = recognizer.model, get_topology(recognizer.topology)
    has_names = topology.name == "regular" or topology.num_durations > 0
    faults = {
        f"topology {recognizer.topology}": has_names,
        f"encoder {type(model.encoder).__name__}": (
            getattr(model.encoder, "kind", None) == "parakeet_encoder"
        ),
        f"predictor {type(model.predictor).__name__}": (
            type(model.predictor) is LstmPredictor
            and model.predictor.embedding.embedding_dim == model.predictor.output_dim
        ),
        f"joiner {type(model.joiner).__name__}": (
            type(model.joiner) is Joiner
            and model.joiner.output.in_features == model.predictor.output_dim
            and model.joiner.normalization == "softmax"
        ),
        f"features of {type(recognizer.fbank).__name__}": (
            isinstance(recognizer.fbank, HuggingFaceFeatures)
        ),
        f"tokenizer {type(recognizer.tokenizer).__name__}": (
            isinstance(recognizer.tokenizer, HuggingFaceTokenizer)
        ),
    }
    for part, is_right in faults.items():
        if not is_right:
            raise ValueError(
                f"--type transformers: expected the parts of a Parakeet model with its tokenizer, "
                f"got {part}; only trainings with init_from=FOLDER model=checkpoint "
                "data/tokenizer=checkpoint keep them"
            )


def _their_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights under the names of transformers."""
    theirs = {}
    for name, value in model.state_dict().items():
        prefix, own = next(it for it in NAMES.items() if name.startswith(it[1]))
        theirs[prefix + name.removeprefix(own)] = value
    theirs[EXTRA_BIAS] = torch.zeros_like(theirs["encoder_projector.bias"])
    return theirs


def _their_tokenizer(tokenizer: HuggingFaceTokenizer) -> Any:
    from tokenizers import Tokenizer

    transformers = import_transformers("export_for_transformers")
    made = transformers.ParakeetTokenizer(tokenizer_object=Tokenizer.from_str(tokenizer.json))
    made.add_special_tokens({"pad_token": tokenizer.symbols[tokenizer.blank]})
    if "<unk>" in tokenizer.symbols:
        made.add_special_tokens({"unk_token": "<unk>"})
    return made
