# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest
import torch

from transducer_toolkit.data.features import Fbank, StreamingFbank


@pytest.mark.parametrize("num_mel_bins", [80, 23])
@pytest.mark.parametrize("num_samples", [400, 401, 1600, 16079, 16080, 16081, 46123])
def test_equals_torchaudio(num_samples, num_mel_bins):
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    waveform = 0.1 * torch.randn(num_samples)
    expected = kaldi.fbank(
        waveform[None],
        num_mel_bins=num_mel_bins,
        sample_frequency=16000.0,
        low_freq=20.0,
        high_freq=-400.0,
        dither=0.0,
        snip_edges=False,
    )
    # float32 log energies of up to 16 in magnitude
    torch.testing.assert_close(
        Fbank(num_mel_bins=num_mel_bins)(waveform), expected, atol=3e-4, rtol=0
    )


@pytest.mark.parametrize("num_samples", [200, 399, 401, 16080, 46123])
def test_equals_the_deployment_client(num_samples):
    """kaldi-native-fbank computes the features in sherpa-onnx."""
    knf = pytest.importorskip("kaldi_native_fbank")
    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = 80
    options.mel_opts.high_freq = -400
    client = knf.OnlineFbank(options)
    waveform = 0.1 * torch.randn(num_samples)
    client.accept_waveform(16000, waveform.tolist())
    client.input_finished()
    frames = [torch.tensor(client.get_frame(i)) for i in range(client.num_frames_ready)]
    torch.testing.assert_close(Fbank()(waveform), torch.stack(frames), atol=2e-3, rtol=0)


@pytest.mark.parametrize("num_samples", [200, 239, 240, 400, 559, 560, 16000])
def test_number_of_frames(num_samples):
    fbank = Fbank()
    assert len(fbank(torch.randn(num_samples))) == fbank.num_frames(num_samples)
    assert fbank.num_frames(199) == 0


def test_silence_is_finite():
    features = Fbank()(torch.zeros(1600))
    torch.testing.assert_close(features, torch.full((10, 80), -15.9424), atol=1e-3, rtol=0)


def test_input_is_left_alone_and_workers_can_have_it():
    waveform = torch.randn(1600)
    before = waveform.clone()
    fbank = pickle.loads(pickle.dumps(Fbank()))
    torch.testing.assert_close(fbank(waveform), Fbank()(waveform), rtol=0, atol=0)
    assert torch.equal(waveform, before)


@pytest.mark.parametrize("num_samples", [0, 199, 200, 279, 280, 281, 439, 440, 441, 1003, 5021])
def test_streamed_equals_whole(num_samples):
    waveform = 0.1 * torch.randn(num_samples)
    whole = Fbank()(waveform) if num_samples >= 200 else torch.empty(0, 80)
    stream = StreamingFbank(Fbank())
    for size in (1, 37, 160, 280, 333, 9999):
        pieces = [stream.accept(piece) for piece in waveform.split(size)]
        # A frame comes as soon as its 400 samples are there, the first centered on sample 80.
        assert sum(map(len, pieces)) == max(0, (num_samples - 280) // 160 + 1)
        assert len(stream._samples) < 2 * 400
        # float32 log energies; and finish() begins anew: the next size sees a new utterance
        streamed = torch.cat([*pieces, stream.finish()])
        torch.testing.assert_close(streamed, whole, atol=3e-4, rtol=0)


def test_errors_of_streaming():
    stream = StreamingFbank(Fbank())
    with pytest.raises(ValueError, match=r"samples must be \(n,\), got \(1, 400\)"):
        stream.accept(torch.zeros(1, 400))
    with pytest.raises(TypeError, match="samples must be float32, got"):
        stream.accept(torch.zeros(400, dtype=torch.float64))


def test_errors():
    with pytest.raises(ValueError, match=r"waveform must be \(num_samples,\), got \(1, 400\)"):
        Fbank()(torch.zeros(1, 400))
    with pytest.raises(TypeError, match="waveform must be float32, got"):
        Fbank()(torch.zeros(400, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 200 samples, got 199"):
        Fbank()(torch.zeros(199))
    with pytest.raises(ValueError, match="num_mel_bins must be positive, got 0"):
        Fbank(num_mel_bins=0)
    with pytest.raises(ValueError, match="num_mel_bins must be at most 512, got 513"):
        Fbank(num_mel_bins=513)
