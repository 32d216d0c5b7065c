# SPDX-License-Identifier: Apache-2.0
"""Every page: its Python runs, its command lines compose, its keys and options exist."""

import ast
import builtins
import functools
import importlib
import inspect
import itertools
import json
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import soundfile
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate

from tests.cli.conftest import compose_for_signs
from tests.pretend_cuda import CUDA, pretend_cuda, to_cuda
from transducer_toolkit.cli import component_arguments, run_folder
from transducer_toolkit.cli.component_arguments import with_signs
from transducer_toolkit.cli.hints import _keys
from transducer_toolkit.cli.train import _fit_defaults
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.inference.recognizer import Recognizer, recognizer_recipe
from transducer_toolkit.optional import OLDEST_TRANSFORMERS

run_folder.register()
ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("recipes/*/README.md")),
    ROOT / "examples" / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "csrc" / "README.md",
]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", ROOT / "CODE_OF_CONDUCT.md"]
HYDRA_COMMANDS = ("train", "evaluate", "prepare")
FLAGS, FLAGS_WITH_VALUE = ("--multirun", "--help", "--hydra-help"), ("--cfg", "--info")
ON_PURPOSE = ("loss=packd",)  # docs/scale.md shows what a misspelt option gets


def name_of(path):
    return str(path.relative_to(ROOT))


def fenced(text):
    """Blocks and prose of a page: pairs of language, or None for prose, and text."""
    parts = re.split(r"^```(.*)$\n?", text, flags=re.M)
    # Prose, then language, block, "" of the closing fence, prose, and so on.
    assert len(parts) % 4 == 1 and not any(parts[3::4]), "a fence is open"
    yield from ((None, prose) for prose in parts[::4])
    yield from zip(parts[1::4], parts[2::4], strict=True)


def blocks(path, language):
    return [text for found, text in fenced(path.read_text()) if found == language]


# --- Python ---------------------------------------------------------------------------------------


def write_recognizer(path):
    """A checkpoint of random weights that may stream."""
    package = "transducer_toolkit.modules"
    config = {
        "_target_": f"{package}.transducer.Transducer.build",
        "encoder": {
            "_target_": f"{package}.encoder.ConvLstmEncoder",
            "conv_channels": 2,
            "hidden_dim": 8,
            "normalization": "global",
        },
        "predictor": {
            "_target_": f"{package}.predictor.StatelessPredictor",
            "_partial_": True,
            "embedding_dim": 4,
        },
        "joiner": {"_target_": f"{package}.joiner.Joiner", "_partial_": True, "joiner_dim": 8},
        "vocab_size": 4,
        "blank": 0,
    }
    model = instantiate(config, _convert_="all")
    model.encoder.normalizer.set_statistics(torch.full((80,), -8.0), torch.full((80,), 3.0))
    tokenizer = CharTokenizer(["<blk>", "\u2581", "a", "b"])
    recipe = recognizer_recipe(config, tokenizer, Fbank(), max_symbols_per_frame=1)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"recognizer": recipe, "state_dict": weights}, path)


def with_checkpoint_and_audio(folder):
    write_recognizer(folder / "RUN" / "checkpoints" / "best.ckpt")
    write_recognizer(folder / "best.ckpt")
    waveform = 0.1 * torch.randn(16000)
    soundfile.write(folder / "three.wav", waveform.numpy(), 16000)
    soundfile.write(folder / "talk.flac", waveform.repeat(30).numpy(), 16000)
    yield {"microphone": list(waveform.split(1600))}


def with_a_model_folder(folder):
    """A folder of transformers, and a manifest beside it."""
    from tests.compat.hugging_face import save_folder

    save_folder(folder / "FOLDER", "ParakeetForTDT")
    rows = []
    for number, text in enumerate(["one two", "seven", "nine of nine", "it is twelve"]):
        path = str(folder / f"{number}.wav")
        soundfile.write(path, 0.1 * torch.randn(16000 + 4000 * number).numpy(), 16000)
        rows.append(json.dumps({"audio": path, "duration_s": 1 + number / 4, "text": text}) + "\n")
    (folder / "train.jsonl").write_text("".join(rows))
    (folder / "dev.jsonl").write_text("".join(rows[:2]))
    yield {}
    yield {}
    yield {}
    yield {}
    recognizer = Recognizer.from_pretrained(folder / "TUNED")
    assert recognizer.topology == "tdt-0-1-2-3-4"
    assert isinstance(recognizer.transcribe([0.1 * torch.randn(16000)])[0], str)


