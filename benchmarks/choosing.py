"""Does `longctx auto` choose what is best? `python -m benchmarks.choosing [MODEL] [TARGET]`.

Chooses with three seeds, and sweeps all candidates with three others, on more prompts than any
candidate was given. An interrupted run goes on where it was.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import longctx
from longctx.eval import ChoiceSettings, Passkey, choose, parse_lengths, sweep
from longctx.eval.choice.candidates import default_candidates, usable
from longctx.eval.comparison.differences import Difference, pair, pooled_answers
from longctx.eval.results.variants import original_window

from ._measure import write_results
from ._sweeps import observed, share

SEEDS = (0, 1, 2)
OTHER = 100  # added to a seed for the sweep of all candidates
SAMPLES = 50  # prompts a length and seed of that sweep


def main() -> None:
    """Choose, sweep everything, and write how far the choice is behind."""
    source, length = (*sys.argv[1:], *("demo", "1k")[len(sys.argv) - 1 :])
    (target,) = parse_lengths(length)
    model, tokenizer = longctx.load(source)
    folder = Path("build/choosing") / f"{Path(source).name}-{target}"
    trained = original_window(model)
    assert trained is not None
    fine, _ = usable(model, default_candidates(trained, target), replace=False)
    rows: list[dict[str, object]] = []
    beyond: list[int] = []
    for seed in SEEDS:
        begin = time.perf_counter()
        choice = choose(
            model,
            tokenizer,
            target,
            settings=ChoiceSettings(seed=seed),
            folder=folder / f"auto-{seed}",
        )
        minutes = (time.perf_counter() - begin) / 60
        beyond = [n for n in choice.keys.lengths if n > trained]
        everything = sweep(
            model,
            tokenizer,
            Passkey(samples=SAMPLES, seed=OTHER + seed),
            beyond,
            methods=["none", *fine.values()],
            results=folder / f"all-{seed}" / "results.jsonl",
        )
        labels = {asked: label for label, asked in fine.items()} | {"none": "none"}
        chosen = labels[choice.recommended]
        found = {v.label: observed(everything, v.label) for v in everything.variants}
        shares = {label: share(observations) for label, observations in found.items()}
        best = max(shares, key=lambda label: shares[label])
        behind = pooled_answers(pair(found[best], found[chosen]))
        rows.append(
            {
                "seed": seed,
                "chosen": f"`{chosen}`",
                "its keys": f"{shares[chosen]:.0%}",
                "best of all": f"`{best}`",
                "best's keys": f"{shares[best]:.0%}",
                "behind, points [95%]": _behind(behind) if chosen != best else "the best",
                "minutes": f"{minutes:.1f}",
            }
        )
    write_results(
        f"Choosing a method: {Path(source).name} to {target:,} tokens",
        f"python -m benchmarks.choosing {source} {length}",
        rows,
        f"`longctx auto` with three seeds, and {len(fine) + 1} candidates swept on {SAMPLES} other "
        f"prompts a length ({' and '.join(f'{n:,}' for n in beyond)} tokens). Behind: share of "
        "keys of the chosen minus that of the best on the same prompts, t over haystacks. A choice "
        "prefers what plain transformers loads among those that it cannot tell apart. Minutes by "
        "the clock on a busy machine.",
    )


def _behind(one: Difference) -> str:
    return f"{100 * one.value:.0f} [{100 * one.low:.0f}, {100 * one.high:.0f}]"


if __name__ == "__main__":
    main()
