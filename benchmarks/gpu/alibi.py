"""ALiBi's attention each way there is, against plain causal attention.

The ways are flash-attn (where it is installed), torch's flex_attention, and q and k that carry the
bias in extra dimensions. Baseline: `scaled_dot_product_attention` without any bias.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from longctx.attention import cuda
from longctx.attention.cpu_flash import KeyBias
from longctx.attention.dispatch import attend
from longctx.attention.reference import attention_with_linear_bias
from longctx.patches.alibi import slopes

from ._common import (
    DEVICE,
    ON_CUDA,
    Attempts,
    peak_gib,
    publish,
    ratio_within,
    say,
)

HEADS, KV_HEADS, DIM = (32, 8, 128) if ON_CUDA else (4, 2, 16)
LENGTHS = (8192, 32_768, 131_072) if ON_CUDA else (128, 256)
CACHE = 32_768 if ON_CUDA else 256
DOCUMENTS = 8
ROWS = 32
SLOPES = slopes(HEADS)
SCALING = DIM**-0.5
SECONDS = 3.0 if ON_CUDA else 0.05
"""For the rounds of one comparison; a few are made in any case."""
DECODED = 16
"""Tokens decoded for one time."""

Inputs = tuple[Tensor, Tensor, Tensor]
Way = Callable[[Tensor, Tensor, Tensor, KeyBias, float], Tensor]
Attention = Callable[[Inputs], Tensor]
Step = Callable[[Attention, Inputs], object]

ERRORS = ("bfloat16", "float32")
AGAINST_PLAIN = ("way / plain [95%]", "plain (s)", "peak GiB", "peak GiB, plain")


def measure(deadline: float) -> None:
    """Four tables: errors, times by length, padding and packing, decoding."""
    attempts = Attempts(deadline)
    for table in (_errors, _against_plain, _apart, _decoding):
        begin = time.monotonic()
        torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage] # it bounds what it compiles
        table(attempts)
        say(f"{table.__name__.strip('_')}: {time.monotonic() - begin:.0f} s")
    attempts.check()


def ways() -> dict[str, Way]:
    """By name, those that run here."""
    found: dict[str, Way] = {}
    if ON_CUDA and cuda.flash_applies(torch.empty(1, 1, 1, DIM).bfloat16(), KeyBias(SLOPES)):
        found["flash-attn"] = cuda.flash_attention
    found["flex_attention"] = cuda.flex_attention
    found["extra dimensions"] = cuda.extended_attention
    return found


def inputs(length: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """q, k, v ~ N(0, 1), laid out as a transformers model lays them out."""
    generator = torch.Generator(DEVICE).manual_seed(length)

    def draw(heads: int) -> Tensor:
        x = torch.randn(batch, length, heads, DIM, generator=generator, device=DEVICE)
        return x.to(dtype).transpose(1, 2).requires_grad_()

    return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


def plain(qkv: Inputs) -> Tensor:
    return functional.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)


def biased(way: Way, qkv: Inputs, mask: Tensor | None = None) -> Tensor:
    return way(*qkv, KeyBias(SLOPES, mask=mask), SCALING)


def forward(run: Attention, qkv: Inputs) -> Tensor:
    with torch.no_grad():
        q, k, v = qkv
        return run((q.detach(), k.detach(), v.detach()))


def both(run: Attention, qkv: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward."""
    out = run(qkv)
    return torch.autograd.grad(out, qkv, torch.ones_like(out))


STEPS: dict[str, Step] = {"forward": forward, "forward + backward": both}


def _errors(attempts: Attempts) -> None:
    rows: list[dict[str, str]] = []
    for length in LENGTHS:
        for name, way in {"plain, no bias": None, **ways()}.items():
            what = f"error of {name} at {length}"
            cells = attempts.cells(what, ERRORS, partial(_error_of, length, way))
            rows.append({"tokens": f"{length:,}", "way": name} | cells)
    publish(
        "alibi",
        "ALiBi, errors",
        rows,
        f"Largest difference from float64 over {ROWS} rows, {HEADS} heads over {KV_HEADS}, head "
        f"dim {DIM}; the reference gets the same rounded inputs. Float32 without TF32, at the "
        "shortest length.",
    )


def _error_of(length: int, way: Way | None) -> Sequence[str]:
    found: list[str] = []
    for dtype in (torch.bfloat16, torch.float32):
        if dtype == torch.float32 and (length > LENGTHS[0] or way is cuda.flash_attention):
            found.append("")
            continue
        qkv = inputs(length, dtype=dtype)
        run = plain if way is None else partial(biased, way)
        chosen = SLOPES if way is not None else (0.0,) * HEADS
        found.append(f"{_error(forward(run, qkv), qkv, chosen):.1e}")
    return found


def _error(
    out: Tensor, qkv: Inputs, chosen: tuple[float, ...], visible: Tensor | None = None
) -> float:
    length = out.shape[2]
    rows = torch.linspace(0, length - 1, ROWS, device=DEVICE).long()
    with torch.no_grad():
        exact = attention_with_linear_bias(*qkv, chosen, rows=rows, visible=visible)
        return (out[:, :, rows] - exact).abs().max().item()


def _against_plain(attempts: Attempts) -> None:
    rows: list[dict[str, str]] = []
    for length in LENGTHS:
        for said, step in STEPS.items():
            for name, way in ways().items():
                if step is both and way is cuda.flex_attention and not ON_CUDA:
                    continue  # it has no backward pass there
                cells = attempts.cells(
                    f"{name}, {said} at {length}",
                    AGAINST_PLAIN,
                    partial(_compare, step, length, way),
                )
                rows.append({"tokens": f"{length:,}", "what": said, "way": name} | cells)
    publish(
        "alibi",
        "ALiBi, against plain causal attention",
        rows,
        f"{HEADS} heads over {KV_HEADS}, head dim {DIM}, bfloat16, in turns. Memory is the peak "
        "beyond q, k and v. flex_attention was compiled before.",
    )


