# SPDX-License-Identifier: Apache-2.0
"""Operators: everything that knows tensors, lattices and the compiled module."""
