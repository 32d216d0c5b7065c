# SPDX-License-Identifier: Apache-2.0
"""Small random models of transformers, and batches for them."""

from __future__ import annotations

import pytest
import torch

from transducer_toolkit.optional import OLDEST_TRANSFORMERS

transformers = pytest.importorskip("transformers", minversion=OLDEST_TRANSFORMERS)

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "subsampling_conv_channels": 8,
    "layerdrop": 0.0,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.2,  # 0.02 makes all logits nearly equal
}
KINDS = {
    "ParakeetForRNNT": "ParakeetRNNTConfig",
    "ParakeetForTDT": "ParakeetTDTConfig",
    "NemotronAsrStreamingForRNNT": "NemotronAsrStreamingConfig",
    "Nemotron3_5AsrForRNNT": "Nemotron3_5AsrConfig",
}
PAD = 2
BLANK_BIAS = 3.0


def small_model(kind="ParakeetForRNNT", vocab_size=33, seed=0, **options):
    """A model whose blank is the last symbol."""
    torch.manual_seed(seed)
    encoder = dict(ENCODER)
    if kind.startswith("Nemotron"):
        encoder["model_type"] = "nemotron_asr_streaming_encoder"
    if kind == "Nemotron3_5AsrForRNNT":
        options["prompt_intermediate_size"] = 16
    config = getattr(transformers, KINDS[kind])(
        vocab_size=vocab_size,
        decoder_hidden_size=24,
        num_decoder_layers=1,
        blank_token_id=vocab_size - 1,
        pad_token_id=PAD,
        encoder_config=encoder,
        **options,
    )
    model = getattr(transformers, kind)(config)
    model.generation_config.decoder_start_token_id = config.blank_token_id
    return model


def batch(vocab_size=33, num_frames=(120, 90), num_labels=(3, 2), padding=None, seed=0):
    """The arguments of a call, with labels padded by blank or by another id."""
    generator = torch.Generator().manual_seed(seed)
    blank = vocab_size - 1
    size = len(num_frames)
    labels = torch.randint(PAD + 1, blank, (size, max(num_labels)), generator=generator)
    is_padding = torch.arange(max(num_labels)) >= torch.tensor(num_labels)[:, None]
    mask = torch.arange(max(num_frames)) < torch.tensor(num_frames)[:, None]
    start = torch.full((size, 1), blank)
    return {
        "input_features": torch.randn(size, max(num_frames), 80, generator=generator),
        "attention_mask": mask.long(),
        "labels": labels.masked_fill(is_padding, blank if padding is None else padding),
        "decoder_input_ids": torch.cat((start, labels.masked_fill(is_padding, blank)), 1),
    }


def save_folder(folder, kind="ParakeetForRNNT", **options):
    """A folder as `save_pretrained` writes it: a random model, its features and a tokenizer."""
    import sentencepiece
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import ParakeetConverter

    folder.mkdir(parents=True, exist_ok=True)
    texts = ["one two three four five six seven eight nine zero", "it is twelve, seven of nine"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20),
        model_prefix=str(folder / "pieces"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    converted = ParakeetConverter(str(folder / "pieces.model")).converted()
    tokenizer = transformers.ParakeetTokenizer(tokenizer_object=converted)
    blank = AddedToken("<blank>", normalized=False, special=True)
    unknown = AddedToken("<unk>", normalized=False, special=True)
    tokenizer.add_tokens([blank])
    tokenizer.add_special_tokens({"pad_token": blank, "unk_token": unknown})
    extractor = transformers.ParakeetFeatureExtractor()
    if kind.startswith("Nemotron"):
        extractor = transformers.NemotronAsrStreamingFeatureExtractor()
    decoder_type = "tdt" if kind == "ParakeetForTDT" else "rnnt"
    transformers.ParakeetProcessor(extractor, tokenizer, decoder_type=decoder_type).save_pretrained(
        folder
    )
    model = small_model(kind, vocab_size=len(tokenizer), **options).eval()
    _spread_outputs(model, extractor, tokenizer.pad_token_id)
    if kind == "ParakeetForTDT":  # as in converted models: durations are no tokens
        sizes = model.config.vocab_size, model.joint.head.out_features
        model.generation_config.suppress_tokens = list(range(*sizes))
        with torch.no_grad():  # few labels without a duration, of which `generate` has no bound
            model.joint.head.weight[model.config.vocab_size :] *= 0.3
            model.joint.head.bias[model.config.vocab_size] -= 2.0
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def _spread_outputs(model, extractor, blank):
    """Make a random model emit many different labels, with blanks between them."""
    inputs = extractor(torch.randn(32000).numpy(), sampling_rate=16000, return_tensors="pt")
    frames = model.get_audio_features(**inputs).pooler_output[0]
    model.encoder_projector.weight /= frames.std(0)[:, None]
    model.encoder_projector.bias.copy_(
        (model.encoder_projector.bias - frames.mean(0)) / frames.std(0)
    )
    model.decoder.embedding.weight.normal_()
    model.decoder.decoder_projector.weight.normal_()
    head = model.joint.head
    head.weight.normal_(std=0.5)
    head.bias[blank] += BLANK_BIAS
