# SPDX-License-Identifier: Apache-2.0
"""A joiner of your own on packed logits: python examples/custom_joiner.py

The fused loss needs a joiner of the form Linear(activation(enc + pred)). For any other joiner,
compute the logits of the lattice cells and call transducer_loss.
"""

import torch
from torch import Tensor, nn

from transducer_toolkit import LatticeShape, transducer_loss


class GatedJoiner(nn.Module):
    """``Linear(tanh(Linear(encoder)) * sigmoid(Linear(predictor)))``.

    It has the methods that ``loss=packed``, ``loss=full`` and the searches call, so that
    transducer-train (``model.joiner._target_=...``) takes it. ``docs/own_parts.md`` lists them.
    """

    def __init__(
        self, encoder_dim: int, predictor_dim: int, joiner_dim: int, vocab_size: int
    ) -> None:
        super().__init__()
        self.encoder_dim, self.vocab_size = encoder_dim, vocab_size
        self.encoder_projection = nn.Linear(encoder_dim, joiner_dim)
        self.predictor_projection = nn.Linear(predictor_dim, joiner_dim)
        self.output = nn.Linear(joiner_dim, vocab_size)

    def forward(self, encoder_out: Tensor, predictor_out: Tensor, shape: LatticeShape) -> Tensor:
        """(B, T, E), (B, U + 1, P) -> packed logits (shape.num_cells, V)."""
        rows = self.project_encoder(encoder_out)  # (B, T, D)
        gates = torch.sigmoid(self.predictor_projection(predictor_out))  # (B, U + 1, D)
        hidden = rows[:, :, None] * gates[:, None]  # (B, T, U + 1, D)
        return self.output(shape.pack(hidden))  # only the cells that exist, without padding

    def padded(self, encoder_out: Tensor, predictor_out: Tensor) -> Tensor:
        """(B, T, E), (B, U + 1, P) -> logits (B, T, U + 1, V)."""
        return self.step(encoder_out[:, :, None], predictor_out[:, None])

    def step(self, encoder_frames: Tensor, predictor_out: Tensor) -> Tensor:
        """(..., E), (..., P) -> logits (..., V); for decoding."""
        return self.step_projected(self.project_encoder(encoder_frames), predictor_out)

    def project_encoder(self, encoder_out: Tensor) -> Tensor:
        """The part of a step that depends on the frame alone; searches compute it once."""
        return torch.tanh(self.encoder_projection(encoder_out))

    def step_projected(self, projected_frames: Tensor, predictor_out: Tensor) -> Tensor:
        gates = torch.sigmoid(self.predictor_projection(predictor_out))
        return self.output(projected_frames * gates)


def main(num_steps: int = 100) -> tuple[float, float]:
    """Fits one batch of random utterances, and returns the first and the last loss."""
    torch.manual_seed(0)
    shape = LatticeShape.from_lengths([40, 31], [7, 4])
    encoder_out, predictor_out = torch.randn(2, 40, 32), torch.randn(2, 8, 24)
    targets = torch.randint(1, 20, (2, 7))
    joiner = GatedJoiner(encoder_dim=32, predictor_dim=24, joiner_dim=48, vocab_size=20)
    optimizer = torch.optim.AdamW(joiner.parameters(), lr=1e-2)
    losses = []
    for _ in range(num_steps):
        logits = joiner(encoder_out, predictor_out, shape)  # (cells, V)
        loss = transducer_loss(logits, targets, *shape.lengths, blank=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{shape.num_cells} cells; loss {losses[0]:.1f} at first, {losses[-1]:.1f} at the end")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
