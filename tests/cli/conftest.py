# SPDX-License-Identifier: Apache-2.0
"""A corpus of tones: one pitch a letter, short enough to train on in seconds."""

import functools
import itertools
import logging
import random
import sys

import numpy as np
import pytest
import soundfile
from hydra import compose
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore

from transducer_toolkit.cli import component_arguments
from transducer_toolkit.data.manifest import Utterance, write_manifest

SAMPLE_RATE = 16000
PITCH_HZ = {"a": 300.0, "b": 700.0, "c": 1500.0}
LETTER_S = 0.12
# To draw them takes as long as the rest of a training.
WITHOUT_PICTURES = ("~callbacks.learning_curves", "~callbacks.utterance_picture")


def tone_waveform(text, rng):
    """LETTER_S a letter, silence for a space, a little noise over everything."""
    times = np.arange(int(LETTER_S * SAMPLE_RATE)) / SAMPLE_RATE
    parts = [
        0.3 * np.sin(2 * np.pi * PITCH_HZ[letter] * times) if letter != " " else 0 * times
        for letter in text
    ]
    waveform = np.concatenate(parts)
    return (waveform + 0.003 * rng.standard_normal(len(waveform))).astype(np.float32)


def word_starts(text):
    """Where the words of a text of tones start, seconds."""
    letters = itertools.accumulate((len(word) + 1 for word in text.split()), initial=0)
    return [LETTER_S * first for first in letters][:-1]


def write_tones(folder):
    """Make the corpus: audio and ``train.jsonl``, ``val.jsonl``, ``test.jsonl`` in ``folder``."""
    folder.mkdir(exist_ok=True)
    rng, choices = np.random.default_rng(0), random.Random(0)
    for name, size in {"train": 32, "val": 5, "test": 6}.items():
        rows = []
        for index in range(size):
            text = " ".join(
                "".join(choices.choices("abc", k=choices.randint(1, 3)))
                for _ in range(choices.randint(1, 3))
            )
            waveform = tone_waveform(text, rng)
            audio = folder / f"{name}-{index}.wav"
            soundfile.write(audio, waveform, SAMPLE_RATE)
            rows.append(
                Utterance(
                    id=audio.stem,
                    audio=str(audio),
                    duration_s=len(waveform) / SAMPLE_RATE,
                    text=text,
                    word_starts_s=word_starts(text) if name == "test" else None,
                )
            )
        write_manifest(folder / f"{name}.jsonl", rows)


def with_pictures(overrides):
    return [text for text in overrides if text not in WITHOUT_PICTURES]


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """Folder of the corpus."""
    folder = tmp_path_factory.mktemp("tones")
    write_tones(folder)
    return folder


@pytest.fixture(scope="session")
def data_overrides(tones):
    return [
        "data=manifest",
        f"data.corpus.train={tones}/train.jsonl",
        f"data.corpus.val={tones}/val.jsonl",
        f"+data.corpus.test.tones={tones}/test.jsonl",
        "data.num_workers=0",
        "data.max_utterances=8",
    ]


@pytest.fixture(scope="session")
def train_overrides(data_overrides):
    return [
        *data_overrides,
        "~experiment",
        "model.encoder.conv_channels=4",
        "model.encoder.hidden_dim=16",
        "model.predictor.embedding_dim=8",
        "model.joiner.joiner_dim=16",
        "trainer.max_epochs=2",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1",
        "num_threads=1",
        "max_symbols_per_frame=3",  # an untrained model writes as many as it may
        *WITHOUT_PICTURES,
    ]


@functools.cache
def composed(config_name, *overrides):
    return compose(config_name, list(overrides))


def compose_for_signs(config_name, overrides):
    """Compose a config once for the same options, unless they are of a test or of a checkpoint."""
    if any(text.startswith(("hydra.searchpath", "data=checkpoint")) for text in overrides):
        return compose(config_name, overrides)
    return composed(config_name, *overrides)


@pytest.fixture(scope="session")
def console():
    """Run a console script in this process: ``console(main, folder, *arguments)``.

    A command composes its config three times, which takes as long as a short training. Here the
    config in which it looks for the arguments of components is composed once for the same options
    of groups, and Hydra does not compose one to look for ``hydra.mode``, which no test sets.
    """

    def run(main, folder, *arguments):
        root = logging.getLogger()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(component_arguments, "compose", compose_for_signs)
            if not any("hydra.mode" in str(argument) for argument in arguments):
                patch.setattr(Hydra, "get_mode", lambda self, config_name, overrides: None)
            # Hydra adds handlers, which would print the messages of later tests.
            patch.setattr(root, "handlers", root.handlers[:])
            patch.setattr(root, "level", root.level)
            patch.chdir(folder)
            patch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
            patch.setenv("TRANSDUCER_TOOLKIT_RUN_ID", "run")
            try:
                return main()
            finally:  # transducer-evaluate makes a checkpoint's data an option of the process
                ConfigStore.instance().repo.get("data", {}).pop("checkpoint.yaml", None)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, console, train_overrides):
    """The run folder of a finished training, with pictures."""
    from transducer_toolkit.cli.train import main

    folder = tmp_path_factory.mktemp("trained")
    console(main, folder, *with_pictures(train_overrides), "name=tones")
    return folder / "outputs" / "tones" / "run"
