# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.compat.hugging_face import KINDS, PAD, batch, small_model, transformers
from transducer_toolkit.compat.common import REDUCTION_NAMES
from transducer_toolkit.compat.transformers import use_fused_loss
from transducer_toolkit.losses.reference import reference_duration_loss, reference_loss
from transducer_toolkit.optional import import_transformers

RNNT = [kind for kind in KINDS if kind != "ParakeetForTDT"]
# Classes that have a loss in transformers, and what pads their labels; None is blank.
THEIRS = {"ParakeetForRNNT": None, "ParakeetForTDT": PAD}


def gradients(model, loss):
    model.zero_grad()
    loss.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def distances(found, truth):
    """Relative L2 distance of each gradient; a gradient that is zero but for rounding is none."""
    largest = max(gradient.norm() for gradient in truth.values())
    return {
        name: float((found[name].double() - truth[name]).norm() / truth[name].norm())
        for name in truth
        if truth[name].norm() > 1e-6 * largest
    }


def true_loss(model, inputs, num_labels):
    """The losses (B,) of float64 logits, by a recursion in plain torch."""
    outputs = model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
    pred = model.decoder(inputs["decoder_input_ids"])
    logits = model.joint(pred[:, None], outputs.pooler_output[:, :, None])
    lengths = outputs.attention_mask.sum(1), torch.tensor(num_labels)
    if hasattr(model.config, "durations"):
        indices = inputs["labels"], *lengths, model.config.blank_token_id
        durations = {"durations": model.config.durations}
        return reference_duration_loss(logits, *indices, **durations, reduction="none")
    return reference_loss(
        logits, inputs["labels"], *lengths, model.config.blank_token_id, reduction="none"
    )


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("vocab_size", [1025, 8193])
def test_loss_and_gradients_are_those_of_transformers(vocab_size, kind):
    pytest.importorskip("torchaudio", exc_type=ImportError)  # theirs needs it
    num_labels = (8, 5, 0)
    sizes = {"num_frames": (400, 360, 90), "num_labels": num_labels}
    inputs = batch(vocab_size, **sizes, padding=THEIRS[kind])
    model = small_model(kind, vocab_size=vocab_size)
    double = copy.deepcopy(model).double()
    doubled = {**inputs, "input_features": inputs["input_features"].double()}
    truth = gradients(double, true_loss(double, doubled, num_labels))
    theirs = model(**inputs, reduction="none").loss
    their_gradients = gradients(model, theirs)
    for precision in ("auto", "full"):
        with use_fused_loss(model, precision=precision):
            outputs = model(**inputs, reduction="none")
            assert outputs.logits is None
            torch.testing.assert_close(outputs.loss, theirs, rtol=1e-5, atol=0)
            ours = distances(gradients(model, outputs.loss), truth)
        reference = distances(their_gradients, truth)
        assert ours.keys() == reference.keys() and len(ours) > 40
        worst = {name: (ours[name], reference[name]) for name in ours}
        for name, (mine, other) in worst.items():
            assert mine <= max(other, 1e-5), (precision, name, mine, other)


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("reduction", REDUCTION_NAMES)
def test_reductions(reduction, kind):
    pytest.importorskip("torchaudio", exc_type=ImportError)
    model, inputs = small_model(kind), batch(padding=THEIRS[kind])
    theirs = model(**inputs, reduction=reduction).loss
    with use_fused_loss(model, reduction=reduction):
        torch.testing.assert_close(model(**inputs).loss, theirs, rtol=1e-5, atol=0)
        other = model(**inputs, reduction="sum").loss
    assert (reduction == "sum") == torch.equal(other, theirs) or other.isclose(theirs.sum())


@pytest.mark.parametrize("kind", THEIRS)
def test_default_reduction_is_theirs(kind):
    pytest.importorskip("torchaudio", exc_type=ImportError)
    model, inputs = small_model(kind), batch(padding=THEIRS[kind])
    theirs = model(**inputs).loss
    with use_fused_loss(model):
        torch.testing.assert_close(model(**inputs).loss, theirs, rtol=1e-5, atol=0)


