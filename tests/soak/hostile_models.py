# SPDX-License-Identifier: Apache-2.0
"""Hostile models: folders of Hugging Face and checkpoints, with code, links and odd numbers."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from packaging.version import Version
from torch import Tensor

from tests.soak.hostile_texts import DEEP, LETTERS, ODD_JSON, Case, edit, places
from tests.soak.spoilt_files import CANARY
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.huggingface_tokenizer import HuggingFaceTokenizer
from transducer_toolkit.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transducer_toolkit.decoding import NonFiniteScoresError
from transducer_toolkit.inference.recognizer import Recognizer, load_checkpoint, recognizer_recipe
from transducer_toolkit.optional import OLDEST_TRANSFORMERS

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None and Version(
    version("transformers")
) >= Version(OLDEST_TRANSFORMERS)
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
ENCODERS = ("wav2vec2", "hubert", "whisper", "parakeet")
OUTSIDE = "outside"  # a folder beside that of a model, whose files must not be read


@dataclass(frozen=True)
class Models:
    """Good models, made once."""

    folder: Path
    waveform: Tensor
    pieces: bytes

    @property
    def transducers(self) -> list[Path]:
        return sorted(self.folder.glob("transducer-*"))

    @property
    def encoders(self) -> list[Path]:
        return sorted(self.folder.glob("encoder-*"))

    @property
    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("*.ckpt"))


def make_models(folder: Path) -> Models:
    """Writes small random models: checkpoints, and folders if transformers is installed."""
    torch.manual_seed(0)
    package = "transducer_toolkit.modules"
    for name, topology, num_extra in (("regular", "regular", 0), ("tdt", "tdt-0-1-2", 3)):
        config = {
            "_target_": f"{package}.transducer.Transducer.build",
            "encoder": {"_target_": f"{package}.encoder.ConvLstmEncoder", "conv_channels": 2,
                        "hidden_dim": 8, "num_layers": 1},
            "predictor": {"_target_": f"{package}.predictor.StatelessPredictor", "_partial_": True,
                          "embedding_dim": 4, "context_size": 2},
            "joiner": {"_target_": f"{package}.joiner.Joiner", "_partial_": True, "joiner_dim": 8,
                       "num_extra": num_extra},
            "vocab_size": LETTERS.vocab_size,
            "blank": 0,
        }  # fmt: skip
        recipe = recognizer_recipe(config, LETTERS, Fbank(), max_symbols_per_frame=3,
                                   topology=topology)  # fmt: skip
        model = instantiate(config, _convert_="all")
        weights = {f"model.{key}": value for key, value in model.state_dict().items()}
        torch.save({"recognizer": recipe, "state_dict": weights}, folder / f"{name}.ckpt")
    if HAS_TRANSFORMERS:
        _make_folders(folder)
    texts = ["one two three", "two ones"] * 5
    pieces = SentencePieceTokenizer.from_texts(texts, vocab_size=20).state()["model"]
    generator = torch.Generator().manual_seed(0)
    return Models(folder, 0.1 * torch.randn(12000, generator=generator), pieces)


def _make_folders(folder: Path) -> None:
    import transformers

    from tests.compat.hugging_face import ENCODER, save_folder

    save_folder(folder / "transducer-rnnt")
    save_folder(folder / "transducer-tdt", "ParakeetForTDT")
    common = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 48}  # fmt: skip
    waves = {**common, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16,
             "num_conv_pos_embedding_groups": 4}  # fmt: skip
    options = {"Wav2Vec2Model": waves, "HubertModel": waves, "ParakeetEncoder": ENCODER,
               "WhisperModel": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
                                "encoder_ffn_dim": 48, "decoder_layers": 1, "vocab_size": 100,
                                "decoder_attention_heads": 2, "decoder_ffn_dim": 48,
                                "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1,
                                "decoder_start_token_id": 1}}  # fmt: skip
    for name, config in options.items():
        kind = getattr(transformers, name)
        path = folder / f"encoder-{name}"
        kind(kind.config_class(**config)).save_pretrained(path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder / "encoder-Wav2Vec2Model")
    transformers.WhisperFeatureExtractor().save_pretrained(folder / "encoder-WhisperModel")


# --- safetensors --------------------------------------------------------------------------------


def _read_parts(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _write_parts(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def spoil_weights(folder: Path, random_: random.Random) -> tuple[str, bool | None]:
    """Spoils ``model.safetensors``; returns how, and whether it must be refused."""
    path = folder / WEIGHTS
    header, data = _read_parts(path)
    names = [name for name in header if name != "__metadata__"]
    name = random_.choice(names)
    how = random_.choice(["header length", "cut", "empty", "header flipped", "shape", "dtype",
                          "offsets", "NaN", "NaN", "gone", "more", "garbage", "deep", "integers",
                          "infinite", "transposed", "float8", "a pickle"])  # fmt: skip
    entry, must_fail = header[name], True
    begin, end = entry["data_offsets"]
    if how == "header length":
        size = random_.choice([2**63, 2**64 - 1, 2**31, 10**8 + 1, 0, 1, len(data) * 2])
        path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
        return how, True
    if how == "cut":
        content = path.read_bytes()
        path.write_bytes(content[: random_.randrange(len(content))])
        return how, True
    if how in ("empty", "garbage", "deep", "a pickle"):
        content = {"empty": b"", "garbage": random_.randbytes(5000),
                   "deep": struct.pack("<Q", len(DEEP)) + DEEP.encode(),
                   "a pickle": pickle.dumps(_Code())}[how]  # fmt: skip
        path.write_bytes(content)
        return how, True
    if how == "header flipped":
        content = bytearray(path.read_bytes())
        content[random_.randrange(8, len(content) - len(data))] = random_.randrange(256)
        path.write_bytes(content)
        return how, None
    if how == "shape":
        entry["shape"] = random_.choice([[2**62], [2**40, 2**40], [0], [-1], [10**400], "x", None,
                                         [*entry["shape"], 2]])  # fmt: skip
    elif how == "transposed":
        must_fail = None if entry["shape"] in (entry["shape"][::-1], [1]) else True
        entry["shape"] = entry["shape"][::-1]
    elif how == "dtype":
        entry["dtype"] = random_.choice(["F16", "F64", "BOOL", "X", None, "F8_E4M3", 3])
    elif how == "integers":
        must_fail = None if entry["dtype"] != "F32" else True
        entry["dtype"] = {"F32": "I32", "I64": "U64"}.get(entry["dtype"], "I32")
    elif how == "offsets":
        entry["data_offsets"] = random_.choice([[0, 2**63], [-1, 3], [end, begin], [begin + 4, end],
                                                [begin, end + 4], "x", [2**70, 2**71]])  # fmt: skip
        must_fail = None if begin == end else True
    elif how in ("NaN", "infinite"):
        if entry["dtype"] != "F32" or begin == end:
            return "good", False
        value = math.nan if how == "NaN" else math.inf
        data = data[:begin] + struct.pack("<f", value) + data[begin + 4 :]
        must_fail = True if how == "NaN" else None
    elif how == "gone":
        weights = _load(path)
        del weights[name]
        _save(weights, path)
        # Of masking, which is switched off.
        return f"{name} gone", None if "masked_spec" in name else True
    elif how == "more":
        weights = _load(path)
        weights[random_.choice(["encoder.extra", "extra", "../x"])] = torch.zeros(2)
        _save(weights, path)
        return how, None
    elif how == "float8":
        weights = _load(path)
        if not weights[name].is_floating_point():
            return "good", False
        weights[name] = torch.full_like(weights[name], math.nan).to(torch.float8_e4m3fn)
        _save(weights, path)
        return how, True
    _write_parts(path, header, data)
    return f"{name} {how}", must_fail


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value.clone() for name, value in load_file(path).items()}


def _save(weights: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, path, metadata={"format": "pt"})


def spoil_index(folder: Path, random_: random.Random) -> tuple[str, bool | None]:
    """Makes an index of shards that names odd files."""
    names = list(_read_parts(folder / WEIGHTS)[0])
    content: Any = {"metadata": {}, "weight_map": dict.fromkeys(names, WEIGHTS)}
    content["weight_map"].pop("__metadata__", None)
    how = random_.choice(["good", "other name", "other name", "edit", "no object", "deep"])
    if how == "other name":
        outside = folder.parent / OUTSIDE / WEIGHTS
        name = random_.choice([f"../{OUTSIDE}/{WEIGHTS}", str(outside), "..", "", ".", "a\0b",
                               "x" * 5000, "none.safetensors", "pytorch_model.bin", 3, None, ["x"],
                               f"./{WEIGHTS}", f"x/../{WEIGHTS}", "\\..\\x"])  # fmt: skip
        content["weight_map"][names[-1]] = name
        how = f"{how} {str(name)[:30]!r}"
    elif how == "edit":
        how = edit(content, random_)
    elif how == "no object":
        content = random_.choice([[], 3, {}, {"weight_map": []}, {"weight_map": {}}])
    text = DEEP if how == "deep" else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)
    is_map = isinstance(content, dict) and "metadata" in content
    is_right = how == "good" or (is_map and how.startswith(("metadata", "no metadata")))
    return f"index: {how}", None if is_right or (is_map and not how.startswith("other")) else True


# --- folders ------------------------------------------------------------------------------------


class _Code:
    """A pickle of it runs a command where it is read."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {Path.cwd() / CANARY}",)


