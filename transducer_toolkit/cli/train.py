# SPDX-License-Identifier: Apache-2.0
"""``transducer-train``: train a transducer from a Hydra config, then test it."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transducer_toolkit.cli import hydra_command, resume

if TYPE_CHECKING:
    from lightning import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from omegaconf import DictConfig

    from transducer_toolkit.data.datamodule import TransducerDataModule
    from transducer_toolkit.decoding import Search
    from transducer_toolkit.training.lightning_module import TransducerModule

logger = logging.getLogger(__name__)


def main() -> None:
    """Entry point."""
    hydra_command.run("train", train)


def train(cfg: DictConfig) -> float | None:
    """Train and test as ``conf/train.yaml`` describes.

    Args:
        cfg: the composed config.

    Returns:
        The best validation WER (a fraction), or None without a validation.
    """
    # Late imports keep --help, --cfg and shell completion fast.
    import torch
    from hydra.utils import instantiate
    from lightning import seed_everything

    from transducer_toolkit.cli.output import quiet_lightning
    from transducer_toolkit.training.callbacks.clock import StepClock

    quiet_lightning()
    _check_options(cfg)
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    if cfg.flush_denormal:  # before the first parallel region, whose threads copy the setting
        torch.set_flush_denormal(True)
    seed_everything(cfg.seed, workers=True, verbose=False)

    # The data decide the vocabulary and so the model's sizes. Its encoder then decides which
    # utterances have a path, and the sizes of lattices.
    ckpt_path = resume.find_checkpoint(cfg.ckpt_path, Path(cfg.run_dir), name=cfg.name)
    datamodule = instantiate(cfg.data, _convert_="all")
    datamodule.prepare_data()
    module = build_module(cfg, datamodule)
    datamodule.num_output_frames = module.model.encoder.num_output_frames
    datamodule.setup("fit")
    if cfg.init_from is not None and ckpt_path is None:
        start_from(module, cfg.init_from)

    if ckpt_path is not None:
        logger.info("resuming from %s", ckpt_path)
        resume.keep_metrics(Path(cfg.run_dir))
    clock = StepClock()
    averaging = [instantiate(cfg.averaging, _convert_="all")] if cfg.averaging else []
    trainer = instantiate(
        cfg.trainer,
        callbacks=[clock, *averaging, *instantiate(cfg.callbacks, _convert_="all").values()],
        logger=list(instantiate(cfg.logger, _convert_="all").values()),
        _convert_="all",
    )
    _refuse_processes_in_sweep(trainer)
    num_parameters = sum(p.numel() for p in module.parameters())
    logger.info("%.2f M parameters, run folder %s", num_parameters / 1e6, cfg.run_dir)

    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    checkpoints = _best_checkpoints(trainer)
    score = checkpoints.best_model_score if checkpoints is not None else None
    best_wer = None if score is None else float(score)
    if cfg.test:
        best_path = checkpoints.best_model_path if checkpoints is not None else ""
        trainer.test(module, datamodule=datamodule, ckpt_path=best_path or None, verbose=False)

    if trainer.is_global_zero:
        report = {
            "seed": cfg.seed,
            "best_validation_wer": best_wer,
            "optimizer_steps": trainer.global_step,
            "seconds_per_step": round(clock.seconds_per_step, 4),
            "loss_part_of_step": round(clock.loss_part, 4),
            "peak_memory_mib": round(clock.peak_memory_mib, 1),
            "training_s": round(clock.training_s, 1),
        }
        _report(module, trainer, cfg, report)
    return best_wer


def _check_options(cfg: DictConfig) -> None:
    """Check options whose own errors would not name the Hydra key."""
    from transducer_toolkit.cli.removed_keys import refuse_removed_keys
    from transducer_toolkit.ops.checks import (
        check_at_least,
        check_flag,
        check_int,
        check_number,
    )
    from transducer_toolkit.ops.topology import get_topology

    refuse_removed_keys(cfg)
    check_at_least(0, seed=cfg.seed)
    if cfg.seed >= 2**32:
        raise ValueError(f"seed must be below 2^32, got {cfg.seed}")
    if cfg.num_threads is not None:
        check_at_least(1, num_threads=cfg.num_threads)
    check_at_least(1, max_symbols_per_frame=cfg.max_symbols_per_frame)
    check_number(cfg.ctc.weight, "ctc.weight")
    if not 0 <= cfg.ctc.weight < float("inf"):
        raise ValueError(f"ctc.weight must be at least 0 and finite, got {cfg.ctc.weight}")
    for name in ("flush_denormal", "test"):
        check_flag(cfg[name], name)
    for name in ("max_epochs", "max_steps"):
        if cfg.trainer.get(name) is not None:
            check_int(cfg.trainer[name], f"trainer.{name}")
    if "accumulate_grad_batches" in cfg.trainer:
        accumulated = cfg.trainer.accumulate_grad_batches
        check_at_least(1, **{"trainer.accumulate_grad_batches": accumulated})
    if "topology" in cfg.loss:  # data.topology follows it, and its error would name that key
        get_topology(cfg.loss.topology, "loss.topology")


def build_module(cfg: DictConfig, datamodule: TransducerDataModule) -> TransducerModule:
    """Build the model for the vocabulary of the data, with loss, optimizer and schedule.

    Args:
        cfg: the composed config.
        datamodule: its corpus is prepared; it makes the tokenizer.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from transducer_toolkit.inference.recognizer import recognizer_recipe
    from transducer_toolkit.ops.topology import TOPOLOGIES
    from transducer_toolkit.training.ctc import CtcLoss
    from transducer_toolkit.training.lightning_module import TransducerModule

    tokenizer = datamodule.made_tokenizer()
    model_config: Any = OmegaConf.to_container(cfg.model, resolve=True)
    model_config |= {"vocab_size": tokenizer.vocab_size, "blank": tokenizer.blank}
    loss = instantiate(cfg.loss, blank=tokenizer.blank, _convert_="all")
    if loss.joiner_target is not None:
        model_config["joiner"] = {"_target_": loss.joiner_target, "_partial_": True}
    shares = TOPOLOGIES[loss.topology].labels_share_frames
    recipe = recognizer_recipe(
        model_config,
        tokenizer,
        datamodule.fbank,
        max_symbols_per_frame=cfg.max_symbols_per_frame if shares else 1,
        topology=loss.topology,
    )
    model = instantiate(model_config, _convert_="all")
    ctc = None
    if cfg.ctc.weight != 0:
        ctc = CtcLoss(
            model.encoder.output_dim,
            blank=tokenizer.blank,
            vocab_size=tokenizer.vocab_size,
            weight=cfg.ctc.weight,
        )
    return TransducerModule(
        model,
        tokenizer,
        loss=loss,
        ctc=ctc,
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        scheduler=instantiate(cfg.scheduler, _convert_="all"),
        recipe=recipe,
        search=make_search(cfg.search, cfg.max_symbols_per_frame),
    )


