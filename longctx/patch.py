"""What a method is, the patch that puts one on a model, and the report that proves its effect."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import MethodError
from .model import text_config, unwrapped
from .rope import Rope

__all__ = [
    "HANDLE",
    "Check",
    "Method",
    "Patch",
    "Report",
    "methods_of",
    "patch_of",
    "reserved",
    "roll_back",
    "slot_holder",
]

HANDLE = "_longctx_patch"
"""Attribute of a model that holds its topmost patch."""


class _Missing:
    """Stands for an attribute that was not there; a class, since a copy of one is itself."""


@runtime_checkable
class Method(Protocol):
    """What the house asks of a method: a frozen dataclass in a file of `patches/`, or your own.

    Derive from it and only `name`, `slots`, `apply` and `verify` are left to write; a method that
    fits one of the bases in `patches/` (`FrequencyMethod`, `AttentionMethod`) needs less.
    """

    __slots__ = ()

    name: ClassVar[str]
    """The name of its file."""
    slots: ClassVar[tuple[str, ...]]
    """What it takes over: "rotary", "attention", "positions" (which distance a key is seen at),
    "scale" (a factor on queries). Two methods stack if they share no slot."""
    plain_loadable: ClassVar[bool] = False
    """Whether plain transformers loads a saved model to the same logits."""
    trains_only: ClassVar[bool] = False
    """Whether it acts in train mode alone, and the model in eval mode is as without it."""
    biases: ClassVar[bool] = False
    """Whether linear biases take the place of the rotary, which some engines compute (ALiBi)."""
    changes_far_logits: ClassVar[bool] = True
    """Whether a few tokens show it, half of them at positions beyond the window; False where it
    takes an input longer than the window, or training."""
    unbounded: ClassVar[bool] = False
    """Whether inputs of any length may be trained on, whatever window the config names."""

    @classmethod
    def example(cls, rope: Rope) -> Method:
        """Settings that change inputs longer than the window, as tests and documentation use it."""
        del rope
        return cls()

    @property
    def length_invariant(self) -> bool:
        """Whether a token's logits are the same in a longer input: no method state per length."""
        return True

    def apply(self, model: PreTrainedModel, patch: Patch) -> None:
        """Change `model` through `patch.set`; `patch.rope` is the geometry it was trained with."""
        ...

    def verify(self, model: PreTrainedModel, patch: Patch) -> list[Check]:
        """Look at the patched model and say whether each thing promised is so."""
        ...

    def cache_tokens(self, window: int) -> int | None:
        """Most tokens of a row that caches keep in layers of full attention; None for all.

        Args:
            window: tokens that the model promises without the method.
        """
        del window
        return None

    def window_note(self, rope: Rope) -> str:
        """What the window named in the config does not say of the method; empty if it says all."""
        del rope
        return ""

    def neutral(self, rope: Rope) -> Method | None:
        """The setting that changes nothing, None where there is none."""
        del rope
        return None

    def reserve(self, model: PreTrainedModel, tokens: int) -> AbstractContextManager[None]:
        """Begin requests inside the block for `tokens` tokens, prompt and answer together.

        Only a method that is not `length_invariant` has anything to do.
        """
        del model, tokens
        return nullcontext()


