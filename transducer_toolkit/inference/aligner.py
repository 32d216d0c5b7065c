# SPDX-License-Identifier: Apache-2.0
"""Alignment of a text to its audio, with a trained model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transducer_toolkit.data.byte_pieces import shown_symbols
from transducer_toolkit.data.tokenizer import check_known
from transducer_toolkit.decoding import (
    Alignment,
    NonFiniteScoresError,
    align,
    lattice_posteriors,
    narrow_lattice,
)
from transducer_toolkit.decoding.search import check_extra
from transducer_toolkit.inference.recognizer import Recognizer
from transducer_toolkit.inference.words import encoder_frame_s, word_spans
from transducer_toolkit.ops.topology import get_topology, is_feasible


@dataclass(frozen=True)
class AlignedToken:
    """A target symbol on the best path.

    Attributes:
        symbol: the symbol, as in ``tokenizer.symbols``. A character of several byte pieces stands
            at the first of them; the others are empty.
        frame: the encoder frame that emits it.
        time_s: start of that frame, seconds from the start of the utterance.
        posterior: probability that this frame emits the symbol, given the text.
        expected_time_s: posterior mean, over all paths, of the start of the emitting frame.
    """

    symbol: str
    frame: int
    time_s: float
    posterior: float
    expected_time_s: float


@dataclass(frozen=True)
class AlignedWord:
    """A word on the best path. In scripts without spaces, the text of one symbol.

    Attributes:
        word: its text.
        start_s: start of the frame that emits its first symbol, seconds.
        end_s: end of the frame that emits its last symbol, seconds. If two words share a frame, the
            first ends after the second starts.
    """

    word: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class AlignedUtterance:
    """An utterance with the times of its text.

    Attributes:
        text: the reference.
        tokens: its symbols, in order.
        words: its words, in order.
        path: the best path.
        log_likelihood: log-probability of the text, summed over all paths; at least that of the
            best path.
        occupancy: (T, U + 1) posterior of each lattice cell, CPU.
        features: (T_in, F) input of the encoder, CPU.
        frame_s: duration of an encoder frame, seconds.
        topology: topology of the lattice.
    """

    text: str
    tokens: list[AlignedToken]
    words: list[AlignedWord]
    path: Alignment
    log_likelihood: float
    occupancy: Tensor
    features: Tensor
    frame_s: float
    topology: str


@torch.inference_mode()
def align_text(
    recognizer: Recognizer, waveform: Tensor, text: str, *, topology: str | None = None
) -> AlignedUtterance:
    """Align the text of one utterance to its audio.

    A time says when the model emits, not when a sound begins: a model that sees no future emits a
    symbol after it has heard enough of it.

    Args:
        recognizer: a trained recognizer.
        waveform: (num_samples,) float32 in [-1, 1] at ``recognizer.fbank.sample_rate``, CPU.
        text: the spoken text; may be empty.
        topology: topology of the lattice; None takes the one of the loss that trained the model.

    Returns:
        Times and posteriors of all symbols and words.

    Raises:
        ValueError: if the tokenizer lacks a character of the text, if the audio or the model's
            scores are not finite, or if the audio is too short for an encoder frame or for the
            symbols of the text in this topology.

    Example:
        >>> recognizer = Recognizer.from_checkpoint("best.ckpt")  # doctest: +SKIP
        >>> align_text(recognizer, read_audio("three.wav"), "three").words  # doctest: +SKIP
        [AlignedWord(word='three', start_s=0.2, end_s=0.48)]
    """
    topology = recognizer.topology if topology is None else topology
    check_extra(recognizer.model.joiner, get_topology(topology))
    model, tokenizer = recognizer.model, recognizer.tokenizer
    tokens = tokenizer.encode(text)
    check_known(tokenizer, text, tokens)
    recognizer.check_length(waveform, "the audio")
    features = recognizer.fbank(waveform)
    if not bool(features.isfinite().all()):
        raise ValueError("the audio holds samples that are NaN, infinite or huge")
    device = next(model.parameters()).device
    targets = torch.tensor(tokens, dtype=torch.int64, device=device).unsqueeze(0)  # (1, U)
    encoder_out, encoder_lengths, predictor_out = model(
        features.unsqueeze(0).to(device), torch.tensor([len(features)]), targets
    )
    num_frames = int(encoder_lengths[0])
    if not is_feasible(num_frames, len(tokens), topology=topology):
        raise ValueError(
            f"the audio is too short for its text: {num_frames} encoder frames cannot emit "
            f"{len(tokens)} symbols in the topology {topology!r}"
        )
    lattice = narrow_lattice(
        model.joiner,
        encoder_out,
        predictor_out,
        targets,
        model.blank,
        vocab_size=model.vocab_size,
        num_durations=get_topology(topology).num_durations,
    )
    if not bool(lattice.logits.isfinite().all()):
        raise NonFiniteScoresError([0], names=[repr(text)])
    path = align(*lattice.arguments(), topology=topology)[0]
    posteriors = lattice_posteriors(*lattice.arguments(), topology=topology)
    of_labels = posteriors.labels[0].cpu()  # (T, U)
    expected = posteriors.expected_frames()[0].tolist()

    frame_s = encoder_frame_s(model.encoder)
    symbols = shown_symbols([tokenizer.symbols[token] for token in tokens])
    return AlignedUtterance(
        text=text,
        tokens=[
            AlignedToken(
                symbol=symbol,
                frame=frame,
                time_s=frame * frame_s,
                posterior=float(of_labels[frame, position]),
                expected_time_s=expected[position] * frame_s,
            )
            for position, (symbol, frame) in enumerate(zip(symbols, path.frames, strict=True))
        ],
        words=[
            AlignedWord(
                span.text, path.frames[span.first] * frame_s, (path.frames[span.last] + 1) * frame_s
            )
            for span in word_spans(tokens, tokenizer)
        ],
        path=path,
        log_likelihood=float(posteriors.log_likelihood[0]),
        occupancy=posteriors.occupancy[0].cpu(),
        features=features,
        frame_s=frame_s,
        topology=topology,
    )
