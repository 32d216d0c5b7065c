# SPDX-License-Identifier: Apache-2.0
"""Messages beside a progress bar and from several processes."""

import io
import logging
import logging.config
import re
import sys

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from rich.console import Console
from rich.live import Live

from tests.cli.test_conf import composed
from transducer_toolkit.cli.log_handlers import ConsoleHandler, OneProcess


@pytest.fixture
def handler():
    handler = ConsoleHandler("ignored")
    logger = logging.getLogger("tests.console")
    logger.setLevel("INFO")
    logger.propagate = False
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    "text",
    ["short", "two\nlines", "long " * 40, "ümläut 你好 [bold]no markup[/bold]", "x" * 200],
)
def test_a_message_is_whole_above_a_bar(handler, text, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    console = Console(file=screen, force_terminal=True, width=80)
    with Live("BAR", console=console, auto_refresh=False):
        handler.info(text)
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    # In one piece, and the bar is drawn again below it.
    shown = re.sub(r"\s", "", text)
    joined = re.sub(r"\s", "", out)
    assert shown in joined and "BAR" in joined.split(shown, 1)[1]
    handler.info("afterwards")
    assert screen.getvalue().endswith("afterwards\n")


def record(name, level):
    return logging.LogRecord(name, level, "", 0, "message", None, None)


def test_one_of_several_processes_logs(monkeypatch):
    cases = {
        ("transducer_toolkit.cli.train", logging.INFO): False,
        ("transducer_toolkit.training.callbacks.prescan", logging.INFO): False,
        ("lightning.fabric.utilities.distributed", logging.INFO): True,
        ("transducer_toolkit.data.datamodule", logging.WARNING): False,
        ("transducer_toolkit.training.warm_start", logging.WARNING): False,
        ("transducer_toolkit.training.callbacks.unreadable", logging.WARNING): True,
        ("my.module", logging.WARNING): True,
        ("transducer_toolkit.data.datamodule", logging.ERROR): True,
    }
    for rank, expected in ((0, dict.fromkeys(cases, True)), (1, cases), (63, cases)):
        monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
        assert {case: OneProcess().filter(record(*case)) for case in cases} == expected


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_the_rank_before_lightning_is_imported(monkeypatch, variable):
    monkeypatch.delitem(sys.modules, "lightning.fabric.utilities.rank_zero")
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    case = record("transducer_toolkit.cli.train", logging.INFO)
    assert OneProcess().filter(case)
    monkeypatch.setenv(variable, "3")
    assert not OneProcess().filter(case)


def test_hydra_uses_both(tmp_path):
    config = OmegaConf.to_container(composed("train").hydra.job_logging, resolve=False)
    config["handlers"]["file"]["filename"] = str(tmp_path / "train.log")
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logging.config.dictConfig(config)
        assert {type(handler) for handler in root.handlers} == {ConsoleHandler, logging.FileHandler}
        for handler in root.handlers:
            assert [type(it) for it in handler.filters] == [OneProcess]
    finally:
        root.handlers[:] = before
        root.setLevel(level)


@pytest.mark.parametrize("value", ["0.00012345", "1.7", "0.1", "123.4", "0"])
def test_the_bar_shows_three_significant_digits(value):
    for config in ("train", "evaluate"):
        needed = ["checkpoint=best.ckpt"] if config == "evaluate" else []
        theme = composed(config, *needed).callbacks.progress_bar.theme
        shown = format(float(value), theme.metrics_format)
        assert len(shown.replace(".", "").lstrip("0") or "000") == 3
        assert float(shown) == pytest.approx(float(value), rel=5e-3)
