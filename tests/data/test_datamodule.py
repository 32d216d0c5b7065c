# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import logging
import types

import numpy as np
import pytest
import soundfile
import torch

from transducer_toolkit.data.audio import read_audio
from transducer_toolkit.data.augment import SpecAugment, WaveformPerturbation
from transducer_toolkit.data.corpus import ManifestCorpus
from transducer_toolkit.data.datamodule import TransducerDataModule
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.manifest import Utterance, read_manifest, write_manifest
from transducer_toolkit.data.tokenizer import CharTokenizer


def manifest_corpus(folder, **changes):
    sets = {"train": folder / "train.jsonl", "val": folder / "val.jsonl"}
    sets["test"] = {"noise": folder / "test.jsonl"}
    return ManifestCorpus(**{**sets, **changes})


def fourfold(num_frames):
    return -(-num_frames // 4)


def eightfold(num_frames):
    return -(-num_frames // 8)


def data_module(folder, **options):
    corpus = options.pop("corpus", None) or manifest_corpus(folder)
    options = {"max_cells": 500, "num_output_frames": fourfold, **options}
    return TransducerDataModule(corpus=corpus, **options)


def ids_of(loader):
    return sorted(id_ for batch in loader for id_ in batch.utterance_ids)


def test_all_utterances_of_all_sets(noise_corpus):
    data = data_module(noise_corpus)
    data.prepare_data()
    data.setup()
    assert ids_of(data.train_dataloader()) == sorted(f"train-{i}" for i in range(12))
    assert ids_of(data.val_dataloader()) == sorted(f"val-{i}" for i in range(5))
    assert data.test_names == ["noise"]
    assert [ids_of(loader) for loader in data.test_dataloader()] == [["test-0", "test-1", "test-2"]]
    texts = [utterance.text for utterance in read_manifest(noise_corpus / "train.jsonl")]
    assert data.tokenizer.symbols == CharTokenizer.from_texts(texts).symbols


def test_the_tokenizer_is_made_before_the_encoder_is_known(noise_corpus):
    data = TransducerDataModule(corpus=manifest_corpus(noise_corpus), max_cells=500)
    assert data.tokenizer is None
    tokenizer = data.made_tokenizer()
    assert data.made_tokenizer() is data.tokenizer is tokenizer
    with pytest.raises(ValueError, match=r"num_output_frames: .* got None: the encoder decides"):
        data.setup("fit")
    data.setup("test")
    with pytest.raises(ValueError, match=r"num_output_frames: .* got None: the encoder decides"):
        data.test_dataloader()
    data.num_output_frames = fourfold
    data.setup("fit")
    assert len(ids_of(data.train_dataloader())) == 12


def test_a_stage_reads_what_it_needs(noise_corpus):
    data = data_module(noise_corpus, tokenizer=CharTokenizer.from_texts(["one two six"]))
    data.setup("test")
    assert len(data.test_dataloader()) == 1
    with pytest.raises(ValueError, match=r"no set 'train' is set up, only \['test/noise'\]"):
        data.train_dataloader()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_workers(noise_corpus, num_workers):
    def batches(workers):
        data = data_module(
            noise_corpus,
            waveform_perturbation=WaveformPerturbation(speed=0.1, noise_snr_db=(5.0, 20.0)),
            spec_augment=SpecAugment(),
            num_workers=workers,
        )
        data.setup()
        loader = data.train_dataloader()
        epochs = []
        for epoch in (0, 1):
            loader.batch_sampler.set_epoch(epoch)
            epochs.append(list(loader))
        return epochs

    for own, reference in zip(batches(num_workers), batches(0), strict=True):
        for batch, expected in zip(own, reference, strict=True):
            assert batch.utterance_ids == expected.utterance_ids
            assert torch.equal(batch.features, expected.features)
            assert torch.equal(batch.targets, expected.targets)


def test_augmentation_differs_between_epochs_and_is_for_training_only(noise_corpus):
    data = data_module(noise_corpus, spec_augment=SpecAugment(), max_utterances=1)
    data.setup()

    def features(loader, epoch):
        loader.batch_sampler.set_epoch(epoch)
        return {batch.utterance_ids[0]: batch.features for batch in loader}

    train = data.train_dataloader()
    first, second = features(train, 0), features(train, 1)
    assert any(not torch.equal(first[id_], second[id_]) for id_ in first)
    val = data.val_dataloader()
    first, second = features(val, 0), features(val, 1)
    assert all(torch.equal(first[id_], second[id_]) for id_ in first)


def test_ranks_share_the_utterances(noise_corpus):
    seen = []
    for rank in range(3):
        data = data_module(noise_corpus)
        data.setup()
        data.trainer = types.SimpleNamespace(global_rank=rank, world_size=3)
        seen += ids_of(data.train_dataloader())
    assert sorted(seen) == sorted(f"train-{i}" for i in range(12))


@pytest.fixture
def short_corpus(tmp_path):
    """Two utterances of 7 and 4 encoder frames for 5 symbols each."""
    rows = []
    for name, num_samples in (("long", 28 * 160), ("short", 16 * 160)):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(num_samples), 16000)
        audio = str(tmp_path / f"{name}.wav")
        rows.append(Utterance(id=name, audio=audio, duration_s=num_samples / 16000, text="three"))
    write_manifest(tmp_path / "m.jsonl", rows)
    path = tmp_path / "m.jsonl"
    return ManifestCorpus(train=path, val=path, test={"all": path})


@pytest.mark.parametrize(("topology", "kept"), [("regular", 2), ("modified", 1)])
def test_infeasible_utterances_are_dropped_and_counted(short_corpus, caplog, topology, kept):
    data = data_module(None, corpus=short_corpus, max_cells=1000, topology=topology)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert len(ids_of(data.train_dataloader())) == len(ids_of(data.val_dataloader())) == kept
    assert len(ids_of(data.test_dataloader()[0])) == 2  # a test set is never shortened
    dropped = [record.getMessage() for record in caplog.records]
    assert len(dropped) == (0 if kept == 2 else 2)
    assert all("dropped 1 of 2 utterances" in message for message in dropped)
    assert all("short" in message for message in dropped)


def test_utterances_without_an_encoder_frame(short_corpus, caplog):
    """Training drops them and names the minimum; a test set is never shortened."""
    data = data_module(None, corpus=short_corpus, num_output_frames=lambda length: length // 20)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert ids_of(data.train_dataloader()) == ["long"]
    needs = "too short for the encoder, which needs at least 0.195 s"
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{x}: dropped 1 of 2 utterances that are {needs}, e.g. short" for x in ("train", "val")
    ]
    with pytest.raises(ValueError, match=rf"utterance 'short' of test/all is {needs}, got 0.16 s"):
        data.test_dataloader()
    caplog.clear()
    perturbation = WaveformPerturbation(speed=0.2)
    options = {"num_output_frames": lambda length: length // 25}
    data = data_module(None, corpus=short_corpus, waveform_perturbation=perturbation, **options)
    with pytest.raises(ValueError, match="set 'train' has no usable utterances in"):
        data.setup()  # 28 frames may become 23
    assert "which needs at least 0.294 s, e.g. long, short" in caplog.text


def test_the_encoder_decides_which_utterances_have_a_path(short_corpus):
    data = TransducerDataModule(corpus=short_corpus, max_cells=1000, topology="modified")
    data.num_output_frames = fourfold
    data.setup("fit")
    assert ids_of(data.train_dataloader()) == ["long"]
    data.num_output_frames = eightfold
    with pytest.raises(ValueError, match="set 'train' has no usable utterances in"):
        data.setup("fit")  # 28 feature frames are 4 encoder frames, for 5 symbols
    data.num_output_frames = lambda num_frames: -(-num_frames // 2)
    data.setup("fit")
    assert ids_of(data.train_dataloader()) == ["long", "short"]


def test_the_encoder_decides_the_size_of_batches(noise_corpus):
    for num_output_frames in (fourfold, eightfold):
        data = data_module(noise_corpus, num_output_frames=num_output_frames)
        data.setup("fit")
        cells = []
        for batch in data.val_dataloader():
            frames = torch.tensor(list(map(num_output_frames, batch.feature_lengths.tolist())))
            cells.append(int((frames * (batch.target_lengths + 1)).sum()))
        assert all(count <= 500 for count in cells)
        assert sum(cells[:2]) > 500 or len(cells) == 1


def test_feasible_at_every_speed_that_training_may_draw(short_corpus):
    options = {"corpus": short_corpus, "max_cells": 1000, "topology": "one_sym_per_frame"}
    data = data_module(None, **options)
    data.setup()
    assert ids_of(data.train_dataloader()) == ["long"]
    data = data_module(None, **options, waveform_perturbation=WaveformPerturbation(speed=0.5))
    with pytest.raises(ValueError, match="set 'train' has no usable utterances in"):
        data.setup()  # 7 frames may become 5


def test_a_text_with_unknown_characters_is_named(noise_corpus):
    data = data_module(noise_corpus, tokenizer=CharTokenizer.from_texts(["x"]))
    with pytest.raises(ValueError, match=r"utterance 'train-0': character .* is not among"):
        data.setup()
    # A test reference stays: the model's errors there are errors.
    data.setup("test")
    (loader,) = data.test_dataloader()
    (batch,) = list(loader)
    assert batch.texts and batch.target_lengths.tolist() == [0] * len(batch)
    assert batch.word_starts_s == [None] * len(batch)


def test_texts_with_symbols_that_stay_unknown_are_counted(noise_corpus, caplog):
    texts = [row.text for row in read_manifest(noise_corpus / "train.jsonl")]
    tokenizer = CharTokenizer.from_texts([" ".join(texts).replace("e", "")], unknown=True)
    data_module(noise_corpus, tokenizer=tokenizer).setup("fit")
    count = sum("e" in text for text in texts)
    assert count > 0
    assert f"train: {count} texts have characters that the model cannot write" in caplog.text
    assert ": 'e'; data.text" in caplog.text
    caplog.clear()
    data_module(noise_corpus, tokenizer=CharTokenizer.from_texts(["one two six"])).setup("fit")
    assert "cannot write" not in caplog.text


class CountingTokenizer(CharTokenizer):
    def __init__(self, symbols):
        super().__init__(symbols)
        self.texts = []

    def encode(self, text):
        self.texts.append(text)
        return super().encode(text)


def test_each_text_is_encoded_once(noise_corpus):
    tokenizer = CountingTokenizer.from_texts(["one two six"])
    data = data_module(noise_corpus, tokenizer=tokenizer)
    for _ in range(2):  # the caller, then Lightning
        data.setup()
    loaders = [data.train_dataloader(), data.val_dataloader(), *data.test_dataloader()]
    texts, encoded = [], []
    for loader in loaders:
        for batch in loader:
            texts += batch.texts
            rows = zip(batch.targets, batch.target_lengths, strict=True)
            encoded += [tokenizer.decode(ids[:length].tolist()) for ids, length in rows]
    list(data.train_dataloader())  # another epoch
    assert sorted(tokenizer.texts) == sorted(texts) == sorted(encoded) and len(texts) == 12 + 5 + 3


def test_missing_manifest(noise_corpus, tmp_path):
    corpus = manifest_corpus(noise_corpus, val=tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no manifest at .*none\.jsonl"):
        data_module(noise_corpus, corpus=corpus).prepare_data()


def test_utterances_that_are_too_long_are_dropped_and_counted(noise_corpus, tmp_path, caplog):
    rows = read_manifest(noise_corpus / "train.jsonl")
    day = dataclasses.replace(rows[0], id="day", duration_s=36_000.0)  # its audio is never read
    write_manifest(tmp_path / "train.jsonl", [*rows, day])
    corpus = manifest_corpus(noise_corpus, train=tmp_path / "train.jsonl")
    data = data_module(noise_corpus, corpus=corpus, max_duration_s=30.0)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert ids_of(data.train_dataloader()) == sorted(row.id for row in rows)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "dropped 1 of 13 utterances longer than 30 s, the longest is day with 36000 s" in message


def test_a_loader_goes_on_where_a_checkpoint_stands(noise_corpus, caplog):
    def loader(**options):
        data = data_module(noise_corpus, **{"max_utterances": 2, **options})
        data.setup()
        return data.train_dataloader()

    def ids(batches):
        return [batch.utterance_ids for batch in batches]

    whole = loader()
    whole.batch_sampler.set_epoch(3)
    expected = ids(whole)
    stopped = loader(num_workers=1)  # reads ahead
    stopped.batch_sampler.set_epoch(3)
    iterator = iter(stopped)
    begun = ids(next(iterator) for _ in range(2))
    state = stopped.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    iterator = iter(resumed)  # before the epoch is known, as Lightning does
    resumed.batch_sampler.set_epoch(3)
    assert begun + ids(iterator) == expected and len(resumed) == len(expected)
    resumed.batch_sampler.set_epoch(4)
    assert len(ids(resumed)) == len(expected)  # once only
    other_epoch = loader()
    other_epoch.load_state_dict(state)
    assert len(ids(other_epoch)) == len(expected)
    assert not caplog.records
    loader(max_cells=400).load_state_dict(state)
    assert "(max_cells 500 -> 400): the rest of epoch 3 repeats" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_cells": 0}, ValueError, "max_cells: expected at least 1, got 0"),
        ({"max_utterances": 1.5}, TypeError, "max_utterances: expected an int, got float"),
        ({"num_workers": -1}, ValueError, "num_workers: expected at least 0, got -1"),
        ({"max_duration_s": 0}, ValueError, "max_duration_s must be positive or None, got 0"),
        ({"max_duration_s": "x"}, TypeError, "max_duration_s: expected a number, got str"),
        ({"on_bad_audio": "ignore"}, ValueError, "on_bad_audio must be 'raise' or 'skip'"),
        ({"topology": "linear"}, ValueError, "topology: expected one of"),
        ({"tokenizer": "words"}, TypeError, "tokenizer: expected a Tokenizer, .* got str 'words'"),
        ({"num_output_frames": 4}, TypeError, "num_output_frames: expected the encoder's method"),
        ({"seed": None}, TypeError, "seed: expected an int, got NoneType"),
    ],
)
def test_bad_options_are_named_before_anything_is_read(noise_corpus, options, error, message):
    with pytest.raises(error, match=message):
        data_module(noise_corpus, **options)


def test_texts_are_normalized_before_anything_reads_them(noise_corpus):
    plain, upper = data_module(noise_corpus), data_module(noise_corpus, text=str.upper)
    for data in (plain, upper):
        data.setup()
    assert {s.upper() for s in plain.tokenizer.symbols} == {
        s.upper() for s in upper.tokenizer.symbols
    }
    for name in ("train", "val", "test/noise"):
        texts = [utterance.text for utterance in plain._utterances[name]]
        assert [u.text for u in upper._utterances[name]] == [text.upper() for text in texts]
    (batch, *_) = upper.val_dataloader()
    assert all(text == text.upper() for text in batch.texts)


def test_the_channel_of_utterances_that_name_none(tmp_path):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", 0.1 * rng.standard_normal((16000, 2)), 16000)
    row = {"id": "a", "audio": "a.wav", "text": "one"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")

    def found(channel):
        data = TransducerDataModule(
            corpus=ManifestCorpus(test=tmp_path / "test.jsonl"),
            tokenizer=CharTokenizer.from_texts(["one"]),
            num_output_frames=lambda n: -(-n // 4),
            max_cells=1000,
            channel=channel,
        )
        data.setup("test")
        batches = [batch for loader in data.test_dataloader() for batch in loader]
        return {
            id_: features
            for batch in batches
            for id_, features in zip(batch.utterance_ids, batch.features, strict=True)
        }

    each = found("each")
    assert sorted(each) == ["a#0", "a#1"]
    for channel in (0, 1):
        expected = Fbank()(read_audio(tmp_path / "a.wav", channel=channel))
        torch.testing.assert_close(found(channel)["a"], expected)
        torch.testing.assert_close(each[f"a#{channel}"], expected)
    torch.testing.assert_close(found("mix")["a"], Fbank()(read_audio(tmp_path / "a.wav")))
    with pytest.raises(ValueError, match="channel: expected 'mix', 'each' or a number from 0"):
        found(-1)


def test_training_without_its_manifests_is_refused(tmp_path):
    data = TransducerDataModule(corpus=ManifestCorpus(test="test.jsonl"), max_cells=1000)
    with pytest.raises(ValueError, match=r"no manifest for train: give data\.corpus\.train=PATH"):
        data.setup("fit")
