# SPDX-License-Identifier: Apache-2.0
"""Folders of transformers' transducers as recognizers."""

import json
import math
import os
import re
import shutil
import subprocess

import pytest
import soundfile
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file

from tests.compat.hugging_face import save_folder, transformers
from tests.fork_server import ROOT, python
from tests.inference.test_recognizer import MODEL
from tests.modules.test_huggingface_encoder import CONFIGS
from transducer_toolkit.cli import align, transcribe
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.decoding import BeamSearch
from transducer_toolkit.inference import Recognizer, align_text, load_checkpoint
from transducer_toolkit.inference.long_audio import AudioSource, transcribe_files


def sound(seed, num_samples=None):
    """A gliding tone with noise: every utterance differs, and so do its frames."""
    generator = torch.Generator().manual_seed(seed)
    length = num_samples or int(torch.randint(8000, 40000, (1,), generator=generator))
    time = torch.arange(length) / 16000
    glide = (200 + 37 * (seed % 11)) * (1 + 0.3 * torch.sin(2 * math.pi * 3 * time))
    tone = 0.3 * torch.sin(2 * math.pi * glide * time) * torch.sin(2 * math.pi * 2 * time) ** 2
    return tone + 0.01 * torch.randn(length, generator=generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parakeet") / "folder"
    save_folder(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize(
    ("kind", "num_sounds"),
    [("ParakeetForRNNT", 30), ("ParakeetForTDT", 50), ("NemotronAsrStreamingForRNNT", 20)],
)
def test_tokens_and_texts_are_those_of_generate(kind, num_sounds, tmp_path):
    model = save_folder(tmp_path, kind)
    processor = transformers.ParakeetProcessor.from_pretrained(tmp_path)
    recognizer = Recognizer.from_pretrained(tmp_path)
    num_tokens, num_endless, symbols = 0, 0, set()
    for seed in range(num_sounds):
        waveform = sound(seed)
        inputs = processor.feature_extractor(
            waveform.numpy(), sampling_rate=16000, return_tensors="pt"
        )
        found = model.generate(**inputs, max_new_tokens=1000).sequences[0].tolist()
        if kind == "ParakeetForTDT" and len(found) > 1000:  # without a bound on labels of a frame
            num_endless += 1
            continue
        expected = [token for token in found if token != model.config.blank_token_id]
        (hypothesis,) = recognizer.recognize([waveform])
        assert hypothesis.tokens == expected, seed
        if seed < 10:  # it recognizes once more
            text = processor.decode(expected, skip_special_tokens=True)
            assert recognizer.transcribe([waveform]) == [" ".join(text.split())]
        num_tokens += len(expected)
        symbols |= set(expected)
    assert num_tokens > 300 and len(symbols) > 4 and num_endless < 5


@pytest.mark.parametrize("search", [None, BeamSearch])
def test_batches_find_what_single_utterances_find(folder, search):
    recognizer = Recognizer.from_pretrained(folder, search=search)
    waveforms = [sound(seed) for seed in range(4)]
    together = recognizer.recognize(waveforms)
    assert together == [recognizer.recognize([waveform])[0] for waveform in waveforms]


def test_words_and_alignments_have_the_times_of_the_encoder(folder):
    recognizer = Recognizer.from_pretrained(folder)
    assert recognizer.frame_s == 0.08
    aligned = align_text(recognizer, sound(1, 32000), "seven of nine")
    assert [word.word for word in aligned.words] == ["seven", "of", "nine"]
    assert aligned.frame_s == 0.08 and aligned.words[-1].end_s <= 2.1
    (words,) = recognizer.recognize_words([sound(2)])
    assert words and all(0 <= word.start_s < word.end_s for word in words)


def test_commands(folder, tmp_path, capfd):
    for seed in range(2):
        soundfile.write(tmp_path / f"{seed}.wav", sound(seed).numpy(), 16000, subtype="FLOAT")
    files = [str(tmp_path / f"{seed}.wav") for seed in range(2)]
    assert transcribe.main(["--checkpoint", str(folder), *files]) == 0
    expected = Recognizer.from_pretrained(folder).transcribe([sound(0), sound(1)])
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == expected
    assert align.main(["--checkpoint", str(folder), files[0], "--text", "one two"]) == 0
    assert [line.split()[4] for line in capfd.readouterr().out.splitlines()] == ["one", "two"]
    manifest = tmp_path / "test.jsonl"
    rows = [
        {"audio_filepath": file, "text": text} for file, text in zip(files, expected, strict=True)
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [python(), "-m", "transducer_toolkit.cli.evaluate", f"checkpoint={folder}"]
    kept = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    options = ["data=manifest", f"data.corpus.test={manifest}", f"run_dir={tmp_path / 'run'}"]
    process = subprocess.run([*command, *options], cwd=tmp_path, **kept)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test_sets"]["test"]["words"]["rate"] == 0.0
    process = subprocess.run(command, cwd=tmp_path, **kept)
    assert process.returncode != 0
    assert "does not say which corpus it was trained on: give data=OPTION" in process.stderr


def test_sharded_and_bfloat16_weights(folder, copied):
    expected = load_checkpoint(folder)["state_dict"]
    model = transformers.ParakeetForRNNT.from_pretrained(folder)
    (copied / "model.safetensors").unlink()
    model.save_pretrained(copied, max_shard_size="50KB")
    assert len([*copied.glob("*.safetensors")]) > 1
    found = load_checkpoint(copied)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for path in copied.glob("model*"):
        path.unlink()
    model.bfloat16().save_pretrained(copied)
    found = load_checkpoint(copied)["state_dict"]
    name = "model.joiner.output.weight"
    assert torch.equal(found[name], expected[name].bfloat16().float())
    Recognizer.from_pretrained(copied).recognize([sound(0)])


def edit(path, **changes):
    config = json.loads(path.read_text())
    for name, value in changes.items():
        part = config
        *parents, last = name.split("__")
        for parent in parents:
            part = part[parent]
        if value is None:
            part.pop(last)
        else:
            part[last] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "parakeet_ctc"}, "expected a model_type of parakeet_rnnt.*'parakeet_ctc'"),
        ({"model_type": "parakeet_tdt"}, "config.json: durations: expected a list, got None"),
        ({"model_type": "parakeet_tdt", "durations": [0]}, "durations: expected distinct integers"),
        ({"model_type": None}, "config.json: expected a model_type"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "code from its folder.*which is never run"),
        ({"blank_token_id": None}, "config.json: blank_token_id: expected an int, got None"),
        (
            {"decoder_hidden_size": 25},
            r"its weight \S+ has shape \(.*\), and its config.json asks for \(",
        ),
        ({"num_decoder_layers": 2}, "its weights lack decoder.lstm.weight_ih_l1"),
        ({"encoder_config__num_hidden_layers": 1}, r"its weight encoder.layers.1\S+ is not of the"),
        ({"encoder_config__model_type": "bert"}, "expected a model_type of parakeet_encoder"),
        ({"hidden_act": "mish"}, "activation"),
        (
            {"encoder_config__num_hidden_layers": 10**6},
            "json: num_hidden_layers=1000000, and",
        ),
        (
            {"encoder_config__hidden_size": 2**40},
            "json: hidden_size=1099511627776, and",
        ),
        ({"encoder_config__hidden_size": "x"}, "config.json: .*hidden_size"),
        ({"vocab_size": 10**12}, "vocab_size: expected at most 1048576, got 1000000000000"),
        (
            {"model_type": "parakeet_tdt", "durations": ["x"]},
            "json: durations: expected integ",
        ),
        (
            {"encoder_config__attn_implementation": "user/repo"},
            "expected 'eager' or 'sdpa', got",
        ),
        ({"encoder_config__quantization_config": {"bits": 4}}, "quantized, which is not supported"),
        ({"max_symbols_per_step": 10**9}, "max_symbols_per_frame: expected at most 1000"),
    ],
)
def test_configs_that_do_not_fit(copied, changes, message):
    edit(copied / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        Recognizer.from_pretrained(copied)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "it is a folder, and it contains no checkpoint, nor the config.json of a"),
        ("model.safetensors", "no model.safetensors in the folder .*save_pretrained"),
        ("tokenizer.json", "no tokenizer.json in the folder .*; save_pretrained"),
        ("processor_config.json", "no preprocessor_config.json or processor_config.json with a"),
    ],
)
def test_missing_files(copied, name, message):
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        Recognizer.from_pretrained(copied)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "config.json: expected JSON"),
        ("model.safetensors", "model.safetensors is not a file of safetensors"),
        ("tokenizer.json", "tokenizer.json is no tokenizer"),
    ],
)
def test_damaged_files(copied, name, message):
    (copied / name).write_bytes(b"\x00\x01 no such file")
    with pytest.raises(ValueError, match=message):
        Recognizer.from_pretrained(copied)


