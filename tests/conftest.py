# SPDX-License-Identifier: Apache-2.0
"""One thread unless a test says otherwise: quick beside other jobs, and the same everywhere."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed_and_threads():
    torch.manual_seed(20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # transducer-train turns it on
    yield
    torch.set_num_threads(threads)