def with_exported_files(folder):
    pytest.importorskip("sherpa_onnx")
    from transducer_toolkit.export import export_for_sherpa

    (given,) = with_checkpoint_and_audio(folder)
    recognizer = Recognizer.from_checkpoint(folder / "best.ckpt")
    export_for_sherpa(recognizer, folder / "exported", int8=True)
    yield {"pieces": []}
    export_for_sherpa(recognizer, folder / "exported", streaming=True)
    yield {"pieces": [piece.numpy() for piece in given["microphone"]]}
    export_for_sherpa(recognizer, folder / "exported", hotwords=["ab"])
    yield {}


def with_a_graph(folder):
    """Pretended CUDA: autograd's engine does not know it (tests/ops/test_no_traffic.py does)."""
    lengths, target_lengths = torch.tensor([6, 4]), torch.tensor([3, 2])
    with pretend_cuda() as traffic, mock.patch.object(torch.Tensor, "backward", return_value=None):
        sizes = {"enc": (2, 6, 16), "pred": (2, 4, 16), "weight": (9, 16), "bias": (9,)}
        given = {name: to_cuda(torch.randn(size)) for name, size in sizes.items()}
        given |= {"logit_lengths": lengths, "target_lengths": target_lengths, "graph": None}
        given["targets"] = to_cuda(torch.randint(1, 9, (2, 3)))
        graph = {"graph": lambda graph: traffic.capture(), "current_device": lambda: 0}
        with mock.patch.multiple(torch.cuda, **graph):
            yield given
            assert torch.Tensor.backward.call_count == 1 and given["enc"].device == CUDA


GIVEN = {
    "docs/decoding.md": with_checkpoint_and_audio,
    "docs/streaming.md": with_checkpoint_and_audio,
    "docs/export.md": with_exported_files,
    "docs/huggingface.md": with_a_model_folder,
    "docs/cuda.md": with_a_graph,
}


NEEDED = {
    "docs/huggingface.md": ("transformers", "accelerate", "peft"),
    "docs/tensorflow.md": ("tensorflow",),
}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_blocks_run_one_after_the_other(page, tmp_path, monkeypatch):
    for package in NEEDED.get(name_of(page), ()):
        oldest = OLDEST_TRANSFORMERS if package == "transformers" else None
        pytest.importorskip(package, minversion=oldest)
    monkeypatch.chdir(tmp_path)
    makers = GIVEN.get(name_of(page), lambda folder: iter([{}]))(tmp_path)
    names = {}
    for block in blocks(page, "python"):
        names |= next(makers, {})
        exec(compile(block, name_of(page), "exec"), names)
    assert next(makers, None) is None  # and what it asserts at its end


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_a_python_block_stands_alone_or_names_what_it_needs(page):
    """Names of other blocks, or of the reader, are listed in a comment on the first line."""
    for block in blocks(page, "python"):
        nodes = list(ast.walk(ast.parse(block)))
        known = {*dir(builtins)} | {node.arg for node in nodes if isinstance(node, ast.arg)}
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {(name.asname or name.name).partition(".")[0] for name in node.names}
        known |= {getattr(node, "name", None) for node in nodes}  # functions, classes, errors
        named = [node for node in nodes if isinstance(node, ast.Name)]
        known |= {node.id for node in named if isinstance(node.ctx, ast.Store)}
        comment = block.partition("\n")[0] if block.startswith("#") else ""
        missing = {node.id for node in named} - known - set(re.findall(r"\w+", comment))
        assert not missing, block


# --- links and the API reference ------------------------------------------------------------------


def anchors(path):
    """What a link may lead to inside of a page, as GitHub and MkDocs both name it."""
    prose = "\n".join(text for language, text in fenced(path.read_text()) if language is None)
    titles = re.findall(r"^#+ (.*)$", prose, flags=re.M)
    words = [re.sub(r"[^\w\s-]", "", title.lower()) for title in titles]
    return {re.sub(r"\s", "-", title.strip()) for title in words}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_to_something(page):
    prose = "".join(text for language, text in fenced(page.read_text()) if language is None)
    for target in re.findall(r"\]\(([^()\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if "://" in path or path.startswith("../../actions/"):  # CI, where this is hosted
            continue
        meant = (page.parent / path).resolve() if path else page
        assert meant.exists() and meant.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(meant), target


@pytest.mark.parametrize("page", ["README.md", "docs/losses.md"])
def test_the_tables_of_losses_have_every_option(page):
    rows = re.findall(
        r"^\| ((?:`\w+`(?:, )?)+)(?: \(default\))? \|", (ROOT / page).read_text(), re.M
    )
    options = {path.stem for path in (ROOT / "conf" / "loss").glob("*.yaml")}
    assert options <= set(re.findall(r"`(\w+)`", " ".join(rows)))


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_each_row_of_a_table_has_as_many_cells_as_its_head(page):
    """A row too short or too long is one that a merge has broken."""
    for language, prose in fenced(page.read_text()):
        if language is None:
            for table in re.findall(r"(?:^ *\|.*\n)+", prose, flags=re.M):
                head, line, *rows = table.splitlines()
                assert rows and re.fullmatch(r" *\|([ :-]*-[ :-]*\|)+ *", line), table
                for row in (head, *rows):
                    assert len(re.findall(r"(?<!\\)\|", row)) == line.count("|"), row


def test_every_page_stands_in_the_menu_of_the_site():
    hooks = (ROOT / "docs" / "site_hooks.py").read_text()
    menu = set(re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M))
    written = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    written |= set(re.findall(r': "(\w+\.md)"', hooks))
    written |= {f"recipes/{page.parent.name}.md" for page in ROOT.glob("recipes/*/README.md")}
    assert menu == written


