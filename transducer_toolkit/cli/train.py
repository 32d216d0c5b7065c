# SPDX-License-Identifier: Apache-2.0
"""``transducer-train``: train a transducer from a Hydra config, then test it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transducer_toolkit.cli import hydra_command, last_line
from transducer_toolkit.cli.console import trust_option

if TYPE_CHECKING:
    from lightning import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from omegaconf import DictConfig

    from transducer_toolkit.data.datamodule import TransducerDataModule
    from transducer_toolkit.data.tokenizer import Tokenizer
    from transducer_toolkit.decoding import Search
    from transducer_toolkit.training.callbacks.clock import StepClock
    from transducer_toolkit.training.lightning_module import TransducerModule
    from transducer_toolkit.training.stages import LossStage

logger = logging.getLogger(__name__)
VALIDATION_METRICS = ("val/wer", "val/cer", "val/loss")


@last_line.printed_at_the_end
def main() -> None:
    """Entry point."""
    hydra_command.run("train", train, prepare=_fit_defaults)


def _fit_defaults(arguments: list[str]) -> list[str]:
    """Remove defaults that contradict the arguments of the command line.

    The default experiment is the recipe of the digits, so other data run without it. A number of
    steps replaces the default number of epochs.

    Raises:
        ValueError: a sweep has the digits and other data, but names no experiment.
    """
    from transducer_toolkit.cli.component_arguments import has_own_config

    given = {text.lstrip("+~").partition("=")[0]: text.partition("=")[2] for text in arguments}
    more = []
    if "data" in given and "experiment" not in given and not has_own_config(arguments):
        options = set(given["data"].split(","))
        if "digits" in options and len(options) > 1:
            raise ValueError(
                f"data={given['data']}: the default experiment is for data=digits alone; name one "
                "(experiment=digits) or none (~experiment)"
            )
        if options != {"digits"}:
            more.append("~experiment")
    if given.get("trainer.max_steps", "-1") not in ("-1", "null", ""):
        more += ["trainer.max_epochs=-1"] if "trainer.max_epochs" not in given else []
    return [*arguments, *more]


def train(cfg: DictConfig) -> float | None:
    """Train and test as ``conf/train.yaml`` describes.

    Args:
        cfg: the composed config.

    Returns:
        The best value of ``callbacks.checkpoint.monitor``, by default the validation WER (a
        fraction), or None without a validation.
    """
    # Late imports keep --help, --cfg and shell completion fast.
    import torch
    from hydra.utils import instantiate
    from lightning import seed_everything
    from omegaconf import OmegaConf

    from transducer_toolkit.cli import auto_loss, changes, resume
    from transducer_toolkit.cli.output import quiet_lightning
    from transducer_toolkit.training.callbacks.clock import StepClock
    from transducer_toolkit.training.checkpoints import AtomicCheckpointIO
    from transducer_toolkit.training.warm_start import start_from

    last_line.set_last_line(None)
    quiet_lightning()
    _check_options(cfg)
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    if cfg.flush_denormal:  # before the first parallel region, whose threads copy the setting
        torch.set_flush_denormal(True)
    seed_everything(cfg.seed, workers=True, verbose=False)

    # The data decide the vocabulary and so the model's sizes. Its encoder then decides which
    # utterances have a path, and the sizes of lattices.
    run_dir = Path(cfg.run_dir)
    ckpt_path = resume.find_checkpoint(cfg.ckpt_path, run_dir, name=cfg.name)
    checkpoint: dict[str, Any] = {}
    if ckpt_path is not None:
        checkpoint = AtomicCheckpointIO().load_checkpoint(ckpt_path, map_location="cpu")
    auto_loss.settle(cfg, ckpt_path, checkpoint)
    config = changes.training_config(cfg)
    changed: changes.Changes = {}
    if ckpt_path is not None:
        changed = changes.find_changes(checkpoint.get(changes.CONFIG_KEY, config), config)
        if cfg.ckpt_path == "auto":
            changes.check_run_folder(changed, ckpt_path, run_dir)
        changes.check_changes(changed, checkpoint, ckpt_path)
    datamodule = instantiate(cfg.data, _convert_="all")
    datamodule.prepare_data()
    module = build_module(cfg, datamodule)
    module.training_config = config
    if ckpt_path is not None:
        changes.check_symbols(module, checkpoint, ckpt_path)
        changes.check_weights(module, checkpoint, changed, ckpt_path)
        changes.check_length(cfg.trainer, checkpoint, ckpt_path)
        logger.info("resuming from %s", ckpt_path)
        if changed:
            logger.info("changed options: %s", changes.described(changed))
        resume.keep_metrics(run_dir)
    del checkpoint
    datamodule.num_output_frames = module.model.encoder.num_output_frames
    datamodule.setup("fit")
    if cfg.init_from is not None and ckpt_path is None:
        start_from(module, cfg.init_from)

    if not datamodule.validates:
        logger.info(
            "data.corpus.val is null: no validation, so there is no best checkpoint and the last "
            "weights are tested"
        )
        OmegaConf.update(cfg, "trainer.limit_val_batches", 0, force_add=True)
    clock = StepClock()
    trainer = _make_trainer(cfg, clock)
    _log_options(trainer, config)
    num_parameters = sum(p.numel() for p in module.parameters())
    logger.info("%.2f M parameters, run folder %s", num_parameters / 1e6, cfg.run_dir)

    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    finally:
        if trainer.is_global_zero:
            last_line.set_last_line(_how_to_go_on(trainer, ckpt_path))
    checkpoints = _best_checkpoints(trainer)
    score = checkpoints.best_model_score if checkpoints is not None else None
    best = None if score is None else float(score)
    if cfg.test and datamodule.test_names:
        best_path = checkpoints.best_model_path if checkpoints is not None else ""
        trainer.test(module, datamodule=datamodule, ckpt_path=best_path or None, verbose=False)

    if trainer.is_global_zero:
        report = {
            "seed": cfg.seed,
            "selected_by": getattr(checkpoints, "monitor", None),
            "best_validation_score": best,
            "optimizer_steps": trainer.global_step,
            "optimizer_steps_of_this_run": clock.num_steps,
            "seconds_per_step": _rounded(clock.seconds_per_step),
            "loss_part_of_step": _rounded(clock.loss_part),
            "peak_memory_mib": round(clock.peak_memory_mib, 1),
            "training_s": round(clock.total_s, 1),
            "training_s_of_this_run": round(clock.training_s, 1),
        }
        _report(module, datamodule, trainer, cfg, report)
    return best


def _make_trainer(cfg: DictConfig, clock: StepClock) -> Trainer:
    """Return the trainer with its callbacks and loggers, after a check of its processes."""
    from hydra.utils import instantiate

    optional = [cfg[name] for name in ("adapters", "averaging") if cfg.get(name)]
    more = [instantiate(config, _convert_="all") for config in optional]
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=[clock, *more, *instantiate(cfg.callbacks, _convert_="all").values()],
        logger=list(instantiate(cfg.logger, _convert_="all").values()),
        _convert_="all",
    )
    _refuse_processes_in_sweep(trainer)
    _check_torchrun(trainer)
    epochs, steps = cfg.trainer.get("max_epochs"), cfg.trainer.get("max_steps")
    if epochs not in (None, -1) and steps not in (None, -1):
        logger.info(
            "the training ends after %d epochs (trainer.max_epochs) or %d steps "
            "(trainer.max_steps), whichever come first",
            epochs,
            steps,
        )
    return trainer


def _check_options(cfg: DictConfig) -> None:
    """Check options whose own errors would not name the Hydra key."""
    from omegaconf import OmegaConf

    from transducer_toolkit.cli import auto_loss
    from transducer_toolkit.cli.component_arguments import check_arguments
    from transducer_toolkit.cli.removed_keys import refuse_removed_keys
    from transducer_toolkit.ops.checks import (
        check_at_least,
        check_flag,
        check_int,
        check_number,
    )
    from transducer_toolkit.ops.topology import get_topology

    refuse_removed_keys(cfg)
    check_arguments(cfg)
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
    monitor = OmegaConf.select(cfg, "callbacks.checkpoint.monitor")
    if str(monitor).startswith("val/") and monitor not in VALIDATION_METRICS:
        raise ValueError(
            f"callbacks.checkpoint.monitor: expected one of {', '.join(VALIDATION_METRICS)}, "
            f"got {monitor}"
        )
    if "accumulate_grad_batches" in cfg.trainer:
        accumulated = cfg.trainer.accumulate_grad_batches
        check_at_least(1, **{"trainer.accumulate_grad_batches": accumulated})
    if cfg.loss.get("topology", auto_loss.AUTO) != auto_loss.AUTO:
        # data.topology follows it, and its error would name that key.
        get_topology(cfg.loss.topology, "loss.topology")


def build_module(cfg: DictConfig, datamodule: TransducerDataModule) -> TransducerModule:
    """Build the model for the vocabulary of the data, with loss, optimizer and schedule.

    Args:
        cfg: the composed config.
        datamodule: its corpus is prepared; it makes the tokenizer.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from transducer_toolkit.decoding.search import check_extra
    from transducer_toolkit.inference.recognizer import (
        model_config_from_checkpoint,
        recognizer_recipe,
    )
    from transducer_toolkit.ops.topology import get_topology
    from transducer_toolkit.training.ctc import CtcLoss
    from transducer_toolkit.training.lightning_module import TransducerModule
    from transducer_toolkit.training.stages import LossStage

    tokenizer = datamodule.made_tokenizer()
    model_config: Any = OmegaConf.to_container(cfg.model, resolve=True)
    if "checkpoint" in model_config:  # model=checkpoint; the other keys are changes
        path = model_config.pop("checkpoint")
        base = model_config_from_checkpoint(path, list(cfg.get("trusted_packages", [])))
        model_config = OmegaConf.to_container(OmegaConf.merge(base, model_config))
    model_config |= {"vocab_size": tokenizer.vocab_size, "blank": tokenizer.blank}
    loss = instantiate(cfg.loss, blank=tokenizer.blank, _convert_="all")
    if not isinstance(loss, LossStage):
        raise TypeError(f"loss: expected a LossStage, got {type(loss).__name__}")
    if "topology" not in cfg.loss and datamodule.topology == "regular":
        datamodule.topology = loss.topology  # data.topology cannot follow what no config says
    if "joiner" in model_config or loss.joiner_target is not None:
        model_config["joiner"] = _joiner_config(model_config.get("joiner") or {}, loss)
    shares = get_topology(loss.topology).labels_share_frames
    model = instantiate(model_config, _convert_="all")
    check_extra(model.joiner, get_topology(loss.topology))
    if hasattr(model.encoder, "plain_config"):  # a checkpoint does not need its folder
        model_config["encoder"] = model.encoder.plain_config
    features = model.encoder.make_features()
    if features is not None:
        datamodule.use_features(features)
    recipe = recognizer_recipe(
        model_config,
        tokenizer,
        datamodule.fbank,
        max_symbols_per_frame=cfg.max_symbols_per_frame if shares else 1,
        topology=loss.topology,
    )
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
        search=make_search(cfg.search, cfg.max_symbols_per_frame, tokenizer),
        normalize=instantiate(cfg.scoring, _convert_="all"),
    )


