# SPDX-License-Identifier: Apache-2.0
import dataclasses
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from transducer_toolkit import LatticeShape
from transducer_toolkit.data.dataset import Batch
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.decoding import NonFiniteScoresError, align
from transducer_toolkit.modules import ConvLstmEncoder, Joiner, StatelessPredictor, Transducer
from transducer_toolkit.training import lightning_module
from transducer_toolkit.training.lightning_module import TransducerModule
from transducer_toolkit.training.schedules import warmup_cosine
from transducer_toolkit.training.stages import PackedLoss
from transducer_toolkit.training.utterance_names import naming_utterances

TOKENIZER = CharTokenizer.from_texts(["ab c"])


def test_long_texts_are_cut_in_the_log():
    """An untrained model emits several symbols on every frame."""
    assert lightning_module._shown("a" * 300) == "a" * 300
    assert lightning_module._shown("ab" * 5000) == "ab" * 150 + "... (10000 characters)"


def make_batch(rows):
    """Utterances 0 to 3, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 30, 80, generator=generator)
    lengths, target_lengths = torch.tensor([30, 21, 9, 17]), torch.tensor([4, 3, 0, 1])
    targets = torch.randint(1, TOKENIZER.vocab_size, (4, 4), generator=generator)
    rows = torch.tensor(rows)
    return Batch(
        utterance_ids=[str(int(row)) for row in rows],
        texts=["" for _ in rows],
        features=features[rows],
        feature_lengths=lengths[rows],
        targets=targets[rows],
        target_lengths=target_lengths[rows],
    )


def make_module(loss=None, **options):
    torch.manual_seed(0)
    model = Transducer.build(
        ConvLstmEncoder(conv_channels=2, hidden_dim=8, dropout=0.0),
        partial(StatelessPredictor, embedding_dim=4),
        partial(Joiner, joiner_dim=8),
        vocab_size=TOKENIZER.vocab_size,
        blank=TOKENIZER.blank,
    )
    return TransducerModule(model.double(), TOKENIZER, loss=loss or PackedLoss(), **options)


def gradients(module, rows, mean_frames):
    """Gradients of one process, when the mean number of frames of all processes is given."""
    module._trainer = SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda frames, reduce_op: mean_frames or frames),
        accumulate_grad_batches=1,
    )
    module.log = lambda *args, **kwargs: None
    batch = make_batch(rows)
    object.__setattr__(batch, "features", batch.features.double())
    module.zero_grad()
    module.training_step(batch, 0).backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


def test_the_average_over_processes_is_the_gradient_of_the_whole():
    module = make_module()
    whole = gradients(module, [0, 1, 2, 3], None)
    encoder_frames = [[8, 6], [3, 5]]  # of utterances 0, 1 and 2, 3
    mean_frames = sum(map(sum, encoder_frames)) / 2
    parts = [gradients(module, rows, mean_frames) for rows in ([0, 1], [2, 3])]
    for expected, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close((first + second) / 2, expected, rtol=1e-10, atol=1e-12)


def test_what_is_missing_is_named():
    module = make_module()
    with pytest.raises(ValueError, match="optimizer: expected a function, got None"):
        module.configure_optimizers()
    module.loss = None
    with pytest.raises(ValueError, match="expected a loss stage"):
        module.compute_losses(make_batch([0]))


def test_an_alignment_is_in_encoder_frames():
    module = make_module()  # of 40 ms
    batch = make_batch([0, 1, 2])
    lengths = torch.tensor([8, 6, 3])
    assert module._alignment(batch, lengths) is None
    batch.token_times_s = [[0.0, 0.039, 0.1199999, 0.28], [0.079, 0.12, 0.31], []]
    # rounded starts of frames are in their frames, times behind the last frame in that
    expected = [[0, 0, 3, 7], [1, 3, 5, 0], [0, 0, 0, 0]]
    assert module._alignment(batch, lengths).tolist() == expected


@pytest.mark.parametrize("topology", ["regular", "one_sym_per_frame"])
def test_symbol_delays_are_those_of_the_best_path(topology):
    loss = PackedLoss(topology=topology)
    module = make_module(loss=loss).eval()
    assert module.topology == topology
    space, a, b = (TOKENIZER.encode("a b")[k] for k in (1, 0, 2))
    batch = make_batch([0, 1, 2, 3])
    batch = dataclasses.replace(
        batch,
        features=batch.features.double(),
        targets=torch.tensor([[a, b, space, a], [b, space, a, 0], [0] * 4, [a, 0, 0, 0]]),
        word_starts_s=[[0.01, 0.1], None, [], [0.05]],
    )
    encoder_out, encoder_lengths = module.model.encoder(batch.features, batch.feature_lengths)
    found = module._symbol_delays(batch, encoder_out, encoder_lengths)
    assert found[1] is None and found[2] == ()
    for row, first_symbols in ((0, [0, 3]), (3, [0])):
        num_frames, num_targets = int(encoder_lengths[row]), int(batch.target_lengths[row])
        shape = LatticeShape.from_lengths([num_frames], [num_targets])
        targets = batch.targets[row : row + 1, :num_targets]
        logits = module.model.joiner(
            encoder_out[row : row + 1, :num_frames], module.model.predictor(targets), shape
        )
        frames = align(logits, targets, shape, TOKENIZER.blank, topology=topology)[0].frames
        starts_s = batch.word_starts_s[row]
        expected = [
            40 * frames[u] - 1000 * start for u, start in zip(first_symbols, starts_s, strict=True)
        ]
        assert found[row] == pytest.approx(expected)


def test_symbol_delays_leave_out_what_has_no_path_or_no_times():
    module = make_module(loss=PackedLoss(topology="one_sym_per_frame")).eval()
    batch = make_batch([0, 1])
    double = batch.features.double()
    encoder_out, encoder_lengths = module.model.encoder(double, batch.feature_lengths)
    assert module._symbol_delays(batch, encoder_out, encoder_lengths) == [None, None]
    a = TOKENIZER.encode("a")[0]
    timed = dataclasses.replace(batch, targets=torch.full((2, 4), a), word_starts_s=[[0.1], [0.1]])
    # Four symbols need more than four frames.
    lengths = torch.tensor([4, 4])
    delays = module._symbol_delays(timed, encoder_out, lengths)
    assert delays[0] is None and delays[1] is not None


def test_checkpoints_carry_the_recipe():
    checkpoint = {}
    make_module(recipe={"format_version": 1}).on_save_checkpoint(checkpoint)
    assert checkpoint == {"recognizer": {"format_version": 1}}
    checkpoint = {}
    make_module().on_save_checkpoint(checkpoint)
    assert checkpoint == {}


def test_a_validation_without_finite_scores_goes_on(caplog):
    """Those utterances are not recognised; the others are, as they would be without them."""
    module, batch = make_module(), make_batch([0, 1, 2])
    module.eval()
    batch = dataclasses.replace(batch, features=batch.features.double())
    module.on_validation_epoch_start()
    module.validation_step(batch, 0)
    expected = [row.hypothesis for row in module._transcripts[0]]
    batch.features[1, 3] = torch.nan
    module.on_validation_epoch_start()
    with caplog.at_level(logging.WARNING):
        module.validation_step(batch, 0)
    found = [row.hypothesis for row in module._transcripts[0]]
    assert found == [expected[0], "", expected[2]] and expected[1]
    assert "their hypotheses are empty: 1" in caplog.text
    with pytest.raises(NonFiniteScoresError, match=r"^1: the scores of the symbols are NaN"):
        module.test_step(batch, 0)


@pytest.mark.parametrize(
    ("part", "make", "message"),
    [
        ("optimizer", partial(torch.optim.AdamW, lr=-1.0), "lr=-1.0"),
        ("optimizer", partial(torch.optim.AdamW, betas=[0.9]), r"betas=\[0.9\]"),
        ("scheduler", partial(warmup_cosine, warmup_fraction=2.0), "warmup_fraction=2.0"),
    ],
)
def test_an_option_that_torch_does_not_name_is_named(part, make, message):
    options = {"optimizer": partial(torch.optim.AdamW, lr=1e-3), "scheduler": None}
    module = make_module(**options | {part: make})
    module._trainer = SimpleNamespace(estimated_stepping_batches=10)
    with pytest.raises(ValueError, match=rf"^{part} \w+\(.*{message}"):
        module.configure_optimizers()


class WrongCount(ConvLstmEncoder):
    def num_output_frames(self, num_frames):
        return super().num_output_frames(num_frames) + (num_frames == 21)


def test_an_encoder_that_counts_wrongly_is_named_with_the_utterance():
    module = make_module().float()
    module.model.encoder = WrongCount(conv_channels=2, hidden_dim=8)
    front_end = module.model.encoder.front_end
    module.model.encoder.front_end = lambda *args: (
        front_end(*args)[0],
        ConvLstmEncoder.num_output_frames(module.model.encoder, args[1]),
    )
    module.compute_losses(make_batch([0, 2]))
    for step in (module.compute_losses, lambda batch: module.test_step(batch, 0)):
        with pytest.raises(ValueError, match=r"utterance '1': WrongCount\.forward makes 6"):
            step(make_batch([0, 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([[1, 2, 1, 2], [1, 99, 1, 0]])}, r"'1': targets\[1\]: expected"),
        ({"target_lengths": torch.tensor([4, -1])}, "'1': target_lengths: expected at least 0"),
        ({"targets": torch.tensor([[1, 2, 1, 2], [0, 1, 1, 0]])}, r"'1': targets\[0\]: .* blank"),
    ],
)
def test_errors_of_a_loss_name_the_id(change, message):
    batch = make_batch([0, 1])
    for name, value in change.items():
        object.__setattr__(batch, name, value)
    object.__setattr__(batch, "features", batch.features.double())
    with pytest.raises(ValueError, match=f"^utterance {message}"):
        make_module().compute_losses(batch)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("utterance 1: topology 'regular' needs", "utterance 'b': topology 'regular' needs"),
        ("boundary[0] (utterance 0): expected", "utterance 'a': boundary: expected"),
        ("ranges[1, 0] (utterance 1): expected", "utterance 'b': ranges[0]: expected"),
        ("s_range: utterance 1 (3 symbols) needs", "utterance 'b': s_range: utterance 1 (3"),
        ("utterance 7: of another batch", "utterance 7: of another batch"),
        ("beam: expected at least 1", "beam: expected at least 1"),
    ],
)
def test_an_index_becomes_an_id(text, expected):
    with pytest.raises(ValueError) as error, naming_utterances(["a", "b"]):
        raise ValueError(text)
    assert str(error.value).startswith(expected)
