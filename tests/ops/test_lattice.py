# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest
import torch

from transducer_toolkit import LatticeShape, transducer_loss


def test_sizes_and_offsets():
    shape = LatticeShape.from_lengths(torch.tensor([2, 3, 1], dtype=torch.int32), [1, 0, 4])
    assert (shape.num_utterances, shape.max_frames, shape.max_targets) == (3, 3, 4)
    assert shape.num_cells == 4 + 3 + 5
    assert shape.cell_offsets.tolist() == [0, 4, 7, 12]
    assert shape.logit_lengths.dtype == torch.int64


def test_no_overflow_for_large_lattices():
    shape = LatticeShape.from_lengths(torch.tensor([60_000] * 3, dtype=torch.int32), [50_000] * 3)
    assert shape.num_cells == 3 * 60_000 * 50_001


@pytest.mark.parametrize("extra", [(0, 0), (2, 0), (0, 3)])
def test_pack_follows_the_documented_order_and_unpack_inverts_it(extra):
    shape = LatticeShape.from_lengths([2, 3, 1], [1, 0, 4])
    padded = torch.randn(3, 3 + extra[0], 5 + extra[1], 2, requires_grad=True)
    packed = shape.pack(padded)
    assert packed.shape == (12, 2)
    for b, (frames, symbols) in enumerate([(2, 1), (3, 0), (1, 4)]):
        for t in range(frames):
            for u in range(symbols + 1):
                row = shape.cell_offsets[b] + t * (symbols + 1) + u
                assert torch.equal(packed[row], padded[b, t, u])
    unpacked = shape.unpack(packed, fill=-7.0)
    assert unpacked.shape == (3, 3, 5, 2)
    assert torch.equal(shape.pack(unpacked), packed)
    assert int((unpacked == -7.0).sum()) == (3 * 3 * 5 - 12) * 2
    (grad,) = torch.autograd.grad(unpacked.sum(), padded)
    assert grad.sum() == packed.numel() and grad.max() == 1


def test_the_shape_does_not_share_the_callers_memory():
    lengths = torch.tensor([2, 3])
    shape = LatticeShape.from_lengths(lengths, [1, 0])
    lengths[0] = 9
    assert shape.logit_lengths.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("frames", "symbols", "error", "message"),
    [
        ([2, 0], [1, 1], ValueError, r"logit_lengths\[1\]: expected at least 1, got 0"),
        ([2, 2], [1, -1], ValueError, r"target_lengths\[1\]: expected at least 0, got -1"),
        ([2, 2], [1], ValueError, "target_lengths: expected 2 lengths, .* got 1"),
        ([], [], ValueError, r"logit_lengths: .* B >= 1, got \(0,\)"),
        ([[2]], [1], ValueError, r"logit_lengths: expected shape \(B,\)"),
        ([2.5], [1], TypeError, "logit_lengths: expected integers, got torch.float32"),
        ([2], [True], TypeError, "target_lengths: expected integers, got torch.bool"),
    ],
)
def test_bad_lengths(frames, symbols, error, message):
    with pytest.raises(error, match=message):
        LatticeShape.from_lengths(frames, symbols)


def test_bad_tensors():
    shape = LatticeShape.from_lengths([2, 3], [1, 0])
    with pytest.raises(ValueError, match=r"padded: .* at least \(2, 3, 2\), got \(2, 2, 2\)"):
        shape.pack(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match=r"packed: expected shape \(7, \.\.\.\)"):
        shape.unpack(torch.zeros(6, 4))


def test_absurd_lengths_are_refused():
    with pytest.raises(ValueError, match="got up to 4611686018427387905 frames"):
        LatticeShape.from_lengths([2**62 + 1], [3])


def test_travels_in_a_batch_and_is_known_where_it_has_been():
    shape = LatticeShape.from_lengths([2, 3, 1], [1, 0, 4])
    meta = torch.device("meta")
    assert shape.index(meta) is None
    for arguments, options in (
        ((torch.float32,), {}),
        ((), {}),
        (("meta",), {"non_blocking": True}),
    ):
        assert shape.to(*arguments, **options) is shape
    known = shape.index(meta)
    assert known is not None and known.device == meta
    assert shape.to(torch.empty(0, device="meta")).to(device=meta).index(meta) is known
    index = shape.index(torch.device("cpu"))
    assert index.tolist() == [[2, 3, 1], [1, 0, 4], [0, 4, 7], [0, 2, 5]]
    copy = pickle.loads(pickle.dumps(shape))  # to another process: without a device's memory
    assert copy.index(meta) is None and torch.equal(copy.index(torch.device("cpu")), index)
    assert (copy.num_cells, copy.max_targets) == (shape.num_cells, shape.max_targets)


def test_a_graph_makes_no_shape_of_tensors():
    torch.compiler.reset()
    frames, targets = torch.tensor([2, 1]), torch.tensor([1, 0])

    def packed(padded):
        return LatticeShape.from_lengths(frames, targets).pack(padded)

    padded = torch.randn(2, 2, 2, 3)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="outside of the compiled function"):
        compiled(padded)


def test_lengths_are_read_between_graphs_without_a_warning():
    """torch logs a warning if it traces ``Tensor.item``; then it breaks the graph anyway."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    frames, symbols = torch.tensor([3, 2]), torch.tensor([1, 0])
    logits, targets = torch.randn(2, 3, 2, 5), torch.tensor([[1], [0]])

    def loss(logits):
        shape = LatticeShape.from_lengths(frames, symbols)
        return transducer_loss(shape.pack(logits.sin()), targets, frames, symbols, blank=0).exp()

    torch.testing.assert_close(torch.compile(loss, backend="eager")(logits), loss(logits))
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert breaks and not any("item" in reason for reason in breaks), breaks
