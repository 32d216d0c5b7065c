# SPDX-License-Identifier: Apache-2.0
import gzip

import numpy as np
import pytest
import soundfile

from transducer_toolkit.data.corpora.asterisk import AsteriskCorpus, spoken_text
from transducer_toolkit.data.manifest import read_manifest

TRANSCRIPTS = """; Sounds

digits/7: seven
letters/dash: dash [-]
beep: [this is a simple beep tone]
no-file: There is no recording of this.
goodbye: Goodbye!
""" + "".join(
    f"menu-{i}: Press {i % 10} for menu number {'abcdefghij'[i // 10]}.\n" for i in range(80)
)


@pytest.fixture
def corpus(tmp_path):
    sounds = tmp_path / "sounds"
    for line in TRANSCRIPTS.splitlines():
        name, colon, _ = line.partition(": ")
        if colon and name != "no-file":
            (sounds / name).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(sounds / f"{name}.wav", np.zeros(4000), 8000)
    (tmp_path / "core.txt.gz").write_bytes(gzip.compress(TRANSCRIPTS.encode()))
    return AsteriskCorpus(
        sounds_dir=sounds, transcripts=tmp_path / "core.txt.gz", cache_dir=tmp_path / "cache"
    )


def test_sets(corpus):
    corpus.prepare()
    manifests = corpus.manifests()
    assert list(manifests.test) == ["test"]
    sets = [
        read_manifest(path) for path in (manifests.train, manifests.val, manifests.test["test"])
    ]
    assert all(sets)
    texts = [{utterance.text for utterance in rows} for rows in sets]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    rows = {utterance.id: utterance for part in sets for utterance in part}
    assert len(rows) == 80 + 3  # neither the beep nor what has no recording
    assert rows["menu-12"].text == "press two for menu number b"
    assert rows["menu-12"].duration_s == 0.5 and rows["menu-12"].audio.endswith("/menu-12.wav")
    # One word alone is never tested.
    assert {"seven", "dash", "goodbye"} <= texts[0]


def test_another_transcript_is_another_corpus(corpus, tmp_path):
    corpus.prepare()
    first = corpus.manifests().train
    corpus.prepare()
    assert corpus.manifests().train == first
    (tmp_path / "core.txt.gz").write_bytes(gzip.compress(b"goodbye: Farewell!\n"))
    assert corpus.manifests().train != first


@pytest.mark.parametrize(
    ("transcript", "expected"),
    [
        ("I'm sorry; press * or 0.", "i'm sorry press star or zero"),
        ("De-activated, A.M.", "de activated a m"),
        ("dial 500 now", None),
        ("a 28.8 kilobit modem", None),
        ("H.323", None),
        ("IAX (note: does not say it)", None),
        ("<beep ascending>", None),
        ("...", None),
    ],
)
def test_spoken_text(transcript, expected):
    assert spoken_text(transcript) == expected


def test_a_missing_package_is_named(tmp_path):
    corpus = AsteriskCorpus(sounds_dir=tmp_path / "none", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="apt-get install asterisk-core-sounds-en-wav"):
        corpus.prepare()
