"""The methods that a choice begins with."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from longctx.errors import LongctxError

from ..results.variants import variants_of

__all__ = ["default_candidates", "usable"]


def default_candidates(trained: int, target: int) -> tuple[str, ...]:
    """Frequencies, changed distances, both on top of each other, and reading in pieces.

    Methods that are of no use without training (alibi, drop, cope) and those that lose what lies
    between (sink_window) are not among them.

    Args:
        trained: the window of the model as it came, in tokens.
        target: the window that is wanted.

    >>> default_candidates(256, 1024)[:3]
    ('linear:4', 'ntk:4', 'yarn:4')
    """
    factor = target / trained
    s = f"{factor:g}" if float(f"{factor:g}") == factor else repr(factor)
    remapped = f"factor={s},log_n=True"
    found = [
        *(f"{name}:{s}" for name in ("linear", "ntk", "yarn", "llama3", "dynamic")),
        f"yarn:{2 * factor:g}",
        *(f"{name}:{remapped}" for name in ("dual_chunk", "rerope", "self_extend")),
        f"dual_chunk:{s}",
    ]
    if factor >= 4:
        found.append(f"yarn:2+dual_chunk:factor={factor / 2!r},log_n=True")
    return (*found, "read:map")


def usable(
    model: PreTrainedModel, candidates: Sequence[str], *, replace: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Those that can be put on this model, and why the others cannot.

    Returns:
        The candidates by the labels that a sweep gives them, and the reasons of the others.
    """
    fine: dict[str, str] = {}
    refused: dict[str, str] = {}
    for candidate in candidates:
        try:
            (variant,) = variants_of(model, [candidate], replace=replace)
        except LongctxError as error:
            refused[candidate] = str(error)
        else:
            fine[variant.label] = candidate
    return fine, refused