def _plant_code(folder: Path, random_: random.Random) -> tuple[str, bool | None]:
    """Puts code beside the model, in the files in which other loaders run it."""
    code = f"import pathlib; pathlib.Path({str(Path.cwd() / CANARY)!r}).touch()\n"
    for name in ("modeling_hostile", "configuration_hostile", "tokenization_hostile", "__init__"):
        (folder / f"{name}.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", ".metadata"):
        (folder / name).write_bytes(pickle.dumps(_Code()))
    torch.save(_Code(), folder / "model.pt")
    how = random_.choice(["beside", "beside", "distributed", "auto_map", "trust_remote_code",
                          "only a pickle", "adapter", "transformers_weights", "kernel",
                          "quantization", "processor auto_map"])  # fmt: skip
    outside = folder.parent / OUTSIDE
    changes: dict[str, Any] = {}
    must_fail: bool | None = False
    if how == "distributed":  # weights of this name go before the others in transformers
        weights = {name: torch.zeros_like(value) for name, value in _load(folder / WEIGHTS).items()}
        _save(weights, folder / "shard-00001-model-00001-of-00001.safetensors")
    elif how == "auto_map":
        name = "modeling_hostile.Model"
        changes, must_fail = {"auto_map": {"AutoModel": name, "AutoConfig": name}}, True
    elif how == "trust_remote_code":
        changes = {"trust_remote_code": True, "custom_pipelines": {"x": {"impl": "hostile.X"}}}
    elif how == "only a pickle":
        (folder / WEIGHTS).unlink()
        must_fail = True
    elif how == "adapter":
        adapter = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(outside),
            "r": 8,
            "auto_mapping": {"base_model_class": "M", "parent_library": "modeling_hostile"},
        }
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        shutil.copy(folder / WEIGHTS, folder / "adapter_model.safetensors")
    elif how == "transformers_weights":
        name = random_.choice(["adapter_model.bin", f"../{OUTSIDE}/{WEIGHTS}", "pytorch_model.bin"])
        changes = {"transformers_weights": name}
    elif how == "kernel":
        key = random_.choice(["attn_implementation", "_attn_implementation"])
        changes, must_fail = {key: "hostile/kernel:x"}, None
    elif how == "quantization":
        changes = {
            "quantization_config": {"quant_method": random_.choice(["bitsandbytes", "gptq"])}
        }
        must_fail = None
    elif how == "processor auto_map":
        for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
            if (folder / name).exists():
                config = json.loads((folder / name).read_text())
                config["auto_map"] = {"AutoProcessor": "modeling_hostile.P"}
                (folder / name).write_text(json.dumps(config))
    _change_config(folder, changes)
    return f"code {how}", must_fail


