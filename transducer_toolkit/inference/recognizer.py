# SPDX-License-Identifier: Apache-2.0
"""A trained model with its tokenizer and features, restored from one checkpoint."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from transducer_toolkit.data.encoder_frames import min_samples, too_short
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.huggingface_tokenizer import HuggingFaceTokenizer
from transducer_toolkit.data.tokenizer import Tokenizer
from transducer_toolkit.data.tokenizer_state import tokenizer_from_state
from transducer_toolkit.decoding import Fusion, GreedySearch, Hypothesis, Search
from transducer_toolkit.decoding.fusion import lm_options
from transducer_toolkit.inference.long_audio import (
    AudioSource,
    Transcription,
    channels_of,
    transcribe_file,
    transcribe_files,
)
from transducer_toolkit.inference.pretrained import local_checkpoint
from transducer_toolkit.inference.trust import (
    all_trusted,
    check_model_config,
    load_plain,
    needed_packages,
)
from transducer_toolkit.inference.words import RecognizedWord, encoder_frame_s, recognized_words
from transducer_toolkit.modules.encoder import try_encoder
from transducer_toolkit.modules.huggingface_files import CONFIG
from transducer_toolkit.modules.transducer import Transducer
from transducer_toolkit.modules.weight_checks import (
    check_kind,
    check_sizes,
    check_weight,
    shapes_only,
)
from transducer_toolkit.ops.checks import one_line
from transducer_toolkit.ops.topology import get_topology

CHECKPOINT_KEY = "recognizer"
FORMAT_VERSION = 1
# Bound for a checkpoint, whose model may never emit a blank.
MAX_SYMBOLS_PER_FRAME = 1000
# Keys of every recipe; newer recipes have more.
RECIPE_KEYS = ("model", "symbols", "num_mel_bins", "max_symbols_per_frame")


def recognizer_recipe(
    model_config: Mapping[str, Any],
    tokenizer: Tokenizer,
    fbank: Fbank,
    *,
    max_symbols_per_frame: int,
    topology: str = "regular",
) -> dict[str, Any]:
    """Describe a recognizer in plain values, for a checkpoint that ``weights_only`` can load.

    Args:
        model_config: Hydra config of the model as plain containers, with ``_target_``,
            ``vocab_size`` and ``blank``.
        tokenizer: tokenizer of the symbols that the model emits.
        fbank: the features that the model reads.
        max_symbols_per_frame: bound of the greedy search.
        topology: topology of the loss that trains the model; alignments use it.

    Returns:
        The entry ``"recognizer"`` of a checkpoint, for :meth:`Recognizer.from_checkpoint`.
    """
    return {
        "format_version": FORMAT_VERSION,
        "model": dict(model_config),
        "symbols": list(tokenizer.symbols),
        "tokenizer": tokenizer.state(),
        "num_mel_bins": fbank.num_mel_bins,
        "max_symbols_per_frame": max_symbols_per_frame,
        "topology": topology,
    }


def recipe_tokenizer(recipe: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of :func:`recognizer_recipe`."""
    # The first checkpoints have no "tokenizer"; all were of characters.
    state = recipe.get("tokenizer", {"kind": "characters", "symbols": recipe["symbols"]})
    return tokenizer_from_state(state)


def recipe_topology(recipe: Mapping[str, Any]) -> Any:
    """Return the topology of :func:`recognizer_recipe`, which a file may have forged."""
    return recipe.get("topology", "regular")  # absent in the first checkpoints


def recipe_normalization(recipe: Mapping[str, Any]) -> Any:
    """Return how a model of :func:`recognizer_recipe` normalizes its logits, maybe forged."""
    model = recipe.get("model")
    joiner = model.get("joiner") if isinstance(model, Mapping) else None
    return joiner.get("normalization", "softmax") if isinstance(joiner, Mapping) else "softmax"


