# SPDX-License-Identifier: Apache-2.0
"""What one process needs to make the steps of two."""

import json

import torch
from lightning import Callback

from transducer_toolkit.data.batching import LatticeBatchSampler
from transducer_toolkit.data.datamodule import TransducerDataModule


class JoinedRanks(LatticeBatchSampler):
    """Each step's batches of all ranks, as one batch of one process."""

    def __init__(self, *args, num_ranks, **options):
        super().__init__(*args, **{**options, "rank": 0, "world_size": num_ranks})

    def __iter__(self):
        for rank_batches in zip(*map(self._of_rank, range(self.world_size)), strict=True):
            yield [key for batch in rank_batches for key in batch]

    def _of_rank(self, rank):
        self.rank = rank
        return list(super().__iter__())


class JoinedRanksDataModule(TransducerDataModule):
    """The data module for the process that stands for ``num_ranks``."""

    num_ranks = 2

    def train_dataloader(self):
        loader = super().train_dataloader()
        old = loader.batch_sampler
        sampler = JoinedRanks(
            [self._num_frames(u) for u in loader.dataset.utterances],
            loader.dataset.targets.lengths,
            max_cells=old.max_cells,
            max_utterances=old.max_utterances,
            num_output_frames=self.num_output_frames,
            seed=self.seed,
            num_ranks=self.num_ranks,
        )
        return type(loader)(loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn)


class RecordWeights(Callback):
    """Write the utterances of each step and, at the end, weights and first gradients of rank 0."""

    def __init__(self, path):
        self.path = path
        self.gradients = None
        self.batches = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.gradients is None:
            grads = {name: p.grad.clone() for name, p in pl_module.named_parameters()}
            self.gradients = grads

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch.utterance_ids)

    def on_train_end(self, trainer, pl_module):
        with open(f"{self.path}.{trainer.global_rank}.json", "w") as file:
            json.dump(self.batches, file)
        if trainer.is_global_zero:
            weights = {name: p.detach() for name, p in pl_module.named_parameters()}
            torch.save({"gradients": self.gradients, "weights": weights}, f"{self.path}.pt")
