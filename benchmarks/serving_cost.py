"""What `longctx plan --serve` predicts against a model that runs here, in float32 on a CPU.

Cache bytes are compared exactly. Times are compared with the bounds that follow from this machine's
bandwidth and TFLOP/s, measured in turns with the model; each figure is the best of its rounds.
Times are CPU time of one thread, since others may use the machine.

    python -m benchmarks.serving_cost SMOLLM2
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import longctx
from longctx.train.memory.machine import measure_machine
from longctx.train.memory.serving import ServingPlan, ServingSettings, plan_serving

from ._measure import write_results

METHODS = ("none", "sink_window:sinks=4,window=124")
LENGTHS = (128, 512)
STEPS, ROUNDS = 6, 3


def bytes_of(cache: Any) -> int:
    return sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )


def run(model: PreTrainedModel, tokens: int) -> tuple[int, float, float]:
    """Bytes of the cache, seconds of the prompt, and the best seconds of a step after it."""
    ids = torch.arange(tokens)[None] % 40_000 + 100
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        begin = time.process_time()
        model(ids, past_key_values=cache, logits_to_keep=1)
        first, steps = time.process_time() - begin, list[float]()
        for _ in range(STEPS):
            begin = time.process_time()
            model(ids[:, :1], past_key_values=cache)
            steps.append(time.process_time() - begin)
    return bytes_of(cache), first, min(steps)


def main() -> None:
    """Predict, run, compare."""
    torch.set_num_threads(1)
    model, _ = longctx.load(sys.argv[1], device="cpu")
    rows: list[dict[str, str]] = []
    for method in METHODS:
        settings = ServingSettings(dtype="float32", method=method, bandwidth=1.0, tflops=1.0)
        plan: ServingPlan = plan_serving(sys.argv[1], settings)
        if method != "none":
            longctx.extend(model, method)
        for tokens in LENGTHS:
            held, first, step, bandwidth, tflops = 0, [9e9], [9e9], [0.0], [0.0]
            for _ in range(ROUNDS):
                machine = measure_machine("cpu", torch.float32, time.process_time)
                held, prompt, one = run(model, tokens)
                first, step = [*first, prompt], [*step, one]
                bandwidth, tflops = [*bandwidth, machine.bandwidth], [*tflops, machine.tflops]
            after = tokens + STEPS
            least = 1 / plan.tokens_per_second(after) / max(bandwidth)
            soonest = plan.time_to_first_token(tokens) / max(tflops)
            rows.append(
                {
                    "method": method,
                    "tokens": f"{tokens:,}",
                    "cache bytes predicted": f"{plan.cache_bytes(after):,}",
                    "measured": f"{held:,}",
                    "step, bound": f"{1e3 * least:.0f} ms",
                    "step, measured": f"{1e3 * min(step):.0f} ms",
                    "times the bound": f"{min(step) / least:.2f}",
                    "prompt, bound": f"{soonest:.2f} s",
                    "prompt, measured": f"{min(first):.2f} s",
                    "times": f"{min(first) / soonest:.2f}",
                    "GB/s": f"{max(bandwidth):.1f}",
                    "TFLOP/s": f"{max(tflops):.3f}",
                }
            )
            print(rows[-1], flush=True)
    write_results(
        "Cost to serve: SmolLM2-135M, predicted and measured",
        "python -m benchmarks.serving_cost SMOLLM2",
        rows,
        "float32, one thread, one row, CPU time. Bounds are bytes over bandwidth and FLOPs over "
        "TFLOP/s, measured by a matrix times a vector and times a matrix in turns with the model; "
        f"best of {ROUNDS} rounds, on a machine that others used too.",
    )


if __name__ == "__main__":
    main()
