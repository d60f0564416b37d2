"""Linear attention: three forms that agree, documents kept apart, and a cache of bounded size."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from longctx.attention.linear import PastSums, attend_linearly, row_numbers
from longctx.attention.reference import linear_attention_with_window
from longctx.attention.state_cache import StateCaching, StateLayer, layer_of
from longctx.errors import ModelError

from ...families import build, tokens

HEADS, KV, DIM, HALF = 4, 2, 8, 5
WINDOWS = (0, 1, 5, 64)


class Case:
    """Queries, keys, values and maps of a layer."""

    def __init__(self, dtype: torch.dtype, window: int, size: int = 50) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.q = draw(2, HEADS, size, DIM)
        self.k, self.v = draw(2, KV, size, DIM), draw(2, KV, size, DIM)
        maps = draw(HEADS, HALF, DIM), draw(KV, HALF, DIM)
        self.of_query: Callable[[Tensor], Tensor] = lambda x: mapped(
            x, maps[0].view(KV, HEADS // KV, HALF, DIM)
        )
        self.of_key: Callable[[Tensor], Tensor] = lambda x: mapped(x, maps[1])
        gate = torch.rand(HEADS, generator=generator, dtype=torch.float64).to(dtype)
        self.gate, self.window = gate if window else None, window

    def attend(
        self,
        queries: slice,
        keys: slice,
        numbers: Tensor,
        past: PastSums | None = None,
        chunk: int | None = None,
    ) -> tuple[Tensor, PastSums]:
        """The function, of part of the tokens."""
        return attend_linearly(
            *(self.q[:, :, queries], self.k[:, :, keys], self.v[:, :, keys]),
            features=(self.of_query, self.of_key),
            gate=self.gate,
            window=self.window,
            scaling=DIM**-0.5,
            numbers=numbers[:, keys],
            past=past,
            chunk=chunk,
        )

    def reference(self, numbers: Tensor) -> Tensor:
        """The quadratic form."""
        grouped = self.q.unflatten(1, (KV, HEADS // KV))
        return linear_attention_with_window(
            *(self.q, self.k, self.v, self.of_query(grouped).flatten(1, 2), self.of_key(self.k)),
            gate=self.gate,
            window=self.window,
            visible=(numbers[:, :, None] == numbers[:, None])[:, None],
        )


def mapped(x: Tensor, weight: Tensor) -> Tensor:
    """Hedgehog's features, written out."""
    found = torch.einsum("...nd,...fd->...nf", x, weight)
    return torch.cat([found, -found], dim=-1).softmax(-1)


def documents() -> Tensor:
    """Two rows: one padded on the left, one of three documents with padding behind."""
    return torch.tensor([[0] * 7 + [1] * 43, [0] * 20 + [1] * 10 + [2] * 15 + [-1] * 5])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("window", WINDOWS)
def test_quadratic_chunked_and_recurrent_forms_agree(
    dtype: torch.dtype, limit: float, window: int
) -> None:
    case, every = Case(dtype, window), slice(None)
    for numbers in (torch.ones(2, 50, dtype=torch.int64), documents()):
        wanted = case.reference(numbers)
        real = (numbers >= 0)[:, None, :, None]  # what padding gets is nobody's
        for chunk in (1, 7, 50, None):
            out, past = case.attend(every, every, numbers, chunk=chunk)
            assert out.dtype == dtype
            assert ((out - wanted) * real).abs().max() <= limit
            assert past.sums.shape == (2, KV, 2 * HALF, DIM + 1)
        past, first, pieces = None, 0, list[Tensor]()
        for stop in (4, 5, 6, 30, 31, 50):  # as a cache hands them over
            start = max(0, first - max(0, window - 1))
            out, past = case.attend(slice(first, stop), slice(start, stop), numbers, past)
            pieces.append(out)
            first = stop
        assert ((torch.cat(pieces, 2) - wanted) * real).abs().max() <= limit
        later, _ = case.attend(slice(30, None), every, numbers)  # all keys there, no past
        assert ((later - wanted[:, :, 30:]) * real[:, :, 30:]).abs().max() <= limit


def test_gradients_are_those_of_the_quadratic_form() -> None:
    found: list[list[Tensor]] = []
    for reference in (False, True):
        case = Case(torch.float64, 5)
        assert case.gate is not None
        leaves = [x.requires_grad_() for x in (case.q, case.k, case.v, case.gate)]
        numbers = documents()
        every = slice(None)
        out = case.reference(numbers) if reference else case.attend(every, every, numbers)[0]
        out.square().sum().backward()
        found.append([x.grad for x in leaves if x.grad is not None])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-10


