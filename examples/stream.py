r"""Generate without end in bounded memory: attention sinks and a window.

    python examples/stream.py
    python examples/stream.py --model smollm2 --tokens 1000000 --every 10000 --window 2044

Without options it generates 3,000 tokens with the embedded model, whose window is 256, in less than
a minute on two cores. Each line says how fast the last tokens came, how many keys each layer keeps,
and how much memory the process holds. All three stay as they are however long it runs: the model
sees the first tokens and the last ones, and knows nothing of what lies between.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

import longctx
from longctx.patches.sink_window import SinkWindow


def resident() -> float:
    """Memory that the process holds, in MiB; NaN where the system has no /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return float("nan")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def pick(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """One token from the last logits [1, S, V], int64 [1, 1]: sampled, or the likeliest at 0."""
    last = logits[:, -1].float()
    if temperature == 0:
        return last.argmax(-1, keepdim=True)
    return torch.multinomial((last / temperature).softmax(-1), 1)


def stream(
    model: PreTrainedModel, ids: torch.Tensor, tokens: int, every: int, temperature: float
) -> None:
    """Read ids [1, S], generate `tokens` more, and report `every` so many."""
    cache = DynamicCache(config=model.config)
    began = time.perf_counter()
    for count in range(1, tokens + 1):
        ids = pick(model(input_ids=ids, past_key_values=cache).logits, temperature)
        if count % every == 0 or count == tokens:
            speed = ((count - 1) % every + 1) / (time.perf_counter() - began)
            keys = max(keys.shape[-2] for keys, *_ in cache if keys is not None)
            print(f"{count:>9,} tokens  {speed:7.1f} a second  {keys} keys  {resident():.1f} MiB")
            began = time.perf_counter()


def main() -> None:
    """Load, extend, stream."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="checkpoint folder, hub id or GGUF file")
    parser.add_argument("--prompt", default="The list is", help="text to go on from")
    parser.add_argument("--tokens", type=int, default=3000, help="how many to generate")
    parser.add_argument("--every", type=int, default=500, help="tokens between two lines")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens that stay in sight")
    parser.add_argument("--window", type=int, help="last tokens in sight; default: the rest")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.tokens < 1 or args.every < 1 or not 0 <= args.temperature < float("inf"):
        parser.error("--tokens and --every: 1 or more; --temperature: 0 or more")

    torch.manual_seed(args.seed)
    model, tokenizer = longctx.load(args.model)
    patch = longctx.extend(model, SinkWindow(sinks=args.sinks, window=args.window))
    print(patch.report())
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids.to(model.device)
    with torch.inference_mode():
        stream(model, ids, args.tokens, args.every, args.temperature)


if __name__ == "__main__":
    try:
        main()
    except longctx.LongctxError as error:
        sys.exit(f"{error}")
