# SPDX-License-Identifier: Apache-2.0
"""Puts known defects into the losses, one at a time, and says whether the suite notices.

    python -m tests.soak.mutants [NAME ...] [--list] [--folder FOLDER]

Each mutant is an edit of one line in a copy of the tree, built again where it is native (CPU only),
against the tests named beside it, which `make test` runs too; the first that fails kills it. A
mutant that survives is a test that is missing. In the end the tests that killed run on the
unchanged tree: one that fails there has killed nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Mutant:
    """One defect: in `file` the text `old`, which is there once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


PACKED = "tests/losses/test_packed.py"
BAD_INPUT = "tests/losses/test_packed_bad_input.py"
FULL = "tests/losses/test_full_and_pruned.py"
PRUNING = "tests/losses/test_pruning.py"
SIMPLE = "tests/losses/test_simple.py"
NORMALIZER = "tests/ops/test_additive.py"
RECURSION = "tests/losses/test_mutual_information.py"
FUSED = "tests/losses/test_fused_joiner.py"
JOINER = "tests/modules/test_joiner.py"
NATIVE = "tests/ops/test_native.py"
DURATIONS = "tests/losses/test_durations.py"
FUSED_DURATIONS = "tests/losses/test_fused_durations.py"
HAT = "tests/losses/test_hat.py"
RESTRICTED = "tests/losses/test_restricted.py"
PRECISION = "tests/losses/test_precision.py"
COARSE_STAGES = "tests/test_backends_coarse.py"
QUANTIZED = "tests/ops/test_quantized.py"
GREEDY = "tests/decoding/test_durations.py"
_LOSSES = "transducer_toolkit/losses/"
_OPS = "transducer_toolkit/ops/"

