"""The two blocks of a decode bench: what a model does, and what a model does under a decoding.

Perplexity, accuracy, rep/l and wrep/l are read off real text and are the model's alone: a decoding
does not change them. seq-rep-n, different tokens, loops, entropy, BLEU and keys are those of
continuations, and belong to both.

Sources: Welleck et al. 2020 (arXiv:1908.04319), section 6; Zhu et al. 2018, Texygen
(arXiv:1802.01886), section 3.2, for self-BLEU; BLEU-4 by sacrebleu, on token ids.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics.bleu import BLEU

from ..stats.intervals import (
    clustered_wilson,
    jackknife_interval,
    mean_interval,
    perplexity_of,
    wilson,
)
from ..tasks.shared.repetition_metrics import loop_onset, rep_l, seq_rep_n, uniq, wrep_l
from .result import Figure

__all__ = [
    "CONTEXTS",
    "Read",
    "Written",
    "decoding_figures",
    "keys_found",
    "model_figures",
]

CONTEXTS = (16, 32, 128, 512)
"""Tokens that rep/l and wrep/l look back."""
_MOST = 32  # other continuations that one is compared with


@dataclass(frozen=True, slots=True)
class Read:
    """A window of real text, read under teacher forcing."""

    document: str
    context: tuple[int, ...]
    """The token before each target."""
    targets: tuple[int, ...]
    argmax: tuple[int, ...]
    """What greedy decoding would take, at each."""
    nll: float
    """Summed over the targets, in nats."""


@dataclass(frozen=True, slots=True)
class Written:
    """A continuation."""

    document: str
    prompt: int
    """Which prompt it continues."""
    tokens: tuple[int, ...]


def model_figures(windows: Sequence[Read]) -> dict[str, Figure]:
    """ppl, accuracy, rep/l and wrep/l for each l of `CONTEXTS`, documents as clusters."""
    clusters = [window.document for window in windows]
    sizes = [float(len(window.targets)) for window in windows]

    def mean(totals: Sequence[float]) -> Figure:
        return Figure(*mean_interval(totals, sizes, clusters))

    nll = mean([window.nll for window in windows])
    hits = [float(sum(p == t for p, t in zip(w.argmax, w.targets, strict=True))) for w in windows]
    found = {
        "ppl": Figure(*(perplexity_of(x) for x in (nll.value, nll.low, nll.high))),
        "accuracy": mean(hits),
    }
    for size in CONTEXTS:
        found[f"rep/{size}"] = mean(
            [rep_l(w.argmax, w.context, size) * len(w.targets) for w in windows]
        )
    for size in CONTEXTS:
        found[f"wrep/{size}"] = mean(
            [wrep_l(w.argmax, w.context, w.targets, size) * len(w.targets) for w in windows]
        )
    return found


def decoding_figures(rows: Sequence[Written]) -> dict[str, Figure]:
    """seq-rep-n, different tokens, loops, entropy, self-BLEU, cross-BLEU; documents as clusters.

    `self-BLEU` compares the samples of one prompt and is left out where each has one; `cross-BLEU`
    compares the first samples of different prompts. Entropy is that of all tokens together, in
    bits, and `uniq-seq` their number of different ones: both grow with the number of tokens, so
    compare them between decodings that wrote as many.
    """
    clusters = [row.document for row in rows]
    ones = [1.0] * len(rows)
    by_document: dict[str, list[Sequence[int]]] = defaultdict(list)
    for row in rows:
        by_document[row.document].append(row.tokens)

    def mean(values: Sequence[float]) -> Figure:
        return Figure(*mean_interval(values, ones, clusters))

    found = {f"seq-rep-{n}": mean([seq_rep_n(row.tokens, n) for row in rows]) for n in (1, 2, 3, 4)}
    loops = [loop_onset(row.tokens) is not None for row in rows]
    found |= {
        "different tokens": mean([float(uniq(row.tokens)) for row in rows]),
        "loops": Figure(*clustered_wilson(loops, clusters, [row.prompt for row in rows])),
        "uniq-seq": Figure(*jackknife_interval(_different, by_document)),
        "entropy": Figure(*jackknife_interval(_entropy, by_document)),
    }
    by_prompt: dict[int, list[Written]] = defaultdict(list)
    for row in rows:
        by_prompt[row.prompt].append(row)
    samples = [those for those in by_prompt.values() if len(those) > 1]
    if samples:
        own = [(those[0].document, _bleu([row.tokens for row in those])) for those in samples]
        found["self-BLEU"] = _mean_of(own)
    firsts = [those[0] for those in by_prompt.values()]
    if len(firsts) > 1:
        texts = [row.tokens for row in firsts]
        each = [_against(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
        found["cross-BLEU"] = _mean_of(
            [(row.document, value) for row, value in zip(firsts, each, strict=True)]
        )
    return found


def _different(texts: Sequence[Sequence[int]]) -> float:
    """The number of different tokens of all texts together."""
    return float(len({token for text in texts for token in text}))


def _entropy(texts: Sequence[Sequence[int]]) -> float:
    """The entropy of the tokens of all texts together, in bits."""
    counts = Counter(token for text in texts for token in text)
    total = sum(counts.values())
    return sum(n / total * math.log2(total / n) for n in counts.values())


def _mean_of(values: Sequence[tuple[str, float]]) -> Figure:
    numbers = [value for _, value in values]
    return Figure(*mean_interval(numbers, [1.0] * len(numbers), [name for name, _ in values]))


def _bleu(texts: Sequence[Sequence[int]]) -> float:
    """Mean BLEU of each text against the others."""
    each = [_against(text, [*texts[:i], *texts[i + 1 :]]) for i, text in enumerate(texts)]
    return sum(each) / len(each)


def _against(text: Sequence[int], others: Sequence[Sequence[int]]) -> float:
    """BLEU-4 of token ids against others, 0 to 1."""
    bleu = BLEU(tokenize="none", effective_order=True)
    return (
        bleu.sentence_score(_words(text), [_words(other) for other in others[:_MOST]]).score / 100
    )


def _words(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def keys_found(hits: Sequence[bool]) -> Figure:
    """The share of keys that were said."""
    return Figure(sum(hits) / len(hits), *wilson(sum(hits), len(hits)))