def documented():
    """Dotted names in the pages of the API reference."""
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        yield from re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M)


def resolve(name):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[length:], value)
    raise AssertionError(name)


def test_the_api_reference_is_complete():
    there = {id(resolve(name)) for name in documented()}
    for package in ("", ".losses", ".modules", ".decoding", ".inference", ".export",
                    ".training.stages", ".training.callbacks", ".data.corpora"):  # fmt: skip
        module = importlib.import_module(f"transducer_toolkit{package}")
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and name not in ("check_topology",):
                assert id(value) in there, f"{module.__name__}.{name}"


# --- command lines --------------------------------------------------------------------------------


def code_of(path):
    """Pieces of a page that are code: lines of blocks that are not Python, and inline spans."""
    lines, spans = [], []
    for language, text in fenced(path.read_text().replace("\\\n", " ")):
        if language is None:
            spans += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
        elif language != "python":
            found = text.splitlines()
            # What follows a command with "$" is its output.
            lines += [x for x in found if x.startswith("$ ")] if text.startswith("$ ") else found
    return lines, spans


def code_of_yaml(path):
    """Commands in comments and help texts of the configs."""
    lines = (line.lstrip("# ") for line in path.read_text().replace("\\\n", " ").splitlines())
    return [line for line in lines if line.startswith(("transducer-", "torchrun "))]


COMMAND = re.compile(r"(?:^|[\s(])(?:transducer-|-m transducer_toolkit\.cli\.)([a-z]+)\)?(?=\s|$)")


def command_of(text):
    """Name and arguments of the first of our commands in a line of code, or None."""
    found = COMMAND.search(text)
    if found is None:
        return None
    rest = re.sub(r"(\S)\s{2,}[^\s#'\"+a-z~-].*$", r"\1", text[found.end() :])
    words = shlex.split(rest, comments=True)
    # "[KEY=VALUE ...]" says what could stand there.
    words = [w for w in words if not (w == "..." or w.startswith("[") or w.endswith("...]"))]
    return found[1], [word.replace("...", "x") for word in words]


def commands():
    for path in PAGES:
        lines, spans = code_of(path)
        for is_whole, texts in ((True, lines), (False, spans)):
            for text in texts:
                if (command := command_of(text)) is not None:
                    yield pytest.param(*command, is_whole, id=f"{name_of(path)}: {text[:80]}")
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        for text in code_of_yaml(path):
            if (command := command_of(re.split(r"\s{2,}", text)[0])) is not None:
                yield pytest.param(*command, False, id=f"{name_of(path)}: {text[:80]}")


COMMANDS = list(commands())


def compose_like_hydra(config_name, words):
    """Compose what the words of a command line override, the first value of a sweep of values."""
    words = list(words)
    for flag in FLAGS_WITH_VALUE:
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    if "--config-dir" in words:
        at = words.index("--config-dir")
        _, folder = words[at : at + 2]
        words[at : at + 2] = [f"hydra.searchpath=[file://{ROOT / folder}]"]
    # "data=OPTION": any of them.
    texts = [w for w in words if w not in FLAGS and not re.fullmatch(r"[a-z_/]+=[A-Z]+", w)]
    if config_name == "train":
        texts = _fit_defaults(texts)
    texts = with_signs(config_name, texts)
    overrides = OverridesParser.create().parse_overrides(texts)
    with initialize_config_module("transducer_toolkit.conf", version_base="1.3"):
        firsts = [
            f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
            if override.is_sweep_override()
            else text
            for override, text in zip(overrides, texts, strict=True)
        ]
        return compose(config_name, overrides=firsts, return_hydra_config=True)