class Recognizer:
    """Converts waveforms to text with a model, a tokenizer and features.

    Args:
        model: a trained transducer; it is put into eval mode.
        tokenizer: tokenizer of the symbols that the model emits.
        fbank: the features that the model reads.
        max_symbols_per_frame: bound of the greedy search.
        topology: topology of the loss that trained the model; searches and alignments use it.
        search: called with the model's predictor and joiner and with ``topology``, returns the
            search, such as ``partial(BeamSearch, beam=8)``; greedy search by default.
        fusion: hotwords and language models, which the search gets as ``lm`` with the weight 1.

    Example:
        >>> recognizer = Recognizer.from_checkpoint("best.ckpt")  # doctest: +SKIP
        >>> recognizer.transcribe([read_audio("three.wav")])  # doctest: +SKIP
        ['three']
    """

    def __init__(
        self,
        model: Transducer,
        tokenizer: Tokenizer,
        fbank: Fbank,
        *,
        max_symbols_per_frame: int = 10,
        topology: str = "regular",
        search: Callable[..., Search] | None = None,
        fusion: Fusion | None = None,
    ) -> None:
        get_topology(topology)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.fbank = fbank
        self.max_symbols_per_frame = max_symbols_per_frame
        self.topology = topology
        self._set_search(search, fusion)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        trusted_packages: Sequence[str] = (),
        search: Callable[..., Search] | None = None,
        fusion: Fusion | None = None,
    ) -> Recognizer:
        """Restore a recognizer from a checkpoint of ``transducer-train``.

        The file is read with ``weights_only=True``. It names the classes of its model, and only
        classes of ``transducer_toolkit.modules`` and ``trusted_packages`` are instantiated, so an
        unknown checkpoint cannot run code.

        Args:
            path: the file, or a folder or an address as in :meth:`from_pretrained`.
            device: device of the model.
            trusted_packages: more packages whose classes may be instantiated, such as yours.
            search: as for the class.
            fusion: as for the class.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not such a checkpoint, or names a class of another package.
        """
        trusted = all_trusted(trusted_packages)
        checkpoint = load_checkpoint(path)
        recipe = checkpoint[CHECKPOINT_KEY]
        check_model_config(recipe["model"], trusted, path)
        try:
            recognizer = cls._restored(recipe, checkpoint["state_dict"])
        except Exception as error:  # a wrong recipe can raise any error in the classes it names
            raise _not_restored(path, error) from error
        try:
            recognizer.model.to(device)
        except (RuntimeError, AssertionError, TypeError) as error:  # no such device, or no room
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from error
        try:
            try_encoder(recognizer.model.encoder, recognizer.fbank)
        except Exception as error:  # a wrong recipe can raise any error
            raise _not_restored(path, error) from error
        if search is not None or fusion is not None:
            recognizer._set_search(search, fusion)
        return recognizer

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, sha256: str | None = None, **options: Any
    ) -> Recognizer:
        """Restore a recognizer from a file, a folder, or an address, which is downloaded once.

        Args:
            name: a path, or an address ``https://host/file.ckpt#sha256=...``. A folder is that of a
                Parakeet or Nemotron model of Hugging Face's transformers with its processor.
            sha256: the file's SHA-256, for an address without one.
            options: as in :meth:`from_checkpoint`.

        Raises:
            ValueError: if the file has another SHA-256, an address has none, or as in
                :meth:`from_checkpoint`.
            ConnectionError: if the file cannot be downloaded.
            FileNotFoundError: if there is no file at the path.

        Example:
            >>> Recognizer.from_pretrained("digits.ckpt", sha256="0f4c...")  # doctest: +SKIP
        """
        path = local_checkpoint(name, sha256=sha256, show_progress=True)
        return cls.from_checkpoint(path, **options)

    @classmethod
    def _restored(
        cls,
        recipe: Mapping[str, Any],
        weights: Mapping[str, Tensor],
    ) -> Recognizer:
        own = {
            name.removeprefix("model."): value
            for name, value in weights.items()
            if name.startswith("model.")
        }
        check_sizes(recipe["model"], weights)
        if not needed_packages(recipe["model"]):  # classes of others may need numbers
            # Shapes only: weights that the file lacks may be larger than the memory.
            with shapes_only():
                shapes = instantiate(recipe["model"], _convert_="all")
            _check_kinds(own, shapes)
            shapes.load_state_dict(own, assign=True)
        model = instantiate(recipe["model"], _convert_="all")
        _check_kinds(own, model)
        model.load_state_dict(own)
        tokenizer = recipe_tokenizer(recipe)
        if (tokenizer.vocab_size, tokenizer.blank) != (model.vocab_size, model.blank):
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} symbols and blank {tokenizer.blank}, "
                f"the model {model.vocab_size} and {model.blank}"
            )
        features = model.encoder.make_features()
        if recipe["max_symbols_per_frame"] > MAX_SYMBOLS_PER_FRAME:
            raise ValueError(
                f"max_symbols_per_frame: expected at most {MAX_SYMBOLS_PER_FRAME}, got "
                f"{recipe['max_symbols_per_frame']}"
            )
        return cls(
            model,
            tokenizer,
            Fbank(num_mel_bins=recipe["num_mel_bins"]) if features is None else features,
            max_symbols_per_frame=recipe["max_symbols_per_frame"],
            topology=recipe_topology(recipe),
        )

    def _set_search(self, search: Callable[..., Search] | None, fusion: Fusion | None) -> None:
        predictor, joiner = self.model.predictor, self.model.joiner
        if search is None:
            search = partial(GreedySearch, max_symbols_per_frame=self.max_symbols_per_frame)
        lm = (fusion or Fusion()).load(self.tokenizer)(predictor, joiner)
        options = lm_options(search, lm)
        self.search = search(predictor, joiner, topology=self.topology, **options)

    @property
    def frame_s(self) -> float:
        """Duration of an encoder frame, seconds."""
        return encoder_frame_s(self.model.encoder)

    @cached_property
    def min_samples(self) -> int:
        """The fewest samples of a waveform, of which the encoder makes a frame."""
        return min_samples(self.fbank, self.model.encoder.num_output_frames)

    @torch.inference_mode()
    def recognize(self, waveforms: Sequence[Tensor]) -> list[Hypothesis]:
        """Recognize the symbols of a batch of waveforms, with their encoder frames.

        Args:
            waveforms: each (num_samples,) float32 in [-1, 1] at ``fbank.sample_rate``, on the CPU.

        Returns:
            One hypothesis per waveform.

        Raises:
            TypeError: if one is no tensor.
            ValueError: if there are no waveforms, if one is shorter than :attr:`min_samples` or
                has samples that are not finite, or if the model's scores are not finite.
        """
        if not waveforms:
            raise ValueError("waveforms must hold at least one waveform, got none")
        for index, waveform in enumerate(waveforms):
            if not isinstance(waveform, Tensor):
                kind = type(waveform).__name__
                raise TypeError(
                    f"waveforms[{index}]: expected a tensor of samples, got {kind}; "
                    "transcribe_file takes the path of a file"
                )
            self.check_length(waveform, f"waveforms[{index}]")
        features = [self.fbank(waveform) for waveform in waveforms]
        for index, frames in enumerate(features):
            if not bool(frames.isfinite().all()):
                raise ValueError(f"waveforms[{index}] holds samples that are NaN, infinite or huge")
        lengths = torch.tensor([len(f) for f in features])
        device = next(self.model.parameters()).device
        padded = pad_sequence(features, batch_first=True).to(device)
        encoder_out, encoder_lengths = self.model.encoder(padded, lengths)
        self.model.encoder.check_output(lengths, encoder_out, encoder_lengths)
        return self.search(encoder_out, encoder_lengths)

    def check_length(self, waveform: Tensor, name: str) -> None:
        """Raise a ValueError if a waveform is shorter than :attr:`min_samples`."""
        if waveform.dim() == 1 and len(waveform) < self.min_samples:
            rate = self.fbank.sample_rate
            reason = too_short(self.min_samples, rate)
            raise ValueError(f"{name} is {reason}, got {len(waveform) / rate:.4g} s")

    def recognize_words(self, waveforms: Sequence[Tensor]) -> list[list[RecognizedWord]]:
        """Recognize the words of a batch of waveforms, with times and confidences.

        A time says when the model emits, not when a sound begins: a model that sees no future emits
        a word after it has heard enough of it.

        Args:
            waveforms: as for :meth:`recognize`.

        Returns:
            The words of each waveform.
        """
        return [
            recognized_words(hypothesis, self.tokenizer, self.frame_s)
            for hypothesis in self.recognize(waveforms)
        ]

    def transcribe(self, waveforms: Sequence[Tensor]) -> list[str]:
        """Return the texts of a batch of waveforms; see :meth:`recognize`."""
        return [self.tokenizer.decode(h.tokens) for h in self.recognize(waveforms)]

    def transcribe_file(self, path: str | os.PathLike[str], **options: Any) -> Transcription:
        """Transcribe an audio file of any length in bounded memory.

        Args:
            path: any format that soundfile reads, any sample rate, any number of channels.
            options: options of :func:`~transducer_toolkit.inference.long_audio.transcribe_file`,
                such as ``channel=0`` or ``cut="windows"``.
        """
        return transcribe_file(self, path, **options)

    def transcribe_channels(
        self, path: str | os.PathLike[str], **options: Any
    ) -> list[Transcription]:
        """Transcribe each channel of an audio file separately.

        Args:
            path: as for :meth:`transcribe_file`.
            options: options of :func:`~transducer_toolkit.inference.long_audio.transcribe_files`.

        Returns:
            One transcription per channel, in order.
        """
        sources = [AudioSource(path, channel) for channel in channels_of(path)]
        found = []
        for _, result in transcribe_files(self, sources, **options):
            if isinstance(result, Exception):
                raise result
            found.append(result)
        return found