def test_sigma_of_tdt():
    model, inputs = small_model("ParakeetForTDT"), batch(padding=PAD)
    plain, theirs = model(**inputs).loss, model(**inputs, sigma=0.05).loss
    with use_fused_loss(model, sigma=0.05):
        torch.testing.assert_close(model(**inputs).loss, theirs, rtol=1e-5, atol=0)
        torch.testing.assert_close(model(**inputs, sigma=0.0).loss, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("durations", [(0, 1), (1, 2, 4), (0, 2, 3, 7)])
def test_durations_of_tdt(durations):
    model = small_model("ParakeetForTDT", durations=durations)
    inputs = batch(padding=PAD, num_frames=(200, 160), num_labels=(3, 2))
    theirs = model(**inputs, reduction="none").loss
    with use_fused_loss(model):
        torch.testing.assert_close(
            model(**inputs, reduction="none").loss, theirs, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("kind", RNNT)
def test_loss_is_the_true_one_in_every_class(kind):
    model, inputs = small_model(kind).eval(), batch()
    truth = true_loss(model.double(), {k: double(v) for k, v in inputs.items()}, (3, 2))
    with use_fused_loss(model.float()):
        outputs = model(**inputs, reduction="none")
        torch.testing.assert_close(outputs.loss.double(), truth, rtol=1e-5, atol=0)
        assert (
            type(outputs).__name__.endswith("RNNTOutput") and outputs.last_hidden_state.dim() == 3
        )
        assert len(gradients(model, outputs.loss)) > 40  # every parameter has one


def double(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def test_padding_of_labels():
    model = small_model()
    with use_fused_loss(model):
        expected = model(**batch(), reduction="none").loss
        for padding in (32, -100, -1):
            found = model(**batch(padding=padding), reduction="none").loss
            assert torch.equal(found, expected), padding
        with pytest.raises(
            ValueError, match=r"targets\[0, 1\] .* blank \(32\)"
        ):  # blank between labels
            inputs = batch()
            inputs["labels"][0, 1] = 32
            model(**inputs)


def test_padding_with_the_pad_token_of_an_rnnt_model():
    inputs = batch(num_labels=(4, 2), padding=PAD)
    model = small_model()
    with use_fused_loss(model), pytest.warns(UserWarning, match=r"labels\[1\] end with 2, .*32, 2"):
        counted = model(**inputs, reduction="none").loss
    with use_fused_loss(model, padding_ids=(32, PAD)):
        skipped = model(**inputs, reduction="none").loss
        expected = model(**batch(num_labels=(4, 2)), reduction="none").loss
    assert torch.equal(skipped, expected)
    assert counted[0] == expected[0] and counted[1] > expected[1] + 1
    if "torchaudio" in sys.modules:
        theirs = model(**inputs, reduction="none").loss  # counts the padding
        torch.testing.assert_close(counted, theirs, rtol=1e-5, atol=0)


def test_what_transformers_requires_may_be_left_out():
    model, inputs = small_model(), batch(num_frames=(120, 120))
    with use_fused_loss(model):
        expected = model(**inputs).loss
        for name in ("decoder_input_ids", "attention_mask"):
            fewer = {key: value for key, value in inputs.items() if key != name}
            torch.testing.assert_close(model(**fewer).loss, expected)
        outputs = model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
        found = model(encoder_outputs=outputs, labels=inputs["labels"]).loss
        torch.testing.assert_close(found, expected)
        assert torch.equal(model(**inputs, return_dict=False)[2], expected)


def test_batch_without_labels_in_any_row():
    model = small_model()
    inputs = batch()
    inputs["labels"] = inputs["labels"][:, :0]
    with use_fused_loss(model):
        for name in REDUCTION_NAMES:
            loss = model(**inputs, reduction=name).loss
            assert bool(loss.isfinite().all()) and float(loss.detach().sum()) > 0


def test_undo_restores_the_model():
    model, inputs = small_model().eval(), batch()
    kind, logits = type(model), model(**{**inputs, "labels": None}).logits
    handle = use_fused_loss(model)
    assert torch.equal(model(**{**inputs, "labels": None}).logits, logits)
    with pytest.raises(ValueError, match="has the fused loss already"):
        use_fused_loss(model)
    handle.undo()
    handle.undo()
    assert type(model) is kind and not hasattr(model, "_fused_loss")
    use_fused_loss(model).undo()
    with pytest.raises(RuntimeError, match="expected a model of class ParakeetForRNNT, got Other"):
        handle = use_fused_loss(model)
        model.__class__ = type("Other", (type(model),), {})
        handle.undo()


def test_generation_is_untouched():
    model, inputs = small_model().eval(), batch()
    arguments = {name: inputs[name] for name in ("input_features", "attention_mask")}
    expected = model.generate(**arguments).sequences
    assert int((expected != 32).sum()) > 0
    with use_fused_loss(model):
        assert torch.equal(model.generate(**arguments).sequences, expected)


def test_copies_pickles_and_saved_models(tmp_path):
    model, inputs = small_model().eval(), batch()
    with use_fused_loss(model):
        expected = model(**inputs).loss
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**inputs).loss, expected)
            with torch.no_grad():
                other.joint.head.bias += torch.randn(33)
            assert other(**inputs).loss != expected
        assert torch.equal(model(**inputs).loss, expected)
        model.save_pretrained(tmp_path)
    restored = transformers.ParakeetForRNNT.from_pretrained(tmp_path)
    assert restored.config.architectures == ["ParakeetForRNNT"]
    with use_fused_loss(restored):
        assert torch.equal(restored.eval()(**inputs).loss, expected)


def test_gradient_checkpointing():
    model, inputs = small_model(), batch()
    with use_fused_loss(model):
        expected = gradients(model, model(**inputs).loss)
        model.gradient_checkpointing_enable()
        found = gradients(model, model(**inputs).loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_autocast_to_bfloat16():
    model, inputs = small_model(), batch()
    with use_fused_loss(model):
        expected = model(**inputs).loss
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        assert loss.dtype == torch.float32 and loss != expected
        torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
        assert all(gradient.dtype == torch.float32 for gradient in gradients(model, loss).values())


def test_compiled_model():
    model, inputs = small_model().eval(), batch()
    with use_fused_loss(model):
        expected = gradients(model, model(**inputs).loss)
        compiled = torch.compile(model, backend="aot_eager")
        found = gradients(model, compiled(**inputs).loss)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_adapters_on_the_encoder():
    peft = pytest.importorskip("peft")
    model, inputs = small_model(), batch()
    with use_fused_loss(model):
        expected = model(**inputs).loss
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    with use_fused_loss(adapted):
        loss = adapted(**inputs).loss
        torch.testing.assert_close(loss, expected)
        loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained and all("lora" in name for name in trained)
    on_head = peft.get_peft_model(small_model(), peft.LoraConfig(target_modules=["head"]))
    with pytest.raises(ValueError, match=r"joint.head: expected a plain .*lora.*target_modules"):
        use_fused_loss(on_head)


def test_an_adapter_on_the_head_that_comes_later_is_refused():
    peft = pytest.importorskip("peft")
    model = small_model()
    use_fused_loss(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "head"]))
    with pytest.raises(ValueError, match=r"joint.head: expected a plain .*lora.*target_modules"):
        adapted(**batch())


