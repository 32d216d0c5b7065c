# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from tests.inference.test_streaming import ENCODERS, random_recognizer
from transducer_toolkit.decoding import Hypothesis
from transducer_toolkit.inference import EndpointRules, StreamingRecognizer


@pytest.mark.parametrize(
    ("duration_s", "silence_s", "has_text", "is_met"),
    [
        (2.39, 2.39, False, False),
        (2.4, 2.4, False, True),
        (5.0, 1.19, True, False),
        (5.0, 1.2, True, True),
        (2.0, 2.0, False, False),  # the silence that counts after text only
        (19.99, 0.0, True, False),
        (20.0, 0.0, True, True),
    ],
)
def test_the_usual_rules(duration_s, silence_s, has_text, is_met):
    given = {"duration_s": duration_s, "silence_s": silence_s, "has_text": has_text}
    assert EndpointRules().are_met(**given) is is_met
    never = EndpointRules(math.inf, math.inf, math.inf)
    assert not never.are_met(**given)


def test_values_that_are_no_durations():
    with pytest.raises(ValueError, match=r"silence_s: expected more than 0 seconds, got 0; math.i"):
        EndpointRules(silence_s=0)
    with pytest.raises(ValueError, match="duration_s: expected more than 0 seconds, got nan"):
        EndpointRules(duration_s=math.nan)
    with pytest.raises(TypeError, match="silence_after_text_s: expected seconds, got '1'"):
        EndpointRules(silence_after_text_s="1")


class Scripted:
    """Emits a symbol on each of these frames of every utterance."""

    def __init__(self, frames):
        self.frames = frames

    def initial_state(self, batch_size, device):
        return 0

    def advance(self, encoder_out, lengths, position):
        end = position + encoder_out.size(1)
        frames = [frame for frame in self.frames if position <= frame < end]
        return [Hypothesis([2] * len(frames), frames)], end

    def finish(self, position):
        return [Hypothesis([], [])]


@pytest.mark.parametrize(
    ("frames", "ends_s"),
    [
        ([], [2.4, 4.8, 7.2]),  # in each utterance anew
        ([0, 10], [1.64, 3.28, 4.92]),  # 11 frames and 1.2 s
        ([*range(0, 100, 20)], [4.44, 8.88]),
        ([*range(0, 1000, 20)], [5.0]),
    ],
)
def test_a_stream_ends_where_the_rules_say(frames, ends_s):
    stream = StreamingRecognizer(
        random_recognizer(ENCODERS["lstm"]()), endpoint_rules=EndpointRules(duration_s=5.0)
    )
    stream._search, stream._search_state = Scripted(frames), 0
    found, num_samples = [], 0
    for piece in torch.zeros(10 * 16000).split(160):
        stream.accept(piece)
        num_samples += len(piece)
        if stream.is_endpoint:
            stream.finish()
            assert not stream.is_endpoint
            found.append(num_samples / 16000)
    assert len(found) >= len(ends_s)
    # A frame is known after the latency of the encoder, in each utterance.
    latency_s = stream.latency_s
    for number, (end_s, expected_s) in enumerate(zip(found, ends_s, strict=False), start=1):
        assert expected_s <= end_s <= expected_s + number * (latency_s + 0.01)
