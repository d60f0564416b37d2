"""Each refusal, its way out, and that the way out is let through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import longctx
from longctx.errors import RunError
from longctx.registry import make_method
from longctx.train.parallel.compatibility import Setup, check_compatibility

from ...families import build

FINE = Setup(heads=12, kv_heads=4)


@pytest.mark.parametrize(
    ("bad", "says", "way_out"),
    [
        ({"context_parallel": 2, "packed": True}, "Do not pack", {"packed": False}),
        (
            {"context_parallel": 2, "packed": True},
            "sequence parallel with flash_attention_2",
            {"context_parallel": 1, "sequence_parallel": 2, "attention": "flash_attention_2"},
        ),
        (
            {"sequence_parallel": 2, "packed": True},
            "attn='flash_attention_2'",
            {"attention": "flash_attention_2"},
        ),
        (
            {"context_parallel": 2, "length_variant_method": "dynamic"},
            "dynamic.*yarn",
            {"length_variant_method": None},
        ),
        (
            {"context_parallel": 2, "attention_method": "alibi"},
            "alibi.*FSDP alone",
            {"context_parallel": 1},
        ),
        (
            {"context_parallel": 2, "attention": "flash_attention_2"},
            "attn='sdpa'",
            {"attention": "sdpa"},
        ),
        (
            {"context_parallel": 2, "sliding": True},
            r"context parallel.*sliding window.*\(sp\) with attn='flash_attention_2'",
            {"context_parallel": 1},
        ),
        ({"sequence_parallel": 8}, r"12 query heads.*\[1, 2, 3, 4, 6, 12\]", {"heads": 16}),
        (
            {"sequence_parallel": 6},
            r"4 key/value heads.*\[1, 2, 4, 12\]",
            {"sequence_parallel": 12},
        ),
        (
            {"fully_sharded": True, "whole_document_losses": ("sequence",)},
            "shared weights",
            {"fully_sharded": False},
        ),
        ({"sequence_parallel": 2, "attention_method": "alibi"}, "alibi", {"sequence_parallel": 1}),
        (
            {"sequence_parallel": 2, "length_variant_method": "dynamic"},
            "dynamic",
            {"length_variant_method": None},
        ),
        (
            {"sequence_parallel": 2, "attention": "eager"},
            "attn='sdpa' or 'flash_attention_2'",
            {"attention": "sdpa"},
        ),
        (
            {"sequence_parallel": 2, "sliding": True},
            "would see the whole sequence.*flash_attention_2",
            {"attention": "flash_attention_2"},
        ),
        (
            {"sequence_parallel": 2, "fully_sharded": True},
            "dp_shard=1.*ring attention",
            {"fully_sharded": False},
        ),
        ({"sequence_parallel": 2, "context_parallel": 2}, "Keep one", {"context_parallel": 1}),
        (
            {"context_parallel": 2, "whole_document_losses": ("contrastive",)},
            "contrastive",
            {"whole_document_losses": ()},
        ),
        (
            {"sequence_parallel": 2, "whole_document_losses": ("unlikelihood",)},
            "unlikelihood",
            {"whole_document_losses": ()},
        ),
    ],
)
def test_a_refusal_names_the_way_out(
    bad: dict[str, Any], says: str, way_out: dict[str, Any]
) -> None:
    check_compatibility(FINE)
    with pytest.raises(RunError, match=says):
        check_compatibility(replace(FINE, **bad))
    check_compatibility(replace(FINE, **bad | way_out))


def test_all_problems_are_named_at_once() -> None:
    setup = replace(FINE, context_parallel=2, packed=True, attention_method="alibi")
    with pytest.raises(RunError, match=r"(?s)packing.*alibi"):
        check_compatibility(setup)


def test_a_model_says_what_is_on_it() -> None:
    model = build("llama")
    plain = Setup.of(model)
    assert (plain.heads, plain.kv_heads, plain.attention) == (4, 2, "sdpa")
    assert plain.attention_method is plain.length_variant_method is None
    assert not plain.sliding
    assert Setup.of(build("gemma3")).sliding
    assert Setup.of(model, put_on_later=make_method("shifted", {})).attention_method == "shifted"
    with longctx.extend(model, "alibi"):
        assert Setup.of(model).attention_method == "alibi"
    with longctx.extend(model, "yarn:4+log_n"):
        assert Setup.of(model).attention_method == "log_n"
        with pytest.raises(RunError, match=r"log_n.*FSDP alone"):
            check_compatibility(Setup.of(model, context_parallel=2))
    with longctx.extend(model, "dynamic", factor=4):
        setup = Setup.of(model, context_parallel=2)
        assert setup.length_variant_method == "dynamic"
        with pytest.raises(RunError, match="dynamic"):
            check_compatibility(setup)
    with longctx.extend(model, "yarn", factor=4):
        check_compatibility(Setup.of(model, context_parallel=2))