def _change_config(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config |= changes
    if isinstance(config.get("encoder_config"), dict):
        config["encoder_config"] |= changes
    (folder / CONFIG).write_text(json.dumps(config))


def _link_out(folder: Path, random_: random.Random) -> tuple[str, bool | None]:
    """Replaces a file by a link to a good file outside of the folder."""
    name = random_.choice(
        [p.name for p in folder.iterdir() if p.name in (CONFIG, WEIGHTS, TOKENIZER)]
    )
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / OUTSIDE / name)
    return f"link {name}", True


def _spoil_json(folder: Path, random_: random.Random) -> tuple[str, bool | None]:
    known = (CONFIG, CONFIG, CONFIG, "preprocessor_config.json", "processor_config.json")
    name = random_.choice([name for name in known if (folder / name).exists()])
    how = random_.choice(
        [*["edit"] * 8, "deep", "cut", "no object", "UTF-16", "size", "size", "size"]
    )
    content = json.loads((folder / name).read_text())
    if how == "edit":
        how = edit(content, random_)
    elif how == "size":  # of a model that would fill the memory, or take forever
        numbers = [place for place in places(content) if _is_size(content, place)]
        place = random_.choice(numbers)
        value = random_.choice([30_000, 10**6, 2**40, 10**30, -1, 0])
        _set(content, place, value)
        how = f"{'.'.join(map(str, place))} = {value}"
    text = json.dumps(content)
    must_fail: bool | None = None
    if how == "deep":
        text, must_fail = random_.choice([DEEP, '{"model_type":' + DEEP]), True
    elif how == "cut":
        text, must_fail = text[: random_.randrange(len(text) - 1)], True
    elif how == "no object":
        text, must_fail = random_.choice(["[]", "3", "null", '"x"', "{}", ""]), True
    encoding = "utf-16" if how == "UTF-16" else "utf-8"
    (folder / name).write_text(text, encoding=encoding)
    return f"{name}: {how}", True if how == "UTF-16" else must_fail


