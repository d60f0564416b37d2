"""Passkey retrieval: is a key found again, hidden at every depth of a prompt of exact length?

Source: Mohtashami & Jaggi, "Landmark Attention" (arXiv:2305.16300), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from longctx.prompts.passkey_prompts import CLASSIC, Prompt, Wording, passkey

from .shared.haystack_task import HaystackTask
from .shared.retrieval import PromptSpec

__all__ = ["TASK", "Passkey"]


@dataclass(frozen=True, slots=True)
class Passkey(HaystackTask):
    """Passkey retrieval; the value of a cell is the share of keys found."""

    digits: int = 5
    """Digits of the key."""
    pairs: int = 1
    """Needles in all; with more than one, the question names the one that is asked for."""
    wording: Wording = CLASSIC
    """The fixed sentences."""

    name: ClassVar[str] = "passkey"

    @property
    def asked(self) -> str:
        """What is to be returned."""
        return f"keys of {self.digits} digits"

    def prompt(self, tokenizer: PreTrainedTokenizerBase, length: int, spec: PromptSpec) -> Prompt:
        """A key at the wanted depth."""
        assert spec.haystack is not None
        return passkey(
            tokenizer,
            length,
            depth=spec.depth,
            seed=spec.seed,
            haystack=spec.haystack,
            haystack_seed=spec.haystack_seed,
            longest=spec.longest or length,
            split="eval",
            chat=self.chat,
            digits=self.digits,
            pairs=self.pairs,
            wording=self.wording,
        )


TASK = Passkey
