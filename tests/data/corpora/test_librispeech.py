# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.librispeech import write_librispeech
from transducer_toolkit.data.corpora.librispeech import LibriSpeechCorpus
from transducer_toolkit.data.manifest import read_manifest


@pytest.fixture
def root(tmp_path):
    write_librispeech(tmp_path / "corpora")
    return tmp_path / "corpora"


def librispeech(root, **options):
    subsets = {"train": ["train-clean-100"], "val": ["dev-clean"], "test": ["test-clean"]}
    return LibriSpeechCorpus(**{"root": root, "cache_dir": root / "cache", **subsets, **options})


def test_manifests(root):
    corpus = librispeech(root)
    corpus.prepare()
    manifests = corpus.manifests()
    train = read_manifest(manifests.train)
    assert len(train) == 12 and len({row.speaker for row in train}) == 3
    assert len(read_manifest(manifests.val)) == 3
    assert {name: len(read_manifest(path)) for name, path in manifests.test.items()} == {
        "test-clean": 4
    }
    row = train[5]
    trans = next(
        (root / "LibriSpeech/train-clean-100").rglob(f"{row.id.rpartition('-')[0]}.trans.txt")
    )
    assert f"{row.id} {row.text}\n" in trans.read_text()
    assert row.audio.endswith(f"{row.id}.flac")
    assert row.duration_s == pytest.approx(0.08 * len(row.text))


def test_another_choice_of_subsets_is_another_corpus(root):
    corpora = [librispeech(root), librispeech(root, train=["train-clean-100", "dev-clean"])]
    for corpus in corpora:
        corpus.prepare()
    assert [len(read_manifest(corpus.manifests().train)) for corpus in corpora] == [12, 15]


def test_errors(root):
    corpus = librispeech(root, train=["train-clean-360"])
    with pytest.raises(
        FileNotFoundError, match=r"no LibriSpeech subset at .*train-clean-360: unpack"
    ):
        corpus.prepare()
    (root / "LibriSpeech" / "dev-other").mkdir()
    with pytest.raises(ValueError, match=r"subset .*dev-other holds no utterances"):
        librispeech(root, val=["dev-other"]).prepare()
