# SPDX-License-Identifier: Apache-2.0
"""Console scripts. Each imports torch and lightning only when it has work to do."""
