"""Ways to fine-tune for a longer window, as typed settings that `run.Run` carries out.

    dataclasses.replace(LONGCHAT_16K, method="yarn:8")              # any of its settings changed
    longctx train MODEL --recipe longchat --data chats.json --output-dir runs/x

Figures of a paper are in the recipe where the paper names them; the rest is said to be ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from longctx.errors import RunError
from longctx.registry import parse_methods

from .config import Training
from .data.tokenize import Overflow
from .engine.lora import Lora
from .engine.teaching import TrainedWeights
from .loss.distillation import Distillation
from .loss.objective import Losses
from .positions import FullLength, LengthSchedule, PoSE, Positions, RandomPositions

__all__ = [
    "ALIBI",
    "EMBEDDED",
    "LONGCHAT_16K",
    "LONGLORA",
    "RECIPES",
    "UPTRAIN",
    "YARN_POSE",
    "Policy",
    "Recipe",
]

Policy = Literal["full", "schedule", "schedule-pose", "pose", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is done to a model, apart from the data and where it goes."""

    method: str = "linear:8"
    """As the command line writes it, several with a "+"; "none" trains the model as it came."""
    max_length: int = 16_384
    """The length that is learnt, and the tokens of a row (`row_tokens`)."""
    overflow: Overflow = "continue"
    """What becomes of longer conversations; see `TokenizeSettings`."""
    positions: Policy = "full"
    """Every document at its full length; lengths that double from `window` to `max_length`
    (schedule), the shorter on positions up to there (schedule-pose); or windows of `window` tokens
    on positions up to `max_length` (pose, random)."""
    window: int = 2_048
    """Tokens of a document under pose and random, and at the start of a schedule."""
    pack: bool = True
    """Several documents to a row, kept apart by attention."""
    retrieval: float = 0.0
    """Share of training that hides a key in text and asks for it."""
    lora: Lora | None = None
    """Train adapters instead of all weights."""
    shifted: bool = False
    """S²-Attn during training."""
    trained_weights: TrainedWeights = "all"
    """All weights, those of the attention alone, which a conversion of heads has changed, or the
    features that a conversion gave it."""
    losses: Losses = field(default_factory=Losses)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        parse_methods(self.method)
        if self.positions not in get_args(Policy):
            raise RunError(f"positions={self.positions!r}: expected {', '.join(get_args(Policy))}.")
        if self.trained_weights not in get_args(TrainedWeights):
            raise RunError(
                f"trained_weights={self.trained_weights!r}: expected "
                f"{', '.join(get_args(TrainedWeights))}."
            )
        if not 0 <= self.retrieval < 1:
            raise RunError(f"retrieval={self.retrieval}: expected a share from 0 up to, not 1.")
        if self.max_length < 2:
            raise RunError(f"max_length={self.max_length}: expected 2 tokens or more.")
        if self.positions != "full" and not 2 <= self.window <= self.max_length:
            raise RunError(
                f"window={self.window:,} (--window): expected 2 to max_length={self.max_length:,} "
                f"tokens under positions={self.positions!r}."
            )
        long_ce = self.losses.long_ce
        if long_ce is not None and long_ce.short >= self.document_tokens:
            raise RunError(
                f"long_ce with a short context of {long_ce.short:,} tokens, in documents of up to "
                f"{self.document_tokens:,}: no token would have a longer one. Pass a smaller one "
                "(--long-ce)."
            )
        if self.drawn and not self.pack:
            raise RunError(
                "a schedule and retrieval prompts are drawn into packed rows: leave packing on."
            )

    @property
    def drawn(self) -> bool:
        """Whether rows are drawn at the step's length, instead of taken once an epoch."""
        return self.positions in ("schedule", "schedule-pose") or self.retrieval > 0

    @property
    def document_tokens(self) -> int:
        """Most tokens of a document."""
        return self.window if self.positions in ("pose", "random") else self.max_length

    @property
    def row_tokens(self) -> int:
        """Tokens of a row: of a short window where windows are all that is read."""
        return self.max_length if self.drawn else self.document_tokens

    def policy(self, steps: int) -> Positions:
        """The policy of positions for a run of so many updates."""
        if self.positions == "pose":
            return PoSE(self.window, self.max_length)
        if self.positions == "random":
            return RandomPositions(self.window, self.max_length)
        if self.positions in ("schedule", "schedule-pose"):
            # Long enough at the shortest to learn what the longer ones then only have to carry.
            full, hold = max(1, steps * 9 // 20), steps * 3 // 20
            chunks = 1 if self.positions == "schedule" else 2
            return LengthSchedule(self.window, self.max_length, full, hold, chunks)
        return FullLength()


LONGCHAT_16K = Recipe()
"""Positions condensed by 8 (2k → 16k), all weights, conversations of up to 16,384 tokens.

Source: Li et al. 2023, LongChat, whose learning rate it has."""

YARN_POSE = Recipe(
    method="yarn:target=16384",
    positions="pose",
    training=Training(learning_rate=2e-5, warmup=10),
)
"""YaRN learnt on windows of 2,048 tokens whose positions reach 16,384, a window to a row: what a
short window costs.

Source: Zhu et al. 2023, PoSE (arXiv:2309.10400), section 4.1."""

LONGLORA = Recipe(
    lora=Lora(r=8, alpha=16, embeddings=True, norms=True),
    shifted=True,
    pack=False,
    training=Training(learning_rate=2e-5, warmup=20, schedule="constant"),
)
"""Linear interpolation by LoRA with embeddings and norms trained whole, under S²-Attn.

Source: Chen et al. 2023, LongLoRA (arXiv:2309.12307), section 3 and appendix B."""

ALIBI = Recipe(
    method="alibi",
    positions="schedule",
    retrieval=0.25,
    training=Training(learning_rate=1e-4, warmup=100),
)
"""RoPE given up for ALiBi's biases: another model, which needs much more training than the rest.

Source: Press et al. 2022, ALiBi (arXiv:2108.12409); the way there from RoPE is ours."""

EMBEDDED = Recipe(
    max_length=2_048,
    positions="schedule-pose",
    window=64,
    retrieval=0.4,
    training=Training(
        max_steps=1_000,
        batch_size=2,
        learning_rate=1.2e-3,
        schedule="linear",
        warmup=20,
        weight_decay=0.1,
    ),
)
"""The embedded model from 256 to 2,048 tokens on two CPU cores: `longctx demo --train`. Ours.

With "manual" and "sample" for data. Short documents first is what makes retrieval come back."""

UPTRAIN = Recipe(
    method="none",
    max_length=2_048,
    retrieval=0.25,
    losses=Losses(distillation=Distillation()),
    training=Training(learning_rate=3e-4, warmup=20),
)
"""A converted model (`longctx convert`) taught by its original: text, and keys hidden in text,
since retrieval does not come back on text alone.

Sources: Ainslie et al. 2023, GQA (arXiv:2305.13245), section 2.1, uptraining; Hinton et al. 2015
(arXiv:1503.02531), the teacher's logits. The mix is ours."""

RECIPES: dict[str, Recipe] = {
    "longchat": LONGCHAT_16K,
    "yarn-pose": YARN_POSE,
    "longlora": LONGLORA,
    "alibi": ALIBI,
    "embedded": EMBEDDED,
    "uptrain": UPTRAIN,
}
"""The recipes by the name that the command line gives them."""
