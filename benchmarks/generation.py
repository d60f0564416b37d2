"""Decodings: time, keys and repetition: `python -m benchmarks.generation [time|keys|repetition]`.

Times are of a random model of SmolLM2-135M's shape; keys and repetition are the embedded models'.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    PreTrainedModel,
)

import longctx
from longctx.eval.tasks.shared.repetition_metrics import loop_onset, seq_rep_n, uniq
from longctx.generation.decoding import Call
from longctx.generation.decodings.contrastive import Contrastive
from longctx.generation.decodings.dry import Dry, DryProcessor
from longctx.generation.decodings.greedy import Greedy
from longctx.generation.loop_guard import BanProcessor, LoopGuard
from longctx.prompts import held_out, passkey

from ._measure import write_results

STEPS, ROUNDS = 12, 5
KEYS, KEY_LENGTH = 24, 512
PROMPTS, PROMPT_LENGTH, NEW = 10, 64, 180


class Clock(LogitsProcessor):
    """Notes the CPU time at which each step takes its token: others share the machine."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change nothing."""
        del input_ids
        self.times.append(time.process_time())
        return scores


CLOCK = Clock()


@dataclass(frozen=True, slots=True)
class TimedGreedy(Greedy):
    """Greedy decoding whose steps are noted."""

    def processors(self, call: Call) -> Sequence[LogitsProcessor]:
        """The clock alone."""
        return (CLOCK,)


@dataclass(frozen=True, slots=True)
class TimedContrastive(Contrastive):
    """Contrastive search whose steps are noted."""

    def processors(self, call: Call) -> Sequence[LogitsProcessor]:
        """The clock alone."""
        return (CLOCK,)


def shaped_as_smollm2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def step_seconds(model: Any, tokenizer: Any, prompt: list[int], decoding: Any) -> float:
    """The median step, without the prompt and the first step after it."""
    CLOCK.times.clear()
    longctx.generate(
        model, tokenizer, prompt, decoding=decoding, max_new_tokens=STEPS, ignore_eos=True
    )
    gaps = [b - a for a, b in zip(CLOCK.times, CLOCK.times[1:], strict=False)]
    return median(gaps[1:])


def timed() -> None:
    """Contrastive search against greedy decoding in turns; DRY and the ban by themselves."""
    torch.set_num_threads(1)
    model, (_, tokenizer) = shaped_as_smollm2(), longctx.load("demo")
    rows: list[dict[str, str]] = []
    for length in (512, 2048):
        prompt = torch.randint(0, 1000, (length,), generator=torch.Generator().manual_seed(1))
        ways = {"greedy": TimedGreedy(), **{f"k={k}": TimedContrastive(k=k) for k in (4, 8)}}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for index in range(ROUNDS):
            for name in list(ways)[:: 1 if index % 2 else -1]:
                seconds[name].append(step_seconds(model, tokenizer, prompt.tolist(), ways[name]))
        base = seconds.pop("greedy")
        rows.append(
            {
                "tokens before": f"{length:,}",
                "greedy (ms a step)": f"{1000 * median(base):.0f}",
                **{
                    f"contrastive {name} / greedy [range]": _ratio(base, found)
                    for name, found in seconds.items()
                },
            }
        )
    write_results(
        "Generation: contrastive search",
        "python -m benchmarks.generation time",
        rows,
        f"A random model of SmolLM2-135M's shape, float32, one row, CPU time on one "
        f"thread: median step of {STEPS}, ratio "
        f"by round, median and range of {ROUNDS} rounds in turns.",
    )
    rows = [
        {
            "tokens generated": f"{length:,}",
            "DRY (ms a step)": f"{processor_ms(length, 'dry'):.2f}",
            "ban (ms a step)": f"{processor_ms(length, 'ban'):.2f}",
        }
        for length in (512, 2048, 8192)
    ]
    write_results(
        "Generation: DRY and the ban",
        "python -m benchmarks.generation time",
        rows,
        "One row, a vocabulary of 49,152, random tokens of 40 different; CPU time, median of 60 "
        "steps.",
    )


def _ratio(base: list[float], other: list[float]) -> str:
    ratios = sorted(b / a for a, b in zip(base, other, strict=True))
    return f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


def processor_ms(length: int, which: str) -> float:
    nothing: Any = None
    _, tokenizer = longctx.load("demo")
    zero = torch.tensor([0])
    call = Call(nothing, tokenizer, zero, zero, (0,))
    processor: Any = (
        DryProcessor(Dry(), call) if which == "dry" else BanProcessor(LoopGuard(mode="ban"), call)
    )
    ids = torch.randint(0, 40, (1, length + 61), generator=torch.Generator().manual_seed(0))
    scores, times = torch.randn(1, 49_152), list[float]()
    for size in range(length, length + 61):
        begin = time.process_time()
        processor(ids[:, :size], scores)
        times.append(time.process_time() - begin)
    return 1000 * median(times[1:])


