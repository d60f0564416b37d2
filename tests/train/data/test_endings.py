"""What answers end with, and a generation config that stops there."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from longctx.train.data.endings import ending_tokens, stop_at

from .. import chats


def test_the_end_tokens_of_answers_are_found_in_packed_rows() -> None:
    tokenizer = chats.tokenizer()
    first, second = (chats.by_hand(tokenizer, chats.turns("Hi", text)) for text in ("Hello", "Yes"))
    row = {"labels": first[1] + second[1]}
    assert ending_tokens([row], tokenizer) == [tokenizer.eos_token_id]
    assert ending_tokens([{"labels": [-100, 65, 66]}], tokenizer) == []  # cut within an answer


@pytest.mark.parametrize(
    ("own", "wanted"), [(None, [7]), (2, [2, 7]), ([2, 3], [2, 3, 7]), (7, 7), ([7, 2], [7, 2])]
)
def test_what_stops_a_model_stays(own: Any, wanted: Any) -> None:
    class Model:
        generation_config = GenerationConfig(eos_token_id=own)

    model: Any = Model()
    stop_at(model, [7])
    assert model.generation_config.eos_token_id == wanted
