# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import numpy as np
import pytest
import soundfile
import torch

from transducer_toolkit.data.alignments import Alignments
from transducer_toolkit.data.audio import read_audio
from transducer_toolkit.data.augment import SpecAugment, WaveformPerturbation
from transducer_toolkit.data.batching import EpochIndex
from transducer_toolkit.data.dataset import SpeechDataset, collate
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.manifest import read_manifest
from transducer_toolkit.data.tokenizer import CharTokenizer


@pytest.fixture
def utterances(noise_corpus):
    return read_manifest(noise_corpus / "train.jsonl")


@pytest.fixture
def tokenizer(utterances):
    return CharTokenizer.from_texts(u.text for u in utterances)


def test_an_example_is_features_and_targets(utterances, tokenizer):
    dataset = SpeechDataset(utterances, tokenizer, Fbank())
    assert len(dataset) == 12
    example = dataset[EpochIndex(2, 3)]
    expected = Fbank()(read_audio(utterances[3].audio))
    assert torch.equal(example.features, expected)
    assert example.targets.tolist() == tokenizer.encode(utterances[3].text)
    assert torch.equal(dataset[3].features, expected)


def test_augmentation_is_keyed_by_seed_epoch_and_utterance(utterances, tokenizer):
    def features(position, epoch, seed=0, rows=utterances):
        dataset = SpeechDataset(
            rows,
            tokenizer,
            Fbank(),
            waveform_perturbation=WaveformPerturbation(noise_snr_db=(5.0, 10.0)),
            spec_augment=SpecAugment(),
            seed=seed,
        )
        return dataset[EpochIndex(epoch, position)].features

    reference = features(3, 2)
    assert torch.equal(reference, features(3, 2))
    assert torch.equal(reference, features(8, 2, rows=utterances[::-1]))  # position is no part
    assert not torch.equal(reference, features(3, 1))
    assert not torch.equal(reference, features(3, 2, seed=1))


def test_collate_pads(utterances, tokenizer):
    dataset = SpeechDataset(utterances, tokenizer, Fbank())
    examples = [dataset[i] for i in (0, 5, 2)]
    batch = collate(examples)
    assert len(batch) == 3
    assert batch.utterance_ids == [utterances[i].id for i in (0, 5, 2)]
    assert batch.texts == [utterances[i].text for i in (0, 5, 2)]
    assert batch.word_starts_s == [None, None, None]
    assert batch.features.dtype == torch.float32
    for lengths in (batch.feature_lengths, batch.target_lengths):
        assert lengths.dtype == torch.int64
    for row, example in enumerate(examples):
        num_frames, num_targets = len(example.features), len(example.targets)
        assert (batch.feature_lengths[row], batch.target_lengths[row]) == (num_frames, num_targets)
        assert torch.equal(batch.features[row, :num_frames], example.features)
        assert not batch.features[row, num_frames:].any()
        assert torch.equal(batch.targets[row, :num_targets], example.targets)
        assert (batch.targets[row, num_targets:] == -1).all()


def test_word_starts_reach_the_batch(utterances, tokenizer):
    num_words = len(utterances[0].text.split())
    known = dataclasses.replace(utterances[0], word_starts_s=[0.01 * k for k in range(num_words)])
    dataset = SpeechDataset([known, utterances[1]], tokenizer, Fbank())
    batch = collate([dataset[0], dataset[1]]).to("cpu")
    assert batch.word_starts_s == [known.word_starts_s, None]


def test_times_of_an_alignment_follow_the_speed(utterances, tokenizer, tmp_path):
    symbols = [tokenizer.symbols[token] for token in tokenizer.encode(utterances[0].text)]
    times_s = [0.01 * k for k in range(len(symbols))]
    tokens = [{"symbol": s, "time_s": t} for s, t in zip(symbols, times_s, strict=True)]
    (tmp_path / f"{utterances[0].id}.json").write_text(json.dumps({"tokens": tokens}))
    options = {"alignments": Alignments(tmp_path)}
    plain = SpeechDataset(utterances, tokenizer, Fbank(), **options)
    assert collate([plain[0]]).to("cpu").token_times_s == [times_s]
    perturbation = WaveformPerturbation(speed=0.4)
    faster = SpeechDataset(
        utterances, tokenizer, Fbank(), waveform_perturbation=perturbation, **options
    )
    ratios = []
    for epoch in range(4):
        example = faster[EpochIndex(epoch, 0)]
        ratios.append(example.token_times_s[-1] / times_s[-1])
        # frames of 10 ms, but for the last ones, which a window of 25 ms does not fit
        assert abs(len(example.features) - ratios[-1] * (len(plain[0].features) + 2) + 2) <= 2
    assert min(ratios) < 0.97 or max(ratios) > 1.03
    with pytest.raises(ValueError, match=f"utterance {utterances[1].id!r}: no alignment at"):
        plain[1]
    assert collate([SpeechDataset(utterances, tokenizer, Fbank())[0]]).token_times_s == []


def test_lengths_stay_on_the_cpu(utterances, tokenizer):
    dataset = SpeechDataset(utterances, tokenizer, Fbank())
    batch = collate([dataset[0], dataset[1]]).to("meta")
    assert batch.features.device.type == batch.targets.device.type == "meta"
    assert batch.feature_lengths.device.type == batch.target_lengths.device.type == "cpu"


