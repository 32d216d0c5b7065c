# SPDX-License-Identifier: Apache-2.0
"""torchaudio: int32 indices, padded logits of which every frame is used; RNNTBeamSearch."""

from torch import Tensor, nn

from benchmarks.decode import MAX_SYMBOLS_PER_FRAME, SearchInputs, decode_job
from benchmarks.jobs import Implementation, Job, LossOfLogits, int32_indices, unpruned
from benchmarks.workloads import BEAM, Workload

State = list[list[Tensor]] | None


def make_loss(workload: Workload) -> LossOfLogits:
    from torchaudio.functional import rnnt_loss

    indices = int32_indices(workload)
    return lambda logits: rnnt_loss(logits, *indices, blank=0, reduction="none")


class Model(nn.Module):
    """The parts of a model as RNNTBeamSearch calls them.

    It takes the last symbol for blank, whatever it is told: label k is k - 1 there. As in
    torchaudio's own models, encoder and predictor outputs come in joiner width.
    """

    def __init__(self, inputs: SearchInputs) -> None:
        super().__init__()
        self.predictor, self.joiner = inputs.predictor, inputs.joiner
        self.register_buffer("weight", self.joiner.output.weight.roll(-1, 0))
        self.register_buffer("bias", self.joiner.output.bias.roll(-1, 0))

    def transcribe(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.joiner.encoder_projection(frames), lengths

    def predict(
        self, tokens: Tensor, lengths: Tensor, state: State
    ) -> tuple[Tensor, Tensor, State]:
        shifted = (tokens[:, 0] + 1) % self.predictor.vocab_size
        before = state[0][0] if state else self.predictor.initial_state(len(tokens), tokens.device)
        out, after = self.predictor.step(shifted, before)
        return self.joiner.predictor_projection(out)[:, None], lengths, [[after]]

    def join(
        self, frame: Tensor, frame_lengths: Tensor, columns: Tensor, column_lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden = (frame[:, :, None] + columns[:, None]).tanh_()  # (beam, 1, 1, D)
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return logits, frame_lengths, column_lengths


def make_beam_search(workload: Workload, beam: int) -> Job:
    from torchaudio.models import RNNTBeamSearch

    def search(inputs: SearchInputs) -> list[list[int]]:
        decoder = RNNTBeamSearch(
            Model(inputs), blank=workload.vocab_size - 1, step_max_tokens=MAX_SYMBOLS_PER_FRAME
        )
        found = []
        for frames, length in zip(inputs.encoder_out, inputs.lengths, strict=True):
            best, *_ = decoder(frames[:length], length, beam)
            found.append([token + 1 for token in best[0][1:]])  # after the start symbol
        return found

    return decode_job(workload, search)


IMPLEMENTATIONS = [
    Implementation(
        "torchaudio",
        project="torchaudio",
        module="torchaudio.functional",
        needs=("rnnt_loss",),
        distribution="torchaudio",
        jobs=unpruned(make_loss, packed=False),
    ),
    *(
        Implementation(
            f"torchaudio: beam {beam}",
            project="torchaudio",
            module="torchaudio.models",
            needs=("RNNTBeamSearch",),
            distribution="torchaudio",
            jobs={"decode": lambda workload, beam=beam: make_beam_search(workload, beam)},
        )
        for beam in (1, BEAM)
    ),
]