def test_all_features_of_a_far_past_weigh_as_one_normaliser_says() -> None:
    """Equal features are the mean of the past, and γ is the share of a window of equal keys."""
    k = torch.zeros(1, 1, 9, 4)
    v = torch.arange(9.0)[None, None, :, None].expand(1, 1, 9, 4)

    def equal(x: Tensor) -> Tensor:
        return torch.full((*x.shape[:-1], 2), 2**-0.5)

    out, _ = attend_linearly(
        *(k[:, :, -1:], k, v),
        features=(equal, equal),
        gate=torch.tensor([0.5]),
        window=3,
        scaling=1.0,
        numbers=row_numbers(k[:, :, -1:], k, None),
    )
    assert out.unique().item() == pytest.approx((15 + 0.5 * 21) / (6 + 0.5 * 3))


def test_masks_are_read_as_numbers() -> None:
    q, k = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 5, 4)
    mask = torch.tensor([[False] * 4 + [True] * 4, [True] * 8])[:, None, None]
    assert row_numbers(q, k, None).tolist() == [[1] * 5] * 2
    assert row_numbers(q, k, mask).tolist() == [[0] + [1] * 4, [1] * 5]
    assert row_numbers(q, k, torch.arange(5)[None, None, None]).tolist() == [[0, 1, 2, 3, 4]] * 2


def filled(window: int, rows: int = 2) -> StateLayer:
    """A layer that has seen ten tokens."""
    layer = StateLayer(window)
    keys = torch.arange(10.0).view(1, 1, 10, 1) + 100 * torch.arange(rows).view(rows, 1, 1, 1)
    layer.begin()
    handed, values = layer.update(keys, -keys)
    assert layer_of(handed) is layer
    assert torch.equal(values, -handed)
    sums = torch.arange(float(rows)).view(rows, 1, 1, 1)
    layer.keep(PastSums(sums, torch.ones(rows, dtype=torch.int64)))
    return layer


@pytest.mark.parametrize(("window", "kept"), [(0, 0), (1, 0), (4, 3), (20, 10)])
def test_the_cache_keeps_the_window_and_the_sums(window: int, kept: int) -> None:
    layer = filled(window)
    assert layer.keys is not None
    assert layer.keys[0, 0, :, 0].tolist() == [*range(10 - kept, 10)]
    assert layer.get_seq_length() == 10
    assert layer.get_mask_sizes(1) == (11, 0)
    assert layer.bytes == 2 * 4 * (2 * max(0, window - 1) + 1)
    layer.reset()
    assert (layer.keys, layer.past, layer.get_seq_length()) == (None, None, 0)


def test_rows_are_chosen_with_their_sums() -> None:
    layer = filled(4)
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.past is not None
    assert layer.past.sums.flatten().tolist() == [1, 1]
    layer = filled(4)
    layer.batch_repeat_interleave(2)
    assert layer.past is not None
    assert layer.past.sums.flatten().tolist() == [0, 0, 1, 1]
    assert layer.keys is not None
    assert layer.keys.shape[0] == 4
    again = copy.deepcopy(layer)
    again.batch_select_indices(torch.tensor([3]))
    assert again.past is not None
    assert again.past.sums.flatten().tolist() == [1]
    layer.offload()
    layer.prefetch()
    StateLayer(3).reorder_cache(torch.tensor([0]))  # nothing there yet


def test_tokens_are_not_taken_back_and_no_other_model_reads_on() -> None:
    layer = filled(4)
    layer.crop(0)
    with pytest.raises(ModelError, match="cannot take 2 back"):
        layer.crop(-2)
    with pytest.raises(ModelError, match="start with a new cache"):
        layer.update(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))
    hook = StateCaching.of(build("llama").model, [0], 5)
    assert hook is not None
    with pytest.raises(ModelError, match="keeps the last 4 tokens, and the model sees 5"):
        hook.begin([layer], {})


def test_padded_rows_are_counted_from_their_first_token() -> None:
    model = build("llama").model
    hook = StateCaching.of(model, [0, 1], 5)
    assert hook is not None
    ids = tokens(6, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    _, given = hook(model, (ids[:, 2:],), {"attention_mask": mask}) or ((), {})
    assert given["position_ids"].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert type(given["past_key_values"]) is DynamicCache
    assert hook(model, (ids,), {"attention_mask": mask[:, 2:], "use_cache": False}) is None
