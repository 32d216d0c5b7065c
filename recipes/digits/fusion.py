# SPDX-License-Identifier: Apache-2.0
"""Make test sets for hotwords and language models, and count recognized hotwords.

    python recipes/digits/fusion.py make FOLDER      (half a minute)
    python recipes/digits/fusion.py recall FOLDER RUN_FOLDER...

The first command writes to FOLDER:

- ``hotwords.txt``: 20 strings of four digits
- ``listed.jsonl``: 300 utterances with one of them among other digits
- ``other.jsonl``: 300 utterances with none of them
- ``codes.jsonl``: 300 utterances of one to three of 50 codes of four digits
- ``codes.arpa``: a 4-gram model of the words of such texts

The voices are those that the digits corpus excludes. The second command prints how many of the
hotwords in ``listed.jsonl`` were recognized by runs of transducer-evaluate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from transducer_toolkit.data.digits.recipe import DIGIT_WORDS, UtterancePlan, plan_set
from transducer_toolkit.data.digits.synthesis import synthesize_plans
from transducer_toolkit.data.manifest import write_manifest

NUM_UTTERANCES = 300  # of each set
NUM_PHRASES, NUM_CODES, DIGITS_OF_PHRASE = 20, 50, 4
MAX_DIGITS_AROUND = 2  # of a phrase, on each side
NUM_TEXTS = 5000  # for the n-gram model
DISCOUNT = 0.5


def digits(choose: random.Random, number: int) -> str:
    return " ".join(choose.choice(DIGIT_WORDS) for _ in range(number))


def different(choose: random.Random, number: int) -> list[str]:
    """Return different strings of four digits."""
    found: dict[str, None] = {}
    while len(found) < number:
        found[digits(choose, DIGITS_OF_PHRASE)] = None
    return list(found)


def codes_text(choose: random.Random, codes: Sequence[str]) -> str:
    return " ".join(choose.choices(codes, k=choose.randint(1, 3)))


def make(folder: Path) -> None:
    """Write the test sets, the hotwords and the n-gram model."""
    choose = random.Random(0)
    phrases, codes = different(choose, NUM_PHRASES), different(choose, NUM_CODES)
    listed, other = [], []
    for number in range(NUM_UTTERANCES):
        before, after = (digits(choose, choose.randint(0, MAX_DIGITS_AROUND)) for _ in range(2))
        listed.append(f"{before} {phrases[number % NUM_PHRASES]} {after}".strip())
    while len(other) < NUM_UTTERANCES:
        text = digits(choose, choose.randint(1, 8))
        other += [] if any(phrase in text for phrase in phrases) else [text]
    texts = {
        "listed": listed,
        "other": other,
        "codes": [codes_text(choose, codes) for _ in range(NUM_UTTERANCES)],
    }
    (folder / "audio").mkdir(parents=True)
    (folder / "hotwords.txt").write_text("".join(f"{phrase}\n" for phrase in phrases))
    train = [codes_text(choose, codes).split() for _ in range(NUM_TEXTS)]
    (folder / "codes.arpa").write_text(arpa(train, order=4))
    plans = [
        [
            spoken(plan, f"{name}-{index:03d}", text)
            for index, (plan, text) in enumerate(
                zip(plan_set("excluded", NUM_UTTERANCES, seed=seed), of_set, strict=True)
            )
        ]
        for seed, (name, of_set) in enumerate(texts.items(), start=1)
    ]
    rows = synthesize_plans(plans, folder / "audio")
    for name in texts:
        write_manifest(folder / f"{name}.jsonl", [row for row in rows if row.id.startswith(name)])


def spoken(plan: UtterancePlan, id_: str, text: str) -> UtterancePlan:
    """Return the plan of another text in the same voice and style."""
    separators = [" "] * (len(text.split()) - 1)
    return dataclasses.replace(plan, id=id_, digits=text, separators=separators)


def arpa(sentences: Iterable[Sequence[str]], order: int) -> str:
    """Return an ARPA file with absolute discounting, interpolated with shorter n-grams."""
    counts: dict[tuple[str, ...], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for sentence in sentences:
        words = ["<s>", *sentence, "</s>"]
        for end in range(1, len(words)):
            for start in range(max(0, end - order + 1), end + 1):
                counts[tuple(words[start:end])][words[end]] += 1

    def backoff(context: tuple[str, ...]) -> float:
        after = counts[context]
        return DISCOUNT * len(after) / sum(after.values())

    def probability(context: tuple[str, ...], word: str) -> float:
        after = counts[context]
        rest = probability(context[1:], word) if context else 1 / (len(after) + 1)  # with <unk>
        own = max(after.get(word, 0) - DISCOUNT, 0) / sum(after.values())
        return own + backoff(context) * rest

    sections: list[list[str]] = [[] for _ in range(order)]
    sections[0] += [f"-99\t<s>\t{math.log10(backoff(('<s>',))):.7f}"]
    sections[0] += [f"{math.log10(probability((), '<unk>')):.7f}\t<unk>"]
    for context in sorted(counts):
        for word in sorted(counts[context]):
            gram = (*context, word)
            line = f"{math.log10(probability(context, word)):.7f}\t{' '.join(gram)}"
            if gram in counts and len(gram) < order:
                line += f"\t{math.log10(backoff(gram)):.7f}"
            sections[len(context)].append(line)
    head = [f"ngram {n}={len(lines)}" for n, lines in enumerate(sections, start=1)]
    body = [f"\n\\{n}-grams:\n" + "\n".join(lines) for n, lines in enumerate(sections, start=1)]
    return "\n".join(["\\data\\", *head, *body, "\n\\end\\\n"])


def recall(folder: Path, run: Path) -> str:
    """Return the share of the hotwords in ``listed.jsonl`` that a run recognized, in words."""
    phrases = (folder / "hotwords.txt").read_text().splitlines()
    lines = (run / "errors" / "listed.jsonl").read_text().splitlines()
    num_spoken = num_found = 0
    for row in map(json.loads, lines):
        there = [phrase for phrase in phrases if phrase in row["reference"]]
        num_spoken += len(there)
        num_found += sum(f" {phrase} " in f" {row['hypothesis']} " for phrase in there)
    return f"{num_found} of {num_spoken} hotwords, {100 * num_found / num_spoken:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("make", "recall"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", type=Path, nargs="*", help="run folders of transducer-evaluate")
    args = parser.parse_args()
    if args.action == "make":
        make(args.folder)
    for run in args.runs:
        print(f"{run}: {recall(args.folder, run)}")


if __name__ == "__main__":
    main()