def _joiner_config(config: dict[str, Any], loss: LossStage) -> dict[str, Any]:
    """Return the config of the joiner that a loss needs.

    Args:
        config: that of the model, maybe with options for the loss of a checkpoint.
        loss: the loss.

    Raises:
        ValueError: the loss does not train the joiner of the config, which is the user's own.
    """
    import inspect

    from hydra.utils import get_class

    target = config.get("_target_", "")
    is_own = target != "" and not target.startswith("transducer_toolkit.")
    if loss.joiner_target is not None:
        if is_own:
            raise ValueError(
                f"model.joiner: {type(loss).__name__} trains {loss.joiner_target}, got {target}; "
                "loss=packed and loss=full accept any joiner"
            )
        return {"_target_": loss.joiner_target, "_partial_": True}
    if is_own and loss.joiner_options:
        taken = inspect.signature(get_class(target)).parameters
        missing = [name for name in loss.joiner_options if name not in taken]
        if missing and not any(it.kind == it.VAR_KEYWORD for it in taken.values()):
            raise ValueError(
                f"model.joiner: {target} has no argument {', '.join(missing)}, which this loss "
                "needs; add it (docs/own_parts.md), or take a loss with normalization=softmax and "
                "without durations"
            )
    of_losses = ("num_extra", "normalization", "blank")
    rest = {name: value for name, value in config.items() if name not in of_losses}
    return rest | loss.joiner_options


