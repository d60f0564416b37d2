"""Scoring without [S, vocab] logits: `python -m benchmarks.scoring`.

LLaMAs of SmolLM2-135M's width and vocabulary read 4,096 tokens. The baseline is
`model(ids).logits` and cross-entropy. Time is measured with one layer, where the head weighs far
more than in any real model; memory without a layer, so that no activation hides what the head
takes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from longctx.scoring.token_scores import score

from ._measure import paired_ratio, peak_memory, write_results

LENGTH, VOCABULARY = 4096, 49_152
ROUNDS = 9


def plain(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1]
        return nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="none")


def states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.base_model(ids, use_cache=False).last_hidden_state


def build(layers: int, device: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config).eval().to(device=device, dtype=dtype)  # pyright: ignore[reportCallIssue]
    assert isinstance(model, PreTrainedModel)
    return model


def main() -> None:
    """Compare time and memory, in float32 on a CPU and also in bfloat16 on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    ids = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    write_results(
        "Scoring against whole logits",
        "python -m benchmarks.scoring",
        [_row(ids.to(device), device, dtype) for dtype in dtypes],
        f"{LENGTH} tokens, vocabulary {VOCABULARY}, {ROUNDS} rounds in turns. Extra memory is the "
        "peak beyond what the hidden states take.",
    )


def _row(ids: Tensor, device: str, dtype: torch.dtype) -> dict[str, str]:
    model = build(1, device, dtype)
    error = (score(model, ids).nll[0] - plain(model, ids).cpu()).abs().max().item()
    ours, whole = partial(score, model, ids), partial(plain, model, ids)
    ratio = paired_ratio(whole, ours, rounds=ROUNDS, warmup=1)
    bare = build(0, device, dtype)
    score(bare, ids)  # its head path is verified once
    floor = peak_memory(partial(states, bare, ids))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "time ratio [95%]": str(ratio),
        "extra MiB": f"{peak_memory(partial(score, bare, ids)) - floor:.0f}",
        "extra MiB, whole logits": f"{peak_memory(partial(plain, bare, ids)) - floor:.0f}",
        "largest difference (nats)": f"{error:.1e}",
    }


if __name__ == "__main__":
    main()
