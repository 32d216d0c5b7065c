# SPDX-License-Identifier: Apache-2.0
"""A streaming model from training to the streaming client."""

import pytest
import torch

from transducer_toolkit.cli import export, train
from transducer_toolkit.data.audio import read_audio
from transducer_toolkit.inference.recognizer import Recognizer
from transducer_toolkit.inference.streaming import StreamingRecognizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, console, data_overrides):
    folder = tmp_path_factory.mktemp("emformer")
    console(
        train.main,
        folder,
        *data_overrides,
        "experiment=digits_streaming",
        "model.encoder.conv_channels=4",
        "model.encoder.dim=16",
        "model.encoder.ffn_dim=32",
        "model.encoder.num_layers=2",
        "model.joiner.joiner_dim=16",
        "data.max_utterances=8",
        "trainer.max_epochs=1",
        "trainer.accelerator=cpu",
        "test=false",
    )
    return folder / "outputs" / "digits_streaming" / "run" / "checkpoints" / "best.ckpt"


def test_statistics_travel_and_text_streams(checkpoint, tones):
    recognizer = Recognizer.from_checkpoint(checkpoint)
    normalizer = recognizer.model.encoder.normalizer
    assert not normalizer.needs_statistics
    assert normalizer.mean.min() < -3.0  # log energies, not the zeros it began with
    with torch.no_grad():  # barely trained: let it emit
        recognizer.model.joiner.output.bias[0] -= 2.0
    stream, num_letters = StreamingRecognizer(recognizer), 0
    for index in range(6):
        waveform = read_audio(tones / f"test-{index}.wav")
        text = "".join(stream.accept(piece) for piece in waveform.split(700)) + stream.finish()
        assert text == recognizer.transcribe([waveform])[0]
        num_letters += len(text)
    assert num_letters > 10


def test_exports_for_the_streaming_client_only(checkpoint, tmp_path, capsys):
    assert export.main([str(checkpoint), "--output", str(tmp_path), "--streaming"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 5
    assert "symbols on one frame" not in captured.err  # topology=modified has one a frame
    assert export.main([str(checkpoint), "--output", str(tmp_path)]) == 1
    assert "streaming=True (--streaming) only" in capsys.readouterr().err
