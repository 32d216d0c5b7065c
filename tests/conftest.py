# SPDX-License-Identifier: Apache-2.0
"""One thread unless a test says otherwise: quick beside other jobs, and the same everywhere."""

import gc
import os
import sys
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests import fork_server
from tests.backends import Backend
from transducer_toolkit.ops import coarse_to_fine, visited_blocks

# Few tests that take long. pytest-xdist would start these files last, one worker at work with one
# of them while the others wait.
LONG = (
    "test_packaging.py",
    "test_gpu_scripts.py",
    "cli/test_ddp.py",
    "losses/test_fused_memory.py",
)
LONG += ("inference/test_huggingface.py", "cli/test_resume.py", "cli/test_train.py")
LONG += ("test_fuzz_inputs.py", "export/test_nemo.py", "cli/test_train_durations.py")
LONG += ("data/digits/test_digits_corpus.py", "cli/test_no_network.py", "test_examples.py")
LONG += ("cli/test_train_huggingface.py", "cli/test_evaluate.py", "cli/test_fuzz_commands.py")
LONG += ("losses/test_ddp.py", "test_pictures.py", "cli/test_librispeech.py")


def pytest_configure(config):
    config.option.loadscopereorder = False  # of pytest-xdist, which may be absent
    fork_server.shared_folder = getattr(config, "workerinput", {}).get("fork_folder")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Let the workers of pytest-xdist share a server of forks."""
    node.workerinput["fork_folder"] = fork_server.folder()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Start with LONG, then with the files of most tests, if several processes share them."""
    if not hasattr(config, "workerinput"):
        return
    files = [item.nodeid.partition("::")[0].removeprefix("tests/") for item in items]
    ranks = {name: LONG.index(name) if name in LONG else len(LONG) for name in files}
    counts = Counter(files)
    order = sorted(range(len(items)), key=lambda i: (ranks[files[i]], -counts[files[i]], files[i]))
    items[:] = [items[i] for i in order]


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()  # what is imported is no garbage: each collection would look at all of it
        gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _configs_are_composed_once():
    if "hydra" not in sys.modules:
        yield
        return
    from tests.composition import composed_once

    with composed_once():
        yield


@pytest.fixture(autouse=True)
def _fixed_seed_and_threads():
    torch.manual_seed(20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # transducer-train turns it on
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "emulated"])
def stages(request):
    """Runs a test of tensors on the CPU twice: with the CPU's stages, and with emulated CUDA's."""
    if request.param == "emulated" and request.node.get_closest_marker("not_emulated"):
        pytest.skip("too slow with emulated stages, or the same")
    with Backend(request.param).active():
        yield


@pytest.fixture
def coarse_pass(monkeypatch):
    """The fused loss of float32 takes its coarse pass for every size and on every processor."""
    monkeypatch.setattr(
        coarse_to_fine, "pays", lambda enc, vocab_size, num_rows: enc.dtype == torch.float32
    )
    monkeypatch.setattr(visited_blocks, "MIN_OPERATIONS_PER_WAVE", 0)
