# SPDX-License-Identifier: Apache-2.0
"""Every example runs, and does what its page says."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from tests.cli.conftest import WITHOUT_PICTURES, write_tones
from tests.fork_server import python

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "from_torchaudio.ipynb"
TINY_TRAINING = [
    "data=manifest", "data.corpus.train=tones/train.jsonl", "data.corpus.val=tones/val.jsonl",
    "data.num_workers=0", "model.encoder.conv_channels=4", "model.encoder.hidden_dim=16",
    "model.predictor.embedding_dim=8", "model.joiner.joiner_dim=16", "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "num_threads=1",
]  # fmt: skip


@pytest.fixture
def example(monkeypatch):
    """Imports a script of the folder."""

    def load(name, folder=EXAMPLES):
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_every_example_is_in_the_readme_and_here():
    scripts = {str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*.py")}
    own = {"plain_loop.py", "custom_joiner.py", "microphone.py"}
    folders = {"custom_encoder/gru_encoder.py", "custom_loss/confidence_penalty.py"}
    assert scripts == own | folders
    linked = re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text())
    assert scripts <= set(linked) and NOTEBOOK.name in linked


def test_the_plain_loop_learns_to_write_symbols_down(example, capsys):
    loss, errors = example("plain_loop").main()
    assert loss < 0.1 and errors < 0.15
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step   0: ") and "backward visits" in said[0]
    assert said[-1].startswith("new utterances: ")


class FakeMicrophone:
    """The part of sounddevice that the example uses, which hears a waveform."""

    def __init__(self, waveform):
        self.waveform = waveform

    def InputStream(self, *, samplerate, channels, callback, blocksize, dtype):
        assert (samplerate, channels, dtype) == (16000, 1, "float32")
        self.pieces = iter(self.waveform.split(blocksize))
        self.callback = callback
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    @property
    def active(self):
        piece = next(self.pieces, None)
        if piece is not None:
            self.callback(piece.numpy()[:, None], len(piece), None, None)
        return piece is not None


def test_the_microphone_writes_what_the_file_does(example, tmp_path, monkeypatch, capsys):
    from tests.test_documentation import write_recognizer
    from transducer_toolkit.inference import Recognizer

    torch.manual_seed(0)
    checkpoint, path = tmp_path / "best.ckpt", tmp_path / "talk.wav"
    write_recognizer(checkpoint)
    waveform = (0.1 * torch.randn(50000)).clamp(-1, 1)
    soundfile.write(path, waveform.numpy(), 16000, subtype="FLOAT")
    microphone = example("microphone")
    lines = microphone.main([str(checkpoint), "--file", str(path), "--pause-s", "100"])
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in lines)
    assert lines == Recognizer.from_checkpoint(checkpoint).transcribe([waveform])
    assert len(lines[0]) > 5

    monkeypatch.setitem(sys.modules, "sounddevice", FakeMicrophone(waveform))
    assert microphone.main([str(checkpoint), "--pause-s", "100"]) == lines
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(SystemExit, match=r"needs sounddevice .*or give --file"):
        microphone.main([str(checkpoint)])


def test_the_custom_joiner_fits_its_batch(example):
    first, last = example("custom_joiner").main()
    assert first > 50 and last < 5


def test_the_custom_joiner_suits_loss_stages_and_searches(example):
    from transducer_toolkit import LatticeShape
    from transducer_toolkit.decoding import BeamSearch, GreedySearch
    from transducer_toolkit.modules import StatelessPredictor
    from transducer_toolkit.training.stages import FullLoss, LossInput, PackedLoss

    torch.manual_seed(0)
    joiner = example("custom_joiner").GatedJoiner(8, 6, 16, 5)
    predictor = StatelessPredictor(5, embedding_dim=6)
    shape = LatticeShape.from_lengths([4, 3], [2, 1])
    targets = torch.tensor([[1, 4], [2, 1]])
    batch = LossInput(joiner, torch.randn(2, 4, 8), predictor(targets), targets, shape)
    packed, full = (stage(batch).losses for stage in (PackedLoss(), FullLoss()))
    torch.testing.assert_close(packed, full)
    for search in (GreedySearch, BeamSearch):
        assert len(search(predictor, joiner)(batch.encoder_out, shape.logit_lengths)) == 2


def test_the_custom_loss_is_the_packed_loss_and_the_entropy(example):
    from transducer_toolkit import LatticeShape
    from transducer_toolkit.modules import Joiner
    from transducer_toolkit.training.stages import LossInput, PackedLoss

    torch.manual_seed(0)
    module = example("confidence_penalty", EXAMPLES / "custom_loss")
    shape = LatticeShape.from_lengths([4, 3], [2, 1])
    joiner = Joiner(8, 6, 16, 5)
    encoder_out, predictor_out = torch.randn(2, 4, 8), torch.randn(2, 3, 6)
    batch = LossInput(joiner, encoder_out, predictor_out, torch.tensor([[1, 4], [2, 0]]), shape)
    losses, metrics = module.ConfidencePenaltyLoss(weight=0.3)(batch)
    entropy = torch.distributions.Categorical(logits=joiner(encoder_out, predictor_out, shape))
    first, second = entropy.entropy().split([12, 6])
    expected = torch.stack([first.sum() / 3, second.sum() / 2])
    torch.testing.assert_close(losses, PackedLoss()(batch).losses - 0.3 * expected)
    torch.testing.assert_close(metrics["entropy"], entropy.entropy().mean())


def test_the_custom_loss_trains_from_the_command_line(tmp_path, monkeypatch):
    write_tones(tmp_path / "tones")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES / "custom_loss"), str(ROOT)]))

    def train(*options):
        command = [python(), "-m", "transducer_toolkit.cli.train", *TINY_TRAINING, *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    conf = ["--config-dir", str(EXAMPLES / "custom_loss" / "conf"), "loss=confidence_penalty"]
    done = train(*conf, "loss.weight=0.05", "loss.topology=modified", "name=own")
    assert done.returncode == 0, done.stderr
    (checkpoint,) = tmp_path.glob("outputs/own/*/checkpoints/best.ckpt")
    assert torch.load(checkpoint, weights_only=True)["recognizer"]["topology"] == "modified"
    (metrics,) = tmp_path.glob("outputs/own/*/metrics/metrics.csv")
    assert "train/entropy" in metrics.read_text().splitlines()[0]


def test_the_custom_encoder_keeps_padding_out(example):
    encoder = example("gru_encoder", EXAMPLES / "custom_encoder").GruEncoder(hidden_dim=8).eval()
    features, lengths = torch.randn(3, 21, 80), torch.tensor([21, 14, 1])
    features[1, 14:] = torch.nan
    encoder_out, encoder_lengths = encoder(features, lengths)
    assert encoder_out.shape == (3, 6, 16) and encoder_lengths.tolist() == [6, 4, 1]
    assert torch.isfinite(encoder_out).all()
    for row, length in enumerate(lengths.tolist()):
        alone, _ = encoder(features[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone[0], encoder_out[row, : alone.size(1)])


def test_the_custom_encoder_trains_and_decodes_from_the_command_line(tmp_path):
    tones = tmp_path / "tones"
    write_tones(tones)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES / "custom_encoder"), str(ROOT)]),
        "TRANSDUCER_TOOLKIT_RUN_ID": "run",
    }

    def run(executable, name, *arguments):
        command = [executable, "-m", f"transducer_toolkit.cli.{name}", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # Not a fork: the line to try names the folder of the interpreter.
    trained = run(
        sys.executable, "train", "--config-dir", EXAMPLES / "custom_encoder" / "conf",
        "model/encoder=gru", "model.encoder.hidden_dim=8", "data=manifest", "name=gru",
        f"data.corpus.train={tones}/train.jsonl", f"data.corpus.val={tones}/val.jsonl",
        f"data.corpus.test.tones={tones}/test.jsonl", "data.num_workers=0",
        "trainer.max_epochs=1", "trainer.accelerator=cpu", "num_threads=1", *WITHOUT_PICTURES,
    )  # fmt: skip
    (line,) = [line for line in trained.splitlines() if line.startswith("try it:")]
    command, *options, wave = line.split()[2:]
    checkpoint = "outputs/gru/run/checkpoints/best.ckpt"
    assert options == ["--checkpoint", checkpoint, "--trust-package", "gru_encoder"]
    assert Path(command).name == "transducer-transcribe"
    assert Path(command).is_file() or shutil.which(command)
    assert wave == "tones/test-0.wav"
    said = run(python(), "transcribe", *options, wave)
    assert said.startswith(f"{wave}\t")


def notebook_cells():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [(cell, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    pytest.importorskip("torchaudio")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    names = {}
    for _, source in notebook_cells():
        exec(compile(source, NOTEBOOK.name, "exec"), names)
    peaks = names["peaks"]
    assert peaks["fused"] < peaks["packed"] < peaks["torchaudio"]
    for loss in names["losses"].values():
        assert loss == pytest.approx(names["losses"]["torchaudio"], rel=1e-5)


def test_the_notebook_was_run_in_order_before_it_was_committed():
    cells = [cell for cell, _ in notebook_cells()]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {kind for cell in cells for out in cell["outputs"] for kind in out.get("data", {})}
    assert "image/png" in kinds and any(cell["outputs"] for cell in cells)
    errors = [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    assert not errors
    assert NOTEBOOK.stat().st_size < 200_000
