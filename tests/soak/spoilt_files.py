# SPDX-License-Identifier: Apache-2.0
"""Files that are not what a command asked for: checkpoints, recordings, manifests, folders."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

CANARY = "canary"  # what code in a checkpoint would leave
SAMPLE_RATE = 16000
ODD_VALUES = (None, "x", -1, 0, [], {}, 1e30, 10**6, True, ["<blk>", 3])


@dataclass(frozen=True)
class World:
    """A trained model and its corpus, which are right."""

    checkpoint: Path
    tones: Path  # folder with train.jsonl, val.jsonl, test.jsonl and their audio


@dataclass(frozen=True)
class BadFile:
    """A spoilt file: how, where, and whether it must be refused (None: it may be).

    A message may also name it by one of `names`.
    """

    how: str
    path: Path
    must_fail: bool | None = True
    names: tuple[str, ...] = ()


def _missing(path: Path) -> None:
    pass


def _folder(path: Path) -> None:
    path.mkdir()


def _empty(path: Path) -> None:
    path.touch()


def _text(path: Path) -> None:
    path.write_text("this is no such file\n" * 20)


def _bytes(path: Path, random_: random.Random) -> None:
    path.write_bytes(random_.randbytes(3000))


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


ANY_FILE: dict[str, Callable[..., None]] = {
    "missing": lambda path, r: _missing(path),
    "a folder": lambda path, r: _folder(path),
    "empty": lambda path, r: _empty(path),
    "a text": lambda path, r: _text(path),
    "random bytes": _bytes,
    "a link to itself": lambda path, r: _loop(path),
    "a pipe": lambda path, r: _pipe(path),
}


# --- checkpoints --------------------------------------------------------------------------------


class _Code:
    """A pickle of it runs a command where it is read."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {CANARY}",)


def _pickled_code(path: Path) -> None:
    torch.save({"recognizer": _Code(), "state_dict": {}}, path)


def _bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Code()))


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes.txt", "no checkpoint")


def _cut(good: Path, path: Path, random_: random.Random) -> None:
    content = good.read_bytes()
    path.write_bytes(content[: random_.randrange(1, len(content))])


def _flipped(good: Path, path: Path, random_: random.Random) -> None:
    content = bytearray(good.read_bytes())
    for _ in range(random_.choice([1, 1, 10])):
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    path.write_bytes(bytes(content))


