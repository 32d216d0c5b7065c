# SPDX-License-Identifier: Apache-2.0
"""Random lattices in two precisions: gradients of the fused loss against float64.

    python -m tests.soak.fuzz_precision --cases 2000

The lattices have any topology, weights of scales from 1 to 100, masked vocabularies, outliers and
known paths. A gradient fails if its relative error is above 1e-5 and above twice that of float32.
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

import torch

from tests.losses.test_precision import BUDGET, random_case
from transducer_toolkit.ops import coarse_to_fine, visited_blocks


def errors_of(seed: int) -> list[tuple[float, float]]:
    """Relative errors of each gradient: in two precisions, and in float32 alone.

    Raises:
        AssertionError: other losses are finite than in float64.
    """
    case, options = random_case(seed)
    exact, plain = case.exact(**options), case.run(precision="full", **options)
    actual = case.run(**options)
    assert torch.equal(actual[0].isfinite(), exact[0].isfinite()), f"seed {seed}: finite losses"
    return [
        tuple(float((grad.double() - truth).norm() / truth.norm()) for grad in grads)
        for *grads, truth in zip(actual[1:], plain[1:], exact[1:], strict=True)
        if truth.norm() > 0
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed, of_float32, worst = 0, 0, 0.0
    with (
        patch.object(coarse_to_fine, "pays", lambda enc, *_: enc.dtype == torch.float32),
        patch.object(visited_blocks, "MIN_OPERATIONS_PER_WAVE", 0),
    ):
        for seed in range(args.seed, args.seed + args.cases):
            for error, plain in errors_of(seed):
                if not error <= max(BUDGET, 2 * plain):
                    failed += 1
                    print(f"seed {seed}: {error:.1e}, float32 alone {plain:.1e}")
                elif error > BUDGET:
                    of_float32 += 1
                else:
                    worst = max(worst, error)
    print(
        f"{args.cases} lattices: {failed} gradients above the budget; {of_float32} above "
        f"{BUDGET:g} as in float32 alone; largest error of the others {worst:.1e}"
    )
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
