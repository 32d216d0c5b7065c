# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(max_file_bytes=2**16):
    """No file of this process may grow beyond ``max_file_bytes``.

    Nor may the one that pytest's output goes to: leave it before the test is over.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
