# SPDX-License-Identifier: Apache-2.0
"""A small corpus of noise: enough for everything but recognition."""

import numpy as np
import pytest
import soundfile

from transducer_toolkit.data.manifest import Utterance, write_manifest

SAMPLE_RATE = 16000


@pytest.fixture(scope="session")
def noise_corpus(tmp_path_factory):
    """Folder with ``train.jsonl`` (12 utterances), ``val.jsonl`` (5) and ``test.jsonl`` (3)."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for name, size in {"train": 12, "val": 5, "test": 3}.items():
        rows = []
        for index in range(size):
            num_samples = int(rng.integers(4000, 16000))
            audio = folder / f"{name}-{index}.wav"
            soundfile.write(audio, 0.1 * rng.standard_normal(num_samples), SAMPLE_RATE)
            text = " ".join(rng.choice(["one", "two", "six"], rng.integers(1, 4)))
            duration_s = num_samples / SAMPLE_RATE
            rows.append(
                Utterance(id=audio.stem, audio=str(audio), duration_s=duration_s, text=text)
            )
        write_manifest(folder / f"{name}.jsonl", rows)
    return folder
