# SPDX-License-Identifier: Apache-2.0
import importlib.util

import pytest
import torch

from transducer_toolkit.cli.export import main
from transducer_toolkit.data.audio import read_audio
from transducer_toolkit.inference.recognizer import Recognizer


@pytest.fixture
def checkpoint(trained):
    return trained / "checkpoints" / "best.ckpt"


def test_the_checkpoint_may_be_an_option(checkpoint, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    assert main(["--checkpoint", str(checkpoint), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "encoder.onnx").is_file()
    for given in ([], [str(checkpoint), "--checkpoint", str(checkpoint)]):
        with pytest.raises(SystemExit):
            main([*given, "--output", str(tmp_path)])
        assert "give one CHECKPOINT" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["icefall", "nemo"])
def test_writes_what_sherpa_reads(checkpoint, tones, tmp_path, capsys, model_type):
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    # The model emits several symbols a frame, so that "nemo" is the default.
    options = ["--type", "icefall"] if model_type == "icefall" else []
    assert main([str(checkpoint), "--output", str(tmp_path), "--int8", *options]) == 0
    captured = capsys.readouterr()
    names = [line.split()[-1].rpartition("/")[2] for line in captured.out.splitlines()]
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 8
    trained = Recognizer.from_checkpoint(checkpoint)
    limit = 1 if model_type == "icefall" else 10
    differs = f"up to {trained.max_symbols_per_frame} symbols on one frame; sherpa-onnx emits at"
    assert (differs in captured.err) == (trained.max_symbols_per_frame != limit)
    assert ('model_type="nemo_transducer"' in captured.err) == (model_type == "nemo")
    recognizer = Recognizer(
        trained.model, trained.tokenizer, trained.fbank, max_symbols_per_frame=limit
    )
    waveform = read_audio(tones / "test-0.wav")
    for suffix in ("", ".int8"):
        client = sherpa_onnx.OfflineRecognizer.from_transducer(
            *(str(tmp_path / f"{part}{suffix}.onnx") for part in ("encoder", "decoder", "joiner")),
            tokens=str(tmp_path / "tokens.txt"),
            model_type="nemo_transducer" if model_type == "nemo" else "transducer",
        )
        stream = client.create_stream()
        stream.accept_waveform(16000, waveform.numpy())
        client.decode_stream(stream)
        if not suffix:
            text = " ".join(stream.result.text.split())
            assert text == recognizer.transcribe([waveform])[0]


def test_hotwords_are_checked(checkpoint, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    phrases = tmp_path / "phrases.txt"
    arguments = [str(checkpoint), "--output", str(tmp_path / "out"), "--hotwords", str(phrases)]
    assert main(arguments) == 1
    assert "phrases.txt" in capsys.readouterr().err
    phrases.write_text("\u00df\n", encoding="utf-8")
    assert main(arguments) == 1
    assert "hotwords, line 1: character '\u00df'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    word = "".join(Recognizer.from_checkpoint(checkpoint).tokenizer.symbols[2:4])
    phrases.write_text(f"{word} :2\n", encoding="utf-8")
    assert main(arguments) == 0
    assert (tmp_path / "out" / "hotwords.txt").read_text(encoding="utf-8") == f"{word} :2\n"


def test_says_what_cannot_be_exported(checkpoint, tmp_path, capsys):
    def complaint(*arguments):
        assert main([*map(str, arguments), "--output", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err

    assert "normalization='global', got 'utterance'" in complaint(checkpoint, "--streaming")
    assert "no checkpoint at" in complaint(tmp_path / "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "holds no 'recognizer' entry" in complaint(tmp_path / "other.ckpt")
    assert not (tmp_path / "out").exists()


def test_says_which_packages_are_missing(checkpoint, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name)
    )
    assert main([str(checkpoint), "--output", str(tmp_path)]) == 1
    assert (
        "onnxruntime is not installed: pip install 'transducer_toolkit[export]'"
        in capsys.readouterr().err
    )


def test_usage(checkpoint, tmp_path, capsys):
    for arguments, message in (
        (["--help"], "--streaming"),
        ([str(checkpoint)], "--output"),
        ([str(checkpoint), "--output", str(tmp_path), "--chunk-frames", "2"], "needs --stream"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        captured = capsys.readouterr()
        assert message in captured.out + captured.err
