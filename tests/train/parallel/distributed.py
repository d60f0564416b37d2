"""Training in several processes, by torchrun: `-m tests.train.parallel.distributed FOLDER CASE …`.

accelerate and torch do FSDP2 and ring attention on accelerators alone: on the CPU the one is left
out without a word, the other is refused. `allow_cpu` lets both through to torch's own code, which
runs there as it is. DeepSpeed's Ulysses runs there unaided; for flash-attn, `varlen` stands in.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longctx.errors import RunError
from longctx.train.config import Training
from longctx.train.data.tokenize import IGNORED
from longctx.train.engine.finetune import Finetuned, finetune
from longctx.train.engine.lora import Lora
from longctx.train.parallel.compatibility import FLASH
from longctx.train.positions import FullLength, PoSE, Positions

from ..engine.test_finetune import Noise, loaded

ring: Any = importlib.import_module(
    "torch.distributed.tensor.experimental._context_parallel._attention"
)
aten: Any = torch.ops.aten
calls: list[str] = []
"""Of ring attention, and of Ulysses' exchanges of heads."""
PARALLEL = "deepspeed.runtime.sequence_parallel"


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
    if importlib.util.find_spec("deepspeed") is not None:
        # DeepSpeed's own all-reduce wants a compiler; torch's does.
        vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
        ulysses = vars(importlib.import_module(f"{PARALLEL}.ulysses_sp"))
        exchange = ulysses["_dim_zero_all_to_all"]

        def counted(*args: Any) -> torch.Tensor:
            calls.append("exchange")
            return exchange(*args)

        ulysses["_dim_zero_all_to_all"] = counted
    ALL_ATTENTION_FUNCTIONS[FLASH] = varlen
    checks = "_check_and_adjust_attn_implementation"
    checked = getattr(PreTrainedModel, checks)

    def found(self: Any, attention: str | None, *args: Any, **rest: Any) -> str:
        return FLASH if attention == FLASH else checked(self, attention, *args, **rest)

    setattr(PreTrainedModel, checks, found)


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _cut(piece: torch.Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(piece, like.device_mesh, [Shard(2)], run_check=False)


def varlen(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    cu_seq_lens_q: torch.Tensor | None = None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """What flash-attn computes of one row, on the CPU; documents end where they are said to."""
    ends = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    settings: dict[str, Any] = {"is_causal": True, "scale": scaling, "enable_gqa": True}
    done = [
        functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], **settings
        )
        for a, b in pairwise(ends)
    ]
    return torch.cat(done, dim=2).transpose(1, 2), None


ADAMW = Training(max_steps=5, learning_rate=1e-3, warmup=1, save_every=100)
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
    flash: bool = False
    """Whether the several attend by what stands in for flash-attn."""
    processes: int = 2

    @property
    def rows(self) -> int:
        """Of an update, over all processes and one forward pass."""
        return self.processes // (self.training.cp * self.training.sp)

    def dataset(self, last: int = 999) -> Noise:
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
        if self.flash and training == self.training:
            model.set_attn_implementation(FLASH)
        settings: dict[str, Any] = {"positions": self.positions, "lora": self.lora}
        if self.evaluated:
            rank = float(os.environ.get("RANK", "0"))
            settings["evaluate"] = lambda model: {"rank": rank, "nll": _nll(model)}
        done = finetune(
            model,
            tokenizer,
            self.dataset(last),
            training,
            output_dir=output,
            packed=self.packed,
            resume=resume,
            progress=False,
            **settings,
        )
        return model, done


def _nll(model: Any) -> float:
    """Of a row that each process reads whole."""
    ids = torch.arange(3, 103)[None]
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    with torch.no_grad():
        return float(model(input_ids=ids, attention_mask=mask, labels=ids).loss)


