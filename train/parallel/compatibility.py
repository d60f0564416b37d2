"""What does not work together in training, and would go wrong without a word: refused up front.

check_compatibility(Setup.of(model, packed=True, context_parallel=2))     # RunError: … and packing
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from longctx.errors import RunError
from longctx.model import text_config, window
from longctx.patch import Method, methods_of

__all__ = ["FLASH", "Setup", "check_compatibility", "has_sliding_layers", "trainable_window"]

FLASH = "flash_attention_2"
"""transformers' name of the attention that takes documents and windows without a mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The settings of a run that may stand in each other's way."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads."""
    attention: str = "sdpa"
    """transformers' attention implementation."""
    sliding: bool = False
    """Whether layers see a stretch of the sequence alone (sliding windows, chunks)."""
    attention_method: str | None = None
    """Name of a method that acts in attention (alibi, log_n, …), if any."""
    length_variant_method: str | None = None
    """Name of a method whose frequencies depend on the length of the input (dynamic, …), if any."""
    context_parallel: int = 1
    """Processes that share a sequence by ring attention (accelerate's cp_size)."""
    sequence_parallel: int = 1
    """Processes that share a sequence by exchanging heads (DeepSpeed Ulysses, sp_size)."""
    packed: bool = False
    """Whether a row may hold several documents."""
    whole_document_losses: tuple[str, ...] = ()
    """Losses that must see whole documents (`Losses.whole_document`)."""
    fully_sharded: bool = False
    """Whether no process holds the whole model (FSDP)."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        *,
        context_parallel: int = 1,
        sequence_parallel: int = 1,
        packed: bool = False,
        put_on_later: Method | None = None,
        whole_document_losses: Iterable[str] = (),
        fully_sharded: bool = False,
    ) -> Setup:
        """Take heads, attention and methods from a model, and one that only training puts on it."""
        config: Any = text_config(model)
        methods = [*([] if put_on_later is None else [put_on_later]), *methods_of(model)]
        heads = int(config.num_attention_heads)
        # What stands beside the rotary (a factor on queries) acts in attention too.
        attending = (m.name for m in methods if "attention" in m.slots or "rotary" not in m.slots)
        return cls(
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            attention=str(config._attn_implementation),
            sliding=has_sliding_layers(config),
            attention_method=next(attending, None),
            length_variant_method=next((m.name for m in methods if not m.length_invariant), None),
            context_parallel=context_parallel,
            sequence_parallel=sequence_parallel,
            packed=packed,
            whole_document_losses=tuple(whole_document_losses),
            fully_sharded=fully_sharded,
        )


def has_sliding_layers(config: Any) -> bool:
    """Whether layers see a stretch of the sequence alone, by a model's text config."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(config, "sliding_window", None))


def trainable_window(model: PreTrainedModel) -> int | None:
    """Tokens that may be trained on: the window; None where a method reads any length."""
    return None if any(method.unbounded for method in methods_of(model)) else window(model)


def check_compatibility(setup: Setup) -> None:
    """Refuse combinations that would train something else than was asked for.

    Raises:
        RunError: names what does not go together and the way out; all of them at once.
    """
    problems = [
        *_sharded(setup),
        *_context_parallel(setup),
        *_sequence_parallel(setup),
    ]
    if problems:
        raise RunError("\n".join(problems))


def _sharded(setup: Setup) -> Iterable[str]:
    if setup.fully_sharded and "sequence" in setup.whole_document_losses:
        yield (
            "sequence-level unlikelihood and shared weights (dp_shard, FSDP): the model continues "
            "texts of its own, for which each process needs it whole. Leave the loss out, or let "
            "every process hold the model."
        )
    if setup.fully_sharded and "long_ce" in setup.whole_document_losses:
        yield (
            "long_ce and shared weights (dp_shard, FSDP): each process reads as many short "
            "contexts as its own documents have, and the others would wait for it. Leave the loss "
            "out, or let every process hold the model."
        )
    if setup.fully_sharded and setup.sequence_parallel > 1:
        yield (
            f"sequence parallel ({setup.sequence_parallel}) and shared weights (dp_shard, FSDP): "
            "DeepSpeed runs the one and FSDP the other. Keep one (dp_shard=1: DeepSpeed shares the "
            "optimizer's states by itself), or share sequences by ring attention (cp)."
        )


