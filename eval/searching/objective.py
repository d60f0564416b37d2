"""How well a model says keys: the loss that a search goes by.

The keys and texts are those of training, which share none with the evaluation's: a search that has
seen its test would find that one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.prompts.assembly import Prompt
from longctx.prompts.haystacks import Grass, Texts
from longctx.prompts.passkey_prompts import passkey
from longctx.scoring.prefix_sharing import score_prompts

__all__ = ["KeyLoss", "key_prompts"]

_GRASS_EVERY = 4
_GOLDEN = (math.sqrt(5) - 1) / 2


def key_prompts(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int, *, text: Texts, seed: int
) -> list[Prompt]:
    """Passkey prompts of the training split: every fourth in repeated sentences, the rest in text.

    Each has a stretch of text of its own. How many keys are found differs more between stretches
    than between divisors, and a search by two of them learnt those two by heart: on the embedded
    model at four times its window it then found fewer of new keys than the yarn that it began with.
    Each has a depth of its own too, spread evenly by the golden ratio: a search by six depths found
    half of the keys at a seventh, at which yarn found three quarters.

    Args:
        tokenizer: the model's; its chat template is used if it has one.
        length: tokens of each prompt, the answer included.
        count: prompts.
        text: the real text.
        seed: of keys, texts and order; two seeds share no prompt.

    Raises:
        DataError: a length that is too short, or too long for the text.
    """
    grass = Grass()
    begin = Random(f"depth/{seed}").random()
    return [
        passkey(
            tokenizer,
            length,
            depth=(begin + index * _GOLDEN) % 1,
            seed=seed * 10**6 + index,
            haystack=text if index % _GRASS_EVERY else grass,
            haystack_seed=seed * 10**6 + index,
            longest=length,
            split="train",
        )
        for index in range(count)
    ]


@dataclass(frozen=True, slots=True)
class KeyLoss:
    """The mean NLL of keys' tokens at the new window, and a share of that inside the old one."""

    far: tuple[Prompt, ...]
    """Prompts of the new window."""
    near: tuple[Prompt, ...]
    """Prompts of the old window."""
    near_weight: float
    """What the old window counts, where the new one counts 1."""
    batch_tokens: int

    def __call__(self, model: PreTrainedModel) -> float:
        """In nats per token of the key; NaN where the logits hold one."""
        return self._nll(model, self.far) + self.near_weight * self._nll(model, self.near)

    def _nll(self, model: PreTrainedModel, prompts: tuple[Prompt, ...]) -> float:
        if not prompts:
            return 0.0
        scores = score_prompts(
            model,
            [prompt.input_ids for prompt in prompts],
            [prompt.answer_start for prompt in prompts],
            batch_tokens=self.batch_tokens,
        )
        return math.fsum(float(nll.double().mean()) for nll in scores.nll) / len(prompts)