MUTANTS = [
    # --- stage 1 ---
    Mutant(
        "a label score at the blank's place",
        "csrc/cell_scores_cpu.cpp",
        "is_label ? any_label + Pick(x, target, shift, log_sum)",
        "is_label ? any_label + Pick(x, options.blank, shift, log_sum)",
        (PACKED,),
    ),
    Mutant(
        "target = V is read",
        "csrc/cell_scores_cpu.cpp",
        "target >= 0 && target < vocab_size",
        "target >= 0 && target <= vocab_size",
        (BAD_INPUT,),
    ),
    Mutant(
        "+inf is a score",
        "csrc/cell_scores_cpu.cpp",
        "return score == -kLogZero ? kNaN : score;",
        "return score;",
        (PACKED,),
    ),
    Mutant(
        "the first vector of a row is not in the sum",
        "csrc/row_kernels.inl",
        "i += kLanes) {\n    total = total + Simd<C>",
        "i += kLanes) {\n    if (i > 0) total = total + Simd<C>",
        (PACKED,),
    ),
    Mutant(
        "the normalizer's low part is lost",
        "csrc/row_kernels.inl",
        "v = weight * Simd<C>::Exp((v - high) - low);",
        "v = weight * Simd<C>::Exp(v - high);",
        (PACKED + "::test_gradient_does_not_depend_on_the_size_of_the_normalizer",),
    ),
    # --- stage 2 ---
    Mutant(
        "one_sym_per_frame may end with a label",
        "csrc/lattice_cpu.cpp",
        "if constexpr (!Traits::kEndsWithLabel) return kLogZero;",
        "if constexpr (false) return kLogZero;",
        (PACKED, FUSED),
    ),
    Mutant(
        "constrained forgets the forced blank",
        "csrc/lattice_cpu.cpp",
        "score += here.Has(u + 1) ? blank_[here.offset + u + 1] : kLogZero;",
        "score += here.Has(u + 1) ? 0 : kLogZero;",
        (FULL,),
    ),
    Mutant(
        "the forced blank is not a use",
        "csrc/lattice_cpu.cpp",
        "use_blank[i] += use_label[i - 1];",
        "use_blank[i] += 0;",
        (FULL,),
    ),
    Mutant(
        "fastemit scales blanks",
        "csrc/lattice_cpu.cpp",
        "use_label[i] *= label_gain;",
        "use_label[i] *= label_gain, use_blank[i] *= label_gain;",
        (PACKED + "::test_fastemit_scales_label_arcs_only",),
    ),
    Mutant(
        "delay penalty from the wrong middle",
        "csrc/lattice_cpu.cpp",
        "static_cast<Score>(frames_ - 1 - first_frame_)",
        "static_cast<Score>(frames_ - first_frame_)",
        (PACKED + "::test_any_batch_equals_oracle",),
    ),
    Mutant(
        "delay penalty ignores where the lattice begins",
        "csrc/lattice_cpu.cpp",
        "static_cast<Score>(frames_ - 1 - first_frame_)",
        "static_cast<Score>(frames_ - 1)",
        (FULL,),
    ),
    Mutant(
        "a NaN no path uses is not seen",
        "csrc/lattice_cpu.cpp",
        "has_nan |= std::isnan(blank_[cell]);",
        "has_nan |= false;",
        (PACKED + "::test_one_bad_utterance_leaves_the_others_alone",),
    ),
    Mutant(
        "log-add in float32",
        "csrc/fast_log_add.h",
        "return high + softplus(gap);",
        "return static_cast<float>(high + softplus(gap));",
        (PACKED,),
    ),
    Mutant(
        "a band one column short",
        "csrc/lattice_batch.h",
        "end = start + row_stride;",
        "end = start + row_stride - 1;",
        (FULL,),
    ),
    Mutant(
        "lengths beyond the tensor are valid",
        "csrc/lattice_batch.h",
        "frames < 1 || frames > max_frames || labels < 0",
        "frames < 1 || labels < 0",
        (BAD_INPUT, NATIVE),
    ),
    Mutant(
        "rows of another utterance are valid",
        "csrc/lattice_batch.h",
        "return frames * Stride(b) - unused <= end - first;",
        "return frames * Stride(b) - unused <= num_rows - first;",
        (NATIVE,),
    ),
    Mutant(
        "kept rows: NaN is dropped",
        "csrc/occupancy.h",
        "return !(occupancy < lowest || occupancy == 0);",
        "return occupancy >= lowest && occupancy > 0;",
        (FUSED,),
    ),
    Mutant(
        "kept rows: twice the dropped mass",
        "csrc/occupancy_cpu.cpp",
        "*dropped + mass[bin] <= limit",
        "*dropped + mass[bin] <= 2 * limit",
        (FUSED,),
    ),
    # --- stage 3 and the joiner ---
    Mutant(
        "blank as a label is subtracted once",
        "csrc/logits_grad_cpu.cpp",
        "if (v == target) g -= uses.label;",
        "else if (v == target) g -= uses.label;",
        (FULL,),
    ),
    Mutant(
        "clamp after the upstream gradient",
        "csrc/logits_grad_cpu.cpp",
        "g = loss_grad * std::min(std::max(g, -context.limit), context.limit);",
        "g = std::min(std::max(loss_grad * g, -context.limit), context.limit);",
        (PACKED + "::test_clamp_comes_before_the_upstream_gradient",),
    ),
    Mutant(
        "small gradients are left out",
        "csrc/logits_grad_cpu.cpp",
        "const bool negligible = weight * std::abs(loss_grad) < kFlushBelow<T>;",
        "const bool negligible = weight * std::abs(loss_grad) < 1e-12;",
        (NATIVE,),
    ),
    Mutant(
        "padding keeps what the memory held",
        "csrc/joint_tile_cpu.cpp",
        "std::fill_n(out, width, T{});",
        "if (width < 0) std::fill_n(out, width, T{});",
        (NATIVE,),
    ),
    Mutant(
        "relu's derivative at a negative sum",
        "csrc/row_kernels.inl",
        "return y > C(0) ? Vec<C>{} + C(1) : Vec<C>{};",
        "return Vec<C>{} + C(1);",
        (JOINER,),
    ),
    Mutant(
        "repair: the row's maximum twice",
        "csrc/normalizer_repair_cpu.cpp",
        "offset + (static_cast<Score>(max) + std::log(static_cast<Score>(sum)));",
        "offset + std::log(static_cast<Score>(sum));",
        (NORMALIZER,),
    ),
    Mutant(
        "a frame of the front begins one column late",
        "csrc/lattice_cpu.cpp",
        "low = std::min(low, frame[k].begin - k);",
        "low = std::min(low, frame[k].begin - k + 1);",
        (PACKED, FULL),
    ),
    Mutant(
        "the prior's share of the gradient is lost",
        "csrc/additive_scores_cpu.cpp",
        "grad[symbols + 1] = -terms.am_only_scale * of_frame;",
        "grad[symbols + 1] = 0 * of_frame;",
        (NORMALIZER,),
    ),
    Mutant(
        "the normalizer of lm alone has no gradient",
        "csrc/additive_scores_cpu.cpp",
        "? -terms.lm_only_scale * (of_blank[i] + of_label[i])",
        "? -0 * terms.lm_only_scale * (of_blank[i] + of_label[i])",
        (NORMALIZER, SIMPLE),
    ),
    Mutant(
        "starts are not lowered to later ones",
        "csrc/prune_windows_cpu.cpp",
        "lowest = std::min(lowest, wanted);",
        "lowest = wanted;",
        (PRUNING,),
    ),
    # --- Python ---
    Mutant(
        "packed lengths are not compared with the rows",
        _OPS + "checks.py",
        "if cells != num_rows:",
        "if cells > num_rows:",
        (BAD_INPUT,),
    ),
    Mutant(
        "a window may start beyond the last symbol",
        _OPS + "checks.py",
        "(start[:, :, 0] <= max_targets + 1 - width)",
        "(start[:, :, 0] <= max_targets + 2 - width)",
        (FULL,),
    ),
    Mutant(
        "inplace: backward twice",
        _OPS + "logits_loss.py",
        "ctx.is_consumed = True",
        "ctx.is_consumed = False",
        (PACKED + "::test_inplace_under_saved_tensor_hooks_and_without_gradient",),
    ),
    Mutant(
        "pruning steps over too many symbols",
        _LOSSES + "pruning.py",
        "step = width - 1 if topology.labels_share_frames else 1",
        "step = width - 1",
        (PRUNING,),
    ),
    Mutant(
        "smoothing averages the padding in",
        _OPS + "simple_scores.py",
        "log_probs = (lm - normalizer.to(lm.dtype)).masked_fill(",
        "log_probs = (lm - normalizer.to(lm.dtype)).masked_fill(False & ",
        (SIMPLE,),
    ),
    Mutant(
        "repair threshold of zero",
        _OPS + "additive_stages.py",
        "threshold=am.size(2) * limits.tiny / limits.eps",
        "threshold=0.0 * am.size(2) * limits.tiny / limits.eps",
        (NORMALIZER, SIMPLE),
    ),
    Mutant(
        "the recursion shifts back the wrong way",
        _OPS + "recursion.py",
        "_shift(posterior, -t_begin, -s_begin)",
        "_shift(posterior, t_begin, s_begin)",
        (RECURSION,),
    ),
    Mutant(
        "an utterance masked out by 0 poisons the weights",
        _OPS + "fused_joiner.py",
        "batch = _lattice_batch(inputs, plan, skip=loss_grad == 0)",
        "batch = _lattice_batch(inputs, plan, skip=None)",
        (FUSED,),
    ),
    Mutant(
        "the gradient of a fused loss forgets its scale",
        _OPS + "joint_tiles.py",
        "total if scale is None else total * scale",
        "total",
        (FUSED,),
    ),
    Mutant(
        "lengths wrap round in a packed batch",
        _OPS + "lattice.py",
        "columns = stride or (num_targets.clamp(-1, max_targets) + 1)",
        "columns = stride or (num_targets + 1)",
        (BAD_INPUT, NATIVE),
    ),
    # --- durations, HAT, restriction, two precisions ---
    Mutant(
        "a blank may jump beyond the last frame",
        "csrc/duration_lattice_cpu.cpp",
        "to == frames_ ? labels_ : -1",
        "to >= frames_ ? labels_ : -1",
        (DURATIONS,),
    ),
    Mutant(
        "a label that stays has no delay penalty",
        "csrc/duration_lattice_cpu.cpp",
        "cell[-1] + Label(here, u - 1, 0) + Penalty(t)",
        "cell[-1] + Label(here, u - 1, 0)",
        (DURATIONS,),
    ),
    Mutant(
        "fastemit is lost with durations",
        "csrc/duration_lattice_cpu.cpp",
        "label_gain * use[u - here.begin]",
        "use[u - here.begin]",
        (DURATIONS,),
    ),
    Mutant(
        "the logits of durations are not normalized",
        "csrc/cell_scores_cpu.cpp",
        "sum += std::exp(row[first + k] - max);",
        "sum = 1;",
        (DURATIONS,),
    ),
    Mutant(
        "HAT: the labels share the blank's probability",
        "csrc/cell_scores_cpu.cpp",
        "any_label = LogSigmoid(-z)",
        "any_label = LogSigmoid(z)",
        (HAT,),
    ),
    Mutant(
        "HAT: the blank is in the softmax of the labels",
        "csrc/cell_scores_cpu.cpp",
        "options.is_hat ? options.blank : -1;",
        "-1;",
        (HAT,),
    ),
    Mutant(
        "HAT: the labels' gradient has the blank's weight",
        "csrc/logits_grad_cpu.cpp",
        "context.is_hat ? uses.label : occupancy;",
        "occupancy;",
        (HAT,),
    ),
    Mutant(
        "big blanks have no uses",
        "csrc/logits_grad_cpu.cpp",
        "if (i < context.num_big_blanks) g -= uses.extra[i];",
        "if (i < 0) g -= uses.extra[i];",
        (DURATIONS,),
    ),
    Mutant(
        "durations of labels only",
        "csrc/logits_grad_cpu.cpp",
        "occupancy * (probability[k] / sum)",
        "uses.label * (probability[k] / sum)",
        (DURATIONS,),
    ),
    Mutant(
        "a coarse logit without its scale",
        "csrc/row_kernels.inl",
        "return product * scale + (Load(row.bias + i)",
        "return product + (Load(row.bias + i)",
        (QUANTIZED,),
    ),
    Mutant(
        "the sum of a coarse row may overflow",
        "csrc/row_kernels.inl",
        "*sum < 0x1p100f",
        "true",
        (QUANTIZED,),
    ),
    Mutant(
        "a coarse loss that is not finite is believed",
        "csrc/row_gradient.h",
        "in.loss[b] < -kLogZero)) return kNaN;",
        "in.loss[b] < -kLogZero)) return 0;",
        (COARSE_STAGES,),
    ),
    Mutant(
        "no coarse score is refined",
        _OPS + "coarse_to_fine.py",
        "COARSE_BUDGET = LOW_BUDGET / 5",
        "COARSE_BUDGET = LOW_BUDGET * 1e9",
        (PRECISION,),
    ),
    Mutant(
        "the error of the coarse scores is underestimated",
        "csrc/coarse_to_fine_cpu.cpp",
        "error = std::max(error, std::max(of_blank, of_label) + of_extra);",
        "error = std::max(error, 1e-3 * (std::max(of_blank, of_label) + of_extra));",
        (PRECISION,),
    ),
    Mutant(
        "blanks use the shortest durations",
        _OPS + "durations.py",
        "label[:, label.size(1) - blank.size(1) :] += blank",
        "label[:, : blank.size(1)] += blank",
        (DURATIONS,),
    ),
    Mutant(
        "sigma is not subtracted from big blanks",
        _OPS + "durations.py",
        "torch.cat([blank, extra - options.sigma], 1)",
        "torch.cat([blank, extra], 1)",
        (DURATIONS,),
    ),
    Mutant(
        "a label may be early by one frame less",
        _OPS + "restriction.py",
        "torch.searchsorted(alignment - self.left, frames, right=True) + 1",
        "torch.searchsorted(alignment - self.left, frames) + 1",
        (RESTRICTED,),
    ),
    Mutant(
        "an alignment beyond the last frame has a path",
        _OPS + "restriction.py",
        "(earliest > last.minimum(ends))",
        "(earliest > last)",
        (RESTRICTED,),
    ),
    Mutant(
        "a skip ends with the chunk",
        "transducer_toolkit/decoding/greedy.py",
        "(frame - lengths).clamp(min=0) if table is not None",
        "torch.zeros_like(lengths) if table is not None",
        (GREEDY,),
    ),
]


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """The file of a mutant with its defect; a ValueError unless the place is there once."""
    text = (root / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.old!r} is in {mutant.file} {text.count(mutant.old)} times"
        )
    return text.replace(mutant.old, mutant.new)


