# SPDX-License-Identifier: Apache-2.0
"""Inputs whose losses other projects have computed; see test_recorded.py."""

import numpy as np
import torch

BLANK = 8
DURATIONS = [0, 1, 2, 4]
LENGTHS = torch.tensor([9, 7, 8]), torch.tensor([4, 2, 3])


def logits(num_extra=0):
    size = (3, 9, 5, BLANK + 1 + num_extra)
    values = np.random.RandomState(0).randn(*size).astype(np.float32)
    return torch.from_numpy(values).requires_grad_()


def targets(num_labels=BLANK):
    return torch.from_numpy(np.random.RandomState(1).randint(0, num_labels, (3, 4)))


def summary(losses, acts):
    """The losses, and the product of the gradient of their sum with a random tensor."""
    gradient = torch.autograd.grad(losses.sum(), acts)[0]
    direction = np.random.RandomState(2).randn(*acts.shape)
    product = (gradient.double() * torch.from_numpy(direction)).sum()
    return [round(float(x), 4) for x in (*losses.detach(), product)]
