# SPDX-License-Identifier: Apache-2.0
"""Restores the tokenizer of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transducer_toolkit.data.huggingface_tokenizer import HuggingFaceTokenizer
from transducer_toolkit.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transducer_toolkit.data.tokenizer import CharTokenizer, Tokenizer


def tokenizer_from_state(state: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer whose ``state`` method returned this mapping.

    Args:
        state: the "kind" of the tokenizer and the values that this kind needs.

    Raises:
        ValueError: the kind is unknown.

    Example:
        >>> tokenizer_from_state(CharTokenizer.from_texts(["on"]).state()).encode("no")
        [1, 2]
    """
    if state["kind"] == CharTokenizer.kind:
        return CharTokenizer(state["symbols"])
    if state["kind"] == SentencePieceTokenizer.kind:
        return SentencePieceTokenizer(state["model"])
    if state["kind"] == HuggingFaceTokenizer.kind:
        sizes = {"vocab_size": state["vocab_size"], "blank": state["blank"]}
        return HuggingFaceTokenizer(state["json"], **sizes)
    kinds = CharTokenizer.kind, SentencePieceTokenizer.kind, HuggingFaceTokenizer.kind
    raise ValueError(f"kind must be one of {', '.join(kinds)}, got {state['kind']!r}")
