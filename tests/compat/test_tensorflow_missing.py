# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import textwrap


def test_tensorflow_is_imported_by_the_first_call():
    code = """
        import sys
        import transducer_toolkit.compat.tensorflow as tf_fast_rnnt
        assert "tensorflow" not in sys.modules
        sys.modules["tensorflow"] = None
        try:
            tf_fast_rnnt.rnnt_loss([[[[0.0]]]], [[]], 0)
        except ImportError as error:
            print(error)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(run, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(
        "transducer_toolkit.compat.tensorflow needs tensorflow: pip install tensorflow"
    )