@pytest.mark.parametrize("is_first", [True, False])
def test_the_whole_head_beside_adapters(is_first):
    """PEFT's modules_to_save trains a copy of the output layer."""
    peft = pytest.importorskip("peft")
    model, inputs = small_model(), batch()
    expected = model(**inputs).loss
    options = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["head"])
    if is_first:
        use_fused_loss(model)
    adapted = peft.get_peft_model(model, options)
    if not is_first:
        use_fused_loss(adapted)
    loss = adapted(**inputs).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    copied = adapted.get_submodule("base_model.model.joint.head.modules_to_save.default")
    assert copied.weight.grad.abs().sum() > 0 and copied.bias.grad.abs().sum() > 0
    with torch.no_grad():
        copied.bias[0] += 5.0
        assert not torch.isclose(adapted(**inputs).loss, expected)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(**inputs).loss, expected, rtol=1e-5, atol=0)


class Examples(torch.utils.data.Dataset):
    def __init__(self, size):
        self.rows = [
            {
                key: value[0]
                for key, value in batch(num_labels=(3,), num_frames=(120,), seed=n).items()
            }
            for n in range(size)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def train(folder, fused, **options):
    """Train and return the Trainer with its loss of every step."""
    pytest.importorskip("accelerate")
    model = small_model()
    if fused:
        use_fused_loss(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Examples(8))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses


def test_trainer_takes_the_same_twenty_steps(tmp_path):
    pytest.importorskip("torchaudio", exc_type=ImportError)
    options = {"max_steps": 20, "per_device_train_batch_size": 2}
    _, theirs = train(tmp_path / "theirs", False, **options)
    trainer, ours = train(tmp_path / "ours", True, **options)
    assert len(ours) == len(theirs) == 20
    assert theirs[-1] < 0.9 * theirs[0]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    assert trainer.evaluate(Examples(2))["eval_loss"] < theirs[0]


def test_trainer_divides_the_loss_of_accumulated_batches(tmp_path):
    norms = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        trainer, _ = train(
            tmp_path / str(size),
            True,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
        )
        norms.append(trainer.state.log_history[0]["grad_norm"])
    # Batch normalization makes them differ a little; without the division they grow with the parts.
    assert max(norms) < 1.3 * min(norms)


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = small_model()
    use_fused_loss(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(5):
        loss = prepared(**batch()).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"reduction": "average"},
            ValueError,
            "reduction: expected one of mean_volume, .*'average'",
        ),
        ({"sigma": 0.05}, ValueError, "sigma: expected 0 for an RNN-T model, got 0.05"),
        ({"clamp": "1"}, TypeError, "clamp"),
        ({"dropped_mass": -1.0}, ValueError, "dropped_mass"),
        ({"precision": "half"}, ValueError, "precision"),
        ({"padding_ids": ("<pad>",)}, TypeError, "padding_ids"),
    ],
)
def test_bad_options(options, error, message):
    model = small_model()
    with pytest.raises(error, match=message):
        use_fused_loss(model, **options)
    assert not hasattr(model, "_fused_loss")


