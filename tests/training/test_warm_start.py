# SPDX-License-Identifier: Apache-2.0
from functools import partial

import pytest
import torch
from hydra.utils import instantiate

from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.inference.recognizer import (
    CHECKPOINT_KEY,
    recognizer_recipe,
    tokenizer_from_checkpoint,
)
from transducer_toolkit.training.ctc import CtcLoss
from transducer_toolkit.training.lightning_module import TransducerModule
from transducer_toolkit.training.stages import FusedLoss, FusedPrunedLoss, PrunedLoss, SimpleLoss
from transducer_toolkit.training.warm_start import start_from

MODULES = "transducer_toolkit.modules"
SYMBOL_WEIGHTS = ("predictor.embedding.weight", "joiner.output.weight", "joiner.output.bias")


def module_of(tokenizer, *, loss=FusedLoss, ctc=False, width=8, joiner_dim=8):
    config = {
        "_target_": f"{MODULES}.transducer.Transducer.build",
        "encoder": {
            "_target_": f"{MODULES}.encoder.ConvLstmEncoder",
            "conv_channels": 2,
            "hidden_dim": width,
            "num_layers": 1,
        },
        "predictor": {
            "_target_": f"{MODULES}.predictor.StatelessPredictor",
            "_partial_": True,
            "embedding_dim": width,
        },
        "joiner": {
            "_target_": f"{MODULES}.joiner.Joiner",
            "_partial_": True,
            "joiner_dim": joiner_dim,
        },
        "vocab_size": tokenizer.vocab_size,
        "blank": tokenizer.blank,
    }
    stage = loss()
    if stage.joiner_target is not None:
        config["joiner"] = {"_target_": stage.joiner_target, "_partial_": True}
    config["joiner"] |= stage.joiner_options
    model = instantiate(config, _convert_="all")
    auxiliary = CtcLoss(width, tokenizer.vocab_size, weight=0.3) if ctc else None
    recipe = recognizer_recipe(
        config, tokenizer, Fbank(), max_symbols_per_frame=10, topology=stage.topology
    )
    return TransducerModule(model, tokenizer, loss=stage, ctc=auxiliary, recipe=recipe)


def saved(module, path):
    torch.save({"state_dict": module.state_dict(), CHECKPOINT_KEY: module.recipe}, path)
    return str(path)


def characters(text):
    return CharTokenizer.from_texts([text])


def pieces(size):
    texts = ["one two three", "two ones", "three twos", "one three"]
    return SentencePieceTokenizer.from_texts(texts, vocab_size=size)


