"""What is measured of a model while it trains: passkeys, perplexity, NLL by position.

figures = figures_of(tokenizer, 256, 2_048, tasks=("passkey", "perplexity"), samples=20)
figures(model)["passkey@2048"], figures(model)["nll@1024-2048"]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from longctx.eval import SweepResult

__all__ = ["figures_of"]


def figures_of(
    tokenizer: PreTrainedTokenizerBase,
    short: int,
    long: int,
    *,
    tasks: Sequence[str],
    samples: int,
) -> Callable[[PreTrainedModel], Mapping[str, float]]:
    """Return a function of the model, for `longctx.train.finetune`.

    Its figures are passkey@N (a share) and perplexity@N at both lengths, and nll@A-B (nats per
    token) of the tokens at positions A to B − 1 of documents, B doubling from `short` to `long`;
    these not where a method depends on the length of the input, since no pass serves all then.

    Args:
        tokenizer: of the model.
        short: the window before it was extended, tokens.
        long: the length that is learnt, tokens.
        tasks: "passkey", "perplexity" or both.
        samples: passkey prompts at each length.
    """

    def figures(model: PreTrainedModel) -> dict[str, float]:
        from longctx.eval import Passkey, Perplexity, sweep

        found: dict[str, float] = {}
        # Every process trains, and has to know the figures that stop it.
        how: dict[str, Any] = {"single_process": True, "progress": False}
        ends = sorted({short, long})
        if "passkey" in tasks:
            result = sweep(model, tokenizer, [Passkey(samples=samples)], ends, **how)
            found |= {f"passkey@{row.length}": row.value for row in result.rows}
        if "perplexity" in tasks:
            doubling = {long, *(short << n for n in range(64) if short << n <= long)}
            result = sweep(model, tokenizer, [Perplexity(windows=4)], sorted(doubling), **how)
            found |= {f"perplexity@{r.length}": r.value for r in result.rows if r.length in ends}
            if result.variants[0].length_invariant:
                found |= _by_position(result)
        return found

    return figures


def _by_position(result: SweepResult) -> dict[str, float]:
    """Mean NLL between each length and the next, from what stands before each in one pass."""
    observations = [o for record in result.records for o in record.observations]
    whole: dict[int, tuple[float, int]] = {0: (0.0, 0)}
    for length in result.lengths:
        own = [o.detail for o in observations if o.length == length]
        nats, targets = (math.fsum(o[f"prefix_{what}"] for o in own) for what in ("nll", "targets"))
        whole[length] = nats, round(targets)
    found: dict[str, float] = {}
    for first, last in pairwise(sorted(whole)):
        nats, targets = (b - a for a, b in zip(whole[first], whole[last], strict=True))
        found[f"nll@{first}-{last}"] = nats / targets if targets > 0 else math.nan
    return found
