# SPDX-License-Identifier: Apache-2.0
"""Hostile text files: language models, hotwords, alignments, manifests, and what they mean."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile
import torch

from tests.soak.spoilt_files import ANY_FILE
from transducer_toolkit.data.alignments import Alignments
from transducer_toolkit.data.manifest import read_manifest
from transducer_toolkit.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transducer_toolkit.data.tokenizer import SPACE_SYMBOL, CharTokenizer
from transducer_toolkit.decoding.arpa import MAX_EMPTY_LINES, MAX_LINE, MAX_LOG10, MAX_ORDER
from transducer_toolkit.decoding.hotwords import HotwordModel, read_hotwords
from transducer_toolkit.decoding.ngrams import NgramModel

LETTERS = CharTokenizer.from_texts(["abc abc"])
# Values of JSON that no field expects, or of the wrong size. Text: what json.dumps cannot write.
ODD_JSON: tuple[Any, ...] = (
    None, "x", "", -1, 0, 1.5, [], {}, [[]], True, 10**6, 10**12, 2**63, 10**400, -(10**30), 1e300,
    math.nan, math.inf, "\ud800", "a\0b", "../x", ["x", 3], {"x": 1}, "x" * 10**6,
    list(range(5000)),
)  # fmt: skip
DEEP = "[" * 100_000


@dataclass
class Case:
    """A hostile file: how to read it, and what a result must be.

    Attributes:
        read: reads it; a ValueError or an OSError refuses it.
        wrong: says what is wrong with the result of ``read``.
        must_fail: whether it must be refused; None: it may be.
        names: a message must contain one of them.
        has_lines: whether a message must name a line, if the fault is in a line.
    """

    kind: str
    how: str
    read: Callable[[], Any]
    wrong: Callable[[Any], str | None]
    must_fail: bool | None = True
    names: list[str] = field(default_factory=list)
    has_lines: bool = False


def odd_file(path: Path, random_: random.Random) -> str | None:
    """Makes a file of another kind in one of ten calls; returns which."""
    if random_.random() > 0.1:
        return None
    how = random_.choice([*ANY_FILE, "UTF-16", "NUL bytes", "invalid UTF-8"])
    if how in ANY_FILE:
        ANY_FILE[how](path, random_)
    elif how == "UTF-16":
        path.write_text("\\data\\\nngram 1=1\n{}", encoding="utf-16")
    elif how == "NUL bytes":
        path.write_bytes(b"\0" * random_.choice([1, 5, 10**6]))
    else:
        path.write_bytes(b"a\n\xff\xc0\n")
    return how


def places(value: Any, prefix: tuple = ()) -> list[tuple]:
    """Paths of all entries of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in items:
        found.append((*prefix, key))
        if isinstance(child, (dict, list)):
            found += places(child, (*prefix, key))
    return found


def edit(value: Any, random_: random.Random, odd: tuple[Any, ...] = ODD_JSON) -> str:
    """Replaces or removes an entry of nested dicts and lists; says which."""
    place = random_.choice(places(value))
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    name = ".".join(str(key)[:40] for key in place)
    if isinstance(parent, dict) and random_.random() < 0.2:
        del parent[place[-1]]
        return f"no {name}"
    parent[place[-1]] = random_.choice(odd)
    return f"{name} = {repr(parent[place[-1]])[:40]}"


# --- language models ----------------------------------------------------------------------------


def good_arpa(random_: random.Random) -> str:
    """A random model of the letters, of up to four orders."""
    words = ["<s>", "</s>", "<unk>", *(s for s in LETTERS.symbols if s != "<blk>")]
    order = random_.randint(1, 4)
    sets: list[list[tuple[str, ...]]] = [[(word,) for word in words]]
    for _ in range(2, order + 1):
        longer = {(*random_.choice(sets[-1]), random_.choice(words)) for _ in range(8)}
        sets.append(sorted(longer))
    lines = ["\\data\\", *(f"ngram {n}={len(s)}" for n, s in enumerate(sets, 1)), ""]
    for n, grams in enumerate(sets, 1):
        lines.append(f"\\{n}-grams:")
        for gram in grams:
            backoff = f"\t{random_.uniform(-2, 0.1):.4f}" if n < order else ""
            backoff = backoff if random_.random() < 0.8 else ""
            lines.append(f"{random_.uniform(-4, 0):.4f}\t{' '.join(gram)}{backoff}")
        lines.append("")
    return "\n".join([*lines, "\\end\\", ""])


NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
ODD_NUMBERS = ("nan", "inf", "-inf", "0.5", "1e300", "-1e300", "-1e39", "-1e-320", "--1", "-1_0",
               "-１", "0x1p3", "-", "-1,5", "-" + "9" * 5000, "-99", "+0", "-0.0")  # fmt: skip
ODD_COUNTS = ("0", "-1", "x", "", "1.5", "1" * 5000, "1000000000000", "２", "1_0", "7")


def _spoil_arpa(text: str, random_: random.Random) -> tuple[str, bytes]:
    lines = text.split("\n")
    grams = [i for i, line in enumerate(lines) if "\t" in line]
    heads = [i for i, line in enumerate(lines) if line.startswith(("\\", "ngram"))]
    how = random_.choice(["good", "count", "no head", "head twice", "heads swapped", "log-prob",
                          "log-prob", "back-off", "twice", "no n-gram", "other word", "column",
                          "a million columns", "a long word", "order skipped", "100000 orders",
                          "40 orders", "CRLF", "CR", "BOM", "spaces", "blank lines", "cut",
                          "flipped", "UNK", "no unk", "other end", "text behind"])  # fmt: skip
    pick, head = random_.choice(grams), random_.choice(heads)
    fields = lines[pick].split("\t")
    if how == "count":
        counts = [i for i, line in enumerate(lines) if line.startswith("ngram")]
        n = random_.choice(counts)
        lines[n] = f"{lines[n].partition('=')[0]}={random_.choice(ODD_COUNTS)}"
    elif how == "no head":
        del lines[head]
    elif how == "head twice":
        lines.insert(head, lines[head])
    elif how == "heads swapped":
        other = random_.choice(heads)
        lines[head], lines[other] = lines[other], lines[head]
    elif how == "log-prob":
        lines[pick] = "\t".join([random_.choice(ODD_NUMBERS), *fields[1:]])
    elif how == "back-off":
        lines[pick] = "\t".join([*fields[:2], random_.choice(ODD_NUMBERS)])
    elif how == "twice":
        lines[random_.choice(grams)] = lines[pick]
    elif how == "no n-gram":
        del lines[pick]
        if random_.random() < 0.7:  # a right count
            n = len(fields[1].split())
            count = lines[n].partition("=")[2]
            lines[n] = f"ngram {n}={int(count) - 1}"
    elif how == "other word":
        words = fields[1].split(" ")
        words[random_.randrange(len(words))] = random_.choice(
            ["zz", "<s>", "a", "\\end\\", "\u3000"]
        )
        lines[pick] = "\t".join([fields[0], " ".join(words), *fields[2:]])
    elif how == "column":
        lines[pick] += random_.choice(["\t-1", "\ta", " b c"])
    elif how == "a million columns":
        lines[pick] += "\t-1" * 10**6
    elif how == "a long word":
        lines[pick] = lines[pick].replace(fields[1][-1], "a" * 3 * 10**6)
    elif how == "order skipped":
        orders = len([line for line in lines if line.startswith("ngram")])
        n = random_.randint(1, orders)
        lines = [line for line in lines if line != f"\\{n}-grams:" and f"ngram {n}=" not in line]
    elif how.endswith(" orders"):
        number = int(how.split()[0])
        grams_of_one = text.partition("\\1-grams:")[2].partition("\n\n")[0].split("\n")
        lines = ["\\data\\", f"ngram 1={len(grams_of_one) - 1}"]
        lines += [f"ngram {n}=0" for n in range(2, number + 1)] + ["\\1-grams:", *grams_of_one[1:]]
        lines += [f"\\{n}-grams:" for n in range(2, number + 1)] + ["\\end\\", ""]
    elif how == "blank lines":
        lines[head:head] = [""] * random_.choice([3, 2000, 20_000])
    elif how == "UNK":
        lines[pick] = lines[pick].replace(fields[1].split()[-1], "<UNK>")
    elif how == "no unk":
        n = next(i for i in grams if lines[i].split("\t")[1] == "<unk>")
        del lines[n]
        lines[1] = f"ngram 1={len(LETTERS.symbols) + 1}"
    elif how == "other end":
        lines = [line.replace("</s>", "</S>").replace("<s>", "<S>") for line in lines]
    elif how == "text behind":
        lines += ["anything", "\\data\\"]
    content = "\n".join(lines).encode()
    if how in ("CRLF", "CR"):
        content = content.replace(b"\n", b"\r\n" if how == "CRLF" else b"\r")
    elif how == "BOM":
        content = "\ufeff".encode() + content
    elif how == "spaces":
        content = content.replace(b"\t", random_.choice([b"  ", b" \t "])).replace(b"\n", b" \n")
    elif how == "cut":
        content = content[: random_.randrange(len(content))]
    elif how == "flipped":
        flipped = bytearray(content)
        for _ in range(random_.choice([1, 3])):
            flipped[random_.randrange(len(flipped))] = random_.randrange(256)
        content = bytes(flipped)
    return how, content


