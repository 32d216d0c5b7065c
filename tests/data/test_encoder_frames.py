# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest

from transducer_toolkit.data.encoder_frames import MAX_SAMPLES, EncoderFrames, min_samples
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.modules import ConvLstmEncoder

FUNCTIONS = {
    "4x": lambda n: -(-n // 4),
    "6x, rounded down": lambda n: n // 6,
    "two unpadded convolutions of width 3 and stride 2": lambda n: ((n - 1) // 2 - 1) // 2,
    "80x": lambda n: max(1, n // 80),
    "one frame always": lambda n: 1,
    "two of three": lambda n: -(-2 * n // 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_counts_are_those_of_the_function(name):
    expected = FUNCTIONS[name]
    counts = EncoderFrames(expected)
    for num_frames in (*range(1, 5000), 99_999, 1_000_000, 1_000_003):
        assert counts(num_frames) == expected(num_frames), num_frames


def test_the_encoder_does_not_travel_to_workers():
    encoder = ConvLstmEncoder(subsampling_factor=8)
    counts = pickle.dumps(EncoderFrames(encoder.num_output_frames))
    assert len(counts) < 20_000
    assert pickle.loads(counts)(5001) == encoder.num_output_frames(5001) == 626


def test_bad_functions_are_named():
    with pytest.raises(
        TypeError, match=r"num_output_frames: expected the encoder's method .* int 4"
    ):
        EncoderFrames(4)
    with pytest.raises(TypeError, match="num_output_frames: expected a function to int, got float"):
        EncoderFrames(lambda n: n / 4)
    with pytest.raises(ValueError, match="num_output_frames: expected counts that grow evenly"):
        EncoderFrames(lambda n: n * n)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_fewest_samples_of_an_encoder_frame(name):
    features, function = Fbank(), FUNCTIONS[name]
    least = min_samples(features, EncoderFrames(function))
    assert features.num_frames(least) > 0 and function(features.num_frames(least)) > 0
    before = features.num_frames(least - 1)
    assert before == 0 or function(before) <= 0


def test_an_encoder_that_never_makes_a_frame():
    assert min_samples(Fbank(), lambda num_frames: 0) == MAX_SAMPLES
