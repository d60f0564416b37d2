"""Digests follow content, and nothing else."""

from __future__ import annotations

from typing import Any

import torch

import longctx
from longctx.eval.fingerprint import json_digest, model_digest, tokenizer_digest

from .conftest import byte_model, byte_tokenizer


def test_a_model_is_known_by_config_and_weights() -> None:
    model: Any = byte_model()
    digest = model_digest(model)
    assert digest == model_digest(byte_model())
    assert digest != model_digest(byte_model(seed=1))
    model.name_or_path = "elsewhere"
    assert digest == model_digest(model)
    with longctx.extend(model, "yarn", factor=2.0):
        assert digest != model_digest(model)
    assert digest == model_digest(model)
    assert digest != model_digest(model.to(torch.bfloat16))
    trained: Any = byte_model()
    with torch.no_grad():
        trained.model.layers[0].mlp.up_proj.weight.mul_(1.001)
    assert digest != model_digest(trained)


def test_a_tokenizer_is_known_by_its_rules() -> None:
    tokenizer = byte_tokenizer()
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert digest == tokenizer_digest(tokenizer) == tokenizer_digest(byte_tokenizer())
    assert digest != tokenizer_digest(byte_tokenizer(bos=False))
    tokenizer.chat_template = "{{ messages }}"
    assert digest != tokenizer_digest(tokenizer)


def test_json_digests_do_not_depend_on_the_order() -> None:
    assert json_digest({"a": 1, "b": (2,)}) == json_digest({"b": [2], "a": 1})
    assert json_digest([1, 2]) != json_digest([2, 1])