def _check_kinds(weights: Mapping[str, Tensor], model: Transducer) -> None:
    for name, value in model.state_dict().items():
        if name in weights:
            check_kind(weights[name], value, f"its weight {name}")


def _not_restored(path: str | os.PathLike[str], error: Exception) -> ValueError:
    reason = one_line(error.__cause__ or error)  # Hydra names the class, its cause says why
    return ValueError(f"{path}: its model cannot be restored: {reason}")


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of ``transducer-train``, or a model folder, without running its code.

    Args:
        path: the file, an address as in :meth:`Recognizer.from_pretrained`, or a folder of a
            Parakeet or Nemotron model of Hugging Face's transformers.

    Returns:
        Its content, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file, or a file of the folder is missing.
        ConnectionError: if it cannot be downloaded.
        ImportError: if it is a folder, and transformers is not installed.
        ValueError: if it is not such a checkpoint, or damaged.
    """
    path = _located(path)
    checkpoint = _checkpoint_of_folder(path) if path.is_dir() else _checkpoint_of_file(path)
    for name, value in checkpoint["state_dict"].items():
        check_weight(value, f"{path}: its weight {name}")
    return checkpoint


def load_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the recipe of a checkpoint or of a model folder, whose weights are not read.

    Args:
        path: as for :func:`load_checkpoint`.

    Returns:
        The entries of :func:`recognizer_recipe`.

    Raises:
        Exception: as :func:`load_checkpoint`, but for what it says about weights.
    """
    path = _located(path)
    if path.is_dir():
        return _recipe_of_folder(path)
    return dict(_checkpoint_of_file(path)[CHECKPOINT_KEY])


