# SPDX-License-Identifier: Apache-2.0
"""The reference result of each function of calls.FUNCTIONS, by its name."""

from __future__ import annotations

from tests.soak import expect_decoders, expect_grids, expect_joiners, expect_logits

EXPECTATIONS = {
    "transducer_loss": expect_logits.transducer_loss,
    "tdt_loss": expect_logits.transducer_loss,
    "multi_blank_loss": expect_logits.transducer_loss,
    "torchaudio.rnnt_loss": expect_logits.torchaudio_rnnt_loss,
    "rnnt_loss": expect_logits.rnnt_loss,
    "rnnt_loss_pruned": expect_logits.rnnt_loss,
    "rnnt_loss_simple": expect_joiners.rnnt_loss_simple,
    "rnnt_loss_smoothed": expect_joiners.rnnt_loss_simple,
    "fused_joiner_loss": expect_joiners.fused_joiner_loss,
    "get_rnnt_logprobs": expect_joiners.get_rnnt_logprobs,
    "get_rnnt_logprobs_smoothed": expect_joiners.get_rnnt_logprobs,
    "get_rnnt_logprobs_joint": expect_logits.get_rnnt_logprobs_joint,
    "get_rnnt_logprobs_pruned": expect_logits.get_rnnt_logprobs_joint,
    "mutual_information_recursion": expect_grids.mutual_information_recursion,
    "joint_mutual_information_recursion": expect_grids.joint_mutual_information_recursion,
    "get_rnnt_prune_ranges": expect_grids.get_rnnt_prune_ranges,
    "do_rnnt_pruning": expect_grids.do_rnnt_pruning,
    "join": expect_joiners.join,
    "joiner_logits": expect_joiners.join,
    "LatticeShape.from_lengths": expect_joiners.from_lengths,
    "greedy_search": expect_decoders.greedy_search,
    "GreedySearch.advance": expect_decoders.advance,
    "ModifiedBeamSearch.nbest": expect_decoders.nbest,
    "best_path": expect_decoders.best_path,
    "align": expect_decoders.align,
    "lattice_posteriors": expect_decoders.lattice_posteriors,
}