def _run(command: list[str | Path], folder: Path, **environment: str) -> tuple[int, str]:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    return result.returncode, result.stdout


def build(tree: Path, folder: Path) -> str | None:
    """Builds _C of the tree into it; what the compiler said if it does not build."""
    import pybind11

    tools = Path(sys.executable).parent
    if not (folder / "build.ninja").exists():
        options = {
            "TRANSDUCER_PYTHON": "ON",
            "TRANSDUCER_CUDA": "OFF",
            "CMAKE_CXX_FLAGS_RELEASE": "-O1",
            "CMAKE_INTERPROCEDURAL_OPTIMIZATION": "OFF",  # pybind11 would link for longer
            "CMAKE_MAKE_PROGRAM": tools / "ninja",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        command: list[str | Path] = [tools / "cmake", "-S", tree, "-B", folder, "-G", "Ninja"]
        _run([*command, *(f"-D{name}={value}" for name, value in options.items())], tree)
    code, output = _run([tools / "cmake", "--build", folder, "--parallel", "1"], tree)
    if code:
        return output
    for module in folder.glob("_C.*.so"):
        fresh = tree / "transducer_toolkit" / (module.name + ".new")
        shutil.copy(module, fresh)
        fresh.replace(fresh.with_suffix(""))
    return None


def killer(tree: Path, tests: tuple[str, ...]) -> str | None:
    """The test that fails first, or None."""
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
    ]
    # Emulated CUDA kernels and torch.compile do not see what changes here, and take long.
    command += ["-k", "not emulated and not graph and not opcheck", "--hypothesis-seed=1", *tests]
    try:
        code, output = _run(command, tree, PYTHONPATH=str(tree), OMP_NUM_THREADS="1")
    except subprocess.TimeoutExpired:
        return "a test that does not end"
    if code in (0, 5):  # 5: no test ran
        return None
    if code in (3, 4):  # of pytest itself: a misspelt test would kill any mutant
        raise RuntimeError(f"the tests do not run:\n{output[-3000:]}")
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"a crash (exit {code})"


