"""Training in several processes, by torchrun: `-m tests.train.distributed FOLDER CASE …`.

accelerate and torch do FSDP2 and ring attention on accelerators alone: on the CPU the one is left
out without a word, the other is refused. `allow_cpu` lets both through to torch's own code, which
runs there as it is.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from longctx.train.adapters import Lora
from longctx.train.encode import IGNORED
from longctx.train.finetune import Finetuned, finetune
from longctx.train.positions import FullLength, PoSE, Positions
from longctx.train.settings import Training

from .test_finetune import Noise, loaded

ring: Any = importlib.import_module(
    "torch.distributed.tensor.experimental._context_parallel._attention"
)
aten: Any = torch.ops.aten
calls: list[str] = []
"""Of ring attention."""


def allow_cpu() -> None:
    """Let accelerate do FSDP2, and torch ring attention, on the CPU."""
    init: Callable[..., None] = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **rest: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **rest)
        if fsdp_plugin is not None:
            assert self.distributed_type == DistributedType.MULTI_CPU
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # pyright: ignore[reportPrivateUsage]

    AcceleratorState.__init__ = with_fsdp

    def forward(op: Any, args: Any, kwargs: Any) -> Any:
        calls.append("forward")
        query, key, value, dropout, causal = (*map(_local, args), 0.0, False)[:5]
        settings = {"dropout_p": dropout, "scale": kwargs.get("scale")}
        group = args[0].device_mesh.get_group()
        found = ring._templated_ring_attention(
            group, 2, op, query=query, key=key, value=value, is_causal=causal, **settings
        )
        return tuple(_cut(x, args[0]) for x in found)

    def backward(op: Any, args: Any, kwargs: Any) -> Any:
        calls.append("backward")
        names = ("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal")
        given = dict(zip(names, map(_local, args), strict=True))
        group = args[0].device_mesh.get_group()
        found = ring._templated_ring_attention_backward(
            group, 2, op, grad_out_name="grad_out", scale=kwargs.get("scale"), **given
        )
        return tuple(_cut(x, args[0]) for x in found)

    ring.custom_ops[aten._scaled_dot_product_flash_attention_for_cpu.default] = forward
    ring.custom_ops[aten._scaled_dot_product_flash_attention_for_cpu_backward.default] = backward


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _cut(piece: torch.Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(piece, like.device_mesh, [Shard(2)], run_check=False)


ADAMW = Training(steps=5, learning_rate=1e-3, warmup=1, save_every=100)
SGD = replace(ADAMW, optimizer="sgd", learning_rate=0.1)


class Kinds(Noise):
    """Two kinds in turn, of which one has fewer labels and the greater share."""

    shares = (0.2, 0.8)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        kind = index % 2
        start = 40 * kind
        labels = [IGNORED] * start + row["labels"][start:]
        return {**row, "labels": labels, "kinds": [kind] * len(self.lengths)}


@dataclass(frozen=True, slots=True)
class Case:
    """A run in several processes."""

    training: Training
    packed: bool = True
    positions: Positions = field(default_factory=FullLength)
    lora: Lora | None = None
    untied: bool = False
    """Whether the model is given a head of its own."""
    interrupted: bool = False
    """Whether it breaks off half-way and is resumed."""
    evaluated: bool = False
    """Whether it is measured, in each process otherwise."""
    kinds: bool = False
    """Whether rows are of two kinds in turn."""
    processes: int = 2

    def feed(self, last: int = 999) -> Noise:
        """Rows; documents of their own are padded under context parallel."""
        make = Kinds if self.kinds else Noise
        return make(20, (40, 24) if self.packed else (62,), last)

    def train(
        self, output: Path, training: Training, *, resume: bool = False, last: int = 999
    ) -> tuple[PreTrainedModel, Finetuned]:
        """Train as any user would; the model that was passed, and what came of it."""
        model, tokenizer = loaded()
        if self.untied:
            head: Any = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
            model.config.tie_word_embeddings = False
        settings: dict[str, Any] = {"positions": self.positions, "lora": self.lora}
        if self.evaluated:
            rank = float(os.environ.get("RANK", "0"))
            settings["evaluate"] = lambda model: {"rank": rank}
        done = finetune(
            model,
            tokenizer,
            self.feed(last),
            training,
            output=output,
            packed=self.packed,
            resume=resume,
            progress=False,
            **settings,
        )
        return model, done


POSE = PoSE(window=64, target=2048)
CASES = {
    "ddp": Case(ADAMW, evaluated=True),
    "ddp-sgd": Case(SGD),
    "fsdp": Case(replace(ADAMW, dp_shard=2)),
    "fsdp-sgd": Case(replace(SGD, dp_shard=2)),
    "fsdp-layers": Case(replace(ADAMW, dp_shard=2, checkpointing="layers")),
    "fsdp-accumulated": Case(replace(ADAMW, dp_shard=2, accumulate=2)),
    "fsdp-lora": Case(
        replace(ADAMW, dp_shard=2, save_every=2),
        lora=Lora(rank=4, embeddings=True, norms=True),
        interrupted=True,
    ),
    "fsdp-untied": Case(replace(ADAMW, dp_shard=2), lora=Lora(rank=4), untied=True),
    "fsdp-resumed": Case(replace(ADAMW, dp_shard=2, save_every=2), interrupted=True),
    "cp": Case(replace(ADAMW, cp=2), packed=False),
    "cp-sgd": Case(replace(SGD, cp=2), packed=False),
    "cp-pose": Case(replace(ADAMW, cp=2), packed=False, positions=POSE),
    "cp-pose-sgd": Case(replace(SGD, cp=2), packed=False, positions=POSE),
    "cp-kinds": Case(replace(ADAMW, cp=2, accumulate=2), packed=False, kinds=True),
    "four-fsdp-cp": Case(replace(ADAMW, dp_shard=2, cp=2), packed=False, processes=4),
    "four-fsdp-twice": Case(replace(ADAMW, dp_shard=2), processes=4),
}


def main(folder: Path, names: list[str]) -> None:
    """Run cases one after the other, in all processes at once."""
    allow_cpu()
    for name in names:
        case, output = CASES[name], folder / name
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # which a run with FSDP leaves there
        calls.clear()
        if case.interrupted:
            with pytest.raises(KeyboardInterrupt):  # in the fourth update
                case.train(output, case.training, last=7)
        model, done = case.train(output, case.training, resume=case.interrupted)
        pieces = [p for p in model.parameters() if isinstance(p, DTensor)]
        seen = {
            "losses": done.losses,
            "tokens": done.tokens,
            "figures": [done.before, done.after],
            "held": sum(p.to_local().numel() for p in pieces) / model.num_parameters(),
            "devices": [p.device.type for p in done.model.parameters()],
            "whole": not any(isinstance(p, DTensor) for p in done.model.parameters()),
            "calls": [calls.count(name) for name in ("forward", "backward")],
        }
        torch.save(seen, output.with_suffix(f".{torch.distributed.get_rank()}.pt"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