def _compare(step: Step, length: int, way: Way) -> Sequence[str]:
    qkv = inputs(length)
    base, other = (partial(step, run, qkv) for run in (plain, partial(biased, way)))
    ratio = ratio_within(base, other, SECONDS)
    peaks = [f"{peak_gib(run):.2f}" for run in (other, base)]
    return (str(ratio), f"{ratio.base_seconds:.4f}", *peaks)


def _apart(attempts: Attempts) -> None:
    """Left padding for each way, and packed documents as `attend` does them."""
    length = LENGTHS[0]
    rows: list[dict[str, str]] = []
    for said, step in STEPS.items():
        for name, way in ways().items():
            if way is cuda.flash_attention:
                continue  # it has no padding
            if step is both and way is cuda.flex_attention and not ON_CUDA:
                continue
            what = f"left padding, {name}"
            names = ("time ratio [95%]", "error")
            cells = attempts.cells(f"{what}, {said}", names, partial(_padded, step, length, way))
            rows.append({"what": what, "pass": said} | cells)
        what = f"{DOCUMENTS} packed documents"
        cells = attempts.cells(
            f"{what}, {said}", ("time ratio [95%]", "error"), partial(_packed, step, length)
        )
        rows.append({"what": what, "pass": said} | cells)
    publish(
        "alibi",
        "ALiBi, padding and packing",
        rows,
        f"{length:,} tokens, bfloat16. Left padding: a quarter of one of two rows, against the "
        "same way without padding. Packed: against plain causal attention over the whole row. "
        "Errors are against float64.",
    )


def _padded(step: Step, length: int, way: Way) -> Sequence[str]:
    qkv = inputs(length, batch=2)
    mask = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    mask[0, : length // 4] = False
    bare, padded = partial(biased, way), partial(biased, way, mask=mask)
    error = _error(forward(padded, qkv), qkv, SLOPES, mask[:, None, None])
    ratio = ratio_within(partial(step, bare, qkv), partial(step, padded, qkv), SECONDS)
    return str(ratio), f"{error:.1e}"


def _packed(step: Step, length: int) -> Sequence[str]:
    qkv = inputs(length)
    numbers = (torch.arange(length, device=DEVICE) * DOCUMENTS // length)[None].int()
    mask = numbers[:, None, None]

    def run(qkv: Inputs) -> Tensor:
        return attend(*qkv, slopes=SLOPES, mask=mask)

    same = mask.transpose(-1, -2) == mask
    error = _error(forward(run, qkv), qkv, SLOPES, same)
    ratio = ratio_within(partial(step, plain, qkv), partial(step, run, qkv), SECONDS)
    return str(ratio), f"{error:.1e}"


def _decoding(attempts: Attempts) -> None:
    rows: list[dict[str, str]] = []
    names = ("way / plain [95%]", "plain (ms a token)")
    choices = {name: way for name, way in ways().items() if way is not cuda.flex_attention}
    for name, way in {"as attend chooses": None, **choices}.items():
        for kind, decode in (("dynamic", _grown), ("static", _preallocated)):
            if kind == "static" and way is cuda.flash_attention:
                continue  # it has no mask
            what = f"{kind} cache, {name}"
            cells = attempts.cells(what, names, partial(_decode, decode, way))
            rows.append({"cache": kind, "way": name} | cells)
    publish(
        "alibi",
        "ALiBi, decoding",
        rows,
        f"One token after {CACHE:,}, one layer's attention, bfloat16, {DECODED} tokens a time. "
        "Dynamic: the cache is concatenated with the new key; static: its unwritten end is masked.",
    )


Decode = Callable[[Way | None, Inputs, int], Tensor]


@torch.no_grad()
def _decode(decode: Decode, way: Way | None) -> Sequence[str]:
    _, k, v = inputs(CACHE + DECODED)
    q = inputs(1)[0]

    def tokens(attention: Way | None) -> None:
        for token in range(DECODED):
            decode(attention, (q, k, v), CACHE + token)

    ratio = ratio_within(partial(tokens, _plain_way), partial(tokens, way), SECONDS)
    return str(ratio), f"{1000 * ratio.base_seconds / DECODED:.3f}"


def _plain_way(q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, scaling: float) -> Tensor:
    mask = None if bias.mask is None else bias.mask[:, None, None]
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True
    )


def _grown(way: Way | None, qkv: Inputs, written: int) -> Tensor:
    """The cache as concatenation leaves it."""
    q, k, v = qkv
    keys, values = (
        torch.cat([x[:, :, :written], x[:, :, written : written + 1]], dim=2) for x in (k, v)
    )
    if way is None:
        return attend(q, keys, values, slopes=SLOPES)
    return way(q, keys, values, KeyBias(SLOPES), SCALING)


def _preallocated(way: Way | None, qkv: Inputs, written: int) -> Tensor:
    """The whole cache with a mask, as transformers' static cache gives it to SDPA.

    The interface hands `attend` and the ways behind it a mask over the written part alone.
    """
    q, k, v = qkv
    real = torch.ones(1, written + 1, dtype=torch.bool, device=DEVICE)
    if way is None:
        return attend(q, k, v, slopes=SLOPES, mask=real[:, None, None])
    if way is _plain_way:
        mask = functional.pad(real, (0, k.shape[2] - written - 1))
        return way(q, k, v, KeyBias(SLOPES, mask=mask), SCALING)
    keys, values = (x[:, :, : written + 1] for x in (k, v))
    return way(q, keys, values, KeyBias(SLOPES, mask=real), SCALING)
