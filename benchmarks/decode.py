# SPDX-License-Identifier: Apache-2.0
"""The suite `decode`: a model that knows a transcript, so that every search has to find it.

A predictor's output d(y) after symbol y is random. Where y is spoken, the encoder's output is -d(y)
and noise, elsewhere only noise; the output layer's row of y is a multiple of -d(y), and blank has a
bias. So y leads where it is spoken and blank leads everywhere else, also on that frame once y has
been emitted, when the two cancel. Posteriors are as decided as a trained model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from benchmarks.jobs import Job
from benchmarks.workloads import BLANK_BIAS, LABEL_GAIN, NOISE, Workload

if TYPE_CHECKING:
    from transducer_toolkit.modules import Joiner, StatelessPredictor

MAX_SYMBOLS_PER_FRAME = 10


class SearchInputs(NamedTuple):
    """What a search gets: the model without its encoder, (B, T, D) encoder output, (B,) lengths."""

    predictor: StatelessPredictor
    joiner: Joiner
    encoder_out: Tensor
    lengths: Tensor


Search = Callable[[SearchInputs], list[list[int]]]


def transcripts(workload: Workload) -> list[list[int]]:
    """What is spoken: random labels, no two equal ones in a row."""
    generator = torch.Generator().manual_seed(workload.seed)
    made = []
    for count in workload.symbols:
        steps = torch.randint(1, workload.vocab_size - 1, (count,), generator=generator)
        made.append((steps.cumsum(0) % (workload.vocab_size - 1) + 1).tolist())
    return made


def search_inputs(workload: Workload) -> SearchInputs:
    """A stateless predictor and a joiner of width D, and encoder output of the transcripts."""
    from transducer_toolkit.modules import Joiner, StatelessPredictor

    width, vocab_size = workload.joiner_dim, workload.vocab_size
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(workload.seed)
        predictor = StatelessPredictor(vocab_size, width).eval()
        joiner = Joiner(width, width, width, vocab_size).eval()
        encoder_out = NOISE * torch.randn(len(workload.frames), max(workload.frames), width)
        places = [
            torch.randperm(frames)[:symbols].sort().values
            for frames, symbols in zip(workload.frames, workload.symbols, strict=True)
        ]
        predictor.context_weight[:-1] = 0  # the newest symbol decides
        outputs = predictor(torch.arange(vocab_size)[:, None])[:, 1]
        after = joiner.predictor_projection(outputs)
        joiner.predictor_projection.weight /= after.std()
        after /= after.std()
        joiner.encoder_projection.weight.copy_(torch.eye(width))
        joiner.encoder_projection.bias.copy_(-after.mean(0))
        after -= after.mean(0)  # d(y)
        joiner.output.weight.copy_(-LABEL_GAIN / width * after)
        joiner.output.weight[0] = 0
        joiner.output.bias.zero_()
        joiner.output.bias[0] = BLANK_BIAS
        for frames, place, tokens in zip(encoder_out, places, transcripts(workload), strict=True):
            frames[place] -= after[tokens[: len(place)]]
    lengths = torch.tensor(workload.frames)
    device = workload.device
    return SearchInputs(
        predictor.to(device), joiner.to(device), encoder_out.to(device), lengths.to(device)
    )


def decode_job(workload: Workload, search: Search) -> Job:
    """Tokens of every utterance."""
    inputs = search_inputs(workload)

    def run(_: None) -> list[list[int]]:
        with torch.inference_mode():
            return search(inputs)

    return Job(run)


def one_frame_at_a_time(inputs: SearchInputs) -> list[list[int]]:
    """Greedy search as it is defined: one utterance, one frame, one symbol after the other."""
    predictor, joiner = inputs.predictor, inputs.joiner
    found = []
    for frames, length in zip(inputs.encoder_out, inputs.lengths.tolist(), strict=True):
        encoder_rows = joiner.encoder_projection(frames[:length])
        state = predictor.initial_state(1, frames.device)
        out, state = predictor.step(torch.tensor([predictor.blank], device=frames.device), state)
        predictor_row = joiner.predictor_projection(out)
        tokens: list[int] = []
        for encoder_row in encoder_rows:
            for _ in range(MAX_SYMBOLS_PER_FRAME):
                best = joiner.output((encoder_row + predictor_row).tanh()).argmax(-1)
                token = int(best)
                if token == predictor.blank:
                    break
                tokens.append(token)
                out, state = predictor.step(best, state)
                predictor_row = joiner.predictor_projection(out)
        found.append(tokens)
    return found
