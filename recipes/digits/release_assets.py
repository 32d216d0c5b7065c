# SPDX-License-Identifier: Apache-2.0
"""Writes the trained model of the default recipe as files for a release.

    python recipes/digits/release_assets.py               # trains first, as make train does
    python recipes/digits/release_assets.py --run FOLDER  # takes the best checkpoint of this run

The files are digits.ckpt (weights, symbols and model, without the optimizer's state), digits.md
(what it is, its error rates, how to use it) and SHA256SUMS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from transducer_toolkit import __version__
from transducer_toolkit.cli.average import average_checkpoints
from transducer_toolkit.inference import Recognizer
from transducer_toolkit.inference.recognizer import CHECKPOINT_KEY

NAME = "digits.ckpt"
CARD = """# {name}

A small RNN-Transducer that recognizes spoken English digits ("three one four"). It shows what
transducer_toolkit does in a few minutes of training on two CPU cores; it is no recognizer for
other words.

| | |
|---|---|
| model | `{model}`, {parameters:.2f} million parameters, {mib:.1f} MiB, 16 kHz audio |
| symbols | {symbols} |
| training data | speech of espeak-ng, synthesized by the recipe `data=digits`; no recordings |
| training | {steps} steps in {seconds:.0f} s, transducer_toolkit {version} |
| SHA-256 | `{sha256}` |

Word error rates of the training's last test:

| test set | WER |
|---|---|
{rows}

```bash
transducer-transcribe --checkpoint {name} recording.wav
```

```python
from transducer_toolkit.inference import Recognizer

recognizer = Recognizer.from_pretrained("{name}", sha256="{sha256}")
```

License: Apache-2.0, as the toolkit. Limits: voices unlike those of the training, noise, and speech
that is not digits are recognized badly. The recipe was developed with the results on `asterisk`,
one speaker, in view; recordings of other people have more errors.
"""


def best_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run, which is not its last."""
    found = [path for path in (run / "checkpoints").glob("*.ckpt") if path.stem != "last"]
    if not found:
        raise SystemExit(f"error: no best checkpoint in {run / 'checkpoints'}")
    return max(found, key=lambda path: path.stat().st_mtime)


def write_assets(run: Path, output: Path) -> list[Path]:
    """Writes the files; returns their paths."""
    results: dict[str, Any] = json.loads((run / "results.json").read_text())
    checkpoint = average_checkpoints([str(best_checkpoint(run))])
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {
        name: value for name, value in weights.items() if name.startswith("model.")
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / NAME
    torch.save(checkpoint, path)
    recognizer = Recognizer.from_checkpoint(path)  # it must be complete
    recipe = checkpoint[CHECKPOINT_KEY]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    symbols = [symbol for symbol in recognizer.tokenizer.symbols if symbol.strip()]
    card = output / "digits.md"
    card.write_text(
        CARD.format(
            name=NAME,
            model=recipe["model"]["encoder"]["_target_"].rpartition(".")[2],
            parameters=sum(x.numel() for x in recognizer.model.parameters()) / 1e6,
            mib=path.stat().st_size / 2**20,
            symbols=f"{recognizer.tokenizer.vocab_size}: {' '.join(symbols)}",
            steps=results["optimizer_steps"],
            seconds=results["training_s"],
            version=__version__,
            sha256=sha256,
            rows="\n".join(f"| {name} | {wer:.2%} |" for name, wer in results["test_wer"].items()),
        )
    )
    sums = output / "SHA256SUMS"
    of_card = hashlib.sha256(card.read_bytes()).hexdigest()
    sums.write_text(f"{sha256}  {NAME}\n{of_card}  {card.name}\n")
    return [path, card, sums]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a finished transducer-train")
    parser.add_argument("--output", type=Path, default=Path("dist/release"))
    options = parser.parse_args(arguments)
    run = options.run
    if run is None:
        run = Path("build/release/run")
        train = [sys.executable, "-m", "transducer_toolkit.cli.train", f"run_dir={run}"]
        subprocess.run(train, check=True)
    for path in write_assets(run, options.output):
        print(f"{path}: {path.stat().st_size / 2**10:,.1f} KiB")


if __name__ == "__main__":
    main()
