# SPDX-License-Identifier: Apache-2.0
"""``python -m transducer_toolkit`` prints the installed versions, for bug reports."""

import platform

import torch

from transducer_toolkit import build_info


def main() -> None:
    info = build_info()
    if info["cuda_runtime"]:
        major, minor = divmod(info["cuda_runtime"] // 10, 100)
        cuda = (
            f"runtime {major}.{minor} (static), architectures {info['cuda_architectures']}, "
            f"driver R{info['cuda_driver_floor']} or newer, {info['cuda_devices']} device(s) here"
        )
    else:
        cuda = "not in this build (add nvcc to the PATH and rebuild)"
    rows = {
        "transducer_toolkit": info["version"],
        "compiler": f"{info['compiler']}, {info['build_type']}",
        "CPU path": info["cpu_path"],
        "CUDA": cuda,
        "torch": f"{torch.__version__} (the compiled module does not link it)",
        "Python": f"{platform.python_version()} on {platform.platform()}",
    }
    for name, value in rows.items():
        print(f"{name:<20}{value}")


if __name__ == "__main__":
    main()
