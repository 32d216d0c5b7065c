# SPDX-License-Identifier: Apache-2.0
"""Speed, memory and precision beside other projects: ``python -m benchmarks.run --help``."""