def read_reference(content: bytes) -> dict[tuple[str, ...], tuple[float, float]]:
    """Reads an ARPA file in the plainest way; ValueError for every other file.

    Returns log-probability and back-off weight, to the base 10, of each n-gram.
    """
    if b"\n" * (MAX_EMPTY_LINES + 1) in content or max(map(len, content.split(b"\n"))) > MAX_LINE:
        raise ValueError("too long")
    lines = [line.strip(" \t\r") for line in content.decode("utf-8-sig").split("\n")]
    lines = [line for line in lines if line]
    if lines[:1] != ["\\data\\"]:
        raise ValueError("no head")
    counts: list[int] = []
    at = 1
    while at < len(lines) and not lines[at].startswith("\\"):
        match = re.fullmatch(r"ngram\s+(\d+)\s*=\s*(\d{1,15})", lines[at], re.ASCII)
        if match is None or int(match[1]) != len(counts) + 1:
            raise ValueError("count")
        counts.append(int(match[2]))
        at += 1
    if not counts or not counts[0] or len(counts) > MAX_ORDER:
        raise ValueError("no counts, or too many")
    found: dict[tuple[str, ...], tuple[float, float]] = {}
    for n, count in enumerate(counts, 1):
        rows = lines[at + 1 : at + 1 + count]
        if lines[at : at + 1] != [f"\\{n}-grams:"] or len(rows) != count:
            raise ValueError("section")
        at += 1 + count
        for row in rows:
            fields = re.split(r"[ \t]+", row)
            numbers = [fields[0], *fields[n + 1 :]]
            if len(fields) not in (n + 1, n + 2) or not all(map(NUMBER.fullmatch, numbers)):
                raise ValueError("row")
            values = [float(number) for number in numbers]
            gram = tuple(fields[1 : n + 1])
            if (
                any(abs(value) > MAX_LOG10 for value in values)
                or values[0] > 0
                or (n == len(counts) and sum(values[1:]))
                or gram in found
                or (n > 1 and any((w,) not in found and w != "<unk>" for w in gram))
            ):
                raise ValueError("value")
            found[gram] = values[0], sum(values[1:])
    if lines[at:] != ["\\end\\"]:
        raise ValueError("end")
    if ("<unk>",) in found and ("<UNK>",) in found:
        raise ValueError("two unknown words")
    words = {gram[0] for gram in found if len(gram) == 1} - {"<s>", "</s>", "<unk>", "<UNK>"}
    if not words & {*LETTERS.symbols} and not any(set(word) <= {*"abc"} for word in words):
        raise ValueError("nothing to write")
    return found


def _reference_log10(found: dict, words: list[str]) -> float:
    unknown = "<UNK>" if ("<UNK>",) in found else "<unk>"
    if (unknown,) not in found:
        found = {**found, (unknown,): (-100.0, 0.0)}
    order, total = max(map(len, found)), 0.0
    history = ["<s>"] if ("<s>",) in found else []
    for word in words:
        word = word if (word,) in found else unknown
        context = tuple(history[max(0, len(history) - order + 1) :])
        while (*context, word) not in found:
            total += found.get(context, (0.0, 0.0))[1]
            context = context[1:]
        total += found[(*context, word)][0]
        history.append(word)
    return total


