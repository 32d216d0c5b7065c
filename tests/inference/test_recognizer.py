# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from functools import partial

import pytest
import soundfile
import torch
from hydra.utils import instantiate
from torch import Tensor

from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.decoding import BeamSearch, NonFiniteScoresError
from transducer_toolkit.inference.aligner import align_text
from transducer_toolkit.inference.recognizer import Recognizer, recognizer_recipe

MODEL = {
    "_target_": "transducer_toolkit.modules.transducer.Transducer.build",
    "encoder": {
        "_target_": "transducer_toolkit.modules.encoder.ConvLstmEncoder",
        "conv_channels": 2,
        "hidden_dim": 8,
    },
    "predictor": {
        "_target_": "transducer_toolkit.modules.predictor.StatelessPredictor",
        "_partial_": True,
        "embedding_dim": 4,
    },
    "joiner": {
        "_target_": "transducer_toolkit.modules.joiner.Joiner",
        "_partial_": True,
        "joiner_dim": 8,
    },
    "vocab_size": 4,
    "blank": 0,
}


@pytest.fixture
def checkpoint(tmp_path):
    """Write a checkpoint of MODEL with changes at its top level; returns path and model."""

    def write(**changes):
        model = instantiate(MODEL, _convert_="all")
        recipe = recognizer_recipe(
            MODEL | changes,
            CharTokenizer(["<blk>", "\u2581", "a", "b"]),
            Fbank(),
            max_symbols_per_frame=3,
        )
        weights = {f"model.{name}": value for name, value in model.state_dict().items()}
        torch.save({"recognizer": recipe, "state_dict": weights}, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt", model

    return write


def test_loading_does_not_import_the_compiler(checkpoint):
    code = (
        "import sys; from transducer_toolkit.inference import Recognizer;"
        "Recognizer.from_checkpoint(sys.argv[1]);"
        "assert 'torch._dynamo' not in sys.modules, 'a second of each command'"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoint()[0])], check=True)


def test_the_topology_travels_with_the_checkpoint(checkpoint):
    path, _ = checkpoint()
    assert Recognizer.from_checkpoint(path).topology == "regular"
    saved = torch.load(path, weights_only=True)
    saved["recognizer"]["topology"] = "modified"
    torch.save(saved, path)
    assert Recognizer.from_checkpoint(path).topology == "modified"
    del saved["recognizer"]["topology"]  # as the first checkpoints were
    torch.save(saved, path)
    assert Recognizer.from_checkpoint(path).topology == "regular"


def test_batch_equals_single(checkpoint):
    recognizer = Recognizer.from_checkpoint(checkpoint()[0])
    assert recognizer.max_symbols_per_frame == 3
    waveforms = [torch.rand(length) - 0.5 for length in (8000, 300, 20000)]
    together = recognizer.recognize(waveforms)
    assert together == [recognizer.recognize([waveform])[0] for waveform in waveforms]
    assert recognizer.transcribe(waveforms) == [
        recognizer.tokenizer.decode(hypothesis.tokens) for hypothesis in together
    ]


def test_weights_are_restored_and_the_model_evaluates(checkpoint):
    path, model = checkpoint()
    recognizer = Recognizer.from_checkpoint(path)
    assert not recognizer.model.training
    for name, value in recognizer.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.hub.load",
        "transducer_toolkit.inference.recognizer.load_checkpoint",
        "transducer_toolkit.modules.encoder_frontend.torch.hub.load",
        "transducer_toolkit.modules.no_such.Encoder",
        "transducer_toolkit.modules_of_mine.Encoder",
    ],
)
def test_foreign_classes_are_refused(checkpoint, target):
    for changes in ({"_target_": target}, {"encoder": [{"_target_": target}]}):
        path, _ = checkpoint(**changes)
        with pytest.raises(ValueError, match="wants to instantiate"):
            Recognizer.from_checkpoint(path)