def _located(path: str | os.PathLike[str]) -> Path:
    """Return the file or the model folder, after a download if it is an address."""
    path = local_checkpoint(path, show_progress=True)
    if path.is_dir() and not (path / CONFIG).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: it is a folder, {_advice(path)}")
    return path


def _advice(folder: Path) -> str:
    """Return how to go on from a folder that is no model folder."""
    found = [*sorted(folder.glob("*.ckpt")), *sorted(folder.glob("checkpoints/*.ckpt"))]
    if found:
        return f"give a file, such as {found[0]}"
    if (folder / "adapter_config.json").is_file():
        return (
            "and it contains an adapter of PEFT without its model; save the whole model: "
            "merge_and_unload() of the adapted model, then save_pretrained of the result and of "
            "the processor"
        )
    return f"and it contains no checkpoint, nor the {CONFIG} of a model of transformers"


def _checkpoint_of_folder(path: Path) -> dict[str, Any]:
    from transducer_toolkit.inference.huggingface import read_model_weights

    recipe = _recipe_of_folder(path)
    weights = read_model_weights(path, recipe["model"])
    weights = {f"model.{name}": value for name, value in weights.items()}
    return {CHECKPOINT_KEY: recipe, "state_dict": weights}


def _recipe_of_folder(path: Path) -> dict[str, Any]:
    from transducer_toolkit.inference.huggingface import read_recipe

    return {"format_version": FORMAT_VERSION, **read_recipe(path)}