def _context_parallel(setup: Setup) -> Iterable[str]:
    size = setup.context_parallel
    if size <= 1:
        return
    if setup.sequence_parallel > 1:
        yield (
            f"context parallel ({size}) and sequence parallel ({setup.sequence_parallel}) at once: "
            "both cut the sequence. Keep one; for packed data that is sequence parallel."
        )
    if setup.packed:
        yield (
            f"context parallel ({size}) and packing: ring attention takes no mask, so documents "
            "would see each other. Do not pack, or use sequence parallel with flash_attention_2."
        )
    if setup.length_variant_method:
        yield (
            f"context parallel ({size}) and {setup.length_variant_method}: each process would take "
            "its own piece for the whole length and choose other frequencies. Use a method that "
            "does not depend on the length (yarn, ntk, linear), or one process per sequence."
        )
    if setup.attention_method:
        yield (
            f"context parallel ({size}) and {setup.attention_method}: ring attention computes "
            "plain causal attention only. Train it with FSDP alone (dp_shard_size) and activation "
            "checkpointing, or use a method that changes frequencies (yarn, ntk, linear)."
        )
    elif setup.sliding:
        yield (
            f"context parallel ({size}) and layers with a sliding window: ring attention takes no "
            "mask, so they would see the whole sequence. Share weights alone (dp_shard), or use "
            f"sequence parallel (sp) with attn={FLASH!r}."
        )
    elif setup.attention != "sdpa":
        yield (
            f"context parallel ({size}) and attention {setup.attention!r}: ring attention stands "
            "in for torch's SDPA only. Load the model with attn='sdpa'."
        )
    yield from _whole_documents(setup, f"context parallel ({size})")


def _sequence_parallel(setup: Setup) -> Iterable[str]:
    size = setup.sequence_parallel
    if size <= 1:
        return
    if setup.attention not in ("sdpa", FLASH) and not setup.attention_method:
        yield (
            f"sequence parallel ({size}) and attention {setup.attention!r}: DeepSpeed Ulysses is "
            f"put around SDPA or flash-attn. Load the model with attn='sdpa' or {FLASH!r}."
        )
    if setup.sliding and setup.attention != FLASH:
        yield (
            f"sequence parallel ({size}), layers with a sliding window and attention "
            f"{setup.attention!r}: DeepSpeed Ulysses hands SDPA no mask, so they would see the "
            f"whole sequence. Load the model with attn={FLASH!r}, or share weights (dp_shard)."
        )
    if setup.packed and setup.attention != FLASH:
        yield (
            f"sequence parallel ({size}), packing and attention {setup.attention!r}: DeepSpeed "
            "Ulysses hands SDPA no document mask, so documents would see each other. Load the "
            "model with attn='flash_attention_2', or do not pack."
        )
    if setup.attention_method:
        yield (
            f"sequence parallel ({size}) and {setup.attention_method}: each process holds other "
            "heads than the method counts on. Train it with FSDP alone (dp_shard_size)."
        )
    if setup.length_variant_method:
        yield (
            f"sequence parallel ({size}) and {setup.length_variant_method}: each process would "
            "take its own piece for the whole length and choose other frequencies. Use a method "
            "that does not depend on the length (yarn, ntk, linear)."
        )
    if setup.heads % size:
        yield (
            f"sequence parallel ({size}) and {setup.heads} query heads: each process needs as many "
            f"heads as the next. Choose a size among {_divisors(setup.heads)}."
        )
    elif setup.kv_heads % size and size % setup.kv_heads:
        fitting = [
            n for n in _divisors(setup.heads) if not setup.kv_heads % n or not n % setup.kv_heads
        ]
        yield (
            f"sequence parallel ({size}) and {setup.kv_heads} key/value heads: these can neither "
            f"be shared out nor repeated evenly. Choose a size among {fitting}."
        )
    yield from _whole_documents(setup, f"sequence parallel ({size})")


def _whole_documents(setup: Setup, what: str) -> Iterable[str]:
    if setup.whole_document_losses:
        yield (
            f"{what} and the loss {', '.join(setup.whole_document_losses)}: it looks at tokens "
            "across a document of which each process has a piece. Leave it out, or keep whole "
            "sequences on each process."
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