def test_own_classes_are_accepted_when_trusted(checkpoint):
    target = "transducer_toolkit.training.schedules.constant"
    path, _ = checkpoint(extra={"_target_": target, "_partial_": True})
    with pytest.raises(ValueError, match="trusted_packages"):
        Recognizer.from_checkpoint(path)
    with pytest.raises(ValueError, match=r"cannot be restored: .*unexpected .* argument 'extra'"):
        Recognizer.from_checkpoint(path, trusted_packages=["transducer_toolkit.training"])


@pytest.mark.parametrize("more", [(), [], ["transducer_toolkit.modules"], ("a", "b.c")])
def test_trusted_packages_add(checkpoint, more):
    assert Recognizer.from_checkpoint(checkpoint()[0], trusted_packages=more)


@pytest.mark.parametrize("more", ["transducer_toolkit.training", [1], None, {"a": 1}])
def test_trusted_packages_are_a_list(checkpoint, more):
    with pytest.raises(TypeError, match="trusted_packages: expected a list of names of packages"):
        Recognizer.from_checkpoint(checkpoint()[0], trusted_packages=more)


def test_no_waveforms_is_an_error(checkpoint):
    with pytest.raises(ValueError, match="at least one waveform"):
        Recognizer.from_checkpoint(checkpoint()[0]).recognize([])


def test_the_path_of_a_file_is_no_waveform(checkpoint):
    recognizer = Recognizer.from_checkpoint(checkpoint()[0])
    with pytest.raises(TypeError, match=r"waveforms\[0\]: .* got str; transcribe_file takes"):
        recognizer.transcribe(["a.wav"])


def test_words_and_files(checkpoint, tmp_path):
    recognizer = Recognizer.from_checkpoint(checkpoint()[0])
    waveform = torch.rand(24000, generator=torch.Generator().manual_seed(0)) - 0.5
    soundfile.write(tmp_path / "a.wav", waveform.numpy(), 16000, subtype="FLOAT")
    (text,), (words,) = recognizer.transcribe([waveform]), recognizer.recognize_words([waveform])
    assert [word.word for word in words] == text.split()
    assert all(0 <= word.start_s < word.end_s <= 1.52 for word in words)
    found = recognizer.transcribe_file(tmp_path / "a.wav")
    assert (found.text, found.words, found.duration_s) == (text, words, 1.5)


def test_the_search_is_an_option_and_follows_the_topology(checkpoint):
    path, _ = checkpoint()
    waveform = torch.rand(24000, generator=torch.Generator().manual_seed(0)) - 0.5
    beam = Recognizer.from_checkpoint(path, search=partial(BeamSearch, beam=3))
    assert (beam.search.topology.name, beam.search.beam) == ("regular", 3)
    (hypothesis,) = beam.recognize([waveform])
    assert beam.transcribe([waveform]) == [beam.tokenizer.decode(hypothesis.tokens)]
    (words,) = beam.recognize_words([waveform])
    assert [word.word for word in words] == beam.transcribe([waveform])[0].split()
    saved = torch.load(path, weights_only=True)
    saved["recognizer"]["topology"] = "constrained"
    torch.save(saved, path)
    assert Recognizer.from_checkpoint(path).search.max_symbols_per_frame == 1
    constrained = Recognizer.from_checkpoint(path, search=BeamSearch)
    assert constrained.search.topology.name == "constrained"


