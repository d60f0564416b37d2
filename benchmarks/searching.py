"""Are searched divisors better than yarn's? `python -m benchmarks.searching [MODEL] [TARGET]`.

Searches with three seeds, and sweeps what each found beside yarn and the model as it came on keys,
texts and a seed that no search has seen. An interrupted run goes on where it was.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import longctx
from longctx.eval import Passkey, SearchSettings, parse_lengths, search, sweep
from longctx.eval.comparison.differences import Difference, Pair, pair, pooled_answers
from longctx.eval.results.variants import original_window
from longctx.eval.tasks.shared.protocol import Observation

from ._measure import write_results
from ._sweeps import observed, share

OTHER = 100  # added to a search's seed for the sweep
_GAIN = "searched − yarn, points [95%]"
SAMPLES = 300  # prompts a length of that sweep


def main() -> None:
    """Search, sweep, and write how far the found divisors are before yarn's."""
    source, length = (*sys.argv[1:], *("demo", "1k")[len(sys.argv) - 1 :])
    (target,) = parse_lengths(length)
    model, tokenizer = longctx.load(source)
    folder = Path("build/searching") / f"{Path(source).name}-{target}"
    window = original_window(model)
    assert window is not None
    yarn = f"yarn:{target / window:g}"
    rows: list[dict[str, object]] = []
    every: dict[int, list[Pair]] = {window: [], target: []}
    settings = [SearchSettings(prompts=96, seed=seed) for seed in (0, 1, 2)]
    for one in settings:
        found = search(model, tokenizer, target, settings=one, folder=folder / f"search-{one.seed}")
        result = sweep(
            model,
            tokenizer,
            Passkey(samples=SAMPLES, seed=OTHER + one.seed),
            [window, target],
            methods=["none", yarn, found.method],
            results=folder / f"keys-{one.seed}" / "results.jsonl",
        )
        _, formula, searched = (variant.label for variant in result.variants)
        for tokens in (window, target):
            keys = {v.label: observed(result, v.label, [tokens]) for v in result.variants}
            pairs = pair(keys[formula], keys[searched])
            every[tokens] += [_of_seed(one.seed, *both) for both in pairs]
            rows.append(
                {
                    "seed": one.seed,
                    "tokens": f"{tokens:,}",
                    **{
                        name: f"{share(keys[label]):.1%}"
                        for name, label in (
                            ("as it came", "none"),
                            (f"`{yarn}`", formula),
                            ("searched", searched),
                        )
                    },
                    _GAIN: _points(pooled_answers(pairs)),
                }
            )
    for tokens, pairs in every.items():
        together = {"seed": "all", "tokens": f"{tokens:,}", _GAIN: _points(pooled_answers(pairs))}
        rows.append({**dict.fromkeys(rows[0], ""), **together})
    write_results(
        f"Searched divisors: {Path(source).name} to {target:,} tokens",
        f"python -m benchmarks.searching {source} {length}",
        rows,
        f"Share of keys found. Three searches of {settings[0].evaluations} divisors, judged by "
        f"{settings[0].prompts} prompts of the target length and {settings[0].near_prompts} inside "
        f"the window, and reported on {SAMPLES} prompts a length of another seed, with keys "
        "and texts that no search has seen, half of them in repeated sentences. Intervals of the "
        "difference on the same prompts: t over haystacks.",
    )


def _of_seed(seed: int, first: Observation, second: Observation) -> Pair:
    """A pair whose haystack is told from that of the same name under another seed."""
    return replace(first, cluster=f"{seed}/{first.cluster}"), replace(
        second, cluster=f"{seed}/{second.cluster}"
    )


def _points(one: Difference) -> str:
    return f"{100 * one.value:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


if __name__ == "__main__":
    main()