def arpa_case(folder: Path, random_: random.Random) -> Case:
    path = folder / random_.choice(["hostile.arpa", "hostile.arpa", "hostile.arpa.gz"])
    how = odd_file(path, random_)
    content: bytes | None = None
    if how is None:
        how, content = _spoil_arpa(good_arpa(random_), random_)
        data = content
        if path.suffix == ".gz":
            data = gzip.compress(content, 1)
            damage = random_.choice(["", "", "cut", "flipped", "no gzip", "bomb", "blank bomb"])
            if damage:
                how, content = f"gzip {damage}", None
            if damage == "cut":
                data = data[: random_.randrange(len(data))]
            elif damage == "flipped":
                flipped = bytearray(data)
                place = random_.randrange(10, len(flipped))
                flipped[place] ^= 1 << random_.randrange(8)
                data = bytes(flipped)
            elif damage == "no gzip":
                data = b"\\data\\\n"
            elif damage:
                data = gzip.compress((b"\n" if "blank" in damage else b"a") * 2**24, 1) * 400
        path.write_bytes(data)

    def wrong(model: NgramModel) -> str | None:
        if content is None:
            return "accepted"
        try:
            found = read_reference(content)
        except ValueError as error:
            return f"accepted, and the reference says: {error}"
        words = [gram[0] for gram in found if len(gram) == 1 and gram[0] not in ("<s>", "</s>")]
        for _ in range(5):
            sentence = [random_.choice([*words, "other"]) for _ in range(random_.randint(0, 6))]
            expected = math.log(10) * _reference_log10(found, sentence)
            got = model.ngrams.log_prob(sentence, end=False)
            if not math.isclose(got, expected, rel_tol=1e-4, abs_tol=1e-3):
                return f"{sentence[:6]}: {got}, expected {expected}"
        state = model.initial_state(2)
        for token in (LETTERS.blank, 1, 2, 3, 1):
            scores, state = model.step(torch.full((2,), token), state)
            if not bool(scores.isfinite().all()) or not bool(model.final(state).isfinite().all()):
                return "scores that are not finite"
        return None

    must_fail: bool | None = True
    if content is not None:
        try:
            read_reference(content)
            must_fail = False
        except ValueError:
            must_fail = True
    return Case("arpa", how, lambda: NgramModel(path, LETTERS), wrong, must_fail, [str(path)],
                has_lines=content is not None)  # fmt: skip


# --- hotwords -----------------------------------------------------------------------------------

ODD_WEIGHTS = ("nan", "inf", "0", "-1", "x", "", "1e300", "1e-300", "1e40", "2.5", "１", " 2 ",
               "1\t2", "0x3", "1,5", "9" * 5000)  # fmt: skip
ODD_PHRASES = ("", " ", "zz", "a" * 10**6, "ab \0c", "ab\x0bc", "\u2028", "abc\ud800", "ab  c",
               "#ab", "\u2581a", "<blk>", "a\u0301", "abc :2.5", "a" * 999)  # fmt: skip


