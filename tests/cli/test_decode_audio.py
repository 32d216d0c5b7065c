# SPDX-License-Identifier: Apache-2.0
"""The benchmark from audio to text."""

import pytest

from benchmarks import decode_audio


def test_every_search_and_the_client_decode_a_manifest(trained, tones, monkeypatch, capsys):
    pytest.importorskip("sherpa_onnx")
    checkpoint = trained / "checkpoints" / "best.ckpt"
    options = ["--max-utterances", "3", "--rounds", "1"]
    monkeypatch.setattr(
        "sys.argv", ["decode_audio", str(checkpoint), str(tones / "test.jsonl"), *options]
    )
    decode_audio.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert len(rows) == 6 and rows[-1][0].startswith("| sherpa-onnx, greedy")
    assert all(float(seconds) > 0 for _, seconds, _ in rows[1:])
    errors = [float(wer.rstrip(" |")) for *_, wer in rows[1:]]
    assert errors[0] == errors[1] and errors[2] == errors[3]  # for any batch