PAIRS = {
    "fewer letters": (characters("a bcde"), characters("a bde")),
    "more letters": (characters("a bd"), characters("a bcd")),
    "others": (characters("abcd"), characters("cdef")),
    "as many, in another order": (characters("abcd"), CharTokenizer(["<blk>", *"dbca"])),
    "unknown, space": (characters("abcd"), CharTokenizer.from_texts(["b c"], unknown=True)),
    "to word pieces": (characters("one two three"), pieces(18)),
    "more word pieces": (pieces(16), pieces(20)),
    "as wide as the vocabulary": (characters("abcdefg"), characters("bcdefgh")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_rows_are_copied_by_symbol(tmp_path, name):
    before, now = PAIRS[name]
    torch.manual_seed(0)
    old, new = module_of(before, ctc=True), module_of(now, ctc=True)
    drawn = {key: value.clone() for key, value in new.state_dict().items()}
    start_from(new, saved(old, tmp_path / "old.ckpt"))
    source, found = old.state_dict(), new.state_dict()
    names = [f"model.{key}" for key in SYMBOL_WEIGHTS] + ["ctc.output.weight", "ctc.output.bias"]
    for key in names:
        for row, symbol in enumerate(now.symbols):
            if symbol in before.symbols:
                expected = source[key][before.symbols.index(symbol)]
            else:
                expected = drawn[key][row]
            assert torch.equal(found[key][row], expected), (key, symbol)
    for key in found.keys() - set(names):
        assert torch.equal(found[key], source[key]), key


@pytest.mark.parametrize("loss", [PrunedLoss, FusedPrunedLoss, SimpleLoss])
def test_the_layers_of_the_loss_too(tmp_path, loss):
    before, now = characters("abc"), characters("bcd")
    old, new = module_of(before, loss=loss), module_of(now, loss=loss)
    start_from(new, saved(old, tmp_path / "old.ckpt"))
    source, found = old.state_dict(), new.state_dict()
    joiner = "model.joiner" if loss is SimpleLoss else "loss.simple_joiner"
    keys = [key for key in found if key.startswith(joiner)]
    assert len(keys) >= 3
    for key in keys:
        for symbol in ("<blk>", "b", "c"):
            row, former = now.symbols.index(symbol), before.symbols.index(symbol)
            assert torch.equal(found[key][row], source[key][former])


def test_a_layer_as_wide_as_the_vocabulary_is_no_layer_of_symbols(tmp_path):
    """Sizes alone would permute the rows of other layers."""
    before, now = characters("abcdefg"), CharTokenizer(["<blk>", *"gfedcba"])
    old, new = module_of(before), module_of(now)  # 8 symbols, width 8
    start_from(new, saved(old, tmp_path / "old.ckpt"))
    key = "model.joiner.predictor_projection.weight"
    assert len(old.state_dict()[key]) == 8
    assert torch.equal(new.state_dict()[key], old.state_dict()[key])


def test_what_does_not_fit_keeps_its_own_weights_and_is_named(tmp_path, caplog):
    before, now = characters("abc"), characters("bcd")
    old, new = module_of(before), module_of(now, ctc=True)
    drawn = new.state_dict()["ctc.output.weight"].clone()
    caplog.set_level("INFO")
    start_from(new, saved(old, tmp_path / "old.ckpt"))
    assert torch.equal(new.state_dict()["ctc.output.weight"], drawn)
    log = caplog.text
    assert "not in the checkpoint: ctc.output.bias, ctc.output.weight" in log
    assert "new symbols, which start with random weights: d" in log
    assert "texts lack them: a; data/tokenizer=checkpoint keeps them" in log
    with pytest.raises(ValueError, match=r"init_from: no weight of .*old\.ckpt has the name"):
        other = module_of(now)
        other.state_dict = partial(dict, {})
        start_from(other, str(tmp_path / "old.ckpt"))


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (
            "regular",
            "durations or big blanks are lost; loss=fused_tdt loss.topology=tdt-0-1-2 keeps",
        ),
        ("tdt-0-1", "durations or big blanks start anew; loss=fused_tdt"),
        ("tdt-0-2-4", "durations or big blanks keep their weights under another meaning; loss="),
        ("tdt-0-1-2", None),
    ],
)
def test_durations_that_change_are_named(tmp_path, caplog, now, said):
    tokenizer = characters("abc")
    torch.manual_seed(1)
    before = module_of(tokenizer, loss=partial(FusedLoss, topology="tdt-0-1-2"))
    path = saved(before, tmp_path / "best.ckpt")
    module = module_of(tokenizer, loss=partial(FusedLoss, topology=now))
    start_from(module, path)
    assert (said is None and "topology" not in caplog.text) or said in caplog.text
    rows = module.model.joiner.output.weight[4:], before.model.joiner.output.weight[4:]
    assert torch.equal(*rows) == (now in ("tdt-0-1-2", "tdt-0-2-4"))


@pytest.mark.parametrize("now", ["softmax", "hat"])
def test_a_normalization_that_changes_is_named(tmp_path, caplog, now):
    tokenizer = characters("abc")
    path = saved(module_of(tokenizer, loss=partial(FusedLoss, normalization="hat")), tmp_path / "a")
    start_from(module_of(tokenizer, loss=partial(FusedLoss, normalization=now)), path)
    said = "normalization=hat, and this training uses softmax; loss.normalization=hat keeps it"
    assert (said in caplog.text) == (now == "softmax")


@pytest.mark.parametrize("texts", ["abc", "bcd"])
def test_a_weight_of_another_size_is_named(tmp_path, texts):
    old, new = module_of(characters("abc"), joiner_dim=4), module_of(characters(texts))
    before = {name: value.clone() for name, value in new.state_dict().items()}
    message = r"init_from: \d weights .* as model\.joiner.*model=checkpoint takes"
    with pytest.raises(ValueError, match=message):
        start_from(new, saved(old, tmp_path / "old.ckpt"))
    assert all(torch.equal(value, before[name]) for name, value in new.state_dict().items())


def test_the_tokenizer_of_a_checkpoint(tmp_path):
    for tokenizer in (characters("abc"), pieces(18)):
        path = saved(module_of(tokenizer), tmp_path / "old.ckpt")
        found = tokenizer_from_checkpoint(path)
        assert found.symbols == tokenizer.symbols and type(found) is type(tokenizer)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        tokenizer_from_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r"got null; set init_from=CHECKPOINT"):
        tokenizer_from_checkpoint(None)


def test_recipes_and_weights_of_hostile_checkpoints(tmp_path):
    tokenizer = characters("abc")
    path = saved(module_of(tokenizer), tmp_path / "hostile.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[CHECKPOINT_KEY].pop("topology")  # as in the first checkpoints
    torch.save(checkpoint, path)
    start_from(module_of(tokenizer), path)
    checkpoint[CHECKPOINT_KEY]["topology"] = "linear"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"init_from: .*hostile\.ckpt: topology: expected one of"):
        start_from(module_of(tokenizer), path)
    name = "model.joiner.output.weight"
    checkpoint["state_dict"][name] = checkpoint["state_dict"][name].int()
    torch.save(checkpoint, path)
    message = r"init_from: .*hostile\.ckpt: its weight model\.joiner\.output\.weight is of "
    with pytest.raises(ValueError, match=message):
        start_from(module_of(tokenizer), path)