@dataclass(frozen=True, slots=True)
class Check:
    """One promise and whether it was kept."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """Proof of effect: what `extend` promised, looked up in the patched model."""

    method: Method
    original_window: int
    window: int
    plain_loadable: bool
    checks: tuple[Check, ...]
    below: Report | None = None
    """Of the patch below, where the same `extend` put it on."""
    note: str = ""
    """What the window does not say."""

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks) and (self.below is None or self.below.ok)

    def __str__(self) -> str:
        where = "plain transformers" if self.plain_loadable else "longctx.load only"
        before, now = self.original_window, self.window
        window = f"{before} → {now} tokens" if now != before else f"{now} tokens, as it was"
        lines = [
            *([] if self.below is None else [f"{self.below}"]),
            f"{self.method}",
            f"  window {window}; saved checkpoint: {where}",
            *([f"  {self.note}"] if self.note else []),
            *(f"  {'ok  ' if c.ok else 'FAIL'} {c.name}: {c.detail}" for c in self.checks),
        ]
        return "\n".join(lines)


@dataclass(slots=True)
class Patch:
    """A method in place on one model: the undo log and the handle.

    As a context manager it removes itself at the end of the block.
    """

    model: PreTrainedModel
    method: Method
    rope: Rope
    """The geometry the model was trained with."""
    below: Patch | None
    """The patch that this one was put on top of."""
    undo: list[tuple[Any, str, Any]] = field(default_factory=list)
    """(object, attribute, what was there) in the order of the changes."""
    proven: tuple[Check, ...] = ()
    """What the model's logits showed when it was put on; empty where that was not asked for."""
    joined: bool = False
    """Whether one `extend` put it on together with the patch below, which goes with it."""
    window_below: int = field(init=False)
    """Tokens that the model promises without this patch: on top of a frequency method that
    method's window, so that extensions multiply."""

    def __post_init__(self) -> None:
        self.window_below = self.rope.length if self.below is None else self.below.window

    def set(self, obj: Any, name: str, value: Any) -> None:
        """Set `obj.name` and remember what was there, so that `remove` can put it back."""
        if isinstance(obj, PreTrainedConfig):
            name = obj.attribute_map.get(name, name)  # some keep the window under another name
        self.undo.append((obj, name, _own(obj, name)))
        setattr(obj, name, value)

    def hook(self, module: nn.Module, hook: Callable[..., Any], *, after: bool = False) -> None:
        """Register a hook before or after forward, which `remove` takes away.

        Args:
            module: whose forward it is.
            hook: takes keyword arguments, as torch says it of `with_kwargs=True`.
            after: register a forward hook instead of a forward pre-hook.
        """
        register = module.register_forward_hook if after else module.register_forward_pre_hook
        self.undo.append((module, "forward hook", register(hook, with_kwargs=True)))

    @property
    def active(self) -> bool:
        """Whether it is still in place."""
        patch = patch_of(self.model)
        while patch is not None and patch is not self:
            patch = patch.below
        return patch is self

    @property
    def factor(self) -> float | None:
        """New window over the original one, as the method names it; None where it names neither."""
        factor, target = (getattr(self.method, name, None) for name in ("factor", "target"))
        if target is not None:
            return float(target) / self.rope.length
        return None if factor is None else float(factor)

    @property
    def window(self) -> int:
        """Tokens the model claims to read: some methods (dynamic) leave the config's number."""
        declared = int(text_config(self.model).max_position_embeddings)
        return max(declared, int((self.factor or 1) * self.rope.length + 1e-9))

    def report(self) -> Report:
        """Verify the method on the model as it is now.

        Raises:
            MethodError: the patch was removed.
        """
        if not self.active:
            raise MethodError(f"{self.method.name} was removed from the model: nothing to report.")
        return Report(
            method=self.method,
            original_window=self.rope.length,
            window=self.window,
            plain_loadable=self.method.plain_loadable,
            checks=(*self.method.verify(self.model, self), *self.proven),
            below=self.below.report() if self.joined and self.below else None,
            note=self.method.window_note(self.rope),
        )

    def remove(self) -> None:
        """Put back, in reverse, everything that was changed: bit for bit the model of before.

        Of methods that one `extend` put on ("yarn:2+log_n") all are taken off.

        Raises:
            MethodError: already removed, or another patch lies on top of it.
        """
        top = patch_of(self.model)
        if not self.active:
            raise MethodError(f"{self.method.name} is not on this model any more.")
        if top is not None and top is not self:
            raise MethodError(
                f"{top.method.name} was put on top of {self.method.name}: remove it first "
                "(`longctx.patch_of(model).remove()`)."
            )
        roll_back(self)
        if self.joined and self.below is not None:
            self.below.remove()

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.active:
            self.remove()


def roll_back(patch: Patch) -> None:
    """Put back all that a patch has changed so far, the last change first."""
    while patch.undo:
        obj, name, value = patch.undo.pop()
        if isinstance(value, RemovableHandle):
            value.remove()
        elif value is _Missing:
            delattr(obj, name)
        else:
            setattr(obj, name, value)


def _own(obj: Any, name: str) -> Any:
    """The attribute where it belongs to the instance; a class attribute comes back by deletion."""
    for store in ("__dict__", "_parameters", "_buffers", "_modules"):
        values = getattr(obj, store, {})
        if name in values:
            return values[name]
    return _Missing


def slot_holder(model: PreTrainedModel, slot: str) -> Method | None:
    """The method on `model` that holds a slot, None if no one does."""
    return next((method for method in methods_of(model) if slot in method.slots), None)


def patch_of(model: nn.Module) -> Patch | None:
    """The patch in place on `model` (the topmost where two are stacked), None if there is none.

    Wrappers (PEFT, `torch.compile`, DistributedDataParallel) are looked through.
    """
    return unwrapped(model).__dict__.get(HANDLE)


def methods_of(model: nn.Module) -> tuple[Method, ...]:
    """The methods in place on `model`, the lowest first."""
    patch, found = patch_of(model), list[Method]()
    while patch is not None:
        found.insert(0, patch.method)
        patch = patch.below
    return tuple(found)


@contextmanager
def reserved(model: PreTrainedModel, tokens: int) -> Generator[None]:
    """Begin requests inside the block for `tokens` tokens, whatever methods are in place."""
    with ExitStack() as begun:
        for method in methods_of(model):
            begun.enter_context(method.reserve(model, tokens))
        yield
