"""Finding a decoding by its name, or a preset by the use that it is for."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..catalogue import public_files
from ..errors import LongctxError, RunError, nearest
from ..registry import named_class, parse_fields
from .decoding import Decoding
from .presets import PRESETS

__all__ = ["available_decodings", "decoding_class", "parse_decoding"]

PACKAGE = "longctx.generation.decodings"


def available_decodings() -> tuple[str, ...]:
    """Names of the decodings: the public files of `generation/decodings/`."""
    return public_files(PACKAGE)


def decoding_class(name: str) -> type[Any]:
    """The dataclass of the decoding called `name`.

    Raises:
        RunError: no such decoding; the message suggests the nearest.
    """
    known = available_decodings()
    if name not in known:
        names = (*known, *PRESETS)
        raise RunError(
            f"unknown decoding {name!r}{nearest(name, names)} (decodings: {', '.join(known)}; "
            f"presets: {', '.join(PRESETS)})"
        )
    return named_class(f"{PACKAGE}.{name}", "DECODING", RunError)


def parse_decoding(text: str) -> Decoding:
    """Read a decoding or a preset as the command line writes it.

    >>> parse_decoding("sample:temperature=0.8,top_p=0.95")
    Sample(temperature=0.8, top_k=0, top_p=0.95, min_p=0.0)
    >>> parse_decoding("beam:num_beams=2").num_beams
    2
    >>> parse_decoding("retrieval").name
    'no_repeat'

    Fields of a preset may be replaced: `chat:temperature=0.5`.

    Raises:
        RunError: unknown decoding or field, a value that cannot be used, or an item that is not
            `field=value`.
    """
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RunError(f"decoding {text!r}: expected text, as 'dry:multiplier=0.8'.")
    name, fields = parse_fields(text, example="dry:multiplier=0.8", error=RunError)
    preset: Any = PRESETS.get(name)
    cls: Any = decoding_class(name) if preset is None else type(preset)
    known = [field.name for field in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            has = f"fields: {', '.join(known)}" if known else "it has none"
            raise RunError(f"{name} has no field {key!r}{nearest(key, known)} ({has})")
    if isinstance(fields.get("breakers"), list | str):  # one text, or as JSON writes several
        given = fields["breakers"]
        fields["breakers"] = (given,) if isinstance(given, str) else tuple(given)
    try:
        made: Any = cls(**fields) if preset is None else dataclasses.replace(preset, **fields)
    except LongctxError:
        raise
    except (TypeError, ValueError) as error:
        said = ", ".join(f"{key}={value!r}" for key, value in fields.items())
        raise RunError(f"{name}: {said} cannot be used ({error}).") from error
    return made
