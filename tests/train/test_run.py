"""A recipe with data: how much is learnt, and in which rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import longctx
from longctx.train.config import Training
from longctx.train.recipes import LONGCHAT_16K, YARN_POSE, Recipe
from longctx.train.run import Run, TrainingPlan


def chats(path: Path, words: list[int]) -> str:
    turns = [
        {
            "conversations": [
                {"from": "human", "value": f"Say {n} words."},
                {"from": "gpt", "value": " ".join(f"w{n:02}" for _ in range(count))},
            ]
        }
        for n, count in enumerate(words)
    ]
    path.write_text(json.dumps(turns))
    return str(path)


def planned(tmp_path: Path, recipe: Recipe, words: list[int]) -> tuple[TrainingPlan, Any]:
    tokenizer: Any = longctx.load("demo")[1]
    data = chats(tmp_path / "chats.json", words)
    run = Run(recipe, (data,), tmp_path / "run", template="vicuna")
    prepared = run.prepare(tokenizer)
    return run.plan(tokenizer, prepared), prepared[0].dataset


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_holds_every_document(tmp_path: Path, pack: bool) -> None:
    """Of three fifths of a row each: counted by tokens, two in five would never be seen."""
    recipe = replace(LONGCHAT_16K, max_length=512, pack=pack, training=Training(batch_size=3))
    found, dataset = planned(tmp_path, recipe, [70] * 20)
    assert all(256 < length < 512 for length in dataset["length"])
    assert (found.updates, found.rows, len(found.train_dataset)) == (
        7,
        3,
        21,
    )  # 20 rows, and one again
    seen = {tuple(found.train_dataset[n]["input_ids"]) for n in range(20)}
    assert seen == {tuple(ids) for ids in dataset["input_ids"]}
    assert str(found).startswith("7 updates of 3 rows; 20 rows a pass, ")


def test_windows_on_long_positions_cost_rows_of_a_window(tmp_path: Path) -> None:
    recipe = replace(YARN_POSE, max_length=2048, window=256, training=Training())
    found, _ = planned(tmp_path, recipe, [20] * 20)
    rows = [found.train_dataset[n]["input_ids"] for n in range(found.updates)]
    assert max(map(len, rows)) <= 256 < sum(map(len, rows))
    share = sum(map(len, rows)) / (256 * len(rows))
    assert f"{len(rows)} rows a pass, {share:.0%} full" in str(found)


def test_passes_and_updates_follow_from_each_other(tmp_path: Path) -> None:
    twice = replace(LONGCHAT_16K, max_length=512, training=Training(epochs=1.5, batch_size=2))
    assert planned(tmp_path, twice, [70] * 20)[0].updates == 15
    given = replace(twice, training=Training(max_steps=4, batch_size=2))
    assert len(planned(tmp_path, given, [70] * 20)[0].train_dataset) == 8
    drawn = replace(twice, retrieval=0.5, training=Training(batch_size=2))
    found, dataset = planned(tmp_path, drawn, [70] * 20)
    assert found.updates == -(-sum(dataset["length"]) // 512)  # half of two rows is data


def test_a_bos_is_kept_in_front_only_where_the_tokenizer_puts_one(tmp_path: Path) -> None:
    tokenizer: Any = longctx.load("demo")[1]
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    recipe = replace(
        LONGCHAT_16K,
        positions="schedule",
        window=64,
        max_length=512,
        training=Training(max_steps=4),
    )
    starts: list[set[bool]] = []
    for puts_one in (True, False):
        run = Run(recipe, (chats(tmp_path / "chats.json", [70] * 20),), tmp_path, "vicuna")
        prepared = run.prepare(tokenizer)
        if not puts_one:
            tokenizer.backend_tokenizer.post_processor = None
        train_dataset = run.plan(tokenizer, prepared).train_dataset
        row = train_dataset[0]
        ends = [sum(row["seq_lengths"][: n + 1]) for n in range(len(row["seq_lengths"]))]
        firsts = [row["input_ids"][start] for start in [0, *ends[:-1]]]
        starts.append({first == tokenizer.bos_token_id for first in firsts})
    assert starts[0] == {True}
    assert False in starts[1]


def test_other_data_of_the_same_size_is_another_run(tmp_path: Path) -> None:
    recipe = replace(LONGCHAT_16K, max_length=512)
    one = planned(tmp_path, recipe, [70, 71])[0].record
    assert planned(tmp_path, recipe, [70, 71])[0].record == one
    other = planned(tmp_path, recipe, [71, 70])[0].record
    assert other["samples"] == one["samples"]
    assert other["content"] != one["content"]