def test_what_is_no_model_folder(tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"an adapter of PEFT .* merge_and_unload"):
        Recognizer.from_pretrained(tmp_path / "adapter")
    (tmp_path / "model.nemo").write_bytes(b"an archive")
    with pytest.raises(ValueError, match=r"model.nemo is a model of NeMo, .* transformers"):
        Recognizer.from_pretrained(tmp_path / "model.nemo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at a/b-0.6b; .*download a/b-0.6b"):
        Recognizer.from_pretrained("a/b-0.6b")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at a/b.ckpt$"):
        Recognizer.from_pretrained("a/b.ckpt")


def test_an_index_may_not_name_files_elsewhere(copied):
    (copied / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../a.safetensors"}}'
    )
    with pytest.raises(ValueError, match=r"expected names of files .*, got '../a.safetensors'"):
        Recognizer.from_pretrained(copied)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "expected a JSON object"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": ["a.safetensors"]}', "expected a weight_map"),
        ('{"weight_map": {"a": 3}}', "expected names of files of safetensors, got 3"),
        ('{"weight_map": {"a": ".."}}', r"expected names .* got '\.\.'"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "expected names .*got 'pytorch_model.bin'"),
        ('{"weight_map": {"a": "b\\u0000.safetensors"}}', "expected names"),
        ("[" * 100_000, "expected JSON: maximum recursion depth"),
    ],
)
def test_an_index_that_is_none(copied, index, message):
    (copied / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=rf"index\.json: {message}"):
        Recognizer.from_pretrained(copied)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_out_of_the_folder_are_not_followed(folder, copied, tmp_path, name):
    (copied / name).unlink()
    (copied / name).symlink_to(folder / name)
    with pytest.raises(ValueError, match=f"{name} is a link to .*, outside of the folder; copy"):
        Recognizer.from_pretrained(copied)
    # The Hub's cache: snapshots/REVISION has links to blobs.
    cached = tmp_path / "cache" / "snapshots" / "1a2b"
    shutil.copytree(folder, cached)
    (tmp_path / "cache" / "blobs").mkdir()
    (cached / name).rename(tmp_path / "cache" / "blobs" / "3c4d")
    (cached / name).symlink_to("../../blobs/3c4d")
    assert (
        load_checkpoint(cached)["state_dict"].keys() == load_checkpoint(folder)["state_dict"].keys()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.to(torch.int32), "is of torch.int32, and the model asks for torch.float32"),
        (lambda x: x * torch.nan, "holds NaN"),
        (lambda x: x.to(torch.float8_e4m3fn), "must be of one of .* got torch.float8_e4m3fn"),
    ],
)
def test_numbers_that_are_none(copied, change, message):
    path = copied / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    weights["joint.head.bias"] = change(weights["joint.head.bias"])
    save_file(weights, path)
    with pytest.raises(ValueError, match=f"its weight joint.head.bias {message}"):
        Recognizer.from_pretrained(copied)