def test_bad_models():
    with pytest.raises(
        TypeError, match=r"model: expected one of ParakeetForRNNT.* got Linear with 0"
    ):
        use_fused_loss(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected one of ParakeetForRNNT.* got str"):
        use_fused_loss("nvidia/parakeet-rnnt-0.6b")
    with pytest.raises(TypeError, match=r"got ModuleList with 2"):
        use_fused_loss(torch.nn.ModuleList([small_model(), small_model()]))
    with pytest.raises(ValueError, match=r"config.hidden_act: expected one of relu.*'mish'"):
        use_fused_loss(small_model(hidden_act="mish"))


def test_bad_calls():
    model, inputs = small_model(), batch()
    with use_fused_loss(model):
        with pytest.raises(ValueError, match=r"labels: expected shape \(B, U\), got \(2,\)"):
            model(**{**inputs, "labels": inputs["labels"][:, 0]})
        with pytest.raises(ValueError, match=r"decoder_input_ids: expected shape \(2, 4\)"):
            model(**{**inputs, "decoder_input_ids": inputs["decoder_input_ids"][:, 1:]})
        with pytest.raises(ValueError, match="decoder_cache: expected none with labels"):
            model(**inputs, use_decoder_cache=True)
        with pytest.raises(ValueError, match="reduction: expected one of"):
            model(**inputs, reduction="average")


def test_missing_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"use_fused_loss needs transformers>=5.24: pip install"):
        use_fused_loss(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [("4.57.1", True), ("5.20.2", True), ("5.24.0.dev0", False), ("5.100", False)],
)
def test_a_version_that_is_too_old_is_named(monkeypatch, version, is_refused):
    """Other packages, such as peft, install the newest one for Python 3.10, which is too old."""
    package = SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "transformers", package)
    if not is_refused:
        assert import_transformers("this") is package
        return
    expected = f"this needs transformers>=5.24, got {version}: pip install 'transformers>=5.24'"
    with pytest.raises(ImportError, match=re.escape(expected)):
        import_transformers("this")
