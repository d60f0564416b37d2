"""Many methods are told apart, and the best of each family stands out."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.eval.reporting.charts import styles, value_chart
from longctx.eval.reporting.families import MANY, best_of_each, by_family, family_of, worth
from longctx.eval.results.reader import data_of, read_sweep
from longctx.registry import available

from ..runs import WIDE_METHODS, write_run


@pytest.mark.parametrize(
    ("label", "family"),
    [
        ("none", "as it came"),
        ("yarn:8", "frequencies"),
        ("dynamic:target=4096", "frequencies"),
        ("dual_chunk:factor=8,log_n=True", "distances"),
        ("block_sparse", "who sees whom"),
        ("alibi:factor=4", "who sees whom"),
        ("log_n", "others"),
        ("yarn:2 + log_n", "on top of each other"),
        ("read:map,chunk=200", "reading in pieces"),
        ("a_method_of_mine:2", "others"),
        ("", "others"),
    ],
)
def test_a_label_tells_its_family(label: str, family: str) -> None:
    assert family_of(label) == family


def test_no_two_of_many_methods_look_alike() -> None:
    several = [f"{name}:{factor}" for name in available() for factor in (2, 4)]
    looks = styles(WIDE_METHODS)
    assert len(set(looks.values())) == len(WIDE_METHODS)
    frequencies = by_family(WIDE_METHODS, str)["frequencies"]
    assert len({looks[method].colour for method in frequencies}) == 1
    assert len(styles(several)) == len(several) + 1
    few = styles(["none", "linear:2", "linear:4", "yarn:2"])
    assert few["linear:2"].colour == few["linear:4"].colour != few["yarn:2"].colour


def test_the_best_of_each_family_stands_out(tmp_path: Path) -> None:
    methods = (
        "none",
        *(f"{name}:{n}" for name in ("linear", "ntk", "yarn", "rerope") for n in (2, 4)),
    )
    assert len(methods) > MANY
    sweep = data_of(write_run(tmp_path, methods=methods))
    assert read_sweep(tmp_path).methods == methods
    looks = styles(methods)
    for task in ("passkey", "perplexity", "repetition"):
        front = best_of_each(sweep, task, methods)
        assert [family_of(method) for method in front] == ["as it came", "frequencies", "distances"]
        own = [m for m in methods if family_of(m) == "frequencies"]
        assert worth(sweep, task, front[1]) == max(worth(sweep, task, method) for method in own)
        chart = value_chart(sweep, task, looks)
        assert {line.method for line in chart.series if not chart.is_back(line)} == {*front}
    assert "no interval" in value_chart(sweep, "repetition", looks).remark
    assert value_chart(sweep, "passkey", looks).remark == ""
