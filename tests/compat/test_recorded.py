# SPDX-License-Identifier: Apache-2.0
"""Values that NeMo and SpeechBrain computed, and what happens without these packages.

test_nemo.py and test_speechbrain.py compare with the packages themselves where they are installed.
The values below are of nemo-toolkit 3.0.0 and of speechbrain 1.1.2 with Numba's simulator.
"""

import subprocess
import sys
import textwrap

import pytest

from tests.compat.recorded import BLANK, DURATIONS, LENGTHS, logits, summary, targets
from transducer_toolkit.compat import nemo, speechbrain

MULTI_BLANK = {"big_blank_durations": [2, 4], "sigma": 0.1}


@pytest.mark.parametrize(
    ("name", "options", "num_extra", "num_labels", "expected"),
    [
        ("warprnnt_numba", {}, 0, 8, [28.4659, 21.2957, 22.709, 0.2047]),
        ("warprnnt_numba", {"clamp": 0.05}, 0, 8, [28.4659, 21.2957, 22.709, -0.8875]),
        ("tdt", {"durations": DURATIONS, "sigma": 0.05}, 4, 8, [16.3465, 9.5149, 12.315, -0.8427]),
        ("multiblank_rnnt", MULTI_BLANK, 0, 6, [13.9978, 8.4233, 10.0407, 0.0657]),
    ],
)
def test_losses_of_nemo(name, options, num_extra, num_labels, expected):
    acts = logits(num_extra)
    losses = nemo.RNNTLoss(BLANK, None, name, options)(acts, targets(num_labels), *LENGTHS)
    assert summary(losses, acts) == pytest.approx(expected, abs=2e-4)


def test_losses_of_speechbrain():
    acts = logits()
    relative = LENGTHS[0] / 9, LENGTHS[1] / 4
    arguments = acts, targets(), *relative, BLANK, "none"
    per_frame = speechbrain.transducer_loss(*arguments, use_torchaudio=False)
    assert per_frame.tolist() == pytest.approx([3.1629, 3.0422, 2.8386], abs=2e-4)
    gradient = summary(speechbrain.transducer_loss(*arguments), acts)[-1]
    assert gradient == pytest.approx(0.2047, abs=2e-4)


def test_packages_are_imported_by_the_first_call():
    code = """
        import sys
        import torch
        from transducer_toolkit.compat import espnet, nemo, tensorflow
        from transducer_toolkit.compat import speechbrain, warprnnt_pytorch
        packages = ["nemo", "espnet2", "speechbrain", "torchaudio", "tensorflow"]
        assert not set(packages) & set(sys.modules)
        sys.modules |= dict.fromkeys(packages)
        for call, *arguments in (
            (nemo.use_fused_loss, torch.nn.Linear(2, 2)),
            (espnet.use_fused_loss, torch.nn.Linear(2, 2)),
            (tensorflow.rnnt_loss, [[[[0.0]]]], [[]], 0),
        ):
            try:
                call(*arguments)
            except ImportError as error:
                print(error)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(run, capture_output=True, text=True, check=True)
    of_nemo, of_espnet, of_tensorflow = result.stdout.splitlines()
    assert of_nemo.startswith("use_fused_loss needs nemo-toolkit[asr]: pip install 'nemo-toolkit[")
    assert of_espnet.startswith("use_fused_loss needs espnet: pip install espnet")
    assert of_tensorflow.startswith(
        "transducer_toolkit.compat.tensorflow needs tensorflow: pip install tensorflow"
    )


@pytest.mark.parametrize("module", [nemo, speechbrain])
def test_unknown_names_are_attribute_errors(module):
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        module.Unknown  # noqa: B018
