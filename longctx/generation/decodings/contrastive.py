"""Contrastive search: of the k likeliest tokens, one that does not resemble what stands there.

    (1 − α) · p(v) − α · max_j cos(h_v, h_j),   h: hidden states of the last layer, j: tokens before

A step needs the hidden state of each candidate. Where possible the k candidates are read in one
pass, side by side: all at the same position, each seeing the tokens before and itself. The chosen
one's keys then take the first place in the cache, and the others are cropped. Where attention does
not go by positions and a mask alone (a method of attention is on the model, layers slide, a kernel
takes no mask), each candidate is read as a row of its own, which is exact too and costs more.

When to use it: for longer texts that must be the same every time. It needs a model whose hidden
states differ from token to token: where all resemble each other (GPT-2 small), it is greedy.

Source: Su et al. 2022, SimCTG (arXiv:2202.06417), section 3.2.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ...attention.packed import grouped_queries
from ...before_transformers_5_24 import cache_argument
from ...errors import ModelError, RunError
from ...model import decoder_of
from ...patch import methods_of
from ..checks import check_number, check_whole
from ..decoding import Call, Decoding

__all__ = ["DECODING", "Contrastive", "packs"]

_BY_POSITION = frozenset({"rotary", "positions"})
"""Slots of methods that look at positions alone; "attention" and "scale" look at places too."""


@dataclass(frozen=True, slots=True)
class Contrastive(Decoding):
    """Likely tokens that do not resemble those before."""

    k: int = 4
    """Candidates, the likeliest tokens of each step."""
    alpha: float = 0.6
    """Weight of the resemblance: 0 is greedy."""

    name: ClassVar[str] = "contrastive"

    def __post_init__(self) -> None:
        check_whole(self.name, "k", self.k, least=1)
        check_number(self.name, "alpha", self.alpha, least=0, most=1)
        if self.k == 1 and self.alpha:
            raise RunError("contrastive: k=1 leaves nothing to choose from: 2 or more, or greedy.")

    def refuse(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse models whose cache cannot hold several candidates.

        Raises:
            ModelError: the model keeps a state in place of keys (Mamba), or no cache.
            RunError: more candidates than the model has tokens.
        """
        del tokenizer
        table: Any = model.get_input_embeddings()
        if self.k > len(table.weight):
            raise RunError(
                f"contrastive: k={self.k:,}: the model has {len(table.weight):,} tokens to choose "
                "from: expected a few, such as 4."
            )
        name = cache_argument(model.forward)
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        strange = {type(layer).__name__ for layer in layers if not _selects(layer)}
        if name is None or strange:
            found = ", ".join(sorted(strange)) or "no cache"
            raise ModelError(
                "contrastive search takes candidates back from a cache of keys, and "
                f"model type {model.config.model_type!r} has {found}: choose another decoding "
                "(sample, dry)."
            )

    def loop(self, call: Call) -> Callable[..., Tensor]:
        """The search, as `custom_generate` takes it."""
        return _Search(self, call)