POSE = PoSE(window=64, target=2048)
CASES = {
    "ddp": Case(ADAMW, evaluated=True),
    "ddp-sgd": Case(SGD),
    "fsdp": Case(replace(ADAMW, dp_shard=2)),
    "fsdp-sgd": Case(replace(SGD, dp_shard=2)),
    "fsdp-layers": Case(replace(ADAMW, dp_shard=2, gradient_checkpointing="layers")),
    "fsdp-accumulated": Case(replace(ADAMW, dp_shard=2, gradient_accumulation_steps=2)),
    "fsdp-lora": Case(
        replace(ADAMW, dp_shard=2, save_every=2),
        lora=Lora(r=4, embeddings=True, norms=True),
        interrupted=True,
    ),
    "fsdp-untied": Case(replace(ADAMW, dp_shard=2), lora=Lora(r=4), untied=True),
    "fsdp-resumed": Case(replace(ADAMW, dp_shard=2, save_every=2), interrupted=True),
    "cp": Case(replace(ADAMW, cp=2), packed=False),
    "cp-sgd": Case(replace(SGD, cp=2), packed=False),
    "cp-pose": Case(replace(ADAMW, cp=2), packed=False, positions=POSE),
    "cp-pose-sgd": Case(replace(SGD, cp=2), packed=False, positions=POSE),
    "cp-kinds": Case(replace(ADAMW, cp=2, gradient_accumulation_steps=2), packed=False, kinds=True),
    "sp": Case(replace(ADAMW, sp=2), packed=False),
    "sp-sgd": Case(replace(SGD, sp=2), packed=False),
    "sp-pose": Case(replace(ADAMW, sp=2), packed=False, positions=POSE),
    "sp-pose-sgd": Case(replace(SGD, sp=2), packed=False, positions=POSE),
    "sp-kinds": Case(replace(ADAMW, sp=2, gradient_accumulation_steps=2), packed=False, kinds=True),
    "sp-layers": Case(
        replace(ADAMW, sp=2, gradient_checkpointing="layers", batch_size=2),
        packed=False,
        evaluated=True,
    ),
    "sp-resumed": Case(replace(ADAMW, sp=2, save_every=2), packed=False, interrupted=True),
    "sp-lora": Case(
        replace(ADAMW, sp=2, save_every=2),
        packed=False,
        lora=Lora(r=4, embeddings=True, norms=True),
        interrupted=True,
    ),
    "sp-packed": Case(replace(ADAMW, sp=2), flash=True),
    "sp-packed-pose": Case(replace(ADAMW, sp=2), positions=POSE, flash=True),
    "four-sp": Case(replace(ADAMW, sp=2, gradient_accumulation_steps=2), packed=False, processes=4),
    "four-sp-heads": Case(
        replace(ADAMW, sp=4, evaluate_every=2), packed=False, evaluated=True, processes=4
    ),
    "four-fsdp-cp": Case(replace(ADAMW, dp_shard=2, cp=2), packed=False, processes=4),
    "four-fsdp-twice": Case(replace(ADAMW, dp_shard=2), processes=4),
}


def left() -> list[str]:
    """What sequence parallel should have taken back of this process."""
    state = sys.modules.get(f"{PARALLEL}.parallel_state_sp")
    held = {
        "attention": ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward,
        "environment": "ACCELERATE_USE_DEEPSPEED" in os.environ,
        "groups": state is not None and vars(state)["_SEQUENCE_PARALLEL_GROUP"] is not None,
    }
    return [name for name, there in held.items() if there]


def hurt(output: Path) -> None:
    """A NaN or infinite gradient, in the first update."""
    model, tokenizer = loaded()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    cast: Any = model
    cast.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    training = CASES["sp"].training
    with pytest.raises(RunError, match="gradient norm is inf in update 1, rows 0 to 0 of"):
        finetune(model, tokenizer, Noise(20, (62,)), training, output_dir=output, packed=False)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not left()


def main(folder: Path, names: list[str]) -> None:
    """Run cases one after the other, in all processes at once."""
    allow_cpu()
    for name in names:
        if name == "hurt":
            hurt(folder / name)
            continue
        case, output = CASES[name], folder / name
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # which a run with FSDP leaves there
        calls.clear()
        if case.interrupted:
            with pytest.raises(KeyboardInterrupt):  # in the fourth update
                case.train(output, case.training, last=4 * case.rows - 1)
        model, done = case.train(output, case.training, resume=case.interrupted)
        pieces = [p for p in model.parameters() if isinstance(p, DTensor)]
        seen = {
            "losses": done.losses,
            "tokens": done.tokens,
            "figures": [done.before, done.after],
            "held": sum(p.to_local().numel() for p in pieces) / model.num_parameters(),
            "devices": [p.device.type for p in done.model.parameters()],
            "whole": not any(isinstance(p, DTensor) for p in done.model.parameters()),
            "calls": [calls.count(name) for name in ("forward", "backward", "exchange")],
            "left": left(),
        }
        torch.save(seen, output.with_suffix(f".{torch.distributed.get_rank()}.pt"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