def check(mutants: list[Mutant], folder: Path) -> list[Mutant]:
    """Tries each; prints a line of a table for each; returns those that survive.

    Args:
        mutants: to try, in the order of their files: then each build compiles one of them.
        folder: for tree and build, which may be there from an earlier run.
    """
    mutants = sorted(mutants, key=lambda mutant: mutant.file)
    for mutant in mutants:
        mutated(mutant)  # an edit that no longer fits is said before an hour is spent
    tree, build_folder = folder / "tree", folder / "build"
    _copy(ROOT, tree)
    survivors, killing = [], {}
    is_built = any(mutant.file.startswith("csrc") for mutant in mutants)
    if is_built and (problem := build(tree, build_folder)):
        raise RuntimeError(f"the unchanged tree does not build:\n{problem}")
    clean = {path: path.read_bytes() for path in (tree / "transducer_toolkit").glob("_C.*.so")}
    for mutant in mutants:
        source = tree / mutant.file
        text, begin = source.read_text(), time.monotonic()
        source.write_text(mutated(mutant, tree))
        if mutant.file.startswith("csrc") and build(tree, build_folder):
            found: str | None = "does not compile: a mutant that is none"
            survivors.append(mutant)
        elif (found := killer(tree, mutant.tests)) is None:
            survivors.append(mutant)
        elif found.startswith("FAILED"):
            killing[found.removeprefix("FAILED ")] = mutant
        source.write_text(text)
        for path, module in clean.items():
            path.unlink()
            path.write_bytes(module)
        seconds = time.monotonic() - begin
        row = mutant.name, source.name, found or "SURVIVES", f"{seconds:.0f} s"
        print("| " + " | ".join(row) + " |", flush=True)
    if killing and (failing := killer(tree, tuple(killing))) is not None:
        raise RuntimeError(f"the unchanged tree fails {failing}: no kill by it counts")
    print(f"{len(killing)} tests that killed pass on the unchanged tree")
    return survivors


def _copy(source: Path, tree: Path) -> None:
    ignored = shutil.ignore_patterns("build", ".*", "outputs", "multirun", "__pycache__", "conf")
    shutil.copytree(source, tree, ignore=ignored, dirs_exist_ok=True, copy_function=_copy_file)
    for folder in ("conf", "transducer_toolkit/conf"):
        shutil.copytree(source / "conf", tree / folder, dirs_exist_ok=True)


def _copy_file(source: str, target: str) -> None:
    """With a new date if there is another content, so that what was built from that is stale."""
    if not os.path.exists(target) or Path(target).read_bytes() != Path(source).read_bytes():
        shutil.copyfile(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of names; default: all")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--folder", type=Path, help="for the build, kept; default: a temporary one")
    options = parser.parse_args()
    names = options.names or [""]
    chosen = [mutant for mutant in MUTANTS if any(name in mutant.name for name in names)]
    if options.list:
        print(*(f"{mutant.file}: {mutant.name}" for mutant in chosen), sep="\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        survivors = check(chosen, options.folder or Path(folder))
    print(f"{len(chosen)} mutants, {len(chosen) - len(survivors)} killed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