def hotword_case(folder: Path, random_: random.Random) -> Case:
    path = folder / "hostile.txt"
    how, tokenizer = odd_file(path, random_), LETTERS
    content: bytes | None = None
    if how is None:
        lines = [
            "".join(random_.choice("abc ") for _ in range(random_.randint(1, 9))).strip() or "b"
            for _ in range(random_.randint(1, 5))
        ]
        lines = [line + random_.choice(["", "", "\t2", "\t0.5"]) for line in lines]
        how = random_.choice(["good", "weight", "weight", "phrase", "phrase", "twice", "CRLF",
                              "BOM", "BOM twice", "empty lines", "many", "flipped"])  # fmt: skip
        pick = random_.randrange(len(lines))
        if how == "weight":
            lines[pick] = lines[pick].partition("\t")[0] + "\t" + random_.choice(ODD_WEIGHTS)
        elif how == "phrase":
            lines[pick] = random_.choice(ODD_PHRASES)
        elif how == "twice":
            lines += lines
        elif how == "empty lines":
            lines[pick:pick] = ["", "  ", "\t"]
        elif how == "many":
            lines = ["".join(random_.choice("abc") for _ in range(12)) for _ in range(500)]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        if how == "CRLF":
            content = content.replace(b"\n", b"\r\n")
        elif how.startswith("BOM"):
            content = "\ufeff".encode() * (2 if how.endswith("twice") else 1) + content
        elif how == "flipped":
            flipped = bytearray(content)
            flipped[random_.randrange(len(flipped))] = random_.randrange(256)
            content = bytes(flipped)
        path.write_bytes(content)

    def read() -> tuple[list, HotwordModel]:
        entries = read_hotwords(path)
        return entries, HotwordModel(entries, tokenizer)

    def wrong(result: tuple[list, HotwordModel]) -> str | None:
        entries, model = result
        assert content is not None
        text = content.decode("utf-8-sig").replace("\r", "\n")
        rows = [row for row in text.split("\n") if row.strip() and not row.startswith("#")]
        if len(rows) != len(entries):
            return f"{len(entries)} phrases, expected {len(rows)}"
        for row, entry in zip(rows, entries, strict=True):
            phrase, _, weight = row.partition("\t")
            if entry.phrase != phrase or not math.isclose(entry.weight, float(weight or 1)):
                return f"{entry} of {row[:50]!r}"
        for entry in entries[:10]:
            tokens = LETTERS.encode(entry.phrase)
            state, total = model.initial_state(1), 0.0
            for token_before, token in zip([LETTERS.blank, *tokens], tokens, strict=False):
                scores, state = model.step(torch.tensor([token_before]), state)
                total += float(scores[0, token])
            _, state = model.step(torch.tensor([tokens[-1]]), state)
            total += float(model.final(state))
            # At least the bonus of the phrase: others may end within it. Its first space has none.
            tokens = tokens[LETTERS.symbols[tokens[0]] == SPACE_SYMBOL :]
            if not math.isfinite(total) or total < 0.2 * entry.weight * len(tokens) * 0.999 - 1e-2:
                return f"the bonus of {entry.phrase[:50]!r} is {total}"
        return None

    how_fails = how in ANY_FILE or how in ("UTF-16", "NUL bytes", "invalid UTF-8")
    must_fail = True if how_fails and how != "a text" else None
    if how in ("good", "twice", "CRLF", "BOM", "many"):
        must_fail = False
    return Case("hotwords", how, read, wrong, must_fail, [str(path)], has_lines=content is not None)


# --- alignments and manifests -------------------------------------------------------------------


def alignment_case(folder: Path, random_: random.Random) -> Case:
    path = folder / "u.json"
    symbols = ["a", "b", "\u2581", "c"]
    rows = [{"symbol": s, "time_s": round(0.2 * k, 2)} for k, s in enumerate(symbols)]
    content: dict[str, Any] = {"audio": "u.wav", "tokens": rows, "words": []}
    how = odd_file(path, random_)
    must_fail: bool | None = True
    if how is None:
        how = random_.choice(["good", "edit", "edit", "edit", "beyond", "fewer", "more", "deep",
                              "cut", "twice the key", "falling"])  # fmt: skip
        must_fail = None if how in ("edit", "cut") else how not in ("good", "twice the key")
        if how == "edit":
            how = edit(content, random_)
        elif how == "beyond":
            rows[-1]["time_s"] = random_.choice([1.01, 1e6, 1e300])
        elif how == "fewer":
            rows.pop(random_.randrange(4))
        elif how == "more":
            rows += rows * random_.choice([1, 10**5])
        elif how == "falling":
            rows[1]["time_s"], rows[2]["time_s"] = rows[2]["time_s"], rows[1]["time_s"]
        text = json.dumps(content)
        if how == "deep":
            text = random_.choice([DEEP, '{"tokens": ' + DEEP, '{"a":' * 100_000])
        elif how == "cut":
            text = text[: random_.randrange(len(text))]
        elif how == "twice the key":
            text = '{"tokens": 3, ' + text[1:]
        path.write_text(text, encoding="utf-8")

    def wrong(times: list[float]) -> str | None:
        given = [row["time_s"] for row in json.loads(path.read_text())["tokens"]]
        if times != [float(time) for time in given] or len(times) != len(symbols):
            return f"{times}, expected {given}"
        if not all(0 <= a <= b <= 1.0 for a, b in zip(times, [*times[1:], 1.0], strict=True)):
            return f"{times}"
        return None

    read = lambda: Alignments(folder).times_s("u", symbols, 1.0)  # noqa: E731
    return Case("alignment", how, read, wrong, must_fail, [str(path)])