def _change_weight(saved, change):
    name = next(name for name, x in saved["state_dict"].items() if x.is_floating_point())
    saved["state_dict"][name] = change(saved["state_dict"][name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.update(recognizer=None), "holds no 'recognizer' entry"),
        (lambda c: c["recognizer"].pop("num_mel_bins"), "its recognizer lacks num_mel_bins"),
        (lambda c: c.update(state_dict=[]), "its state_dict is no dict of tensors"),
        (lambda c: c.pop("state_dict"), "its state_dict is no dict of tensors"),
        (lambda c: c["state_dict"].update(x=3), "its state_dict is no dict of tensors"),
        (
            lambda c: _change_weight(c, lambda x: x * 1j),
            "must be a dense tensor of real .*complex64",
        ),
        (lambda c: _change_weight(c, Tensor.to_sparse), "must be a dense .* got .*sparse_coo"),
        (lambda c: _change_weight(c, lambda x: x.to("meta")), "on device meta"),
        (lambda c: _change_weight(c, lambda x: x * torch.nan), "its weight model.* holds NaN"),
        (lambda c: c["state_dict"].popitem(), "cannot be restored: RuntimeError: .* Missing key"),
        (lambda c: c["recognizer"].update(model=[]), "its model cannot be restored"),
        (
            lambda c: c["recognizer"]["model"]["encoder"].update(num_layers=10**6),
            "num_layers=1000000, and .* weights",
        ),
        (
            lambda c: c["recognizer"]["model"]["encoder"].update(hidden_dim=2**40),
            "hidden_dim=1099511627776, and weights of",
        ),
        (
            lambda c: c["recognizer"]["model"]["encoder"].update(hidden_dim=300),
            "size mismatch for encoder",
        ),
        (lambda c: _change_weight(c, Tensor.int), "is of torch.int32, and the model asks for"),
        (lambda c: _change_weight(c, lambda x: x.to(torch.float8_e5m2)), "must be of one of"),
        (
            lambda c: _change_weight(c, lambda x: x.flatten()[:1].expand(2**40)),
            "has 1099511627776 numbers, and its file holds fewer",
        ),
        (lambda c: c["recognizer"].update(num_mel_bins=2**40), "num_mel_bins must be at most 512"),
        (lambda c: c["recognizer"].update(num_mel_bins=40), "its model cannot be restored"),
        (
            lambda c: c["recognizer"].update(max_symbols_per_frame=10**9),
            "max_symbols_per_frame: expected at most 1000",
        ),
        (
            lambda c: c["recognizer"]["tokenizer"].update(kind="sentencepiece", model=10**12),
            "model must be bytes, got int",
        ),
        (lambda c: c["recognizer"].update(num_mel_bins="x"), "its model cannot be restored"),
        (lambda c: c["recognizer"].update(topology=3), "topology: expected one of"),
        (lambda c: c["recognizer"].update(max_symbols_per_frame=0), "expected at least 1"),
        (lambda c: c["recognizer"]["tokenizer"].pop("kind"), "cannot be restored: KeyError"),
        (lambda c: c["recognizer"]["tokenizer"]["symbols"].pop(), "the tokenizer has 3 symbols"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said(checkpoint, damage, message):
    path, _ = checkpoint()
    saved = torch.load(path, weights_only=True)
    damage(saved)
    torch.save(saved, path)
    with pytest.raises(ValueError, match=message) as error:
        Recognizer.from_checkpoint(path)
    assert str(path) in str(error.value)


def test_a_damaged_file_is_named(checkpoint):
    path, _ = checkpoint()
    content = bytearray(path.read_bytes())
    pickled = content.index(b"recognizer")
    for place in range(pickled - 40, pickled + 200, 3):
        damaged = content.copy()
        damaged[place] ^= 0x15
        path.write_bytes(bytes(damaged))
        try:
            Recognizer.from_checkpoint(path)  # a letter of a symbol may have become another
        except ValueError as error:
            assert str(path) in str(error)


def test_devices_that_are_not_there_are_named(checkpoint):
    path, _ = checkpoint()
    for device in ("abacus", "cpu:x", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
            Recognizer.from_checkpoint(path, device=device)


def test_sound_that_is_none_is_an_error(checkpoint):
    path, _ = checkpoint()
    waveforms = [torch.rand(4000) - 0.5, torch.rand(4000) - 0.5]
    waveforms[1][200] = torch.nan
    recognizer = Recognizer.from_checkpoint(path)
    with pytest.raises(ValueError, match=r"waveforms\[1\] holds samples that are NaN"):
        recognizer.transcribe(waveforms)
    with pytest.raises(ValueError, match="the audio holds samples that are NaN"):
        align_text(recognizer, waveforms[1], "a")
    with torch.no_grad():
        recognizer.model.joiner.output.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteScoresError, match="the scores of the symbols are NaN"):
        recognizer.transcribe(waveforms[:1])
