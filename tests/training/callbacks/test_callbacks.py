# SPDX-License-Identifier: Apache-2.0
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from transducer_toolkit.data.dataset import Batch
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.modules import ConvLstmEncoder, Joiner, StatelessPredictor, Transducer
from transducer_toolkit.training.callbacks import UtterancePicture, pictures
from transducer_toolkit.training.lightning_module import TransducerModule

TOKENIZER = CharTokenizer.from_texts(["ab"])


def make_module(topology):
    model = Transducer.build(
        ConvLstmEncoder(conv_channels=2, hidden_dim=8),
        partial(StatelessPredictor, embedding_dim=4),
        partial(Joiner, joiner_dim=8),
        vocab_size=TOKENIZER.vocab_size,
        blank=TOKENIZER.blank,
    )
    return TransducerModule(model, TOKENIZER, topology=topology).eval()


@pytest.mark.parametrize(
    ("topology", "drawn"), [("regular", "short"), ("modified", "fits"), ("constrained", "fits")]
)
def test_the_picture_is_of_an_utterance_that_has_a_path(tmp_path, monkeypatch, topology, drawn):
    batch = Batch(
        utterance_ids=["empty", "short", "fits"],
        texts=["", "abab", "ab"],
        features=torch.randn(3, 40, 80),
        feature_lengths=torch.tensor([10, 10, 40]),
        targets=torch.tensor([[-1, -1, -1, -1], [1, 2, 1, 2], [1, 2, -1, -1]]),
        target_lengths=torch.tensor([0, 4, 2]),  # of 3, 3 and 10 encoder frames
    )
    titles = []

    def draw(*arguments, title, **options):
        titles.append(title)
        return drawing(*arguments, title=title, **options)

    drawing = pictures.draw_utterance
    monkeypatch.setattr(pictures, "draw_utterance", draw)
    trainer, module = SimpleNamespace(is_global_zero=True, loggers=[]), make_module(topology)
    picture = UtterancePicture(str(tmp_path / "picture.png"), duration_s=0.1)
    with torch.inference_mode():
        picture.on_test_start(trainer, module)
        picture.on_test_batch_end(trainer, module, None, batch, 0)
        picture.on_test_end(trainer, module)
    assert [title.split(":")[0] for title in titles] == [drawn]
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_no_picture_of_a_lattice_that_is_too_large(tmp_path, monkeypatch, caplog):
    batch = Batch(
        utterance_ids=["long"],
        texts=["ab"],
        features=torch.randn(1, 40, 80),
        feature_lengths=torch.tensor([40]),
        targets=torch.tensor([[1, 2]]),
        target_lengths=torch.tensor([2]),
    )
    trainer, module = SimpleNamespace(is_global_zero=True, loggers=[]), make_module("regular")
    picture = UtterancePicture(str(tmp_path / "picture.png"))
    for limit, drawn in ((10 * 3 - 1, False), (10 * 3, True)):
        monkeypatch.setattr(pictures, "MAX_CELLS", limit)
        with torch.inference_mode():
            picture.on_test_start(trainer, module)
            picture.on_test_batch_end(trainer, module, None, batch, 0)
            picture.on_test_end(trainer, module)
        assert (tmp_path / "picture.png").exists() == drawn
    assert "the lattice of long has 30 cells, more than 29" in caplog.text