def packs(model: PreTrainedModel) -> bool:
    """Whether candidates may stand side by side in one pass: attention goes by positions alone."""
    for method in methods_of(model):
        if not set(method.slots) <= _BY_POSITION and not method.trains_only:
            return False
    config: Any = model.config.get_text_config(decoder=True)
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    try:
        decoder_of(model)
    except ModelError:
        return False
    layers = DynamicCache(config=config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def _selects(layer: object) -> bool:
    return isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states")


class _Read(NamedTuple):
    """What the model says of tokens."""

    logits: Tensor
    """float32 [B, k, V]."""
    hidden: Tensor
    """Directions of the last layer's states, float32 [B, k, H]."""


def _picked(of: Tensor, chosen: Tensor) -> Tensor:
    """The chosen candidate of each row, [B, n], of [B, k, n]; chosen is int64 [B, 1]."""
    return of[torch.arange(len(of), device=of.device), chosen[:, 0].to(of.device)]


class _Search:
    """The loop of one call."""

    def __init__(self, settings: Contrastive, call: Call) -> None:
        self._settings = settings
        self._packed = packs(call.model)
        self._firsts = call.firsts
        self._cache: Any = None
        self._taken = torch.empty(0)  # last_hidden_state of the latest forward

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """Generate; the arguments are those that `generate` prepares.

        Returns:
            Prompts and new tokens, int64 [B, S].
        """
        del generation_config  # its lengths and ends are stopping criteria by now
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = (places >= self._firsts.to(places.device)[:, None]).long()  # [B, S]
        given = (model_kwargs.get(name) for name in ("cache", "past_key_values"))
        self._cache = next((each for each in given if isinstance(each, Cache)), None)
        if self._cache is None:
            self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        with self._listening(model):
            read = self._forward(
                model, input_ids, mask, (mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1
            )
            logits, seen = read.logits[:, -1], read.hidden
            room = mask.bool().to(seen.device)  # where the directions of real tokens stand
            while not bool(done.all()):
                if seen.shape[1] == mask.shape[1]:  # directions [B, S + 64, H]: grown by pieces
                    seen, room = pad(seen, (0, 0, 0, 64)), pad(room, (0, 64))
                scores = logits_processor(input_ids, logits)
                top = scores.softmax(-1).topk(min(self._settings.k, scores.shape[-1]), dim=1)
                step = self._packed_step if self._packed else self._rows_step
                places = mask.sum(1, keepdim=True)  # the next position, [B, 1]
                read, choose = step(model, top.indices, mask, places)
                alike = torch.einsum("bkh,bsh->bks", read.hidden, seen)
                alike = alike.masked_fill(~room[:, None], -torch.inf).amax(-1)
                alpha = self._settings.alpha
                merit = (1 - alpha) * top.values - alpha * alike.to(top.values)
                # What a processor excluded is no candidate, however few are left.
                allowed = scores.gather(1, top.indices) > -torch.inf
                chosen = merit.masked_fill(~allowed, -torch.inf).argmax(1, keepdim=True)
                choose(chosen[:, 0])
                logits = _picked(read.logits, chosen)
                seen[:, mask.shape[1]] = _picked(read.hidden, chosen)
                room[:, mask.shape[1]] = True
                input_ids = torch.cat([input_ids, top.indices.gather(1, chosen)], dim=1)
                mask = pad(mask, (0, 1), value=1)
                done = done | stopping_criteria(input_ids, None)
        return input_ids

    def _packed_step(
        self, model: PreTrainedModel, candidates: Tensor, mask: Tensor, places: Tensor
    ) -> tuple[_Read, Callable[[Tensor], None]]:
        """Candidates [B, k] side by side, and what keeps one of each row in the cache."""
        rows, k = candidates.shape
        size = mask.shape[1]
        dtype = next(model.parameters()).dtype
        seen = torch.cat(
            [
                mask.bool()[:, None].expand(rows, k, size),
                torch.eye(k, dtype=torch.bool, device=mask.device).expand(rows, k, k),
            ],
            dim=2,
        )
        bias = torch.zeros(seen.shape, dtype=dtype, device=mask.device)
        bias.masked_fill_(~seen, torch.finfo(dtype).min)
        with grouped_queries(model):
            read = self._forward(model, candidates, bias[:, None], places.expand(rows, k))

        def choose(chosen: Tensor) -> None:
            index = torch.arange(rows, device=chosen.device)
            for layer in self._cache.layers:
                if not layer.is_initialized:  # it shares the keys of a layer before
                    continue
                at, here = index.to(layer.keys.device), chosen.to(layer.keys.device)
                for kept in (layer.keys, layer.values):
                    kept[:, :, size] = kept[at, :, size + here]
                layer.crop(1 - k)

        return read, choose

    def _rows_step(
        self, model: PreTrainedModel, candidates: Tensor, mask: Tensor, places: Tensor
    ) -> tuple[_Read, Callable[[Tensor], None]]:
        """Candidates [B, k] as rows of their own, and what keeps one of each."""
        rows, k = candidates.shape
        self._cache.batch_repeat_interleave(k)
        grown = pad(mask, (0, 1), value=1).repeat_interleave(k, dim=0)
        flat = self._forward(
            model, candidates.reshape(-1, 1), grown, places.repeat_interleave(k, dim=0)
        )
        read = _Read(flat.logits.view(rows, k, -1), flat.hidden.view(rows, k, -1))

        def choose(chosen: Tensor) -> None:
            self._cache.batch_select_indices(torch.arange(rows, device=chosen.device) * k + chosen)

        return read, choose

    def _forward(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, **further: Any
    ) -> _Read:
        """Read tokens [B, n] on top of the cache, which is filled in place."""
        name = cache_argument(model.forward)
        assert name is not None
        if "position_ids" in inspect.signature(model.forward).parameters:
            further["position_ids"] = positions
        out: Any = model(
            input_ids=ids, attention_mask=mask, use_cache=True, **{name: self._cache}, **further
        )
        return _Read(out.logits.float(), normalize(self._taken.float(), dim=-1))

    @contextmanager
    def _listening(self, model: PreTrainedModel) -> Generator[None]:
        """Take the decoder's last hidden states as they come, without those of all layers."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del module, args
            self._taken = output[0]

        decoder: Any = model.get_decoder()
        handle = decoder.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


DECODING = Contrastive
