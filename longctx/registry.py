"""Finding a method by its name: the single dynamic seam of the house."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

from .catalogue import converts, public_files
from .conversion import Conversion
from .errors import DataError, LongctxError, MethodError, nearest
from .files import read_text
from .patch import Method

__all__ = [
    "available",
    "conversions",
    "make_conversion",
    "make_method",
    "method_class",
    "parse_conversion",
    "parse_fields",
    "parse_method",
    "parse_methods",
]

_FOLDER = "longctx.patches"


def available() -> tuple[str, ...]:
    """Names of the methods that `extend` puts on: the public files of `patches/` but for these.

    `conversions` lists the others.
    """
    return tuple(name for name in public_files(_FOLDER) if not converts(f"{_FOLDER}.{name}"))


def conversions() -> tuple[str, ...]:
    """Names of the methods that make a new model, which `longctx.convert` takes."""
    return tuple(name for name in public_files(_FOLDER) if converts(f"{_FOLDER}.{name}"))


def method_class(name: str) -> type[Any]:
    """The dataclass of the method called `name`, one that `extend` puts on.

    Raises:
        MethodError: no such method; the message suggests the nearest.
    """
    known = available()
    if name in conversions():
        raise MethodError(
            f"{name} makes a new model of other weights, which is not put on and taken off: use "
            f"longctx.convert(model, {name!r}, …), or `longctx convert MODEL OUT --to {name}:…`."
        )
    if name not in known:
        raise MethodError(
            f"unknown method {name!r}{nearest(name, known)} (available: {', '.join(known)})"
        )
    return named_class(f"{_FOLDER}.{name}", "METHOD", MethodError)


def conversion_class(name: str) -> type[Any]:
    """The dataclass of the conversion called `name`.

    Raises:
        MethodError: no such conversion; one that `extend` takes is said to be that.
    """
    known = conversions()
    if name in available():
        raise MethodError(
            f"{name} leaves the weights as they are: use longctx.extend(model, {name!r}, …), or "
            f"`longctx extend MODEL OUT --method {name}:…`."
        )
    if name not in known:
        raise MethodError(
            f"unknown conversion {name!r}{nearest(name, known)} (available: {', '.join(known)})"
        )
    return named_class(f"{_FOLDER}.{name}", "METHOD", MethodError)


def named_class(module: str, constant: str, error: type[LongctxError]) -> type[Any]:
    """The class that a file assigns to METHOD or TASK, whose `name` is the file's.

    Raises:
        LongctxError: of the type `error`; it assigns none, or one of another name.
    """
    file = module.rpartition(".")[2]
    found: Any = getattr(importlib.import_module(module), constant, None)
    if found is None:
        raise error(f"{file}.py has no {constant}: end it with `{constant} = YourClass`.")
    if found.name != file:
        raise error(
            f"{found.__name__}.name is {found.name!r} in {file}.py: expected {file!r}, since saved "
            "files find the class by it."
        )
    return found


def make_method(name: str, fields: dict[str, Any]) -> Method:
    """Build the method `name` from its fields, refusing those that it does not have."""
    return _made(method_class(name), name, fields)


def make_conversion(name: str, fields: dict[str, Any]) -> Conversion:
    """Build the conversion `name` from its fields, refusing those that it does not have."""
    return _made(conversion_class(name), name, fields)


def _made(cls: type[Any], name: str, fields: dict[str, Any]) -> Any:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            raise MethodError(
                f"{name} has no field {key!r}{nearest(key, known)} (fields: {', '.join(known)})"
            )
    try:
        return cls(**fields)
    except LongctxError:
        raise
    except (TypeError, ValueError) as error:
        said = ", ".join(f"{key}={value!r}" for key, value in fields.items())
        raise MethodError(f"{name}: {said} cannot be used ({error}).") from error


def parse_method(text: str) -> Method | None:
    """Read a method as the command line writes it.

    >>> parse_method("yarn:4")
    Yarn(factor=4, target=None, beta_fast=32.0, beta_slow=1.0, attention_factor=None)
    >>> parse_method("abf:target=16384,theta=1e6").theta
    1000000.0
    >>> parse_method("none") is None
    True

    A first value without a name is the factor. Values are Python literals; words stay words.
    `NAME:@FILE` takes the fields from a file that `longctx search` wrote.

    Raises:
        MethodError: unknown method or field, an item that is not `field=value`, a file that does
            not hold such fields, or several methods ("yarn:2+log_n").
    """
    methods = parse_methods(text)
    if len(methods) > 1:
        raise MethodError(
            f"{text!r} names {len(methods)} methods: one is expected here; parse_methods reads all."
        )
    return methods[0] if methods else None


def parse_methods(text: str) -> tuple[Method, ...]:
    """Read methods that go on top of each other, the lowest first; "none" is no method.

    >>> [method.name for method in parse_methods("yarn:2+dual_chunk:factor=4,log_n=True")]
    ['yarn', 'dual_chunk']
    >>> parse_methods("none")
    ()

    Raises:
        MethodError: as `parse_method`, and "none" among others; of several it names the wrong one.
    """
    parts = split_methods(text)
    if len(parts) == 1:
        return () if parts == ["none"] else (_parse_one(parts[0]),)
    found: list[Method] = []
    for part in parts:
        try:
            if part in ("", "none"):
                raise MethodError("expected a method, which 'none' is not.")
            found.append(_parse_one(part))
            _refuse_on_top(found)
        except MethodError as error:
            raise MethodError(f"{part!r} in {text!r}: {error}") from error
    return tuple(found)


def _refuse_on_top(methods: list[Method]) -> None:
    """Refuse the last one on top of the others where no model could be under them."""
    *below, top = methods
    for method in below:
        shared = [slot for slot in top.slots if slot in method.slots]
        if shared:
            raise MethodError(
                f"{method.name} holds the {shared[0]} slot already: leave one of them out."
            )
        if "rotary" in top.slots and "positions" in method.slots:
            raise MethodError(
                f"{method.name} counts on the window below it: write {top.name} before it."
            )


def split_methods(text: str) -> list[str]:
    """The parts of a word for several methods.

    A "+" stands before a method's name or at an end: those of "1e+6" and "@runs/a+b.json" stay.
    """
    return re.split(r"\s*\+\s*(?=[A-Za-z]\w*\s*(?:[:+]|$)|\+|$)", text.strip())


def _parse_one(text: str) -> Method:
    name, _, rest = text.partition(":")
    if rest.startswith("@"):
        return make_method(name, _fields_in(Path(rest[1:]), name))
    name, fields = parse_fields(text, first="factor", example="yarn:factor=4", error=MethodError)
    return make_method(name, fields)


def _fields_in(path: Path, name: str) -> dict[str, Any]:
    """The fields of method `name` in a JSON file {"method": NAME, "fields": {…}}."""
    try:
        found: Any = json.loads(read_text(path, f"the fields of {name}, as longctx search writes"))
    except DataError as error:
        raise MethodError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise MethodError(
            f"{path} is not JSON ({error}): expected a file of longctx search."
        ) from error
    fields: Any = found.get("fields") if isinstance(found, dict) else None
    if not isinstance(fields, dict) or found.get("method") != name:
        raise MethodError(
            f'{path} does not hold {{"method": "{name}", "fields": {{…}}}}: name a file that '
            "longctx search wrote."
        )
    return fields


def parse_conversion(text: str) -> Conversion:
    """Read a conversion as the command line writes it.

    >>> parse_conversion("multi_query:2").kv_heads
    2

    A first value without a name is for the conversion's first field.

    Raises:
        MethodError: unknown conversion or field, an item that is not `field=value`, or several.
    """
    if len(parts := split_methods(text)) > 1:
        raise MethodError(
            f"{text!r} names {len(parts)}: a conversion makes a new model, so convert by one, then "
            "convert or extend what comes of it."
        )
    cls = conversion_class(text.strip().partition(":")[0])
    first = dataclasses.fields(cls)[0].name
    name, fields = parse_fields(
        text, first=first, example=f"{cls.name}:{first}=2", error=MethodError
    )
    return make_conversion(name, fields)


def parse_fields(
    text: str, *, first: str | None = None, example: str, error: type[LongctxError]
) -> tuple[str, dict[str, Any]]:
    """Read `NAME:field=value,…` into the name and its fields.

    >>> from longctx.errors import RunError
    >>> parse_fields("needle:samples=5,text=manual", example="needle:samples=5", error=RunError)
    ('needle', {'samples': 5, 'text': 'manual'})

    Args:
        text: as the command line writes it. Values are Python literals; words stay words.
        first: the field that a first value without a name is for; None where there is none.
        example: one that is right, for the message.
        error: raised for an item that is not `field=value`, or a field that stands twice.
    """
    name, _, rest = text.strip().partition(":")
    fields: dict[str, Any] = {}
    for index, item in enumerate(_split(rest)):
        key, equals, value = item.partition("=")
        if not equals and index == 0 and first:
            key, value = first, item
        elif not equals:
            raise error(f"{item!r} in {text!r}: expected field=value, as in {example!r}.")
        key, value = key.strip(), value.strip()
        if key in fields:
            raise error(f"{key!r} stands twice in {text!r}: leave one out.")
        try:
            fields[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[key] = value
    return name, fields


def _split(text: str) -> list[str]:
    """Split at commas that stand outside brackets and quotes."""
    items, depth, start, quote = [], 0, 0, ""
    for position, character in enumerate(text):
        before = text[position - 1 : position]
        if quote or (character in "'\"" and before in ("=", "(", "[", ",", " ")):
            quote = "" if character == quote else quote or character
            continue
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            items.append(text[start:position])
            start = position + 1
    items.append(text[start:])
    return [item for item in items if item.strip()]