def test_a_tokenizer_with_which_the_library_panics(copied):
    path = copied / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    (precompiled,) = [
        part for part in tokenizer["normalizer"]["normalizers"] if part["type"] == "Precompiled"
    ]
    precompiled["precompiled_charsmap"] = "\u20ac" + precompiled["precompiled_charsmap"][1:]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer: PanicException"):
        Recognizer.from_pretrained(copied)


def test_other_features_are_refused(copied):
    path = copied / "processor_config.json"
    edit(path, feature_extractor__sampling_rate=8000)
    with pytest.raises(ValueError, match=r"expected 16000 Hz .* got 8000 Hz"):
        Recognizer.from_pretrained(copied)
    edit(path, feature_extractor__feature_extractor_type="ClapFeatureExtractor")
    with pytest.raises(ValueError, match=r"features: expected one of .*'ClapFeatureExtractor'"):
        Recognizer.from_pretrained(copied)
    edit(path, feature_extractor__feature_extractor_type="ParakeetFeatureExtractor")
    for options, message in (
        ({"sampling_rate": 16000, "n_fft": 2**40}, "n_fft: expected at most 1000000"),
        ({"n_fft": 10**6}, "expected mel filters of at most 16777216 numbers"),
        ({"n_fft": 512, "preemphasis": 1e300}, "features of noise are not finite"),
        ({"preemphasis": "x"}, "processor_config.json: "),
        ({"preemphasis": 0.97, "feature_size": 81}, "its model cannot be restored"),
    ):
        edit(path, **{f"feature_extractor__{name}": value for name, value in options.items()})
        with pytest.raises(ValueError, match=message) as raised:
            Recognizer.from_pretrained(copied)
        assert str(copied) in str(raised.value)