def keys() -> None:
    """Keys found by real generation: ours and transformers' own."""
    model, tokenizer = longctx.load("demo-tuned")
    hay = held_out()
    asked = [
        passkey(tokenizer, KEY_LENGTH, depth=(i + 0.5) / KEYS, seed=i, haystack=hay)
        for i in range(KEYS)
    ]
    ids = [list(each.input_ids[: each.answer_start]) for each in asked]

    def found(texts: Sequence[str]) -> str:
        return str(sum(each.key in text for each, text in zip(asked, texts, strict=True)))

    def ours(decoding: str, guard: str | None = None) -> str:
        said = longctx.generate(
            model, tokenizer, ids, decoding=decoding, guard=guard, max_new_tokens=8
        )
        return found(said.texts)

    def theirs(**settings: Any) -> str:
        texts: list[str] = []
        for each in ids:
            prompt = torch.tensor([each])
            config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, **settings)
            out: Any = model.generate(  # pyright: ignore[reportCallIssue]
                prompt,  # pyright: ignore[reportArgumentType]
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
            )
            texts.append(str(tokenizer.decode(out[0, prompt.shape[1] :])))
        return found(texts)

    rows = [
        {"decoding": name, "keys": ours(name), "with mend": ours(name, None if beams else "mend"),
         "transformers' own": theirs(**own) if own is not None else "–"}
        for name, beams, own in (
            ("greedy", False, {}),
            ("penalty:penalty=1.2", False, {"repetition_penalty": 1.2}),
            ("penalty:penalty=1.5", False, {"repetition_penalty": 1.5}),
            ("no_repeat:ngram=2", False, {"no_repeat_ngram_size": 2}),
            ("no_repeat:ngram=3", False, {"no_repeat_ngram_size": 3}),
            ("no_repeat:ngram=4", False, {"no_repeat_ngram_size": 4}),
            ("dry", False, None),
            ("dry:include_prompt=True", False, None),
            ("beam", True, {"num_beams": 4}),
            ("contrastive", False, None),
            ("sample", False, None),
            ("noise", False, None),
            ("noise:where=embeddings", False, None),
            ("chat", False, None),
        )
    ]  # fmt: skip
    for row in rows:
        if row["decoding"] == "beam":
            row["with mend"] = "–"
    write_results(
        "Generation: keys",
        "python -m benchmarks.generation keys",
        rows,
        f"Keys said, of {KEYS} hidden in prompts of {KEY_LENGTH} tokens; demo-tuned, 8 new tokens. "
        "transformers' own processors look at the prompt too.",
    )


def repetition() -> None:
    """Longer continuations of the embedded model, by decoding and guard."""
    model, tokenizer = longctx.load("demo")
    documents: Any = [tokenizer(text)["input_ids"] for text in held_out().documents[:PROMPTS]]
    ids = [words[len(words) // 2 :][:PROMPT_LENGTH] for words in documents]
    rows: list[dict[str, str]] = []
    for decoding in (
        "greedy", "beam", "sample:temperature=0.7", "sample:top_p=0.9", "sample:min_p=0.1",
        "penalty", "no_repeat", "dry", "contrastive", "noise", "chat",
    ):  # fmt: skip
        for guard in ("none", "ban", "mend", "mend:strategy=split", "mend:strategy=marker"):
            plain = decoding in ("greedy", "dry", "contrastive")
            if (guard != "none" and not plain) or (guard == "mend" and decoding == "beam"):
                continue
            said = longctx.generate(
                model, tokenizer, ids, decoding=decoding, guard=None if guard == "none" else guard,
                max_new_tokens=NEW, ignore_eos=True,
            )  # fmt: skip
            rows.append(
                {
                    "decoding": decoding,
                    "guard": guard,
                    "seq-rep-4": f"{_mean(seq_rep_n(row) for row in said.token_ids):.3f}",
                    "different tokens": f"{_mean(uniq(row) for row in said.token_ids):.0f}",
                    "end in a loop": str(
                        sum(loop_onset(row) is not None for row in said.token_ids)
                    ),
                    "tokens": f"{_mean(len(row) for row in said.token_ids):.0f}",
                    "retries": str(sum(event.kind == "retry" for event in said.events)),
                    "gave up": str(said.finish_reasons.count("loop")),
                }
            )
    write_results(
        "Generation: repetition",
        "python -m benchmarks.generation repetition",
        rows,
        f"{len(ids)} continuations of {NEW} tokens by the embedded model, one seed: a direction, "
        "not a claim. A loop: the tail is three copies of the same tokens. The guard lets those of "
        "less than 12 tokens be.",
    )


def _mean(values: Any) -> float:
    found = [*values]
    return sum(found) / len(found)


def main() -> None:
    """What is named on the command line, or all."""
    parts = {"time": timed, "keys": keys, "repetition": repetition}
    threads = torch.get_num_threads()
    for name in sys.argv[1:] or parts:
        parts[name]()
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
