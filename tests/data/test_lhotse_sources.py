# SPDX-License-Identifier: Apache-2.0
"""A manifest of cuts is data: no shell, no network, unless the user says so."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import soundfile
from lhotse import CutSet, MonoCut
from lhotse.audio import AudioSource

from tests.cuts import write_cuts
from transducer_toolkit.data.corpus import ManifestCorpus
from transducer_toolkit.data.lhotse_datamodule import LhotseDataModule
from transducer_toolkit.data.lhotse_sources import check_audio_sources


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where commands would run: a manifest of 8 cuts, the same as shards."""
    write_cuts(tmp_path, 8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def batches(path, **options):
    corpus = ManifestCorpus(train=path, val=path, test={"all": path})
    if path.is_dir():
        options["steps_per_epoch"] = 1
    data = LhotseDataModule(
        corpus=corpus, max_cells=800, num_buckets=1, num_output_frames=lambda n: n // 4, **options
    )
    data.setup()
    return list(data.train_dataloader())


def rewrite(path, change):
    """Change the JSON of each row of a manifest."""
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        change(row)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def source(type_, text):
    return {"type": type_, "channels": [0], "source": text}


def set_source(type_, text):
    def change(row):
        row["recording"]["sources"] = [source(type_, text.format(row["id"]))]

    return change


def reverberate(rir_source):
    """A recording whose transform reads another one."""

    def change(row):
        rir = {"id": "room", "sampling_rate": 16000, "num_samples": 800, "duration": 0.05}
        row["recording"]["transforms"] = [
            {
                "name": "ReverbWithImpulseResponse",
                "kwargs": {"rir": rir | {"sources": [rir_source]}},
            }
        ]

    return change


COMMAND = "touch exploded; cat {}.wav"


def test_a_command_runs_only_if_allowed(folder):
    path = folder / "train.jsonl.gz"
    rewrite(path, set_source("command", COMMAND))
    with pytest.raises(ValueError, match=r"cut 'c\d': its audio is of type 'command' \('touch ex"):
        batches(path)
    assert not Path("exploded").exists()
    assert batches(path, audio_sources=["file", "command"])
    assert Path("exploded").exists()  # it would


def test_a_command_hidden_in_a_transform(folder):
    path = folder / "train.jsonl.gz"
    rewrite(path, reverberate(source("command", "touch exploded; cat c0.wav")))
    with pytest.raises(ValueError, match="is of type 'command'"):
        batches(path)
    assert not Path("exploded").exists()
    with pytest.raises(ValueError, match="declared samples"):  # as c0 is longer, but it has run
        batches(path, audio_sources=["file", "command"])
    assert Path("exploded").exists()


def test_a_command_in_an_archive(folder):
    """What an archive says of a recording replaces what the manifest beside it says."""
    change = reverberate(source("command", "touch exploded; cat c0.wav"))
    for path in (folder / "shar").glob("recording.*.tar"):
        with tarfile.open(path) as old:
            members = [(member, old.extractfile(member).read()) for member in old]
        with tarfile.open(path, "w") as new:
            for member, content in members:
                if member.name.endswith(".json"):
                    row = {"recording": json.loads(content)}
                    change(row)
                    content = json.dumps(row["recording"]).encode()
                    member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="is of type 'command'"):
        batches(folder / "shar")
    assert not Path("exploded").exists()
    with pytest.raises(ValueError, match="declared samples"):
        batches(folder / "shar", audio_sources=["memory", "command"])
    assert Path("exploded").exists()


def test_a_command_in_a_track(folder):
    first, second = CutSet.from_file(folder / "train.jsonl.gz").subset(first=2)
    second.recording.sources[0] = AudioSource("command", [0], "touch exploded")
    with pytest.raises(ValueError, match="is of type 'command'"):
        check_audio_sources(first.append(second))
    check_audio_sources(first.append(first).pad(duration=30.0))


def test_skipping_bad_audio_does_not_run_it(folder):
    path = folder / "train.jsonl.gz"
    rewrite(path, set_source("command", COMMAND))
    with pytest.raises(ValueError, match=r"none of the \d cuts of a batch can be read"):
        batches(path, on_bad_audio="skip")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        ("url", "http://127.0.0.1:9/a.wav"),
        ("file", "http://127.0.0.1:9/a.wav"),
        ("file", "pipe:ls"),
    ],
)
def test_nothing_is_fetched(folder, type_, text):
    path = folder / "train.jsonl.gz"
    rewrite(path, set_source(type_, text))
    with pytest.raises(ValueError, match=r"is of type 'url'|no audio file at"):
        batches(path)


@pytest.mark.parametrize("name", ["a;touch exploded;.sph", "a'; touch exploded; '.opus"])
def test_a_name_that_a_shell_would_run(folder, name, monkeypatch):
    monkeypatch.setenv("LHOTSE_LEGACY_OPUS_LOADING", "1")
    samples, rate = soundfile.read("c0.wav")
    soundfile.write(name, samples, rate, format="WAV")
    path = folder / "train.jsonl.gz"
    rewrite(path, set_source("file", name))
    with pytest.raises(ValueError, match="Lhotse gives such names to a shell"):
        batches(path)
    assert not Path("exploded").exists()


def test_a_member_of_an_archive_is_a_file(folder):
    """Recordings as Lhotse names those of a tar file."""
    member = sorted((folder / "shar").glob("recording.*.tar"))[0]
    cut = next(iter(CutSet.from_file(folder / "train.jsonl.gz")))
    cut.recording.sources[0].source = f"{member}/c0.wav"
    check_audio_sources(cut)
    cut.recording.sources[0].source = f"{folder}/none.tar/c0.wav"
    with pytest.raises(ValueError, match=r"no audio file at '.*none\.tar/c0\.wav'"):
        check_audio_sources(cut)


def test_unknown_types_are_refused(folder):
    with pytest.raises(ValueError, match=r"audio_sources must be some of .*, got \['pipe'\]"):
        batches(folder / "train.jsonl.gz", audio_sources=["pipe"])
    cut = next(iter(CutSet.from_file(folder / "train.jsonl.gz")))
    assert isinstance(cut, MonoCut)
    cut.recording.sources[0].type = "other"
    with pytest.raises(ValueError, match="its audio is of type 'other'"):
        check_audio_sources(cut)
