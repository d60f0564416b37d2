"""Position policies against what their papers say of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longctx.errors import DataError, RunError
from longctx.train.positions import FullLength, LengthSchedule, PoSE, RandomPositions


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_full_length_is_consecutive() -> None:
    policy = FullLength()
    assert policy.place(7, rng()).tolist() == list(range(7))
    assert policy.tokens(0) is None


def test_the_schedule_doubles_up_to_the_full_length() -> None:
    policy = LengthSchedule(start=64, full=2048, steps=100)
    sizes = [policy.tokens(step) or 0 for step in range(101)]
    assert sizes[0] == 64
    assert sizes[-1] == policy.tokens(10_000) == 2048
    assert sorted(set(sizes)) == [64, 128, 256, 512, 1024, 2048]
    assert sizes == sorted(sizes)
    # Every doubling has as many steps as the next.
    assert [sizes.count(n) for n in (64, 128, 256, 512, 1024)] == [20] * 5


def test_the_schedule_may_stay_short_for_a_while() -> None:
    policy = LengthSchedule(start=64, full=256, steps=100, hold=60)
    sizes = [policy.tokens(step) or 0 for step in range(101)]
    assert [sizes.count(n) for n in (64, 128, 256)] == [80, 20, 1]
    assert sizes == sorted(sizes)


def test_the_schedule_reaches_a_length_that_is_no_power_of_two_times_the_start() -> None:
    policy = LengthSchedule(start=100, full=1000, steps=8)
    assert [policy.tokens(step) for step in (0, 2, 4, 6, 8)] == [100, 200, 400, 800, 1000]
    assert LengthSchedule(10, 10, 3).tokens(0) == 10


def test_the_schedule_in_chunks_reaches_the_full_length_from_the_start() -> None:
    policy = LengthSchedule(start=64, full=512, steps=100, chunks=2)
    last = [int(policy.place(64, rng(seed))[-1]) for seed in range(200)]
    assert min(last) < 128
    assert max(last) > 480
    for seed in range(20):  # the same draws as PoSE
        pose = PoSE(window=64, target=512).place(64, rng(seed))
        assert torch.equal(policy.place(64, rng(seed)), pose)
    assert policy.place(512, rng()).tolist() == list(range(512)), "nothing to skip"


def test_pose_skips_once_and_keeps_the_order() -> None:
    policy = PoSE(window=64, target=512)
    starts, jumps, cuts, last = set[int](), list[int](), set[int](), 0
    for seed in range(400):
        place = policy.place(64, rng(seed))
        steps = place.diff()
        assert place.dtype == torch.int64
        assert (steps >= 1).all()
        assert (steps > 1).sum() <= 1
        starts.add(int(place[0]))
        jumps.append(int(steps.max()) - 1)
        if jumps[-1]:
            cuts.add(int(steps.argmax()) + 1)
        last = max(last, int(place[-1]))
    assert starts == {0}
    assert last <= 511
    # The skip is uniform on 0 … 448: mean 224, standard error 6.5; the cut falls everywhere.
    assert abs(np.mean(jumps) - 224) < 26
    assert max(jumps) > 430
    assert min(cuts) <= 3
    assert max(cuts) >= 61


def test_pose_with_more_chunks_skips_further_each_time() -> None:
    place = PoSE(window=40, target=4000, chunks=4).place(40, rng(3))
    assert (place.diff() > 1).sum() == 3
    assert int(place[-1]) < 4000


@pytest.mark.parametrize("length", [1, 2, 3])
def test_pose_takes_the_shortest_documents(length: int) -> None:
    place = PoSE(window=64, target=512).place(length, rng())
    assert len(place) == length
    assert place[0] == 0 or length == 1


def test_random_positions_are_a_sorted_subset_of_all() -> None:
    policy = RandomPositions(window=16, target=64)
    seen = set[int]()
    for seed in range(60):
        place = policy.place(16, rng(seed))
        assert (place.diff() > 0).all()
        seen |= set(place.tolist())
    assert seen == set(range(64))
    assert policy.place(16, rng(1)).tolist() == policy.place(16, rng(1)).tolist()


@pytest.mark.parametrize("policy", [PoSE(8, 64), RandomPositions(8, 64), LengthSchedule(4, 8, 2)])
def test_longer_documents_are_refused(policy: PoSE | RandomPositions | LengthSchedule) -> None:
    with pytest.raises(DataError, match=r"9 tokens .* max_length=8"):
        policy.place(9, rng())


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(RunError, match="window ≤ target"):
        PoSE(window=100, target=50)
    with pytest.raises(RunError, match="window ≤ target"):
        RandomPositions(window=100, target=50)
    with pytest.raises(RunError, match="start ≤ full"):
        LengthSchedule(start=100, full=50, steps=1)
    with pytest.raises(RunError, match="hold < steps"):
        LengthSchedule(start=50, full=100, steps=5, hold=5)
