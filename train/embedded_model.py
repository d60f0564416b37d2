"""Train the embedded model: `python -m longctx.train.embedded_model OUT`.

A LLaMA of 0.9 M parameters with a window of 256 tokens that finds passkeys, so that every method
has something to show. Retrieval is learnt at 64 tokens first (at 256 from the start it is not
learnt at all in the same time), on three kinds of input, each with its own averaged loss:

    passkey   prompts of the train split in grass and in real text, loss on the answer alone
    repeats   a stretch of text twice, loss on the second copy alone
    text      Python's manual, loss on every token

An interrupted run goes on where it was: batches depend on seed and step alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longctx.folders import new_folder, refuse_taken
from longctx.prompts.haystacks import Grass, Texts, held_in
from longctx.prompts.passkey_prompts import CLASSIC

from .data.passkeys import Passkeys

__all__ = ["Pretraining", "Stage", "train"]

WINDOW = 256


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of training at one length."""

    length: int
    """Tokens of each sample."""
    steps: int
    samples: tuple[int, int, int]
    """Passkey prompts, repeats and texts in a batch."""
    learning_rate: float
    """Peak, reached after `warmup` steps and left along a cosine."""
    warmup: int


@dataclass(frozen=True, slots=True)
class Pretraining:
    """What is trained, and how long."""

    out: tyro.conf.Positional[Path]
    """Folder for the checkpoint (float16) and its tokenizer."""
    seed: int = 0
    """Chooses the initial weights and every batch."""
    rope_theta: float = 300.0
    """Base of the rotary. With LLaMA's 10,000 retrieval carries far beyond so short a window; with
    this one it breaks there, as it does in large models, and yarn without training reads four times
    as far, as it does there. With 100 it breaks too, and yarn finds nothing."""
    stages: tyro.conf.Suppress[tuple[Stage, ...]] = (
        Stage(64, 500, (20, 24, 20), 3e-3, 100),
        Stage(256, 900, (8, 6, 10), 2e-3, 50),
    )
    """One after the other on the same weights."""
    save_every: int = 100
    """Steps between two saved states, which an interrupted run goes on from."""


def train_tokenizer(texts: Texts) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 1,024 tokens in which each digit is its own token."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    wording = [Grass().line, *(t.format(name="pass", key="") for t in _sentences())]
    tokenizer.train_from_iterator([*texts.documents, *wording * 200], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=WINDOW,
    )


def _sentences() -> tuple[str, ...]:
    return CLASSIC.intro, CLASSIC.needle, CLASSIC.question, CLASSIC.answer_prefix


def build_model(seed: int, rope_theta: float) -> LlamaForCausalLM:
    """Build the untrained model: 4 layers of 128, 4 heads over 2 kv heads, tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True, slots=True)
class Batches:
    """Training batches; each depends on the seed and its step alone."""

    tokenizer: PreTrainedTokenizerFast
    texts: Texts
    ids: Tensor
    """The training text as one row of tokens."""
    seed: int

    def __call__(self, step: int, stage: Stage) -> tuple[Tensor, list[Tensor]]:
        """Return inputs [batch, length] and for each kind its labels (−100: no loss)."""
        rng = Random(f"tiny/{self.seed}/{step}")
        kinds = [
            [make(rng, stage.length) for _ in range(count)]
            for make, count in zip(
                (self._passkey, self._repeat, self._text), stage.samples, strict=True
            )
        ]
        inputs = torch.stack([row for kind in kinds for row, _ in kind])
        labels: list[Tensor] = []
        for kind in kinds:
            starts = torch.tensor([start for _, start in kind])[:, None]
            rows = torch.stack([row for row, _ in kind])
            labels.append(rows.masked_fill(torch.arange(stage.length) < starts, -100))
        return inputs, labels

    def _passkey(self, rng: Random, length: int) -> tuple[Tensor, int]:
        source = Passkeys(
            self.tokenizer, self.texts, fillers=(Grass(),), pairs=(1, 1, 2, 3), roomy=WINDOW
        )
        prompt = source.prompt(length, rng)
        return torch.tensor(prompt.input_ids), prompt.answer_start

    def _repeat(self, rng: Random, length: int) -> tuple[Tensor, int]:
        size = rng.randint(length // 8, (length - 1) // 2)
        begin = rng.randrange(len(self.ids) - length)
        text = self.ids[begin : begin + length - 1 - size]
        return torch.cat([self._bos(), text, text[-size:]]), length - size + 1

    def _text(self, rng: Random, length: int) -> tuple[Tensor, int]:
        begin = rng.randrange(len(self.ids) - length)
        return torch.cat([self._bos(), self.ids[begin : begin + length - 1]]), 1

    def _bos(self) -> Tensor:
        return torch.tensor([self.tokenizer.bos_token_id])


def loss_of(model: LlamaForCausalLM, inputs: Tensor, labels: list[Tensor]) -> Tensor:
    """Mean over the kinds of the mean loss over each kind's own labels."""
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
    parts = logits.split([len(kind) for kind in labels])
    losses = [
        functional.cross_entropy(part.flatten(0, 1), kind[:, 1:].flatten())
        for part, kind in zip(parts, labels, strict=True)
    ]
    return torch.stack(losses).mean()


def train(recipe: Pretraining) -> None:
    """Train, or go on training, and write the checkpoint to `recipe.out`."""
    refuse_taken(recipe.out, overwrite=False)
    texts = held_in()
    tokenizer = train_tokenizer(texts)
    model = build_model(recipe.seed, recipe.rope_theta)
    encoded: Any = tokenizer("\n\n".join(texts.documents), add_special_tokens=False, verbose=False)
    batches = Batches(tokenizer, texts, torch.tensor(encoded["input_ids"]), recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    state = recipe.out.with_name(recipe.out.name + ".state.pt")
    first = _resume(state, model, optimizer)
    for step, stage, rate in _schedule(recipe, first):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, *batches(step, stage))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % recipe.save_every == 0:
            _save_state(state, step + 1, model, optimizer)
            print(f"step {step + 1}: {stage.length} tokens, loss {loss.item():.3f}", flush=True)
    with new_folder(recipe.out) as folder:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    state.unlink(missing_ok=True)


def _schedule(recipe: Pretraining, first: int) -> Iterator[tuple[int, Stage, float]]:
    from rich.progress import track

    whole = [(stage, step) for stage in recipe.stages for step in range(stage.steps)]
    for index in track(range(first, len(whole)), description="training", total=len(whole) - first):
        stage, step = whole[index]
        if step < stage.warmup:
            share = (step + 1) / stage.warmup
        else:
            along = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
            share = 0.05 + 0.95 * (1 + math.cos(math.pi * along)) / 2
        yield index, stage, stage.learning_rate * share


def _save_state(
    path: Path, step: int, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer
) -> None:
    partial = path.with_suffix(".partial")
    torch.save(
        {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, partial
    )
    partial.rename(path)


def _resume(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    print(f"going on at step {saved['step']} of {path}")
    return int(saved["step"])


if __name__ == "__main__":
    train(tyro.cli(Pretraining, description=__doc__))