def make_search(
    cfg: DictConfig, max_symbols_per_frame: int, tokenizer: Tokenizer
) -> Callable[..., Search]:
    """Return what makes the search of ``cfg.search``, with its hotwords and language models.

    Args:
        cfg: an option of the group ``search``.
        max_symbols_per_frame: for a search whose own is null.
        tokenizer: tokenizer of the model.
    """
    import dataclasses

    from hydra.utils import instantiate

    from transducer_toolkit.decoding.fusion import Fusion, fused

    if cfg.get("max_symbols_per_frame", 0) is None:
        cfg.max_symbols_per_frame = max_symbols_per_frame
    of_fusion = {field.name for field in dataclasses.fields(Fusion)} & set(cfg)
    options = instantiate({name: cfg[name] for name in of_fusion}, _convert_="all")
    rest = {name: cfg[name] for name in cfg if name not in of_fusion}
    return fused(instantiate(rest, _convert_="all"), Fusion(**options).load(tokenizer))


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


def _check_torchrun(trainer: Trainer) -> None:
    """Raise an error if each process of torchrun would train by itself, in the same run folder."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if "TORCHELASTIC_RUN_ID" in os.environ and started != trainer.world_size:
        raise ValueError(
            f"torchrun started {started} processes, but trainer.devices and trainer.num_nodes are "
            f"for {trainer.world_size}: add trainer=ddp trainer.devices=N, the processes of a node"
        )


def _log_options(trainer: Trainer, config: dict[str, Any]) -> None:
    """Give the options to the loggers: hparams.yaml, and the table of TensorBoard."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from torch.utils.tensorboard.summary import hparams

    from transducer_toolkit.cli import changes

    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    options = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in changes.flattened(config).items()
    }
    for sink in trainer.loggers:
        sink.log_hyperparams(options)
        if isinstance(sink, TensorBoardLogger):
            # Lightning would log a value of each metric at step 0.
            for summary in hparams(options, dict.fromkeys(VALIDATION_METRICS, 0.0)):
                sink.experiment._get_file_writer().add_summary(summary)


