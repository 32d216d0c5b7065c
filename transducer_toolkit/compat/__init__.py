# SPDX-License-Identifier: Apache-2.0
"""Drop-in forms of other projects' losses: their names, signatures and defaults, our stages."""