def _is_size(content: Any, place: tuple) -> bool:
    for key in place:
        content = content[key]
    return type(content) is int


def _set(content: Any, place: tuple, value: Any) -> None:
    for key in place[:-1]:
        content = content[key]
    content[place[-1]] = value


def _spoil_tokenizer(folder: Path, random_: random.Random) -> tuple[str, bool | None]:
    path = folder / TOKENIZER
    if not path.exists():
        return "good", False
    text = path.read_text()
    how = random_.choice([*["edit"] * 5, "deep", "cut", "garbage", "flipped", "no object"])
    must_fail: bool | None = None
    if how == "edit":
        content = json.loads(text)
        how = edit(content, random_)
        text = json.dumps(content)
    elif how == "deep":
        text, must_fail = random_.choice([DEEP, '{"model":' + DEEP]), True
    elif how == "cut":
        text, must_fail = text[: random_.randrange(len(text) - 1)], True
    elif how == "garbage":
        path.write_bytes(random_.randbytes(500))
        return "tokenizer: garbage", True
    elif how == "flipped":
        place = random_.randrange(len(text))
        text = text[:place] + chr(random_.randrange(32, 0x3000)) + text[place + 1 :]
    elif how == "no object":
        text, must_fail = random_.choice(["[]", "3", "null", "{}", ""]), True
    path.write_text(text, encoding="utf-8")
    return f"tokenizer: {how}", must_fail


