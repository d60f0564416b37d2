"""Teacher-forced scores against real generation, on a sample of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from longctx.assembly import Prompt

from .records import Record
from .retrieval import Retrieval
from .task import Unit

__all__ = ["Verification", "generated", "verify"]


@dataclass(frozen=True, slots=True)
class Verification:
    """How many answers were generated too, and which came out otherwise."""

    method: str
    task: str
    checked: int
    disagreements: tuple[str, ...]
    """A sentence each."""

    @property
    def note(self) -> str:
        """What goes under the table."""
        told = f"{self.task} under {self.method}: {self.checked} answers were generated too"
        if not self.disagreements:
            return f"{told}, all as scored"
        return f"{told}, {len(self.disagreements)} NOT as scored: {'; '.join(self.disagreements)}"


def verify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    task: Retrieval,
    units: Sequence[Unit],
    records: Sequence[Record],
    count: int,
) -> Verification:
    """Generate `count` answers, evenly over all prompts, and compare each with its score."""
    scored = {(o.length, o.item): o.correct for record in records for o in record.observations}
    cases = [
        (length, str(place.index), prompt)
        for unit in units
        for length, place, prompt in task.cases(tokenizer, unit)
        if (length, str(place.index)) in scored
    ]
    count = min(count, len(cases))
    chosen = [cases[i * len(cases) // count] for i in range(count)]
    wrong: list[str] = []
    for length, item, prompt in chosen:
        answer = generated(model, prompt)
        found = answer == prompt.answer_ids
        if found != scored[length, item]:
            wrong.append(
                f"prompt {item} at {length}: scored {scored[length, item]}, generated "
                f"{tokenizer.decode(list(answer))!r} for {prompt.answer!r}"
            )
    return Verification(method, task.name, count, tuple(wrong))


def generated(model: PreTrainedModel, prompt: Prompt) -> tuple[int, ...]:
    """What greedy `generate` says in as many tokens as the answer has."""
    ids = torch.tensor([prompt.input_ids[: prompt.answer_start]], device=model.device)
    # Named one by one, since `generate` fills in from the checkpoint what is left out.
    greedy = GenerationConfig(
        max_new_tokens=len(prompt.answer_ids),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=0,
    )
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)  # pyright: ignore[reportCallIssue, reportArgumentType]
    tokens: list[int] = out[0, ids.shape[1] :].tolist()  # pyright: ignore[reportArgumentType, reportCallIssue]
    return tuple(tokens)
