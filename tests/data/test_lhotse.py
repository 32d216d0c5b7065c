# SPDX-License-Identifier: Apache-2.0
"""Lhotse's cuts and shards, of generated audio."""

import dataclasses
import logging
import os
import re
import types

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MultiCut, Recording, SupervisionSegment, SupervisionSet

from tests.cuts import write_cuts
from transducer_toolkit.data.audio import read_audio
from transducer_toolkit.data.augment import SpecAugment
from transducer_toolkit.data.corpus import ManifestCorpus
from transducer_toolkit.data.datamodule import TransducerDataModule
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.lhotse_batching import (
    cut_targets,
    cut_text,
    duration_bins,
    with_targets,
)
from transducer_toolkit.data.lhotse_datamodule import LhotseDataModule
from transducer_toolkit.data.text import TextNormalizer
from transducer_toolkit.data.tokenizer import CharTokenizer

NUM_CUTS = 40


def fourfold(num_frames):
    return -(-num_frames // 4)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """``train.jsonl.gz`` and the same as shards of five in ``shar``, and as our own manifest."""
    folder = tmp_path_factory.mktemp("cuts")
    write_cuts(folder, NUM_CUTS)
    return folder


def data_module(cuts, train="train.jsonl.gz", **options):
    corpus = ManifestCorpus(
        train=cuts / train, val=cuts / "val.jsonl.gz", test={"all": cuts / "val.jsonl.gz"}
    )
    corpus.prepare()
    options = {"max_cells": 800, "num_buckets": 4, "num_output_frames": fourfold, **options}
    data = LhotseDataModule(corpus=corpus, **options)
    data.setup()
    return data


def test_an_epoch_has_all_cuts_in_batches_within_the_budget(cuts):
    data = data_module(cuts, max_utterances=6)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader)
    assert sorted(id_ for batch in batches for id_ in batch.utterance_ids) == sorted(
        f"c{number}" for number in range(NUM_CUTS)
    )
    for batch in batches:
        frames = -(-batch.feature_lengths // 4)
        assert len(batch) <= 6 and int((frames * (batch.target_lengths + 1)).sum()) <= 800
    assert max(len(batch) for batch in batches) > 2


@pytest.mark.parametrize("train", ["train.jsonl.gz", "shar"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_encoder_decides_the_size_of_batches_and_lattices(cuts, train, num_workers):
    steps = {"steps_per_epoch": 5} if train == "shar" else {}
    options = {"topology": "modified", "num_workers": num_workers, "max_cells": 400, **steps}
    kept = {}
    for factor in (4, 8):
        data = data_module(
            cuts, train, num_output_frames=lambda n, factor=factor: -(-n // factor), **options
        )
        ids = set()
        for batch in data.train_dataloader():
            frames = -(-batch.feature_lengths // factor)
            assert int((frames * (batch.target_lengths + 1)).sum()) <= 400 or len(batch) == 1
            assert bool((frames >= batch.target_lengths).all())
            ids.update(batch.utterance_ids)
        kept[factor] = ids
    assert kept[8] < kept[4] or train == "shar"


def test_batches_hold_what_our_own_manifests_give(cuts):
    corpus = ManifestCorpus(train=cuts / "train.jsonl", val=cuts / "train.jsonl")
    own = TransducerDataModule(
        corpus=corpus, max_cells=800, max_utterances=1, num_output_frames=fourfold
    )
    own.setup("fit")
    expected = {batch.utterance_ids[0]: batch for batch in own.val_dataloader()}
    data = data_module(cuts, max_utterances=1)
    assert data.tokenizer.symbols == own.tokenizer.symbols
    for batch in data.train_dataloader():
        other = expected[batch.utterance_ids[0]]
        assert torch.allclose(batch.features, other.features, atol=1e-5)
        assert torch.equal(batch.targets, other.targets) and batch.texts == other.texts


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_take_disjoint_batches_equally_many(cuts, num_workers):
    seen = []
    for rank in range(3):
        data = data_module(cuts, num_workers=num_workers)
        data.trainer = types.SimpleNamespace(global_rank=rank, world_size=3)
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(1)
        seen.append([batch.utterance_ids for batch in loader])
    assert len({len(batches) for batches in seen}) == 1
    ids = [id_ for batches in seen for batch in batches for id_ in batch]
    assert len(set(ids)) == len(ids)
    repeated = [id_ for id_ in ids if "_dup" in id_]  # by lhotse, to fill the last step
    assert sorted(set(ids) - set(repeated)) == sorted(f"c{number}" for number in range(NUM_CUTS))
    assert len(repeated) < 3


def test_epochs_differ_and_repeat(cuts):
    data = data_module(cuts, spec_augment=SpecAugment())
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.batch_sampler.set_epoch(epoch)
        epochs.append(list(loader))
    ids = [[batch.utterance_ids for batch in batches] for batches in epochs]
    assert ids[0] == ids[2] != ids[1]
    assert all(
        torch.equal(a.features, b.features) for a, b in zip(epochs[0], epochs[2], strict=True)
    )


def test_an_epoch_goes_on_where_a_checkpoint_stands(cuts):
    loader = data_module(cuts).train_dataloader()
    loader.batch_sampler.set_epoch(2)
    given = iter(loader)
    for _ in range(3):
        next(given)
    state = loader.state_dict()
    rest = [batch.utterance_ids for batch in given]
    resumed = data_module(cuts)
    resumed.load_state_dict({"train": state})
    loader = resumed.train_dataloader()
    loader.batch_sampler.set_epoch(2)
    assert [batch.utterance_ids for batch in loader] == rest


def test_validation_and_test_are_whole_and_in_order(cuts):
    data = data_module(cuts)
    for loader in (data.val_dataloader(), *data.test_dataloader()):
        ids = [id_ for batch in loader for id_ in batch.utterance_ids]
        assert sorted(ids) == ["c0", "c1", "c2", "c3"]
    assert data.test_names == ["all"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_read_disjoint_shards(cuts, num_workers, monkeypatch):
    seen = []
    for rank in range(2):
        data = data_module(cuts, "shar", steps_per_epoch=3, num_workers=num_workers)
        data.trainer = types.SimpleNamespace(global_rank=rank, world_size=2)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        loader = data.train_dataloader()
        assert len(loader) == 3
        epochs = [[batch.utterance_ids for batch in loader] for _ in range(2)]
        assert [len(batches) for batches in epochs] == [3, 3] and epochs[0] != epochs[1]
        first = [id_ for batch in epochs[0] for id_ in batch]
        assert len(first) == len(set(first))
        seen.append(set(first))
    assert not seen[0] & seen[1]


def test_shards_hold_the_audio(cuts):
    data = data_module(cuts, "shar", steps_per_epoch=60, max_utterances=1)
    by_id = {
        batch.utterance_ids[0]: batch
        for batch in data_module(cuts, max_utterances=1).train_dataloader()
    }
    seen = list(data.train_dataloader())
    assert {batch.utterance_ids[0] for batch in seen[:NUM_CUTS]} == set(by_id)  # one whole pass
    assert seen[0].utterance_ids != seen[NUM_CUTS].utterance_ids or seen[1:3] != seen[41:43]
    for batch in seen[:5]:
        expected = by_id[batch.utterance_ids[0]].features
        assert torch.allclose(batch.features, expected, atol=1e-2)  # 16 bits


def test_another_stream_after_a_resume(cuts):
    data = data_module(cuts, "shar", steps_per_epoch=4)
    streams = []
    for epoch in (0, 0, 5):
        loader = data.train_dataloader()
        loader.set_epoch(epoch)
        streams.append([batch.utterance_ids for batch in loader])
    assert streams[0] == streams[1] != streams[2]


def test_a_worker_without_shards_says_so(cuts, monkeypatch):
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "10")
    data = data_module(cuts, "shar", steps_per_epoch=4)
    with pytest.raises(ValueError, match="a data worker has no shard of its own"):
        next(iter(data.train_dataloader()))


def test_infeasible_cuts_are_left_out(cuts, caplog):
    tokenizer = CharTokenizer.from_texts(["one two six"])
    data = data_module(cuts, tokenizer=tokenizer, topology="one_sym_per_frame")
    with caplog.at_level(logging.WARNING):
        kept = [id_ for batch in data.train_dataloader() for id_ in batch.utterance_ids]
    assert 0 < len(kept) < NUM_CUTS
    assert "is too short for its text (topology one_sym_per_frame)" in caplog.text
    assert caplog.text.count("too short") == 1


def test_cuts_without_an_encoder_frame(cuts, caplog):
    durations = sorted(cut.duration for cut in CutSet.from_file(cuts / "val.jsonl.gz"))
    frames = Fbank().num_frames(round(16000 * durations[0])) + 1
    data = data_module(cuts, num_output_frames=lambda length: length // frames)
    list(data.val_dataloader())
    needs = rf"is too short for the encoder, which needs at least {(frames - 0.5) / 100:.4g} s"
    assert re.search(rf"val: cut \w+ {needs} and left out, like others", caplog.text)
    with pytest.raises(ValueError, match=rf"cut \w+ {needs}, got"):
        list(data.test_dataloader()[0])


@pytest.mark.parametrize("train", ["train.jsonl.gz", "shar"])
def test_each_text_is_encoded_once_a_pass(cuts, train):
    texts = []

    class CountingTokenizer(CharTokenizer):
        def encode(self, text):
            texts.append(text)
            return super().encode(text)

    tokenizer = CountingTokenizer.from_texts(["one two six"])
    steps = {"steps_per_epoch": NUM_CUTS} if train == "shar" else {}
    data = data_module(cuts, train, tokenizer=tokenizer, max_utterances=1, **steps)
    seen = [text for batch in data.train_dataloader() for text in batch.texts]
    assert sorted(texts) == sorted(seen) and len(seen) == NUM_CUTS


def test_cuts_without_targets_are_named(cuts):
    cut = CutSet.from_file(cuts / "val.jsonl.gz")[0]
    with pytest.raises(ValueError, match=r"cut 'c0' has no target symbols yet: use with_targets"):
        cut_targets(cut)
    assert cut_targets(with_targets(cut, CharTokenizer(["<blk>", *"\u2581enosiwtx"]))).min() > 0


def test_long_cuts_are_left_out(cuts):
    loader = data_module(cuts, max_duration_s=0.5).train_dataloader()
    lengths = torch.cat([batch.feature_lengths for batch in loader])
    assert 0 < len(lengths) < NUM_CUTS and int(lengths.max()) <= 50


def test_bad_audio_is_named_or_left_out(cuts):
    bad = [cut.with_id("bad") if cut.id == "c1" else cut for cut in
           CutSet.from_file(cuts / "train.jsonl.gz").subset(first=4)]  # fmt: skip
    bad[1].recording.sources[0].source = str(cuts / "none.wav")
    CutSet.from_cuts(bad).to_file(cuts / "bad.jsonl.gz")
    with pytest.raises(ValueError, match="cut 'bad': "):
        list(data_module(cuts, "bad.jsonl.gz").train_dataloader())
    data = data_module(cuts, "bad.jsonl.gz", on_bad_audio="skip")
    (batch,) = data.train_dataloader()
    assert sorted(batch.utterance_ids) == ["c0", "c2", "c3"] and list(batch.unreadable) == ["bad"]
    data = data_module(cuts, "bad.jsonl.gz", on_bad_audio="skip", max_utterances=1)
    with pytest.raises(ValueError, match="none of the 1 cuts of a batch can be read"):
        list(data.train_dataloader())


def test_durations_that_part_the_cuts(cuts):
    train = CutSet.from_file(cuts / "train.jsonl.gz")
    bins = duration_bins(train, 4)
    assert len(bins) == 3 and bins == sorted(bins)
    assert duration_bins(train, 30) == duration_bins(train, 1) == []


def odd_manifest(folder, name):
    """Make a path that holds no cuts; returns its name."""
    path = folder / name
    if name == "supervisions.jsonl":
        segments = (
            s for cut in CutSet.from_file(folder / "val.jsonl.gz") for s in cut.supervisions
        )
        SupervisionSet.from_segments(segments).to_file(path)
    elif name == "pipe.jsonl":
        os.mkfifo(path)
    elif name == "no_shards":
        path.mkdir()
    elif name != "train.jsonl":
        path.write_text("" if name == "empty.jsonl" else "no gzip")
    return name


def test_errors(cuts):
    for train, steps in (("shar", None), ("train.jsonl.gz", 5)):
        with pytest.raises(ValueError, match=f"steps_per_epoch is for folders .* got {steps} for"):
            data_module(cuts, train, steps_per_epoch=steps)
    for train, steps, message in (
        ("text.jsonl.gz", None, "is no manifest of Lhotse's cuts .* BadGzipFile"),
        ("train.jsonl", None, "is no manifest of Lhotse's cuts .* unexpected keyword"),
        ("supervisions.jsonl", None, "it holds a SupervisionSet"),
        ("empty.jsonl", None, "it holds nothing"),
        ("pipe.jsonl", None, "nor a file at all"),
        ("no_shards", 5, "holds no shards of Lhotse's cuts"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            data_module(cuts, odd_manifest(cuts, train), steps_per_epoch=steps)
        assert str(cuts / train) in str(error.value)
    with pytest.raises(TypeError, match="num_buckets: expected an int, got str"):
        data_module(cuts, num_buckets="x")
    with pytest.raises(ValueError, match="steps_per_epoch: expected at least 1, got 0"):
        data_module(cuts, "shar", steps_per_epoch=0)
    with pytest.raises(ValueError, match=r"cut 'c\d+': character '.' of .* is not among"):
        list(data_module(cuts, tokenizer=CharTokenizer.from_texts(["x"])).train_dataloader())
    bare = CutSet.from_file(cuts / "train.jsonl.gz").subset(first=2).drop_supervisions()
    bare.to_file(cuts / "bare.jsonl.gz")
    with pytest.raises(ValueError, match="cut 'c0' must have one supervision, got 0"):
        data_module(cuts, "bare.jsonl.gz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "cut 'c0': its supervision 'c0' has no text; add it, or remove the cut"),
        ({"duration": 3.0}, r"cut 'c0': its supervision 'c0' spans 0\.00 to 3\.00 s, the cut 0 to"),
        ({"start": -0.5}, r"cut 'c0': its supervision 'c0' spans -0\.50 to"),
        ({"start": 0.2}, r"cut 'c0': its supervision 'c0' spans 0\.20 to"),
    ],
)
def test_a_supervision_that_does_not_describe_its_cut_is_refused(cuts, changes, message):
    first = CutSet.from_file(cuts / "train.jsonl.gz")[0]
    odd = first.map_supervisions(lambda supervision: dataclasses.replace(supervision, **changes))
    CutSet.from_cuts([odd]).to_file(cuts / "odd.jsonl.gz")
    with pytest.raises(ValueError, match=message):
        data_module(cuts, "odd.jsonl.gz")
    with pytest.raises(ValueError, match=message):
        with_targets(odd, CharTokenizer.from_texts(["a"]))


@pytest.mark.parametrize("changes", [{"text": ""}, {"start": 0.05}, {"start": -0.05}])
def test_an_empty_text_and_rounded_times_are_accepted(cuts, changes):
    first = CutSet.from_file(cuts / "train.jsonl.gz")[0]
    cut = first.map_supervisions(lambda supervision: dataclasses.replace(supervision, **changes))
    assert cut_text(cut) == changes.get("text", first.supervisions[0].text)


@pytest.fixture
def stereo(tmp_path):
    """Manifests of cuts with two channels: unlike ones, and ones of opposite phase."""
    rng = np.random.default_rng(0)
    left, right = 0.1 * rng.standard_normal((2, 8000))
    for name, samples in {"two": [left, right], "opposite": [left, -left]}.items():
        soundfile.write(tmp_path / f"{name}.wav", np.stack(samples, axis=1), 16000)
        recording = Recording.from_file(tmp_path / f"{name}.wav", recording_id=name)
        segment = SupervisionSegment(name, name, 0.0, 0.5, channel=[0, 1], text="One, two")
        cut = MultiCut(name, 0.0, 0.5, [0, 1], [segment], recording=recording)
        CutSet.from_cuts([cut]).to_file(tmp_path / f"{name}.jsonl.gz")
    return tmp_path


def cuts_of(folder, name, **options):
    """Batches of a test set."""
    corpus = ManifestCorpus(test=folder / f"{name}.jsonl.gz")
    options = {"tokenizer": CharTokenizer.from_texts(["one two"]), "max_cells": 800, **options}
    data = LhotseDataModule(corpus=corpus, num_output_frames=fourfold, **options)
    data.setup("test")
    return [batch for loader in data.test_dataloader() for batch in loader]


def features(folder, name, channel):
    return Fbank()(read_audio(folder / f"{name}.wav", channel=channel))


@pytest.mark.parametrize("channel", ["mix", 0, 1])
def test_a_channel_of_a_cut_is_selected(stereo, channel):
    (batch,) = cuts_of(stereo, "two", channel=channel)
    torch.testing.assert_close(batch.features[0], features(stereo, "two", channel))


def test_each_channel_may_be_a_cut(stereo):
    batches = cuts_of(stereo, "two", channel="each", max_utterances=1)
    assert sorted(id_ for batch in batches for id_ in batch.utterance_ids) == ["two-0", "two-1"]
    for batch in batches:
        channel = int(batch.utterance_ids[0][-1])
        torch.testing.assert_close(batch.features[0], features(stereo, "two", channel))


def test_channels_that_cancel_each_other_are_refused(stereo):
    with pytest.raises(ValueError, match="cut 'opposite': its audio: its channels cancel"):
        cuts_of(stereo, "opposite")
    (batch,) = cuts_of(stereo, "opposite", channel=1)
    torch.testing.assert_close(batch.features[0], features(stereo, "opposite", 1))
    with pytest.raises(ValueError, match=r"it has the channels \[0, 1\]: there is no channel=2"):
        cuts_of(stereo, "two", channel=2)


def test_a_cut_of_one_channel_is_read_as_it_is(cuts):
    expected = cuts_of(cuts, "val")
    for channel in (1, "each"):
        found = cuts_of(cuts, "val", channel=channel)
        for one, other in zip(found, expected, strict=True):
            assert one.utterance_ids == other.utterance_ids
            torch.testing.assert_close(one.features, other.features)


def test_texts_of_cuts_are_normalized(stereo, cuts):
    (batch,) = cuts_of(stereo, "two")
    # The tokenizer lacks "O" and ",": the reference stays, without targets.
    assert (batch.texts, batch.target_lengths.tolist()) == (["One, two"], [0])
    text = TextNormalizer(case="lower", punctuation="remove")
    (batch,) = cuts_of(stereo, "two", text=text)
    assert (batch.texts, batch.target_lengths.tolist()) == (["one two"], [7])
    data = data_module(cuts, text=str.upper)
    assert set("".join(data.tokenizer.symbols[1:])) <= set("\u2581ONETWSIX")
    assert all(text == text.upper() for batch in data.val_dataloader() for text in batch.texts)