SPOILERS: dict[str, Callable[[Path, random.Random], tuple[str, bool | None]]] = {
    "weights": spoil_weights,
    "index": spoil_index,
    "json": _spoil_json,
    "tokenizer": _spoil_tokenizer,
    "code": _plant_code,
    "link": _link_out,
}


def _spoilt_folder(
    good: Path, folder: Path, random_: random.Random, kinds: tuple[str, ...]
) -> tuple[Path, str, bool | None]:
    shutil.copytree(good, folder / OUTSIDE)
    path = Path(shutil.copytree(good, folder / "hostile"))
    how, must_fail = SPOILERS[random_.choice(kinds)](path, random_)
    return path, how, must_fail


def transducer_case(folder: Path, random_: random.Random, models: Models) -> Case:
    """A folder of a transducer, as a checkpoint."""
    kinds = ("weights", "index", "json", "json", "json", "tokenizer", "tokenizer", "code", "link")
    good = random_.choice(models.transducers)
    path, how, must_fail = _spoilt_folder(good, folder, random_, kinds)
    reads_tokenizer = random_.random() < 0.15
    if reads_tokenizer and must_fail:
        must_fail = None

    def read() -> Any:
        if reads_tokenizer:
            return HuggingFaceTokenizer.load(path)
        return Recognizer.from_checkpoint(path)

    def wrong(result: Any) -> str | None:
        if reads_tokenizer:
            return _wrong_tokenizer(result)
        own = {f"model.{key}": value for key, value in result.model.state_dict().items()}
        return _wrong_recognizer(result, models.waveform, own, load_checkpoint(good)["state_dict"],
                                 is_good=must_fail is False)  # fmt: skip

    return Case("transducer", f"{good.name} {how}", read, wrong, must_fail, [str(path)])


def _wrong_tokenizer(tokenizer: Any) -> str | None:
    try:
        ids = tokenizer.encode("one two")
        if any(not 0 <= id_ < tokenizer.vocab_size for id_ in ids):
            return f"ids {ids} of {tokenizer.vocab_size}"
        tokenizer.decode(ids)
    except ValueError:
        return None
    return None


def _wrong_recognizer(
    recognizer: Recognizer, waveform: Tensor, own: dict, good: dict, *, is_good: bool
) -> str | None:
    if is_good and any(not torch.equal(own[name], value) for name, value in good.items()):
        return "other weights"
    try:
        (hypothesis,) = recognizer.recognize([waveform])
        recognizer.tokenizer.decode(hypothesis.tokens)
    except NonFiniteScoresError:
        return "cannot recognize" if is_good else None
    except ValueError as error:
        return f"fails after it was accepted: {str(error)[:200]}"
    if not all(map(math.isfinite, hypothesis.log_probs)):
        return f"log-probabilities {hypothesis.log_probs}"
    return None


def encoder_case(folder: Path, random_: random.Random, models: Models) -> Case:
    """A folder of an encoder, for training."""
    from transducer_toolkit.modules.huggingface import HuggingFaceEncoder

    kinds = ("weights", "weights", "index", "json", "json", "json", "code", "code", "link")
    good = random_.choice(models.encoders)
    path, how, must_fail = _spoilt_folder(good, folder, random_, kinds)

    def read() -> HuggingFaceEncoder:
        return HuggingFaceEncoder(folder=str(path))

    def wrong(encoder: HuggingFaceEncoder) -> str | None:
        if must_fail is False:
            expected = HuggingFaceEncoder(folder=str(good)).model.state_dict()
            own = encoder.model.state_dict()
            if any(not torch.equal(own[name], value) for name, value in expected.items()):
                return "other weights"
        if not all(bool(p.isfinite().all()) for p in encoder.parameters()) and "inf" not in how:
            return "weights that are not finite"
        json.dumps(encoder.plain_config)
        features = encoder.make_features()(models.waveform)
        if not bool(features.isfinite().all()):
            return "features that are not finite"
        lengths = torch.tensor([len(features)])
        with torch.no_grad():
            out, out_lengths = encoder.eval()(features[None], lengths)
        encoder.check_output(lengths, out, out_lengths)
        return None

    return Case("encoder", f"{good.name} {how}", read, wrong, must_fail, [str(path)])