def make_search(cfg: DictConfig, max_symbols_per_frame: int) -> Callable[..., Search]:
    """Return what makes the search of ``cfg.search``.

    Args:
        cfg: an option of the group ``search``.
        max_symbols_per_frame: for a search whose own is null.
    """
    from hydra.utils import instantiate

    if cfg.get("max_symbols_per_frame", 0) is None:
        cfg.max_symbols_per_frame = max_symbols_per_frame
    return instantiate(cfg, _convert_="all")


def start_from(module: TransducerModule, path: str) -> None:
    """Load weights from a checkpoint of another training, of any loss, where name and size match.

    Args:
        module: the module whose model and loss stage get the weights.
        path: a checkpoint of ``transducer-train``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a checkpoint, or no weight matches.
    """
    from transducer_toolkit.inference.recognizer import CHECKPOINT_KEY, load_checkpoint

    checkpoint = load_checkpoint(path)
    own, other = module.state_dict(), checkpoint["state_dict"]
    fitting = {
        name: value
        for name, value in other.items()
        if name in own and own[name].shape == value.shape
    }
    if not fitting:
        raise ValueError(f"{path}: no weight has the name and size of one of this model")
    module.load_state_dict(fitting, strict=False)
    symbols = checkpoint[CHECKPOINT_KEY]["symbols"]
    if symbols != list(module.tokenizer.symbols):
        logger.warning("the symbols of %s are not those of this model: %s", path, symbols)
    logger.info("%d of %d weights taken over from %s", len(fitting), len(own), path)
    for what, names in (
        ("not in the checkpoint, or of another size", sorted(own.keys() - fitting.keys())),
        ("in the checkpoint, but not used", sorted(other.keys() - fitting.keys())),
    ):
        if names:
            logger.warning("%s: %s", what, ", ".join(names))


def _refuse_processes_in_sweep(trainer: Trainer) -> None:
    """Raise an error in a sweep if Lightning would start processes.

    They repeat the command line, so each would run the whole sweep.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    launcher = trainer.strategy.launcher
    environment = getattr(launcher, "cluster_environment", None)
    if in_sweep and environment is not None and not environment.creates_processes_externally:
        raise ValueError(
            "--multirun cannot start the processes of trainer=ddp: use one device a job "
            "(trainer=default), or a Hydra launcher that starts the processes itself, such as "
            "hydra-submitit-launcher"
        )


def _best_checkpoints(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the callback that keeps the best checkpoint, or None."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    found = (it for it in trainer.checkpoint_callbacks if isinstance(it, ModelCheckpoint))
    return next(found, None)


def _report(module: Any, trainer: Any, cfg: DictConfig, report: dict[str, Any]) -> None:
    """Print results and paths; write the results to results.json."""
    from transducer_toolkit.cli.output import print_word_errors, write_transcripts

    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    report["test_wer"] = {name: errors.wer for name, errors in module.test_errors.items()}
    report["symbol_delay_ms"] = {
        name: delay and {"mean": delay.mean_ms, "median": delay.median_ms, "words": delay.num_words}
        for name, delay in module.test_symbol_delays.items()
    }
    (run_dir / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    if module.test_errors:
        write_transcripts(run_dir / "transcripts", module.test_transcripts)
        print_word_errors(module.test_errors, module.test_symbol_delays)
    print(
        f"{report['optimizer_steps']} steps in {report['training_s']:.0f} s, "
        f"{1000 * report['seconds_per_step']:.0f} ms a step"
    )
    checkpoint = getattr(_best_checkpoints(trainer), "best_model_path", "")
    found = {
        "checkpoint": Path(checkpoint) if checkpoint else None,
        "pictures": run_dir / "pictures",
        "transcripts": run_dir / "transcripts",
        "metrics": run_dir / "metrics",
        "results": run_dir / "results.json",
    }
    for name, path in found.items():
        if path is not None and path.exists():
            print(f"{name:12s} {_relative(path)}")
    if checkpoint:
        shown = shlex.quote(str(_relative(Path(checkpoint))))
        command = f"transducer-transcribe --checkpoint {shown}"
        print(f"\ntry it:  {command} FILE.wav")


def _relative(path: Path) -> Path:
    """Return the path relative to the working directory if it lies below it."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    main()
