# SPDX-License-Identifier: Apache-2.0
"""model/encoder is a config group: another encoder replaces the old one with all of its keys."""

from importlib.resources import files

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.cli.eightfold import EightfoldEncoder
from transducer_toolkit.cli import run_folder
from transducer_toolkit.cli.hints import find_hints
from transducer_toolkit.cli.train import main as train
from transducer_toolkit.modules import ConvLstmEncoder
from transducer_toolkit.optional import OLDEST_TRANSFORMERS

run_folder.register()
CONF = files("transducer_toolkit.conf")
HERE = __name__


def options(group):
    return sorted(
        path.name.removesuffix(".yaml")
        for path in (CONF / group).iterdir()
        if path.name.endswith(".yaml")
    )


class Miscounting(EightfoldEncoder):
    """Says that it subsamples by 4, as the encoder that it derives from."""

    def num_output_frames(self, num_frames):
        return -(-num_frames // 4)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder of configs with two encoders of a user's own."""
    folder = tmp_path_factory.mktemp("configs") / "model" / "encoder"
    folder.mkdir(parents=True)
    for name, target in (
        ("eightfold", "tests.cli.eightfold.EightfoldEncoder"),
        ("miscounting", f"{HERE}.Miscounting"),
    ):
        text = f"_target_: {target}\nconv_channels: 2\nhidden_dim: 8\n"
        (folder / f"{name}.yaml").write_text(text)
    return folder.parents[1]


def composed(*overrides):
    with initialize_config_module("transducer_toolkit.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("choice", [
    *(["~experiment", f"model={option}"] for option in options("model") if option != "checkpoint"),
    *([f"experiment={option}"] for option in options("experiment")),
], ids=" ".join)  # fmt: skip
def test_an_encoder_of_your_own_replaces_all_keys(choice, mine):
    if choice == ["experiment=librispeech"]:
        choice = [*choice, "data.corpus.root=corpora"]
    search = f"hydra.searchpath=[file://{mine}]"
    cfg = composed(*choice, search, "model/encoder=eightfold")
    encoder = OmegaConf.to_container(cfg.model.encoder)
    target = "tests.cli.eightfold.EightfoldEncoder"
    assert encoder == {"_target_": target, "conv_channels": 2, "hidden_dim": 8}
    model = instantiate(cfg.model, vocab_size=5, blank=0, _convert_="all")
    assert isinstance(model.encoder, EightfoldEncoder)


@pytest.mark.parametrize(("index", "option"), enumerate(options("model")))
def test_a_model_is_the_same_in_every_experiment(index, option):
    """In every third: an experiment that sets a key of models sets it in every model."""
    expected = composed("~experiment", f"model={option}").model
    for experiment in options("experiment")[index % 3 :: 3]:
        assert composed(f"experiment={experiment}", f"model={option}").model == expected


@pytest.mark.parametrize("predictor", options("model/predictor"))
@pytest.mark.parametrize("option", options("model/encoder"))
def test_every_encoder_goes_with_every_predictor(option, predictor):
    needed = []
    if option.startswith(("fastconformer", "huggingface")):
        pytest.importorskip("transformers", minversion=OLDEST_TRANSFORMERS)
    if option == "huggingface":
        needed = ["model.encoder.config={model_type:hubert,num_hidden_layers:1}"]
    choice = [f"model/encoder={option}", f"model/predictor={predictor}", *needed]
    cfg = composed("~experiment", *choice)
    with torch.device("meta"):
        model = instantiate(cfg.model, vocab_size=5, blank=0, _convert_="all")
    assert model.joiner.encoder_dim == model.encoder.output_dim


def test_a_misspelt_encoder_is_named():
    hint = "model/encoder=conv_lsmt: did you mean model/encoder=conv_lstm?"
    assert find_hints("train", ["model/encoder=conv_lsmt"]) == [hint]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["data/tokenizer=sentencpiece"], "did you mean data/tokenizer=sentencepiece?"),
        (["model/predicter=lstm"], "model/predicter: did you mean model/predictor?"),
        (["serch=greedy"], "serch: did you mean search?"),
        (["search=gredy"], "search=gredy: did you mean search=greedy?"),
    ],
)
def test_options_of_groups_have_hints(arguments, hint):
    (found,) = find_hints("train", arguments)
    assert found.endswith(hint)


OVERRIDES = ["model.predictor.embedding_dim=8", "model.joiner.joiner_dim=16"]


def test_training_with_an_encoder_of_your_own(mine, console, data_overrides, tmp_path):
    options = [*data_overrides, *OVERRIDES, "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    console(train, tmp_path, "--config-dir", mine, "model/encoder=eightfold", *options)
    assert list(tmp_path.rglob("best.ckpt"))


def test_a_wrong_count_is_found_at_the_first_batch(mine, console, data_overrides, tmp_path, capsys):
    options = [*data_overrides, *OVERRIDES, "trainer.accelerator=cpu"]
    with pytest.raises(SystemExit):
        console(train, tmp_path, "--config-dir", mine, "model/encoder=miscounting", *options)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("transducer-train: utterance 'train-")
    assert "Miscounting.forward makes " in last and "num_output_frames(" in last
    assert isinstance(Miscounting(), ConvLstmEncoder)
