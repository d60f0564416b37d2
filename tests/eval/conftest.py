"""A tokenizer of bytes and a tiny random LLaMA that reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WINDOW = 512


def byte_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, with or without a BOS before each text."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def byte_model(seed: int = 0) -> LlamaForCausalLM:
    """One random layer with a window of 512 bytes."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=WINDOW,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return byte_model()


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, ...]:
    """Three documents of 3,000, 2,600 and 900 bytes."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, count in (("a", 3000), ("b", 2600), ("c", 900)):
        line = f"Line of document {name}, which says that {{}} is a number.\n"
        text = "".join(line.format(i * i) for i in range(count))[:count]
        (folder / f"{name}.txt").write_text(text)
    return (str(folder),)
