"""Passkey prompts to learn retrieval from, in the form that the evaluation asks in.

    ids, labels = Passkeys(tokenizer, texts).document(2_048, random.Random(0))

The keys are of the split "train": by construction the evaluation asks for none of them. The loss
is on the answer alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from longctx.errors import TooShortError
from longctx.prompts.haystacks import Grass, Texts
from longctx.prompts.passkey_prompts import CLASSIC, SHORT, Prompt, passkey

from .tokenize import IGNORED

__all__ = ["Passkeys"]

_SHORTEST = 64  # tokens that a prompt fits in with most tokenizers
FILLERS = (
    Grass("The river is long. The road is dry. The lamp is lit. Up we walk. Down and up again."),
    Grass("The bread is warm. The cup is full. The door is shut. In we come. Out and in again."),
    Grass("The snow is soft. The night is cold. The fire is low. On we go. Off and on again."),
    Grass(
        "The coat is old. The hat is new. The shoe is small. Round we turn. Back and round again."
    ),
)
"""Filler sentences of the form that the evaluation uses, and none of its own."""


@dataclass(frozen=True, slots=True)
class Passkeys:
    """Prompts of any length that hide a key; a `sampling.Source`."""

    tokenizer: PreTrainedTokenizerBase
    texts: Texts
    """Haystack; none of it must be in what the evaluation hides its keys in."""
    grass: float = 0.25
    """Share of prompts in filler sentences instead: an easier haystack, from which it is learnt."""
    fillers: tuple[Grass, ...] = FILLERS
    """What stands in for the evaluation's filler sentences."""
    pairs: tuple[int, ...] = (1,)
    """Keys to a prompt, drawn from these; with several, one of them is asked for by its name."""
    shorter: float = 0.1
    """Share of documents shorter than asked for, so that what short ones taught is not lost."""
    roomy: int = 256
    """Tokens from which on prompts may have several keys and the introduction."""

    def prompt(self, length: int, rng: Random) -> Prompt:
        """Draw a prompt of exactly `length` tokens, the answer included.

        Raises:
            TooShortError: too short for the sentences (about 50 tokens).
            DataError: too long for the texts.
        """
        roomy = length >= self.roomy
        # The ends as often as all between: the farthest keys are the hardest, and the rarest.
        depth, seed = rng.betavariate(0.5, 0.5), rng.randrange(2**48)
        filler = self.fillers[seed % len(self.fillers)]
        return passkey(
            self.tokenizer,
            length,
            depth=depth,
            seed=seed,
            haystack=filler if rng.random() < self.grass else self.texts,
            split="train",
            pairs=rng.choice(self.pairs) if roomy else 1,
            wording=CLASSIC if roomy and rng.random() < 0.7 else SHORT,
        )

    def document(self, tokens: int, rng: Random) -> tuple[list[int], list[int]]:
        """Draw a prompt of up to `tokens` tokens and its labels.

        Raises:
            TooShortError: no prompt has so few.
        """
        fewer = tokens
        if rng.random() < self.shorter and tokens > _SHORTEST:
            fewer = round(_SHORTEST * (tokens / _SHORTEST) ** rng.random())
        try:
            prompt = self.prompt(fewer, rng)
        except TooShortError:  # a tokenizer or chat template that takes more than most
            prompt = self.prompt(tokens, rng)
        ids = list(prompt.input_ids)
        return ids, [IGNORED] * prompt.answer_start + ids[prompt.answer_start :]
