# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transducer_toolkit.data import batching
from transducer_toolkit.data.batching import EpochIndex
from transducer_toolkit.ops.topology import is_feasible


def make_sampler(*args, num_output_frames=lambda length: -(-length // 4), **options):
    return batching.LatticeBatchSampler(*args, num_output_frames=num_output_frames, **options)


def positions(sampler):
    return [[position for _, position in batch] for batch in sampler]


def cells(frames, targets, batch, subsampling=4):
    return sum(-(-frames[i] // subsampling) * (targets[i] + 1) for i in batch)


def corpus(size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(20, 1500, size).tolist(), rng.integers(0, 60, size).tolist()


@pytest.mark.parametrize(
    ("topology", "slack"), [("modified", 0), ("constrained", 0), ("one_sym_per_frame", 1)]
)
def test_feasibility(topology, slack):
    for num_targets in range(4):
        assert is_feasible(1, num_targets)
        assert not is_feasible(0, num_targets)
        for num_frames in range(6):
            expected = num_frames >= 1 and num_frames >= num_targets + slack
            assert is_feasible(num_frames, num_targets, topology=topology) == expected


def test_unknown_topology():
    with pytest.raises(ValueError, match=r"topology: expected one of .*regular.*, got 'other'"):
        is_feasible(1, 1, topology="other")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 400), st.integers(0, 30)), min_size=4, max_size=60),
    max_cells=st.integers(1, 20_000),
    max_utterances=st.integers(1, 20),
    world_size=st.integers(1, 4),
    shuffle=st.booleans(),
    epochs=st.lists(st.integers(0, 10_000), min_size=1, max_size=3),
)
def test_every_epoch_is_a_partition(
    lengths, max_cells, max_utterances, world_size, shuffle, epochs
):
    frames, targets = zip(*lengths, strict=True)
    ranks = [
        make_sampler(
            frames,
            targets,
            max_cells=max_cells,
            max_utterances=max_utterances,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for epoch in epochs:
        batches = []
        for sampler in ranks:
            sampler.set_epoch(epoch)
            own = positions(sampler)
            assert len(own) == len(sampler) == len(ranks[0])
            batches += own
        assert sorted(i for batch in batches for i in batch) == list(range(len(frames)))
        bounded = [
            len(batch) == 1
            or (cells(frames, targets, batch) <= max_cells and len(batch) <= max_utterances)
            for batch in batches
        ]
        if all(bounded):
            continue
        # Joining the smallest is the last resort, when there are hardly enough utterances.
        assert world_size > 1 and len(batches) + world_size > len(frames)


def test_shuffling_depends_on_seed_and_epoch_alone():
    def batches(epoch, seed=0):
        sampler = make_sampler(*corpus(300), max_cells=20_000, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(3) == batches(3)
    assert batches(3) != batches(4) and batches(3) != batches(3, seed=1)
    assert all(key.epoch == 3 for batch in batches(3) for key in batch)
    assert isinstance(batches(3)[0][0], EpochIndex)


def test_unshuffled_epochs_are_alike_and_start_with_the_longest():
    frames, targets = corpus(100)
    sampler = make_sampler(frames, targets, max_cells=20_000, shuffle=False)
    first = positions(sampler)
    sampler.set_epoch(5)
    assert positions(sampler) == first
    lengths = [frames[i] for batch in first for i in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_batches_waste_little_padding_and_steps_are_even_over_ranks():
    frames, targets = corpus(4000)
    ranks = [
        positions(make_sampler(frames, targets, max_cells=60_000, rank=rank, world_size=4))
        for rank in range(4)
    ]
    real = sum(frames)
    padded = sum(max(frames[i] for i in batch) * len(batch) for own in ranks for batch in own)
    assert real / padded > 0.9
    for step in zip(*ranks, strict=True):
        sizes = [len(batch) * max(frames[i] for i in batch) for batch in step]  # padded frames
        assert min(sizes) > 0.8 * max(sizes) or max(sizes) < 30_000


def test_an_utterance_beyond_the_bound_is_alone():
    sampler = make_sampler([4000, 40, 40], [99, 1, 1], max_cells=1000, shuffle=False)
    assert positions(sampler) == [[0], [1, 2]]


def test_cells_are_counted_in_frames_of_the_encoder():
    frames, targets = [801, 800, 9], [9, 4, 2]
    sampler = make_sampler(frames, targets, num_output_frames=lambda n: -(-n // 8), max_cells=1515)
    assert [sampler.num_cells(position) for position in range(3)] == [101 * 10, 100 * 5, 2 * 3]
    assert len(sampler) == 2
    none = make_sampler([3, 3], [1, 1], num_output_frames=lambda n: n // 8, max_cells=100)
    assert len(list(none)) == 1  # utterances without an encoder frame, as in a test set


def test_epoch_is_set_through_lightning():
    from lightning.fabric.utilities.data import _set_sampler_epoch
    from torch.utils.data import DataLoader

    sampler = make_sampler(*corpus(10), max_cells=20_000)
    _set_sampler_epoch(DataLoader(list(range(10)), batch_sampler=sampler), 7)
    assert sampler.epoch == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cells": 0}, "max_cells must be positive, got 0"),
        ({"max_utterances": 0}, "max_utterances must be positive, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in \[0, world_size=2\), got 2"),
        ({"world_size": 4}, "3 utterances are too few for world_size=4"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler([40, 40, 40], [1, 1, 1], **{"max_cells": 100, **options})


@pytest.mark.parametrize(
    ("frames", "targets", "message"),
    [
        ([40], [1, 2], "equally long, got 1 and 2"),
        ([40, 0], [1, 2], "num_frames must be positive and num_targets not negative"),
        ([40, 4], [1, -2], "num_frames must be positive and num_targets not negative"),
        ([], [], "0 utterances are too few for world_size=1"),
    ],
)
def test_bad_lengths(frames, targets, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(frames, targets, max_cells=100)


def test_the_largest_of_an_epoch():
    frames, targets = corpus(300)
    sampler = make_sampler(frames, targets, max_cells=20_000, max_utterances=12)
    found = sampler.largest(2)
    sampler.set_epoch(2)
    batches = list(sampler)
    assert all(batch in batches for batch in found.values())
    positions = [[key.position for key in batch] for batch in batches]
    most_cells = [key.position for key in found["most cells"]]
    largest = max(cells(frames, targets, batch) for batch in positions)
    assert cells(frames, targets, most_cells) == largest
    assert sum(map(sampler.num_cells, most_cells)) == largest
    padded = max(len(batch) * max(frames[i] for i in batch) for batch in positions)
    assert padded in [len(b) * max(frames[k.position] for k in b) for b in found.values()]
    assert max(map(len, found.values())) == max(map(len, batches))