def _checkpoint_of_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        advice = ""
        if re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and path.suffix not in (".ckpt", ".pt"):
            advice = (
                "; a model of the Hugging Face Hub must be downloaded first: "
                f"hf download {path} --local-dir FOLDER"
            )
        raise FileNotFoundError(f"no checkpoint at {path}{advice}")
    if path.suffix == ".nemo":
        raise ValueError(
            f"{path} is a model of NeMo, which cannot be read here; give a folder of the same "
            "model in the format of transformers"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a checkpoint of transducer-train, nor of torch at all")
    with open(path, "rb") as file:
        checkpoint = load_plain(file, path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(CHECKPOINT_KEY), dict):
        raise ValueError(
            f"{path} is not a checkpoint of transducer-train: it holds no {CHECKPOINT_KEY!r} entry"
        )
    recipe = checkpoint[CHECKPOINT_KEY]
    version = recipe.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has the recognizer format {version}, this version of transducer_toolkit "
            f"reads {FORMAT_VERSION}"
        )
    missing = [name for name in RECIPE_KEYS if name not in recipe]
    if missing:
        raise ValueError(f"{path}: its recognizer lacks {', '.join(missing)}")
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()):
        raise ValueError(f"{path}: its state_dict is no dict of tensors")
    return checkpoint


def model_config_from_checkpoint(
    path: str | os.PathLike[str] | None, trusted_packages: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the config of the model of a checkpoint, for a training that starts with its weights.

    Args:
        path: a checkpoint of ``transducer-train``.
        trusted_packages: as in :meth:`Recognizer.from_checkpoint`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a checkpoint, names a class of another package, or ``path``
            is None.
    """
    if path is None:
        raise ValueError("model=checkpoint: expected a checkpoint, got null; set init_from=PATH")
    config = load_recipe(path)["model"]
    check_model_config(config, all_trusted(trusted_packages), path)
    return dict(config)


def tokenizer_from_checkpoint(path: str | os.PathLike[str] | None) -> Tokenizer:
    """Return the tokenizer of a checkpoint, for a training that starts with its weights.

    Args:
        path: a checkpoint of ``transducer-train``, or a folder as in :func:`load_checkpoint`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a checkpoint, or ``path`` is None.

    Example:
        >>> tokenizer_from_checkpoint("best.ckpt").encode("no")  # doctest: +SKIP
        [1, 2]
    """
    if path is None:
        raise ValueError(
            "data/tokenizer=checkpoint: expected a checkpoint, got null; set "
            "init_from=CHECKPOINT, or data.tokenizer.path=CHECKPOINT"
        )
    if (Path(path) / CONFIG).is_file():  # a folder, whose weights are not read here
        return HuggingFaceTokenizer.load(path)
    return recipe_tokenizer(load_checkpoint(path)[CHECKPOINT_KEY])