# --- checkpoints --------------------------------------------------------------------------------

ODD_PLAIN = (*ODD_JSON[:-4], 30_000, 10**7, "tdt-0-1", "tdt-0-1-2-3", "tdt-0-1000000000000",
             "multi_blank-2-3", "modified", b"x", ("x",))  # fmt: skip


def checkpoint_case(folder: Path, random_: random.Random, models: Models) -> Case:
    """A checkpoint of the toolkit with other hyperparameters, weights or symbols."""
    path, good = folder / "hostile.ckpt", random_.choice(models.checkpoints)
    saved = torch.load(good, weights_only=True)
    recipe, weights = saved["recognizer"], saved["state_dict"]
    how = random_.choice([*["recipe"] * 5, *["size"] * 3, "weight", "weight", "tokenizer", "code"])
    must_fail: bool | None = None
    if how == "recipe":
        how = edit(recipe, random_, ODD_PLAIN)
    elif how == "size":
        place = random_.choice([place for place in places(recipe) if _is_size(recipe, place)])
        value = random_.choice([30_000, 10**6, 2**40, 10**30, -1])
        _set(recipe, place, value)
        how = f"{'.'.join(map(str, place))} = {value}"
        must_fail = None if "max_symbols" in how else True
        if place[-1] in ("format_version", "dropout", "num_extra") or "version" in how:
            must_fail = None
    elif how == "weight":
        name = random_.choice([name for name in weights if weights[name].is_floating_point()])
        x = weights[name]
        how, value = random_.choice([
            ("NaN", torch.full_like(x, math.nan)), ("integers", x.to(torch.int32)),
            ("bool", x > 0), ("float8 NaN", torch.full_like(x, math.nan).to(torch.float8_e4m3fn)),
            ("empty", x[:0]), ("expanded", x.flatten()[:1].expand(2**40)),
            ("one row more", torch.cat([x, x[:1]])), ("float64", x.double() * 1e300),
            ("quantized", torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        ])  # fmt: skip
        weights[name], how = value, f"{name} {how}"
        must_fail = None if "float64" in how else True
    elif how == "tokenizer":
        model = random_.choice([b"", b"x", 10**12, "x", None, models.pieces])
        state = random_.choice([
            {"kind": "sentencepiece", "model": model},
            {"kind": "huggingface", "json": "{}", "vocab_size": 5, "blank": 0},
            {"kind": "huggingface", "json": DEEP, "vocab_size": 10**12, "blank": 0},
            {"kind": "characters", "symbols": ["<blk>", *"abc", *"abc"]},
            {"kind": "characters", "symbols": "<blk>abc"}, {"kind": ["x"]}, [], "x",
        ])  # fmt: skip
        recipe["tokenizer"], must_fail = state, True
        how = f"tokenizer {str(state)[:50]}"
    elif how == "code":
        config = recipe["model"]
        package = "transducer_toolkit.modules"
        target = random_.choice(["os.system", "builtins.eval", f"{package}.encoder.torch.load", "",
                                 f"{package}.huggingface.json.loads", "antigravity.x",
                                 "tests.soak.hostile_models.make_models"])  # fmt: skip
        part = random_.choice([config, config["encoder"], config["joiner"]])
        part["_target_"], must_fail = target, True
        how = f"code {target}"
    torch.save(saved, path)

    def wrong(recognizer: Recognizer) -> str | None:
        return _wrong_recognizer(recognizer, models.waveform, {}, {}, is_good=False)

    read = lambda: Recognizer.from_checkpoint(path)  # noqa: E731
    return Case("checkpoint", f"{good.stem} {how}", read, wrong, must_fail, [str(path)])