def _best_checkpoints(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the callback that keeps the best checkpoint, or None."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    found = (it for it in trainer.checkpoint_callbacks if isinstance(it, ModelCheckpoint))
    return next(found, None)


def _report(
    module: Any, datamodule: Any, trainer: Any, cfg: DictConfig, report: dict[str, Any]
) -> None:
    """Print results and paths; write the results to results.json."""
    from transducer_toolkit.cli.output import (
        print_unwritable,
        print_word_errors,
        write_transcripts,
    )
    from transducer_toolkit.inference.trust import needed_packages

    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    report["test_wer"] = {name: errors.wer for name, errors in module.test_errors.items()}
    cers = {name: errors.cer for name, errors in module.test_character_errors.items()}
    report["test_cer"] = cers
    report["symbol_delay_ms"] = {
        name: delay and {"mean": delay.mean_ms, "median": delay.median_ms, "words": delay.num_words}
        for name, delay in module.test_symbol_delays.items()
    }
    (run_dir / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    if module.test_errors:
        write_transcripts(run_dir / "transcripts", module.test_transcripts)
        print_word_errors(
            module.test_errors, module.test_character_errors, module.test_symbol_delays
        )
        print_unwritable(module.test_transcripts, module.tokenizer, module.normalize)
    steps, seconds = report["optimizer_steps_of_this_run"], report["training_s_of_this_run"]
    line = f"{steps} steps in {seconds:.0f} s"
    if report["seconds_per_step"] is not None:  # else there were too few steps to measure one
        line += f", {1000 * report['seconds_per_step']:.0f} ms a step"
    if steps != report["optimizer_steps"]:
        line += f"; {report['optimizer_steps']} steps in {report['training_s']:.0f} s in all"
    print(line)
    best, last = getattr(_best_checkpoints(trainer), "best_model_path", ""), _last(trainer)
    paths = {
        "best": Path(best) if best else None,
        "last": Path(last.path) if last else None,
        "pictures": run_dir / "pictures",
        "transcripts": run_dir / "transcripts",
        "metrics": run_dir / "metrics",
        "results": run_dir / "results.json",
    }
    found = {name: path for name, path in paths.items() if path is not None and path.exists()}
    for name, path in found.items():
        print(f"{name:12s} {_relative(path)}")
    checkpoint = found.get("best") or found.get("last")
    if checkpoint is not None:
        shown = shlex.quote(str(_relative(checkpoint)))
        options = ["--checkpoint", shown]
        if packages := needed_packages((module.recipe or {}).get("model")):
            options.append(trust_option("transducer-transcribe", packages))
        file = (_test_file(datamodule) if module.test_errors else None) or "FILE.wav"
        print(f"\ntry it:  {_transcribe()} {' '.join(options)} {shlex.quote(file)}")


def _transcribe() -> str:
    """Return transducer-transcribe, with its folder if the shell would not find it."""
    name = "transducer-transcribe"
    beside = Path(sys.executable).with_name(name)
    is_found = shutil.which(name) is not None or not beside.is_file()
    return name if is_found else shlex.quote(str(_relative(beside)))


def _test_file(datamodule: Any) -> str | None:
    """Return a file of the first test set that was read; None for data without such files."""
    from transducer_toolkit.data.datamodule import TransducerDataModule

    if not isinstance(datamodule, TransducerDataModule) or not datamodule.test_names:
        return None
    try:
        utterances = datamodule.dataset(f"test/{datamodule.test_names[0]}").utterances
    except ValueError:  # a test set of Lhotse's cuts has no list of files
        return None
    return str(_relative(Path(utterances[0].audio)))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _how_to_go_on(trainer: Trainer, ckpt_path: str | None) -> str | None:
    """Return the last line of the output: the newest checkpoint, and how to go on from it."""
    from lightning.pytorch.callbacks import Timer

    last = _last(trainer)
    if last is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    if last.saved_step is not None:
        path, what = _relative(Path(last.path)), f"step {last.saved_step} is saved in"
    elif ckpt_path is not None:
        path, what = _relative(Path(ckpt_path)), "no step was trained since"
    else:
        return "no step was trained, so there is no checkpoint"
    limit = ""
    if trainer.state.finished:  # type: ignore[attr-defined]
        is_reached = {
            "max_steps": trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps,
            "max_epochs": trainer.max_epochs not in (None, -1)
            and trainer.current_epoch >= trainer.max_epochs,
            "max_time": any(isinstance(it, Timer) for it in _callbacks(trainer)),
        }
        reached = [name for name, is_it in is_reached.items() if is_it][:1]
        limit = "".join(f" and a larger trainer.{name}" for name in reached)
    option = shlex.quote(f"ckpt_path={path}")
    return f"{what} {path}; to go on, repeat the command with {option}{limit}"


def _callbacks(trainer: Any) -> list[Any]:
    return list(trainer.callbacks)


def _last(trainer: Trainer) -> Any:
    """Return the callback that writes the last checkpoint, or None."""
    from transducer_toolkit.training.checkpoints import LastCheckpoint

    return next((it for it in trainer.checkpoint_callbacks if isinstance(it, LastCheckpoint)), None)


def _relative(path: Path) -> Path:
    """Return the path relative to the working directory if it lies below it."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    main()
