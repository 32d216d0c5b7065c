# SPDX-License-Identifier: Apache-2.0
"""A folder of transformers, read and written again, holds the same model."""

import json

import pytest
import torch

from tests.compat.hugging_face import batch, save_folder, transformers
from transducer_toolkit.cli.export import main
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.export import export_for_transformers
from transducer_toolkit.inference import Recognizer
from transducer_toolkit.modules import ConvLstmEncoder, Joiner, StatelessPredictor, Transducer

BEFORE_AND_AFTER = ("before", "after")


@pytest.mark.parametrize("kind", ["ParakeetForRNNT", "ParakeetForTDT"])
def test_the_folder_comes_back(tmp_path, capsys, kind):
    save_folder(tmp_path / "before", kind)
    arguments = [str(tmp_path / "before"), "--type", "transformers"]
    assert main([*arguments, "--output", str(tmp_path / "after")]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    names = ("config", "generation_config", "processor_config", "tokenizer", "tokenizer_config")
    for name in (f"{name}.json" for name in names):
        found, expected = (
            json.loads((tmp_path / it / name).read_text()) for it in BEFORE_AND_AFTER
        )
        assert found == expected, name
    models = [getattr(transformers, kind).from_pretrained(tmp_path / it) for it in BEFORE_AND_AFTER]
    inputs = batch(vocab_size=models[0].config.vocab_size)
    losses = [model.eval()(**inputs).loss for model in models]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    waveform = torch.randn(16000, generator=torch.Generator().manual_seed(3)) / 10
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "after")
    features = processor(waveform.numpy(), sampling_rate=16000, return_tensors="pt")
    texts = [model.generate(**features, max_new_tokens=60).sequences for model in models]
    assert torch.equal(*texts) and processor.decode(texts[0][0], skip_special_tokens=True)
    recognizers = [Recognizer.from_pretrained(tmp_path / it) for it in BEFORE_AND_AFTER]
    assert recognizers[0].transcribe([waveform]) == recognizers[1].transcribe([waveform])


def test_other_models_are_refused(tmp_path, capsys):
    parts = ConvLstmEncoder(hidden_dim=8), StatelessPredictor(4, 8), Joiner(8, 8, 8, 4)
    ours = Recognizer(Transducer(*parts), CharTokenizer.from_texts(["abc"]), Fbank())
    with pytest.raises(ValueError, match=r"expected the parts of a Parakeet .* got encoder Conv"):
        export_for_transformers(ours, tmp_path / "after")
    save_folder(tmp_path / "nemotron", "NemotronAsrStreamingForRNNT")
    recognizer = Recognizer.from_pretrained(tmp_path / "nemotron")
    with pytest.raises(ValueError, match=r"got encoder HuggingFaceEncoder"):
        export_for_transformers(recognizer, tmp_path / "after")
    with pytest.raises(SystemExit):
        main(["a.ckpt", "--type", "transformers", "--output", "b", "--int8"])
    assert "--int8 is for sherpa-onnx, not for --type transformers" in capsys.readouterr().err
    assert not (tmp_path / "after").exists()