def test_text_that_names_a_special_token_is_text(folder):
    tokenizer = Recognizer.from_pretrained(folder).tokenizer
    blank = tokenizer.blank
    assert blank == tokenizer.vocab_size - 1 and tokenizer.symbols[blank] == "<blank>"
    assert blank not in tokenizer.encode("one <blank> two")
    assert tokenizer.decode(tokenizer.encode("  one   two ")) == "one two"
    assert tokenizer.decode([blank, *tokenizer.encode("one"), blank]) == "one"
    with pytest.raises(ValueError, match="ids must lie in"):
        tokenizer.decode([blank + 1])


def test_alignment_and_words_of_tdt(tmp_path):
    save_folder(tmp_path, "ParakeetForTDT")
    recognizer = Recognizer.from_pretrained(tmp_path)
    assert recognizer.topology == "tdt-0-1-2-3-4"
    aligned = align_text(recognizer, sound(1, 32000), "seven of nine")
    assert [word.word for word in aligned.words] == ["seven", "of", "nine"]
    assert aligned.path.log_prob <= aligned.log_likelihood + 1e-4
    (words,) = recognizer.recognize_words([sound(2)])
    assert words and all(0 <= word.start_s < word.end_s for word in words)


@pytest.mark.parametrize("encoder", [None, *CONFIGS])
def test_the_minimum_of_an_encoder(tmp_path, encoder):
    """The fewest samples are recognized, also beside longer audio; fewer are an error."""
    own = {"_target_": "transducer_toolkit.modules.huggingface.HuggingFaceEncoder"}
    config = MODEL if encoder is None else MODEL | {"encoder": {**own, "config": CONFIGS[encoder]}}
    model = instantiate(config, _convert_="all")
    tokenizer = CharTokenizer(["<blk>", "\u2581", "a", "b"])
    recognizer = Recognizer(model, tokenizer, model.encoder.make_features() or Fbank())
    noise = 0.1 * torch.randn(16000)
    least = recognizer.min_samples
    assert 200 <= least <= 600
    assert len(recognizer.recognize([noise[:least]])) == 1
    assert len(recognizer.recognize([noise, noise[:least]])) == 2
    align_text(recognizer, noise[:least], "a")
    needs = r"is too short for the encoder, which needs at least 0\.0\d+ s"
    message = f"{needs}, got {(least - 1) / 16000:.4g} s"
    with pytest.raises(ValueError, match=r"waveforms\[1\] " + message):
        recognizer.recognize([noise, noise[: least - 1]])
    with pytest.raises(ValueError, match="the audio " + message):
        align_text(recognizer, noise[: least - 1], "a")
    short, long = tmp_path / "short.wav", tmp_path / "long.wav"
    soundfile.write(short, noise[: least - 1].numpy(), 16000)
    soundfile.write(long, noise[:8001].numpy(), 16000)  # the last window has one sample
    sources = [AudioSource(path) for path in (long, short, long)]
    options = {"cut": "windows", "window_s": 0.25, "overlap_s": 0.0}
    (_, found), (_, error), (_, again) = transcribe_files(recognizer, sources, **options)
    assert found == again and found.duration_s == pytest.approx(8001 / 16000)
    assert re.search("the audio " + message, str(error))
