"""Models and decodings on the same prompts: `longctx.eval.decode_bench`.

result = decode_bench(model, tokenizer, ["greedy", "dry"], folder="runs/decodings/demo")
print_decode_bench([result]); write_decode_bench([result], "runs/decodings")

Prompts are windows of real text, spread over documents, that the model writes on after. Every
continuation is a line of a file in the folder, so that an interrupted bench goes on where it was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.errors import DataError, RunError
from longctx.fingerprint import identity_of, json_digest
from longctx.generation.generate import generate
from longctx.generation.loop_guard import parse_guard
from longctx.generation.registry import parse_decoding
from longctx.generation.row_file import RowFile
from longctx.model import window
from longctx.prompts.haystacks import bos_of
from longctx.scoring.batching import score_batches

from ..running.progress import Progress
from ..tasks.passkey import Passkey
from ..tasks.shared.texts import documents_of, spread, texts_of
from .examples import loop_examples
from .figures import Read, Written, decoding_figures, keys_found, model_figures
from .result import TEXT, DecodeBench, LoopExample
from .settings import BenchSettings

__all__ = ["decode_bench"]


def decode_bench(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decodings: Sequence[str],
    *,
    settings: BenchSettings | None = None,
    folder: Path | str,
    name: str = "",
    batch_size: int = 16,
    progress: bool = True,
) -> DecodeBench:
    """Write on after the same prompts under each decoding.

    Args:
        model: in place, patched or not.
        tokenizer: the model's.
        decodings: as the command line writes them.
        settings: what is written on, and how far; None: the defaults.
        folder: for the continuations, a file each decoding; it resumes from those that are there.
        name: of the model in tables; "": that of its folder or hub id.
        batch_size: prompts at a time.
        progress: show a bar on stderr; where that is not a terminal, a line every 30 seconds.

    Raises:
        RunError: no decoding, one that is unknown or asked for twice, or a folder that holds
            continuations of other settings.
        DataError: texts too short for such prompts, or prompts beyond the window.
        ModelError: a decoding that this model does not work with.
    """
    settings = settings or BenchSettings()
    parsed = {text: parse_decoding(text) for text in decodings}
    if not decodings:
        raise RunError("no decodings: name some, such as greedy dry (see `longctx decodings`).")
    if len(parsed) < len(decodings):
        twice = next(text for text in decodings if list(decodings).count(text) > 1)
        raise RunError(f"decoding {twice!r} is asked for twice: leave one out.")
    bos, documents = bos_of(tokenizer), documents_of(tokenizer, texts_of(settings.text))
    places = _places(settings, documents)
    _refuse_beyond_window(model, settings)
    prompts = [[*bos, *documents[d][start : start + settings.prompt_tokens]] for d, start in places]
    after = [
        documents[d][start + settings.prompt_tokens :][: settings.new_tokens] for d, start in places
    ]
    samples = {text: settings.samples if parsed[text].draws else 1 for text in decodings}
    keys = _keys(tokenizer, settings)
    identity = identity_of(model, tokenizer)
    bench = _Bench(model, tokenizer, settings, Path(folder), batch_size, identity)
    total = len(prompts) + sum(samples[text] * len(prompts) + len(keys) for text in decodings)
    with Progress(total, shown=progress) as bar:
        bar.at("reading")
        read = bench.read(places, prompts, after, bar)
        itself = [Written(d, i, tuple(after[i])) for i, (d, _) in enumerate(places)]
        blocks = {TEXT: decoding_figures(itself)}
        examples: dict[str, tuple[LoopExample, ...]] = {}
        for text in decodings:
            bar.at(text)
            said = bench.write(text, "text", prompts * samples[text], settings.new_tokens, bar)
            rows = [
                Written(places[i % len(places)][0], i % len(places), tuple(tokens))
                for i, tokens in enumerate(said)
            ]
            block = decoding_figures(rows)
            if looped := loop_examples(tokenizer, prompts, rows):
                examples[text] = looped
            if keys:
                longest = max(len(answer) for _, answer in keys)
                answers = bench.write(text, "keys", [p for p, _ in keys], longest, bar)
                block["keys"] = keys_found(
                    [
                        tuple(found[: len(answer)]) == answer
                        for found, (_, answer) in zip(answers, keys, strict=True)
                    ]
                )
            blocks[text] = block
    called = name or Path(model.name_or_path or model.config.model_type).name
    return DecodeBench(
        called,
        settings,
        len(prompts),
        len({d for d, _ in places}),
        model_figures(read),
        blocks,
        bench.identity,
        examples,
    )


def _places(
    settings: BenchSettings, documents: dict[str, tuple[int, ...]]
) -> list[tuple[str, int]]:
    """(document, first token) of each prompt."""
    size = settings.prompt_tokens + settings.new_tokens
    sizes = {name: len(ids) for name, ids in documents.items()}
    places = spread(sizes, size, settings.prompts)
    if len(places) < 2:
        raise DataError(
            f"{len(places)} windows of {size} tokens in {len(documents)} documents, the longest of "
            f"which has {max(sizes.values())}: expected two or more. Pass longer texts, or fewer "
            "prompt_tokens and new_tokens."
        )
    return places


def _refuse_beyond_window(model: PreTrainedModel, settings: BenchSettings) -> None:
    most = window(model)
    needed = max(settings.prompt_tokens + settings.new_tokens + 1, settings.key_length)
    if most is not None and needed > most:
        raise DataError(
            f"prompts and continuations need {needed:,} tokens, and the model's window is "
            f"{most:,}: pass fewer prompt_tokens and new_tokens, or a smaller key_length."
        )


def _keys(
    tokenizer: PreTrainedTokenizerBase, settings: BenchSettings
) -> list[tuple[list[int], tuple[int, ...]]]:
    """Prompts without their answers, and the answers."""
    if not settings.keys:
        return []
    task = Passkey(samples=settings.keys, seed=settings.seed)
    plan = task.plan(tokenizer, [settings.key_length], length_invariant=True)
    return [
        ([*prompt.input_ids[: prompt.answer_start]], prompt.answer_ids)
        for unit in plan.units
        for _, _, prompt in task.cases(tokenizer, unit)
    ]


@dataclass(frozen=True, slots=True)
class _Bench:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: BenchSettings
    folder: Path
    batch_size: int
    identity: dict[str, str]

    def read(
        self,
        places: Sequence[tuple[str, int]],
        prompts: Sequence[Sequence[int]],
        after: Sequence[Sequence[int]],
        bar: Progress,
    ) -> list[Read]:
        """Score each prompt and what really follows it."""
        ids = torch.tensor([[*p, *a] for p, a in zip(prompts, after, strict=True)])
        tokens = self.batch_size * ids.shape[1]
        scores = score_batches(self.model, ids, start=1, batch_tokens=tokens)
        bar.advance(len(prompts))
        return [
            Read(document, tuple(row[:-1]), tuple(row[1:]), tuple(argmax), float(nll.sum()))
            for (document, _), row, argmax, nll in zip(
                places, ids.tolist(), scores.argmax.tolist(), scores.nll.double(), strict=True
            )
        ]

    def write(
        self,
        decoding: str,
        what: str,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        bar: Progress,
    ) -> list[list[int]]:
        """The continuations of all prompts, those that are there from their file."""
        name = re.sub(r"[^A-Za-z0-9.=_-]+", "_", f"{decoding}.{what}")
        record: dict[str, Any] = {
            "decoding": str(parse_decoding(decoding)),
            "guard": str(parse_guard(self.settings.guard)),
            "max_new_tokens": new_tokens,
            "seed": self.settings.seed,
            **self.identity,
        }
        digests = [json_digest(list(prompt)) for prompt in prompts]
        path = self.folder / f"{name}.jsonl"
        with RowFile(path, record, digests) as rows:
            bar.advance(rows.done)
            for first in range(rows.done, len(prompts), self.batch_size):
                batch = prompts[first : first + self.batch_size]
                said = generate(
                    self.model,
                    self.tokenizer,
                    [list(prompt) for prompt in batch],
                    decoding=decoding,
                    guard=parse_guard(self.settings.guard),
                    max_new_tokens=new_tokens,
                    batch_size=self.batch_size,
                    seed=self.settings.seed,
                    ignore_eos=True,
                    first_row=first,
                )
                for tokens, text in zip(said.token_ids, said.texts, strict=True):
                    rows.add({"text": text, "token_ids": tokens})
                bar.advance(len(batch))
            return rows.tokens()
