# SPDX-License-Identifier: Apache-2.0
"""Streaming recognition: returns text while the audio arrives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_toolkit.data.features import FRAME_LENGTH_MS, FRAME_SHIFT_MS, StreamingFbank
from transducer_toolkit.decoding import Hypothesis, StreamingSearch
from transducer_toolkit.inference.endpoints import EndpointRules
from transducer_toolkit.inference.recognizer import Recognizer
from transducer_toolkit.modules.encoder import EncoderState, StreamingEncoder

NUM_RECENT_TOKENS = 32  # decoded together with new tokens, so that spaces are right


class StreamingRecognizer:
    """Recognizes utterances one after the other, each in pieces of any size.

    The text of all pieces together is the text that ``recognizer`` gives for the whole utterance.
    Text is only ever added, so what was shown stays; the last word may still grow.
    The state between two pieces does not grow: it consists of less than two frames of samples, the
    incomplete frames and segment, and the states of encoder and search. The state of a beam search
    also has the symbols in which its hypotheses differ: their text comes when they agree.

    Args:
        recognizer: a recognizer whose encoder is a
            :class:`~transducer_toolkit.modules.encoder.StreamingEncoder` with global normalization,
            and whose search is a :class:`~transducer_toolkit.decoding.StreamingSearch`. Its
            hotwords and language models are used.
        endpoint_rules: when :attr:`is_endpoint` is True; None means those of Kaldi.

    Attributes:
        added: tokens that the last call of :meth:`accept` or :meth:`finish` added, with their
            frames, counted from the start of the utterance.

    Raises:
        ValueError: if the encoder or the search does not stream.

    Example:
        >>> recognizer = Recognizer.from_checkpoint("best.ckpt")  # doctest: +SKIP
        >>> stream = StreamingRecognizer(recognizer)  # doctest: +SKIP
        >>> for samples in read_audio("three.wav").split(1600):  # doctest: +SKIP
        ...     print(stream.accept(samples), end="", flush=True)
        ...     if stream.is_endpoint:
        ...         print(stream.finish())
        >>> print(stream.finish())  # doctest: +SKIP
    """

    _encoder_state: EncoderState
    _search_state: Any
    _recent: list[int]  # the last tokens of the utterance
    _num_frames: int  # encoder frames of the utterance
    _text_frames: int  # encoder frames up to the last token, 0 without one

    def __init__(
        self, recognizer: Recognizer, *, endpoint_rules: EndpointRules | None = None
    ) -> None:
        encoder = recognizer.model.encoder
        if not isinstance(encoder, StreamingEncoder):
            raise ValueError(f"{type(encoder).__name__} does not stream: it needs all of the audio")
        if not hasattr(recognizer.search, "advance"):
            raise ValueError(
                f"{type(recognizer.search).__name__} does not stream: it needs all frames"
            )
        self.recognizer = recognizer
        self.endpoint_rules = endpoint_rules or EndpointRules()
        self._encoder = encoder
        self._fbank = StreamingFbank(recognizer.fbank)
        self._search: StreamingSearch = recognizer.search  # type: ignore[assignment]
        self.added = Hypothesis([], [])
        self._reset()

    @property
    def latency_s(self) -> float:
        """Bound on the seconds from a sound until its encoder frame is known."""
        frame_ms = self._encoder.subsampling_factor * FRAME_SHIFT_MS
        # A feature frame is longer than the shift, by the same amount on both sides.
        overhang_ms = (FRAME_LENGTH_MS - FRAME_SHIFT_MS) / 2
        return (self._encoder.latency_frames * frame_ms + overhang_ms) / 1000

    @property
    def is_endpoint(self) -> bool:
        """Whether the utterance should end here, with :meth:`finish`."""
        frame_s = self.recognizer.frame_s
        return self.endpoint_rules.are_met(
            duration_s=self._num_frames * frame_s,
            silence_s=(self._num_frames - self._text_frames) * frame_s,
            has_text=self._text_frames > 0,
        )

    def accept(self, samples: Tensor) -> str:
        """Take the next samples of the utterance.

        Args:
            samples: float32 (n,), n >= 0, at ``recognizer.fbank.sample_rate``, in [-1, 1], on the
                CPU.

        Returns:
            The text that they add, often ""; it begins with a space if a new word begins.
        """
        return self._decode(self._fbank.accept(samples), final=False)

    def finish(self) -> str:
        """End the utterance and return its remaining text; the next samples begin another one."""
        text = self._decode(self._fbank.finish(), final=True)
        self._reset()
        return text

    @torch.inference_mode()
    def _decode(self, features: Tensor, *, final: bool) -> str:
        encoder_out, self._encoder_state = self._encoder.stream(
            features, self._encoder_state, final=final
        )
        self.added = Hypothesis([], [], [])
        if len(encoder_out) > 0:
            lengths = torch.tensor([len(encoder_out)])
            (self.added,), self._search_state = self._search.advance(
                encoder_out.unsqueeze(0), lengths, self._search_state
            )
        if final:
            (rest,) = self._search.finish(self._search_state)
            self.added = Hypothesis(
                self.added.tokens + rest.tokens,
                self.added.frames + rest.frames,
                self.added.log_probs + rest.log_probs,
            )
        self._num_frames += len(encoder_out)
        if self.added.frames:
            self._text_frames = self.added.frames[-1] + 1
        before = self.recognizer.tokenizer.decode(self._recent)
        self._recent += self.added.tokens
        text = self.recognizer.tokenizer.decode(self._recent)[len(before) :]
        del self._recent[:-NUM_RECENT_TOKENS]
        return text

    def _reset(self) -> None:
        device = next(self._encoder.parameters()).device
        self._encoder_state = self._encoder.initial_state()
        self._search_state = self._search.initial_state(1, device)
        self._recent = []
        self._num_frames = self._text_frames = 0
