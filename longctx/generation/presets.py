"""Decodings by what they are for: a name where a decoding is asked for.

What they rest on is measured in `benchmarks/RESULTS.md` (section "Generation"), on small models:
take them as a beginning.
"""

from __future__ import annotations

from .decoding import Decoding
from .decodings.beam import Beam
from .decodings.dry import Dry
from .decodings.no_repeat import NoRepeat

__all__ = ["PRESETS"]

PRESETS: dict[str, Decoding] = {
    # The answer is nearly fixed: the likeliest whole, not the likeliest next token.
    "translation": Beam(num_beams=4, length_penalty=1.0),
    # Drawn among likely tokens, as a person varies; repeats over lines are made unlikely.
    "chat": Dry(temperature=0.7, top_p=0.9),
    # Greedy, since an answer is right or wrong. What stands in the prompt may be said; a key may
    # hold a digit twice, and a pair of digits: so n is at least 3, and nothing is penalised.
    "retrieval": NoRepeat(ngram=4),
}
"""Name of a use → its decoding."""
