# SPDX-License-Identifier: Apache-2.0
"""The Hydra configs, installed as package data; ``config_path="pkg://transducer_toolkit.conf"``."""
