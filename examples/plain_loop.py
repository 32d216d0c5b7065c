# SPDX-License-Identifier: Apache-2.0
"""A plain training loop around the fused loss: python examples/plain_loop.py

A made-up task that takes seconds: every symbol is a random vector that lasts three to six frames,
plus noise, and the model has to write the symbols down.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from transducer_toolkit import LatticeShape, fused_joiner_loss
from transducer_toolkit.decoding import GreedySearch
from transducer_toolkit.modules import Joiner, StatelessPredictor

VOCAB_SIZE = 12  # blank is 0
NUM_FEATURES = 16


def make_batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, LatticeShape]:
    """Features (B, T, F), targets (B, U) and the lattices of utterances of uneven length."""
    vectors = torch.randn(VOCAB_SIZE, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    target_lengths = torch.randint(2, 9, (size,), generator=generator)
    targets, features = [], []
    for length in target_lengths.tolist():
        symbols = torch.randint(1, VOCAB_SIZE, (length,), generator=generator)
        durations = torch.randint(3, 7, (length,), generator=generator)
        spoken = vectors[symbols].repeat_interleave(durations, dim=0)
        features.append(spoken + 0.5 * torch.randn(spoken.shape, generator=generator))
        targets.append(symbols)
    shape = LatticeShape.from_lengths([len(spoken) for spoken in features], target_lengths)
    return pad_sequence(features, batch_first=True), pad_sequence(targets, batch_first=True), shape


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(NUM_FEATURES, 64, batch_first=True)
        self.predictor = StatelessPredictor(VOCAB_SIZE, embedding_dim=32)
        self.joiner = Joiner(encoder_dim=64, predictor_dim=32, joiner_dim=48, vocab_size=VOCAB_SIZE)

    def loss(self, features: Tensor, targets: Tensor, shape: LatticeShape) -> tuple[Tensor, Tensor]:
        """Nats a frame, and the share of the cells that backward visits."""
        encoder_out, _ = self.encoder(features)
        loss, kept = fused_joiner_loss(
            self.joiner.encoder_projection(encoder_out),  # (B, T, D)
            self.joiner.predictor_projection(self.predictor(targets)),  # (B, U + 1, D)
            self.joiner.output.weight,
            self.joiner.output.bias,
            targets,
            *shape.lengths,
            blank=0,
            reduction="sum",
            shape=shape,
            return_kept=True,
        )
        return loss / shape.num_frames, kept


@torch.no_grad()
def error_rate(model: Model, generator: torch.Generator) -> float:
    """Wrong symbols of greedy decoding, position by position, as a share of all targets."""
    features, targets, shape = make_batch(32, generator)
    search = GreedySearch(model.predictor, model.joiner)
    hypotheses = search(model.encoder(features)[0], shape.logit_lengths)
    wrong = total = 0
    for hypothesis, target, length in zip(
        hypotheses, targets, shape.target_lengths.tolist(), strict=True
    ):
        found, expected = hypothesis.tokens, target[:length].tolist()
        wrong += sum(a != b for a, b in zip(found, expected, strict=False))
        wrong += abs(len(found) - len(expected))
        total += length
    return wrong / total


def main(num_steps: int = 500) -> tuple[float, float]:
    """Trains, and returns the last loss and the error rate on new utterances."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(num_steps):
        loss, kept = model.loss(*make_batch(16, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == num_steps - 1:
            print(f"step {step:3}: {loss.item():.3f} nats a frame, backward visits {kept:.0%}")
    errors = error_rate(model, generator)
    print(f"new utterances: {errors:.1%} of the symbols are wrong")
    return loss.item(), errors


if __name__ == "__main__":
    main()