def manifest_case(folder: Path, random_: random.Random) -> Case:
    path = folder / "hostile.jsonl"
    for name in "ab":
        soundfile.write(folder / f"{name}.wav", [0.1] * 16000, 16000)
    rows: list[dict[str, Any]] = [
        {"id": "a", "audio": "a.wav", "text": "a b", "duration_s": 1.0, "offset_s": 0.0,
         "word_starts_s": [0.1, 0.5], "channel": 0, "speaker": "s", "extra": {"x": 1}},
        {"audio": "./b.wav", "text": "a b"},
        {"audio_filepath": "a.wav", "duration": 0.5, "offset": 0.2, "text": "c", "lang": "en",
         "id": "c", "extra": {"y": [1]}},
    ]  # fmt: skip
    how = odd_file(path, random_)
    must_fail: bool | None = True if how not in ("empty",) else None
    is_line = how is None
    if how is None:
        how = random_.choice(
            ["good", *["edit"] * 6, "deep", "cut", "new field", "both names", "climbs"]
        )
        must_fail = {"good": False, "edit": None, "cut": None}.get(how, True)
        row = random_.choice(rows)
        if how == "edit":
            how = edit(row, random_)
        elif how == "new field":
            rows[0][random_.choice(["_target_", "channels", "", "\0"])] = 3
        elif how == "both names":
            rows[2]["audio"] = "a.wav"
        elif how == "climbs":
            row["audio_filepath" if "audio_filepath" in row else "audio"] = random_.choice(
                ["../a.wav", "x/../../a.wav", "..", "./../a.wav"]
            )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if how == "deep":
            text += random_.choice([DEEP, '{"a":' * 100_000]) + "\n"
        elif how == "cut":
            text = text[: random_.randrange(len(text))]
        path.write_text(text, encoding="utf-8")

    def wrong(utterances: list) -> str | None:
        for u in utterances:
            if not 0 < u.duration_s < math.inf or not 0 <= u.offset_s < math.inf:
                return f"times of {u}"
            if not Path(u.audio).is_absolute() or not isinstance(u.text, str):
                return f"audio or text of {u}"
        return None

    return Case("manifest", how, lambda: read_manifest(path), wrong, must_fail, [str(path)],
                has_lines=is_line)  # fmt: skip


def pieces_case(folder: Path, random_: random.Random, good: bytes) -> Case:
    """A SentencePiece model."""
    path, content = folder / "hostile.model", bytearray(good)
    how = odd_file(path, random_)
    if how is None:
        how = random_.choice(["good", "cut", "flipped", "flipped", "flipped", "twice", "dropped"])
        if how == "cut":
            content = content[: random_.randrange(len(content))]
        elif how == "flipped":
            for _ in range(random_.choice([1, 1, 5, 40])):
                content[random_.randrange(len(content))] = random_.randrange(256)
        elif how == "twice":
            content = content * 2
        elif how == "dropped":
            begin = random_.randrange(len(content))
            del content[begin : begin + random_.randint(1, 30)]
        path.write_bytes(content)

    def wrong(tokenizer: SentencePieceTokenizer) -> str | None:
        ids = tokenizer.encode("one two")
        if any(not 0 < id_ < tokenizer.vocab_size for id_ in ids):
            return f"ids {ids} of {tokenizer.vocab_size}"
        if how == "good" and tokenizer.decode(ids) != "one two":
            return "another text"
        tokenizer.decode(range(tokenizer.vocab_size))
        return None

    must_fail = {"good": False}.get(how, True if how in ANY_FILE else None)
    return Case("pieces", how, lambda: SentencePieceTokenizer.load(path), wrong, must_fail,
                [str(path)])  # fmt: skip
