"""Lengths at which tasks of lm-evaluation-harness look for a prompt that fits without end.

RULER's vt, cwe and fwe make a prompt shorter until it fits, and go on for ever where their smallest
does not. So the smallest is made here first, by their own code.

Source: lm-evaluation-harness 0.4.13, lm_eval/tasks/ruler; its other tasks end with an error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from longctx.errors import RunError

__all__ = ["refuse_endless"]

_DRAWS = 20  # prompts that are made, whose words are random
_EXAMPLE = 500  # tokens that vt gives its example, answer included
_TASKS = ("ruler_vt", "ruler_cwe", "ruler_fwe")


def refuse_endless(
    names: Sequence[str], lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse lengths at which a task would never be loaded.

    Args:
        names: of tasks, or "ruler" for all of them.
        lengths: in tokens.
        tokenizer: by which they are counted.

    Raises:
        RunError: it names task, length and the least that works.
    """

    def count(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"])  # pyright: ignore[reportArgumentType]

    for task in _TASKS if "ruler" in names else [name for name in names if name in _TASKS]:
        try:
            utils = _copy_of(f"lm_eval.tasks.ruler.{task[6:]}_utils")
        except ImportError:  # the harness says itself what it lacks
            continue
        for length in sorted(lengths):
            least = _least(task, utils, length, count)
            if least > length:
                raise RunError(
                    f"lm-eval's {task} fits no prompt into {length:,} tokens of this tokenizer: "
                    f"its smallest has {least:,}. Ask for longer ones, or leave the task out."
                )


def _copy_of(name: str) -> Any:
    """A module beside the one in use, whose random numbers it leaves alone."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _least(task: str, utils: Any, length: int, count: Callable[[str], int]) -> int:
    """Tokens of the task's smallest prompts, those of the answer included."""
    if task == "ruler_fwe":
        return count(utils.TEMPLATE) + 50
    if task == "ruler_cwe":
        made = [utils.generate_input_output(10, length) for _ in range(_DRAWS)]
        listed = (" ".join(f"{i}. {word}" for i, word in enumerate(a, 1)) for _, _, a in made)
        return 120 + max(count(f"{e}\n{t} {a}") for (e, t, _), a in zip(made, listed, strict=True))
    examples = [utils.generate_input_output(5, 1, 4, is_icl=True)[0] for _ in range(_DRAWS)]
    if (longest := 30 + max(map(count, examples))) > _EXAMPLE:
        raise RunError(
            f"lm-eval's {task} fits no example into its {_EXAMPLE} tokens with this tokenizer: the "
            f"smallest has {longest}. Leave it out; `longctx sweep --tasks variable_tracking` asks "
            "the same."
        )
    made = [utils.generate_input_output(10, 1, 4) for _ in range(_DRAWS)]
    return _EXAMPLE + 30 + max(count(f"{text} {answer}") for text, answer in made)