@pytest.mark.parametrize(("name", "words", "is_whole"), COMMANDS)
def test_command_lines_are_right(name, words, is_whole, tmp_path, monkeypatch):
    monkeypatch.setattr(component_arguments, "compose", compose_for_signs)
    if words == ["trainer.max_epoch=3"]:  # docs/scale.md shows what a misspelt key gets
        with pytest.raises(Exception, match=r"Could not override 'trainer\.max_epoch'"):
            compose_like_hydra(name, words)
    elif name in HYDRA_COMMANDS:
        cfg = compose_like_hydra(name, words)
        if name != "prepare":
            known = inspect.signature(importlib.import_module("lightning").Trainer).parameters
            assert set(cfg.trainer) - {"_target_"} <= set(known)
    else:
        parser = importlib.import_module(f"transducer_toolkit.cli.{name}")._parser()
        if is_whole:
            parser.parse_args(words)
        options = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert options <= set(parser._option_string_actions)


def test_all_commands_are_found():
    """Else the test above would be right about nothing."""
    scripts = re.findall(r"^transducer-(\w+) =", (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert {command.values[0] for command in COMMANDS} == set(scripts)
    for path in PAGES:
        lines = [line.partition("#")[0] for line in code_of(path)[0]]
        expected = [x for x in lines if re.search(r"transducer-[a-z]|toolkit\.cli\.", x)]
        found = [c for c in COMMANDS if c.id.startswith(f"{name_of(path)}:") and c.values[2]]
        assert len(found) == len(expected)
    assert len(COMMANDS) > 70
    assert command_of("srun $(which transducer-train) seed=1,2 'x.y=[a,b]'  # why") == (
        "train",
        ["seed=1,2", "x.y=[a,b]"],
    )


# --- keys and options in prose --------------------------------------------------------------------


@functools.cache
def known_keys():
    """Keys of every option of every group, and the groups with their options."""
    conf = ROOT / "conf"
    groups = {}
    for path in conf.rglob("*.yaml"):
        if path.parent != conf:
            groups.setdefault(str(path.parent.relative_to(conf)), []).append(path.stem)
    keys, chosen = set(), {"train": [], "evaluate": []}
    for group, options in groups.items():
        if group.startswith("hydra"):
            continue
        if "/" in group:  # of a part of an option
            for option in options:
                text = (conf / group / f"{option}.yaml").read_text()
                keys |= {f"{group.replace('/', '.')}.{name}" for name in yaml.safe_load(text)}
            continue
        config_name = "evaluate" if group == "search" else "train"
        chosen[config_name].append([f"{group}={option}" for option in options])
    with initialize_config_module("transducer_toolkit.conf", version_base="1.3"):
        for config_name, choices in chosen.items():
            for overrides in itertools.zip_longest(*choices):  # an option of each group at a time
                keys |= set(_keys(compose(config_name, overrides=list(filter(None, overrides)))))
    return keys, groups


OVERRIDE = re.compile(r"(?:\+\+?|~)?([a-z_]+(?:[./][a-z_0-9]+)*)(=?)(\S*)")


def overrides_in_prose():
    # Their keys are those of other projects' configs.
    others = [ROOT / "docs" / f"{name}.md" for name in ("nemo", "espnet", "speechbrain", "icefall")]
    for path in (path for path in PAGES if path not in others):
        for span in code_of(path)[1]:
            if command_of(span) is None and span not in ON_PURPOSE:
                for word in shlex.split(span) if span.count("'") % 2 == 0 else []:
                    if found := OVERRIDE.fullmatch(word):
                        yield name_of(path), *found.groups()


def test_keys_and_options_in_prose_exist():
    keys, groups = known_keys()
    first_parts = {key.partition(".")[0] for key in keys} - {"name", "seed", "test"}
    checked, unknown, others = 0, [], []
    for page, key, equals, value in overrides_in_prose():
        if key in groups and equals:
            checked += 1
            options = re.findall(r"^[a-z_]+$", value)  # not N, nor two of them, nor nothing
            unknown += [
                (page, f"{key}={option}") for option in options if option not in groups[key]
            ]
        elif "." in key and key.partition(".")[0] in first_parts and (equals or not value):
            checked += 1
            others += [(page, key)] if key not in keys else []
    # Or an argument that its component takes, or a test set, of a manifest.
    for more, is_of_data in ((["data=manifest"], True), ([], False)):
        found = [(page, key) for page, key in others if key.startswith("data.") == is_of_data]
        signed = with_signs("train", [*more, *(f"{key}=1" for _, key in found)])[len(more) :]
        unknown += [place for place, text in zip(found, signed, strict=True) if text[0] != "+"]
    assert not unknown
    assert checked > 30
