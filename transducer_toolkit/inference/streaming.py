# SPDX-License-Identifier: Apache-2.0
"""Audio in pieces to text in pieces, while the speaker speaks."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.data.features import FRAME_LENGTH_MS, FRAME_SHIFT_MS, StreamingFbank
from transducer_toolkit.decoding import GreedySearch, GreedyState, Hypothesis
from transducer_toolkit.inference.recognizer import Recognizer
from transducer_toolkit.modules.encoder import EncoderState, StreamingEncoder

NUM_RECENT_TOKENS = 32  # what new text is decoded together with, for its spaces


class StreamingRecognizer:
    """Recognise one utterance after the other, each in pieces of any size.

    The text of all pieces together is the text that ``recognizer`` gives for the whole utterance.
    What is kept between two pieces does not grow: less than two frames of samples, the frames of
    features and the segment that are not complete, the state of encoder and predictor.

    Args:
        recognizer: with an encoder that streams: an
            :class:`~transducer_toolkit.modules.encoder.StreamingEncoder` of global normalisation.

    Attributes:
        added: what the last call of :meth:`accept` or :meth:`finish` found, tokens with their
            frames, counted from the start of the utterance.

    Raises:
        ValueError: if the encoder does not stream.

    Example:
        >>> recognizer = Recognizer.from_checkpoint("best.ckpt")  # doctest: +SKIP
        >>> stream = StreamingRecognizer(recognizer)  # doctest: +SKIP
        >>> for samples in read_audio("three.wav").split(1600):  # doctest: +SKIP
        ...     print(stream.accept(samples), end="", flush=True)
        >>> print(stream.finish())  # doctest: +SKIP
    """

    _encoder_state: EncoderState
    _search_state: GreedyState
    _recent: list[int]  # the last tokens of the utterance

    def __init__(self, recognizer: Recognizer) -> None:
        encoder = recognizer.model.encoder
        if not isinstance(encoder, StreamingEncoder):
            raise ValueError(f"{type(encoder).__name__} does not stream: it needs all of the audio")
        self.recognizer = recognizer
        self._encoder = encoder
        self._fbank = StreamingFbank(recognizer.fbank)
        self._search = GreedySearch(
            recognizer.model.predictor,
            recognizer.model.joiner,
            max_symbols_per_frame=recognizer.max_symbols_per_frame,
            topology=recognizer.topology,
        )
        self.added = Hypothesis([], [])
        self._reset()

    @property
    def latency_s(self) -> float:
        """Seconds from a sound until the encoder frame that it falls into is known, at most."""
        frame_ms = self._encoder.subsampling_factor * FRAME_SHIFT_MS
        # The last feature frame reaches beyond its shift by half of what is longer than it.
        overhang_ms = (FRAME_LENGTH_MS - FRAME_SHIFT_MS) / 2
        return (self._encoder.latency_frames * frame_ms + overhang_ms) / 1000

    def accept(self, samples: Tensor) -> str:
        """Take the next samples of the utterance.

        Args:
            samples: float32 (n,), n >= 0, at ``recognizer.fbank.sample_rate``, in [-1, 1], on the
                CPU.

        Returns:
            The text they add, with the space before it where a word begins; often "".
        """
        return self._decode(self._fbank.accept(samples), final=False)

    def finish(self) -> str:
        """End the utterance: return the text that is left; the next samples begin another."""
        text = self._decode(self._fbank.finish(), final=True)
        self._reset()
        return text

    @torch.inference_mode()
    def _decode(self, features: Tensor, *, final: bool) -> str:
        encoder_out, self._encoder_state = self._encoder.stream(
            features, self._encoder_state, final=final
        )
        if len(encoder_out) == 0:
            self.added = Hypothesis([], [])
            return ""
        lengths = torch.tensor([len(encoder_out)])
        (self.added,), self._search_state = self._search.advance(
            encoder_out.unsqueeze(0), lengths, self._search_state
        )
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
