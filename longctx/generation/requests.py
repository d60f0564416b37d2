"""Prompts as token ids: texts, chats, ids, or several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DataError
from ..model import learned_positions, window
from ..patch import methods_of, patch_of
from ..prompts.haystacks import encode
from ..prompts.rendering import render_chat
from .checks import check_text

__all__ = [
    "Chat",
    "One",
    "Prompts",
    "is_prompt",
    "new_tokens_of",
    "prompt_ids",
    "reach",
    "refuse_beyond_window",
]

Chat: TypeAlias = Sequence[Mapping[str, str]]
One: TypeAlias = str | Chat | Sequence[int] | Tensor
Prompts: TypeAlias = One | Sequence[One]

_DEFAULT = 256  # new tokens where the window leaves as many
_EXPECTED = (
    'expected a text, a chat ([{"role": "user", "content": "Hi"}]), token ids, or a list of such'
)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, vocabulary: int
) -> list[tuple[int, ...]]:
    """The token ids of each prompt.

    Args:
        tokenizer: the model's.
        prompts: one or several.
        vocabulary: number of tokens the model knows.

    Raises:
        DataError: none, an empty one, one of another type, or ids beyond the vocabulary.
    """
    several = [prompts] if is_prompt(prompts) else _listed(prompts)
    if not several:
        raise DataError(f"no prompts: {_EXPECTED}.")
    return [_ids(tokenizer, each, index, vocabulary) for index, each in enumerate(several)]


def _listed(prompts: Any) -> list[Any]:
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    if not isinstance(prompts, list | tuple):
        raise DataError(f"prompts of type {type(prompts).__name__}: {_EXPECTED}.")
    return list(prompts)


def is_prompt(prompts: Any) -> bool:
    """Whether this has the form of one prompt: a text, messages or token ids."""
    if isinstance(prompts, Tensor):
        return prompts.ndim == 1
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, list | tuple) or not prompts:
        return False
    return all(isinstance(part, Mapping) for part in prompts) or all(map(_is_id, prompts))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, index: int, vocabulary: int
) -> tuple[int, ...]:
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    found: Any
    if isinstance(prompt, str):
        text = check_text(f"prompt {index}", prompt)
        found = tokenizer(text, verbose=False)["input_ids"] if text.strip() else []
    elif isinstance(prompt, list | tuple) and prompt and all(map(_is_id, prompt)):
        found = prompt
    elif isinstance(prompt, list | tuple) and all(isinstance(part, Mapping) for part in prompt):
        found = _chat_ids(tokenizer, prompt, index) if prompt else []
    else:
        raise DataError(f"prompt {index} is {prompt!r:.60} ({type(prompt).__name__}): {_EXPECTED}.")
    if not found:
        raise DataError(f"prompt {index} is empty: there is nothing to go on from.")
    wrong = [token for token in found if not 0 <= token < vocabulary]
    if wrong:
        raise DataError(
            f"prompt {index}: token {wrong[0]} is not in the model's vocabulary of {vocabulary:,}: "
            f"expected ids from 0 to {vocabulary - 1}, and the tokenizer that the model came with."
        )
    return tuple(found)


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Any, index: int) -> list[int]:
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(
                f"prompt {index}: the message {dict(message)!r:.60} lacks a text as 'role' or "
                "'content'."
            )
    if not tokenizer.chat_template:
        raise DataError(
            f"prompt {index} is a chat, and the tokenizer has no chat template: pass it as text."
        )
    text = render_chat(tokenizer, messages, generation=True)
    return [*encode(tokenizer, check_text(f"prompt {index}", text))]


def refuse_beyond_window(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int
) -> None:
    """Refuse prompts that, with the new tokens, are longer than the model can read.

    Raises:
        DataError: one is.
    """
    most, what = reach(model)
    longest = max(map(len, prompts))
    if most is not None and longest + new_tokens > most:
        index = [len(prompt) for prompt in prompts].index(longest)
        shorter = f"pass at most {most - new_tokens:,}, " if new_tokens < most else ""
        raise DataError(
            f"prompt {index} has {longest:,} tokens and max_new_tokens={new_tokens:,} are to "
            f"follow, {longest + new_tokens:,} in all, and {what} is {most:,}: {shorter}lower "
            "max_new_tokens, or extend the model (longctx.extend)."
        )


def new_tokens_of(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], asked: int | None
) -> int:
    """The new tokens of each row: those asked for, else 256 or what the window leaves.

    Raises:
        DataError: none was asked for, and the longest prompt fills the window.
    """
    if asked is not None:
        return asked
    most, _ = reach(model)
    left = _DEFAULT if most is None else min(_DEFAULT, most - max(map(len, prompts)))
    if left < 1:
        refuse_beyond_window(model, prompts, 1)
    return left


def reach(model: PreTrainedModel) -> tuple[int | None, str]:
    """Tokens that the model reads at most, None for any number, and what sets that."""
    table = learned_positions(model)
    if table is not None:
        return table, "the model's table of positions"
    if any(method.unbounded for method in methods_of(model)):
        return None, ""
    patch = patch_of(model)
    return window(model) if patch is None else patch.window, "the model's window"
