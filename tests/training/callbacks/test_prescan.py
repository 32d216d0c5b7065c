# SPDX-License-Identifier: Apache-2.0
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import Precision

from tests.data.conftest import noise_corpus  # noqa: F401, a fixture
from tests.data.test_datamodule import data_module
from transducer_toolkit.modules import ConvLstmEncoder, Joiner, StatelessPredictor, Transducer
from transducer_toolkit.training.callbacks.prescan import PreScan
from transducer_toolkit.training.lightning_module import TransducerModule
from transducer_toolkit.training.stages import PackedLoss


class Limited(PackedLoss):
    """A loss stage that runs out of memory beyond some cells."""

    def __init__(self, max_cells, error):
        super().__init__()
        self.max_cells = max_cells
        self.error = error
        self.seen = []

    def forward(self, batch):
        cells = int((batch.shape.logit_lengths * (batch.shape.target_lengths + 1)).sum())
        self.seen.append(cells)
        if cells > self.max_cells:
            raise self.error
        return super().forward(batch)


@pytest.fixture
def setting(noise_corpus):  # noqa: F811
    """Module, trainer and loader; call with the cells that fit."""

    def make(fitting_cells, error=None, **options):
        data = data_module(noise_corpus, **options)
        data.setup()
        error = error or torch.OutOfMemoryError("no more")
        model = Transducer.build(
            ConvLstmEncoder(conv_channels=2, hidden_dim=8, dropout=0.5),
            partial(StatelessPredictor, embedding_dim=4),
            partial(Joiner, joiner_dim=8),
            vocab_size=data.tokenizer.vocab_size,
            blank=data.tokenizer.blank,
        )
        model.add_module("statistics", torch.nn.BatchNorm1d(2))
        module = TransducerModule(model, data.tokenizer, loss=Limited(fitting_cells, error))
        trainer = SimpleNamespace(
            train_dataloader=data.train_dataloader(), current_epoch=0, precision_plugin=Precision()
        )
        return module, trainer

    return make


def test_the_largest_batches_run_and_leave_nothing_behind(setting, caplog):
    module, trainer = setting(10**9)
    sampler = trainer.train_dataloader.batch_sampler
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        PreScan().on_train_start(trainer, module)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    cells = [sum(sampler.num_cells(key.position) for key in batch) for batch in sampler]
    assert module.loss.seen[0] == max(cells)
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"{max(cells)} cells" in message and "largest batches fit, peak" in message


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no more"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_names_an_option_and_a_value_that_fits(setting, error):
    module, trainer = setting(400, error, max_cells=2000)
    with pytest.raises(RuntimeError, match="out of memory: the batch with most cells") as found:
        PreScan().on_train_start(trainer, module)
    fitting = module.loss.seen[-1]
    assert fitting <= 400 < module.loss.seen[0]
    max_cells = fitting // 10 * 10 if fitting >= 100 else fitting
    assert f"data.max_cells={max_cells} (now 2000)" in str(found.value)
    # The advice is good.
    module, trainer = setting(400, error, max_cells=max_cells)
    PreScan().on_train_start(trainer, module)


def test_an_utterance_that_never_fits_is_named(setting):
    module, trainer = setting(10)
    message = r"utterance 'train-\d+' of \d\.\d s .*cells\) does not fit even in a batch by itself"
    with pytest.raises(RuntimeError, match=message):
        PreScan().on_train_start(trainer, module)


def test_other_errors_are_not_about_memory(setting):
    module, trainer = setting(10, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        PreScan().on_train_start(trainer, module)


def test_other_loaders_are_left_alone(setting):
    module, trainer = setting(10)
    trainer.train_dataloader = [1, 2]
    PreScan().on_train_start(trainer, module)
    assert module.loss.seen == []