def test_lightning_moves_batches(utterances, tokenizer):
    from lightning.fabric.utilities.apply_func import move_data_to_device

    dataset = SpeechDataset(utterances, tokenizer, Fbank())
    moved = move_data_to_device(collate([dataset[0]]), torch.device("meta"))
    assert moved.features.device.type == "meta" and moved.feature_lengths.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_batches_reach_the_gpu(utterances, tokenizer):
    dataset = SpeechDataset(utterances, tokenizer, Fbank())
    batch = collate([dataset[0]]).pin_memory()
    assert batch.features.is_pinned() and batch.targets.is_pinned()
    assert torch.equal(batch.to("cuda").features.cpu(), batch.features)


def test_errors(utterances, tokenizer):
    with pytest.raises(ValueError, match="examples must not be empty"):
        collate([])
    dataset = SpeechDataset(utterances, CharTokenizer.from_texts(["xyz"]), Fbank())
    with pytest.raises(ValueError, match="utterance 'train-0': character"):
        dataset[0]


@pytest.fixture
def faulty(utterances, tmp_path):
    """Utterances that cannot be read, each in its way, by name."""
    (tmp_path / "empty.wav").touch()
    (tmp_path / "noise.wav").write_bytes(bytes(range(256)) * 40)
    with open(utterances[0].audio, "rb") as file:
        (tmp_path / "header.wav").write_bytes(file.read(44))
    samples = np.zeros(16000, dtype=np.float32)
    samples[4000] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 16000, subtype="FLOAT")
    names = ["absent", "empty", "noise", "header", "nan"]
    return {
        name: dataclasses.replace(utterances[0], id=name, audio=str(tmp_path / f"{name}.wav"))
        for name in names
    }


REASONS = {
    "absent": "no audio file at",
    "empty": "cannot be read as audio",
    "noise": "cannot be read as audio",
    "header": "breaks off",
    "nan": "holds samples that are NaN",
}


def test_bad_audio_is_named_or_left_out(utterances, tokenizer, faulty):
    rows = [utterances[1], *faulty.values(), utterances[2]]
    keys = [EpochIndex(0, position) for position in range(len(rows))]
    refusing = SpeechDataset(rows, tokenizer, Fbank())
    for position, (name, reason) in enumerate(REASONS.items(), start=1):
        with pytest.raises(ValueError, match=f"^utterance '{name}': .*{reason}"):
            refusing.__getitems__(keys[position:])
    skipping = SpeechDataset(rows, tokenizer, Fbank(), on_bad_audio="skip")
    batch = collate(skipping.__getitems__(keys))
    assert batch.utterance_ids == [utterances[1].id, utterances[2].id]
    assert batch.unreadable.keys() == REASONS.keys()
    assert all(REASONS[name] in why and name in why for name, why in batch.unreadable.items())
    # A batch is never empty: the next that can be read joins it.
    batch = collate(skipping.__getitems__(keys[3:5]))
    assert batch.utterance_ids == [utterances[2].id]
    assert list(batch.unreadable) == ["noise", "header", "nan"]


def test_the_channel_of_an_utterance_is_read(utterances, tokenizer, tmp_path):
    left = read_audio(utterances[0].audio).numpy()
    path = tmp_path / "inverted.wav"
    soundfile.write(path, np.stack([left, -left], axis=1), 16000, subtype="FLOAT")
    rows = [
        dataclasses.replace(utterances[0], audio=str(path), channel=channel)
        for channel in (0, 1, 2, "mix")
    ]
    dataset = SpeechDataset(rows, tokenizer, Fbank())
    expected = Fbank()(torch.from_numpy(left))
    torch.testing.assert_close(dataset[0].features, expected)
    torch.testing.assert_close(dataset[1].features, Fbank()(torch.from_numpy(-left)))
    with pytest.raises(ValueError, match=r"^utterance 'train-0': .*inverted\.wav has 2 channels"):
        dataset[2]
    with pytest.raises(ValueError, match=r"^utterance 'train-0': .*inverted\.wav: its channels c"):
        dataset[3]


@pytest.mark.parametrize(("offset_s", "extra_s"), [(0.0, 2.0), (0.0, 0.3), (0.1, 82.0), (0.2, 0.0)])
def test_a_duration_beyond_the_file_is_named(utterances, tokenizer, offset_s, extra_s):
    first = utterances[0]
    wrong = dataclasses.replace(first, offset_s=offset_s, duration_s=first.duration_s + extra_s)
    dataset = SpeechDataset([wrong, utterances[1]], tokenizer, Fbank())
    with pytest.raises(ValueError, match=r"^utterance 'train-0': .*train-0\.wav ends after 0"):
        dataset[0]
    skipping = SpeechDataset([wrong, utterances[1]], tokenizer, Fbank(), on_bad_audio="skip")
    batch = collate(skipping.__getitems__([EpochIndex(0, 0), EpochIndex(0, 1)]))
    assert batch.utterance_ids == [utterances[1].id] and list(batch.unreadable) == ["train-0"]


def test_a_corpus_without_any_readable_audio_is_refused(tokenizer, faulty):
    dataset = SpeechDataset([*faulty.values()], tokenizer, Fbank(), on_bad_audio="skip")
    with pytest.raises(ValueError, match=r"none of 5 utterances can be read, the last: .*"):
        dataset.__getitems__([EpochIndex(0, 0)])
    with pytest.raises(ValueError, match="on_bad_audio must be 'raise' or 'skip', got 'ignore'"):
        SpeechDataset([], tokenizer, Fbank(), on_bad_audio="ignore")
