# SPDX-License-Identifier: Apache-2.0
import zlib

import numpy as np
import pytest
import soundfile

from transducer_toolkit.data.corpora.tuxpaint import TuxPaintCorpus, spoken_text
from transducer_toolkit.data.manifest import read_manifest


def write_stamp(folder, name, texts, *, duration_s=1.0, suffix="_desc"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["In English.", *(f"{language}.utf8={text}" for language, text in texts.items())]
    (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for language in texts:
        rng = np.random.default_rng(zlib.crc32(f"{name} {language}".encode()))
        noise = 0.1 * rng.standard_normal(int(duration_s * 22050))
        soundfile.write(folder / f"{name}{suffix}_{language}.ogg", noise, 22050)


@pytest.fixture
def stamps(tmp_path):
    folder = tmp_path / "stamps"
    for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz"):
        texts = {"fr": f"Un maïs {letter}.", "ru": f"Буква {letter}!", "ja": "いち"}
        write_stamp(folder / f"part{number % 2}", f"stamp_{letter}", texts)
    write_stamp(folder / "math", "0", {"fr": "Zéro."}, suffix="")
    write_stamp(folder, "euro", {"fr": "Une pièce de 1 euro (1 €)."})
    write_stamp(folder, "stale", {"fr": "Bien plus que ce qui est dit."}, duration_s=0.5)
    again = folder / "part0" / "stamp_a_desc_fr.ogg"
    (folder / "again.txt").write_text("Again.\nfr.utf8=Encore.\n")
    (folder / "zagain_desc_fr.ogg").write_bytes(again.read_bytes())
    (folder / "zagain.txt").write_text("Again.\nfr.utf8=Encore.\n")
    (folder / "effect.ogg").write_bytes(again.read_bytes())
    return folder


def test_sets(stamps, tmp_path, caplog):
    corpus = TuxPaintCorpus(languages=["ru", "fr"], stamps_dir=stamps, cache_dir=tmp_path / "cache")
    with caplog.at_level("INFO"):
        corpus.prepare()
    assert "1 recordings left out: above 25 characters a second" in caplog.text
    manifests = corpus.manifests()
    assert set(manifests.test) <= {"fr", "ru"}
    tests = {name: read_manifest(path) for name, path in manifests.test.items()}
    train, val = read_manifest(manifests.train), read_manifest(manifests.val)
    rows = [*train, *val, *(row for rows in tests.values() for row in rows)]
    texts = [row.text for row in rows]
    assert len(texts) == len(set(texts)) == 2 * 26 + 1
    assert "un maïs b" in texts and "буква z" in texts and "zéro" in texts and "encore" not in texts
    assert all(row.extra["language"] == name for name, rows in tests.items() for row in rows)
    samples, rate = soundfile.read(rows[0].audio)
    assert rate == 16000 and abs(len(samples) / rate - rows[0].duration_s) < 1e-9
    assert (tmp_path / "cache") in type(tmp_path)(rows[0].audio).parents


@pytest.mark.parametrize(
    ("transcript", "expected"),
    [
        ("Un lion, à l’abri d'eau", "un lion à l'abri d'eau"),
        ("E\u0301te\u0301", "été"),
        ("Камп'ютэрная мыш. Пік!", "камп'ютэрная мыш пік"),
        ("le numéro 7", None),
        ("nommé “quarter”", "nommé quarter"),
        ("!", None),
    ],
)
def test_spoken_text(transcript, expected):
    assert spoken_text(transcript) == expected


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="languages must name at least one language"):
        TuxPaintCorpus(languages=[])
    corpus = TuxPaintCorpus(stamps_dir=tmp_path / "none", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps-default"):
        corpus.prepare()
