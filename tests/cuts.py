# SPDX-License-Identifier: Apache-2.0
"""Lhotse's cuts of noise: as a manifest, as shards and as a manifest of ours."""

import numpy as np
import soundfile
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from transducer_toolkit.data.manifest import Utterance, write_manifest


def write_cuts(folder, num_cuts):
    """Write ``train.jsonl.gz``, the same in ``shar`` and ``train.jsonl``; ``val.jsonl.gz`` (4)."""
    rng = np.random.default_rng(0)
    rows, made = [], []
    for number in range(num_cuts):
        id_ = f"c{number}"
        num_samples = int(rng.integers(4000, 12000))
        path = folder / f"{id_}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(num_samples), 16000)
        text = " ".join(rng.choice(["one", "two", "six"], rng.integers(1, 4)))
        recording = Recording.from_file(path, recording_id=id_)
        duration_s = recording.duration
        segment = SupervisionSegment(id_, id_, 0.0, duration_s, text=text)
        made.append(MonoCut(id_, 0.0, duration_s, 0, [segment], recording=recording))
        rows.append(Utterance(id=id_, audio=str(path), duration_s=duration_s, text=text))
    write_manifest(folder / "train.jsonl", rows)
    cuts = CutSet.from_cuts(made)
    cuts.to_file(folder / "train.jsonl.gz")
    cuts.subset(first=4).to_file(folder / "val.jsonl.gz")
    (folder / "shar").mkdir()
    cuts.to_shar(folder / "shar", fields={"recording": "wav"}, shard_size=5)
