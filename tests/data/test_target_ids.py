# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest
import torch

from transducer_toolkit.data.target_ids import TargetIds

ROWS = [[5, 6, 4], [], [1], [29, 29]]


@pytest.mark.parametrize(
    ("vocab_size", "bytes_a_symbol"), [(30, 1), (256, 1), (257, 2), (70_000, 4)]
)
def test_symbols_come_back_and_take_few_bytes(vocab_size, bytes_a_symbol):
    targets = TargetIds(vocab_size)
    for ids in ROWS:
        targets.append(ids)
    for known in (targets, pickle.loads(pickle.dumps(targets))):  # a worker's copy
        assert len(known) == 4 and known.lengths.tolist() == [3, 0, 1, 2]
        assert [known[position].tolist() for position in range(4)] == ROWS
        assert known[1].dtype == torch.int64
    targets.append([vocab_size - 1] * 100_000)
    assert targets[4].unique().tolist() == [vocab_size - 1]
    size = len(pickle.dumps(targets))
    assert 100_000 * bytes_a_symbol < size < 100_000 * bytes_a_symbol + 500


@pytest.mark.parametrize("id_", [-1, 256])
def test_an_id_outside_the_vocabulary_is_an_error(id_):
    with pytest.raises(ValueError, match=rf"ids: expected numbers in \[0, 30\), got \[{id_}\]"):
        TargetIds(30).append([id_])
