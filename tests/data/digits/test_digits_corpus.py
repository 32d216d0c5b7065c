# SPDX-License-Identifier: Apache-2.0
import hashlib
import multiprocessing
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("espeakng_loader")

from tests.fork_server import ROOT, python
from transducer_toolkit.data.audio import read_audio
from transducer_toolkit.data.digits import DigitsCorpus, synthesis
from transducer_toolkit.data.digits.recipe import load_voices, plan_set
from transducer_toolkit.data.manifest import read_manifest

SIZES = {"num_train": 30, "num_val": 10, "num_test": 14, "num_excluded": 14, "num_held_out": 4}


@pytest.fixture(scope="module", autouse=True)
def _forked_workers():
    """Fresh workers without the time to import PyTorch. The command line starts real ones."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([synthesis.__name__])
    with pytest.MonkeyPatch.context() as patch:
        made = SimpleNamespace(get_context=lambda name: context)
        patch.setattr(synthesis, "multiprocessing", made)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    corpus = DigitsCorpus(cache_dir=tmp_path_factory.mktemp("digits"), **SIZES, num_workers=2)
    corpus.prepare()
    return corpus


def sets_of(corpus):
    manifests = corpus.manifests()
    paths = {"train": manifests.train, "val": manifests.val, **manifests.test}
    return {name: read_manifest(path) for name, path in paths.items()}


def test_sets(corpus):
    sets = sets_of(corpus)
    sizes = {name: len(sets[name]) for name in ("train", "val", "test", "excluded")}
    assert sizes == {"train": 30, "val": 10, "test": 14, "excluded": 14}
    for name in sizes:
        assert {u.speaker for u in sets[name]} <= set(load_voices().of_set(name)[0])
    ids = [u.id for rows in sets.values() for u in rows]
    assert len(set(ids)) == len(ids)


def test_audio_is_what_the_manifest_says(corpus):
    for name, rows in sets_of(corpus).items():
        for utterance in rows:
            waveform = read_audio(utterance.audio)
            assert len(waveform) == round(utterance.duration_s * 16000)
            assert 0.005 < waveform.abs().max() <= 1
            starts = utterance.word_starts_s
            assert (starts is None) == (name in ("flite", "asterisk"))
            if starts is not None:
                assert len(starts) == len(utterance.text.split())
                assert starts == sorted(set(starts)) and starts[0] >= 0
                assert starts[-1] < utterance.duration_s


def test_nothing_but_the_corpus_is_left(corpus):
    assert not list(corpus.cache_dir.glob(".*partial*"))
    folder = corpus.manifests().train.parent
    assert {p.name for p in folder.iterdir()} == {"audio"} | {
        f"{name}.jsonl" for name in ("train", "val", "test", "excluded")
    }
    assert len(list((folder / "audio").iterdir())) == 68


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.wav")
    }


def test_audio_does_not_depend_on_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "SHARD_UTTERANCES", 20)
    # Of each set, so that variants with noise and breath of their own are among them.
    plans = [plan for name in ("train", "test") for plan in plan_set(name, 40, seed=3)[20:]]
    results = []
    for num_workers in (1, 2):
        folder = tmp_path / str(num_workers)
        folder.mkdir()
        synthesis.synthesize_plans([plans], folder, num_workers=num_workers)
        results.append(digests(folder))
    assert len(results[0]) == 40 and results[0] == results[1]


def test_a_second_prepare_does_nothing(corpus):
    before = corpus.manifests().train.stat().st_mtime_ns
    corpus.prepare()
    assert corpus.manifests().train.stat().st_mtime_ns == before


def test_what_the_seed_changes(corpus, tmp_path):
    other = DigitsCorpus(cache_dir=tmp_path, **SIZES, seed=1)
    assert other.manifests().train.parent.name != corpus.manifests().train.parent.name
    other.prepare()
    for name, rows in sets_of(other).items():
        reference = sets_of(corpus)[name]
        own, expected = (
            {u.id: (u.text, Path(u.audio).read_bytes()) for u in utterances}
            for utterances in (rows, reference)
        )
        assert (own == expected) == (name != "train")


def test_a_failing_worker_is_reported(tmp_path):
    plans = plan_set("train", 2, seed=0)
    object.__setattr__(plans[0], "variant", "nobody")
    with pytest.raises(RuntimeError, match="train-00000 to train-00001 ended with exit code 1"):
        synthesis.synthesize_plans([plans], tmp_path, num_workers=1)


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_train: expected at least 1, got 0"):
        DigitsCorpus(num_train=0)


def test_command_line(tmp_path):
    command = [python(), "-m", "transducer_toolkit.data.digits"]
    kept = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    help_text = subprocess.run([*command, "--help"], check=True, **kept).stdout
    assert "--cache-dir" in help_text
    options = ["--cache-dir", str(tmp_path)]
    for name in ("train", "val", "test", "excluded", "held-out"):
        options += [f"--num-{name}", "2"]
    answer = subprocess.run([*command, *options], check=True, **kept)
    sets = [line.split()[0] for line in answer.stdout.splitlines()]
    assert sets[:4] == ["train", "val", "test", "excluded"]
    assert all(Path(line.split()[-1]).is_file() for line in answer.stdout.splitlines())
    assert "\r" not in answer.stderr  # no progress bar without a terminal