def _places(value: Any, prefix: tuple = ()) -> list[tuple]:
    """Paths of all entries of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in items:
        found.append((*prefix, key))
        if isinstance(child, (dict, list)):
            found += _places(child, (*prefix, key))
    return found


def _edited(checkpoint: dict[str, Any], random_: random.Random) -> str:
    """Spoil an entry of the recipe or of the weights; says which."""
    recipe, weights = checkpoint["recognizer"], checkpoint["state_dict"]
    what = random_.choice(["recipe", "recipe", "recipe", "weights", "whole"])
    if what == "whole":
        key = random_.choice(["recognizer", "state_dict"])
        checkpoint[key] = random_.choice([None, [], {}, "x", 3])
        return key
    if what == "recipe":
        place = random_.choice(_places(recipe))
        parent = recipe
        for key in place[:-1]:
            parent = parent[key]
        if isinstance(parent, dict) and random_.random() < 0.3:
            del parent[place[-1]]
        else:
            parent[place[-1]] = random_.choice(ODD_VALUES)
        return ".".join(map(str, place))
    name = random_.choice([name for name in weights if name.startswith("model.")])
    x = weights[name]
    changes: dict[str, Any] = {
        "NaN": torch.full_like(x, torch.nan) if x.is_floating_point() else x - 5,
        "huge": x * 1e30 if x.is_floating_point() else x,
        "flat": x.flatten()[:-1],
        "no tensor": "x",
        "complex": x.to(torch.complex64),
        "sparse": x.to_sparse(),
        "nowhere": x.to("meta"),
    }
    how = random_.choice([*changes, "gone"])
    if how == "gone":
        del weights[name]
    else:
        weights[name] = changes[how]
    return f"{name} {how}"


def bad_checkpoint(world: World, folder: Path, random_: random.Random) -> BadFile:
    path = folder / "spoilt.ckpt"
    how = random_.choice([*ANY_FILE, "cut", "cut", "flipped", "flipped", "code", "bare code", "zip",
                          "audio", *["edited"] * 10])  # fmt: skip
    if how in ANY_FILE:
        ANY_FILE[how](path, random_)
    elif how == "cut":
        _cut(world.checkpoint, path, random_)
    elif how == "flipped":
        _flipped(world.checkpoint, path, random_)
        return BadFile(how, path, None)  # torch does not look at checksums of weights
    elif how == "code":
        _pickled_code(path)
    elif how == "bare code":
        _bare_pickle(path)
    elif how == "zip":
        _zip(path)
    elif how == "audio":
        path.write_bytes((world.tones / "test-0.wav").read_bytes())
    else:
        checkpoint = torch.load(world.checkpoint, weights_only=True)
        how = f"edited: {_edited(checkpoint, random_)}"
        torch.save(checkpoint, path)
        # Some values are as good as those that were there; others show only in the scores.
        return BadFile(how, path, None, ("weights of the model", "of the tokenizer"))
    return BadFile(how, path)


# --- audio --------------------------------------------------------------------------------------


def _samples(path: Path, samples: Any, rate: int = SAMPLE_RATE, subtype: str = "FLOAT") -> None:
    soundfile.write(path, np.asarray(samples, dtype=np.float32), rate, subtype=subtype)


def _flac_cut(path: Path, random_: random.Random) -> None:
    whole = path.with_suffix(".flac")
    soundfile.write(whole, np.random.default_rng(0).normal(0, 0.1, 20_000), SAMPLE_RATE)
    path.write_bytes(whole.read_bytes()[: random_.randrange(8000)])
    whole.unlink()


def _with_value(value: float) -> Callable[[Path, random.Random], None]:
    def write(path: Path, random_: random.Random) -> None:
        samples = np.full(8000, 0.1, dtype=np.float32)
        samples[random_.randrange(8000)] = value
        _samples(path, samples)

    return write


def _header(offset: int, size: int) -> Callable[[Path, random.Random], None]:
    """A field of the header of a wave file is another number."""

    def write(path: Path, random_: random.Random) -> None:
        _samples(path, np.full(8000, 0.1), subtype="PCM_16")
        content = bytearray(path.read_bytes())
        content[offset : offset + size] = random_.randbytes(size)
        path.write_bytes(bytes(content))

    return write


BAD_AUDIO: dict[str, tuple[Callable[[Path, random.Random], None], bool | None]] = {
    "no samples": (lambda path, r: _samples(path, []), True),
    "one sample": (lambda path, r: _samples(path, [0.1]), True),
    "NaN": (_with_value(float("nan")), True),
    "infinity": (_with_value(float("inf")), True),
    "1e38": (_with_value(1e38), None),
    "cut flac": (_flac_cut, None),
    "other number of channels": (_header(22, 2), None),
    "other sample rate": (_header(24, 4), None),
    "other block size": (_header(32, 2), None),
    "other length": (_header(40, 4), None),
    "1 Hz": (lambda path, r: _samples(path, np.full(3, 0.1), rate=1), None),
    "stereo": (lambda path, r: _samples(path, np.zeros((8000, 2))), None),
}


def bad_audio(folder: Path, random_: random.Random) -> BadFile:
    how = random_.choice([*ANY_FILE, *BAD_AUDIO])
    path = folder / "spoilt.wav"
    if how in ANY_FILE:
        ANY_FILE[how](path, random_)
        return BadFile(how, path)
    write, must_fail = BAD_AUDIO[how]
    write(path, random_)
    return BadFile(how, path, must_fail)


# --- manifests ----------------------------------------------------------------------------------

FIELD_VALUES: dict[str, tuple[Any, ...]] = {
    "id": ("", None, 3, "train-1"),
    "audio": ("", None, 3, "none.wav", "manifest.jsonl", "/dev/null"),
    "duration_s": (0, -1, "1.0", None, 1e300, 10**400, True, 1e-9, float("nan"), float("inf")),
    "offset_s": (-1, "0", 1e9, None, float("nan")),
    "text": (None, 3, ["a"], "\ud83d\ude00", "a\tb"),
    "word_starts_s": ([-1.0], "x", [9.0] * 40),
    "extra": (3, []),
    "volume": (1,),
}


def _row_changed(rows: list[Any], random_: random.Random) -> tuple[str, str]:
    """Spoil a field of a row; returns how, and the id of the row."""
    row, name = random_.choice(rows), random_.choice(list(FIELD_VALUES))
    id_ = row["id"]
    if name in row and random_.random() < 0.2:
        del row[name]
        return f"no {name}", id_
    row[name] = random_.choice(FIELD_VALUES[name])
    return f"{name} = {row[name]!r}", id_


def bad_manifest(world: World, name: str, folder: Path, random_: random.Random) -> BadFile:
    """A manifest of `name` (train, val, test) with something wrong."""
    path = folder / "spoilt.jsonl"
    how = random_.choice([*ANY_FILE, "blank lines", "cut", "an array", "a BOM", *["row"] * 8])
    if how in ANY_FILE:
        ANY_FILE[how](path, random_)
        return BadFile(how, path)
    rows = [json.loads(line) for line in (world.tones / f"{name}.jsonl").open(encoding="utf-8")]
    for row in rows:
        row["audio"] = str(world.tones / row["audio"])
    must_fail: bool | None = True
    names: tuple[str, ...] = ()
    if how == "row":
        (how, id_), must_fail = _row_changed(rows, random_), None
        names = (f"{id_}'", f"{id_}.wav")  # not train-1 for train-10
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if how == "blank lines":
        text = "\n  \n\n"
    elif how == "cut":
        text = text[: random_.randrange(len(text))].rstrip("\n")
        must_fail = not text.endswith("}")  # where a line ends, it is only shorter
    elif how == "an array":
        text = json.dumps(rows)
    elif how == "a BOM":
        text, must_fail = "\ufeff" + text, None
    path.write_text(text, encoding="utf-8")
    return BadFile(how, path, must_fail, names)
