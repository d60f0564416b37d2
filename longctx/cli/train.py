"""The command that teaches: `longctx train`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from tyro.conf import FlagCreatePairsOff, Positional, arg

from ..errors import RunError
from .device_options import DeviceOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from longctx.train.recipes import Recipe

__all__ = ["COMMAND", "Train"]

Flag: TypeAlias = Annotated[bool, FlagCreatePairsOff]
"""On or left to the recipe: there is no --no-shifted, which would seem to turn a recipe's off."""
_RECIPE = (
    "method",
    "max_length",
    "overflow",
    "positions",
    "window",
    "retrieval",
    "trained_weights",
)
_TRAINING = (
    "max_steps",
    "epochs",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "warmup",
    "schedule",
    "weight_decay",
    "optimizer",
    "gradient_checkpointing",
    "seed",
    "save_every",
    "evaluate_every",
    "dp_shard",
    "cp",
    "sp",
)


@dataclass(frozen=True, slots=True)
class Train:
    r"""Extend a model, fine-tune it on long texts, and save it to serve.

    A recipe gives every setting that you leave out: longchat (positions condensed by 8, all
    weights), yarn-pose (short windows on long positions), longlora (LoRA, norms, embeddings,
    S²-Attn), alibi, embedded (the embedded model to 2,048 tokens), uptrain (a converted model
    learns from its original, --teacher). The same command runs under torchrun or accelerate launch.

    Examples:
        longctx train MODEL --method linear:8 --data chats.json --max-length 16384 \
            --output-dir runs/x
        longctx train smollm2 --recipe yarn-pose --method yarn:2 --window 1024 --data chats.json \
            --salvage --lora-r 16 --norms --max-steps 20 --output-dir runs/pose
        longctx train demo --recipe embedded --data manual sample --template vicuna \
            --output-dir runs/demo
        longctx train demo --method yarn:2+log_n --data manual --template vicuna \
            --max-length 512 --max-steps 20 --output-dir runs/stacked
        torchrun --standalone --nproc-per-node 8 --no-python longctx train MODEL --dp-shard 8 \
            --evaluate --data chats.json --output-dir runs/y
    """

    model: Positional[str]
    """Checkpoint folder, hub id, GGUF file, or "demo"."""
    data: tuple[str, ...]
    """Conversations or texts: files, folders, hub ids; "sample" and "manual" ship with it."""
    output_dir: Path
    """Folder of the run; its model goes to OUTPUT_DIR/model."""
    recipe: Literal["longchat", "yarn-pose", "longlora", "alibi", "embedded", "uptrain"] = (
        "longchat"
    )
    """Where settings come from that are not given."""
    resume: bool = False
    """Go on with the run in OUTPUT_DIR from its last checkpoint."""
    dry_run: bool = False
    """Prepare the data, say what would be done, refuse what would be refused, and stop."""

    method: str | None = None
    """NAME:FACTOR or NAME:field=value,…, with a "+" between several that go on top of each other;
    "none" keeps the window."""
    max_length: int | None = None
    """Tokens of a row, and the length that is learnt."""
    overflow: Literal["continue", "drop", "cut"] | None = None
    """A longer conversation goes on as a further sample, is dropped there, or is cut."""
    positions: Literal["full", "schedule", "schedule-pose", "pose", "random"] | None = None
    """Full length; lengths that grow; or windows on long positions (pose, random)."""
    window: int | None = None
    """Tokens of a document under pose and random, and at the start of a schedule."""
    no_pack: Flag = False
    """One document to a row, instead of several that attention keeps apart."""
    retrieval: float | None = None
    """Share of training that hides a key in text and asks for it, with keys of its own."""
    shifted: Flag = False
    """S²-Attn during training."""
    lora_r: int | None = None
    """Train LoRA adapters of this rank; 0 for all weights."""
    lora_alpha: float | None = None
    """Scale of the adapters."""
    lora_target_modules: tuple[str, ...] | None = None
    """Names of the linear layers with adapters; default: those of the attention."""
    norms: Flag = False
    """With adapters, train the norms whole."""
    embeddings: Flag = False
    """With adapters, train the embeddings whole."""
    unlikelihood: float | None = None
    """Weight of the token-level unlikelihood loss."""
    sequence_unlikelihood: float | None = None
    """Weight of sequence-level unlikelihood, which has half of the updates to itself."""
    contrastive: float | None = None
    """Margin of SimCTG's contrastive loss."""
    long_ce: int | None = None
    """LongCE: tokens weigh by what more than so many tokens before them give; 4096 in the paper."""
    long_ce_step: int | None = None
    """Tokens whose short contexts begin at one place; default: a quarter of --long-ce."""
    long_ce_gamma: float | None = None
    """The largest weight; default: 5."""

    teacher: str | None = None
    """The original of a converted model, whose logits are learnt too."""
    distillation: float | None = None
    """Weight of the teacher's logits, the text having the rest; 0 for none."""
    trained_weights: Literal["all", "attention", "features"] | None = None
    """Train the weights of the attention alone, or the features that a conversion gave it."""
    load_balance: float | None = None
    """Weight of the loss that lets a mixture's experts be used evenly."""

    template: str | None = None
    """Chat template: "vicuna" or a Jinja file; default: the tokenizer's own."""
    salvage: bool = False
    """Go on with the whole records of a file that breaks off."""
    strict: bool = False
    """Refuse conversations out of order instead of tidying them."""
    split: str = "train"
    """Of a hub id, a folder, or a file with a list for each split."""
    skip_bad: bool = False
    """Leave out records that cannot be used, and count them by reason."""

    max_steps: int | None = None
    """Updates; default: as many as the epochs take."""
    epochs: float | None = None
    """Passes over the data."""
    batch_size: int | None = None
    """Rows per process and forward pass."""
    gradient_accumulation_steps: int | None = None
    """Forward passes per update."""
    learning_rate: float | None = None
    """Peak."""
    warmup: int | None = None
    """Updates until the peak."""
    schedule: Literal["cosine", "linear", "constant"] | None = None
    """How the learning rate falls."""
    weight_decay: float | None = None
    """On matrices."""
    optimizer: str | None = None
    """As transformers' `optim`: adamw_torch, adamw_8bit, sgd, …"""
    gradient_checkpointing: Literal["none", "layers", "offload"] | None = None
    """Keep activations, make them again layer by layer, or that with inputs in CPU memory."""
    seed: int | None = None
    """Chooses order, positions and first weights of adapters."""
    save_every: int | None = None
    """Updates between checkpoints."""
    dp_shard: int | None = None
    """Processes that share the weights (FSDP2)."""
    cp: int | None = None
    """Processes that share a sequence by ring attention."""
    sp: int | None = None
    """Processes that share a sequence by exchanging heads."""
    report_to: tuple[str, ...] = ()
    """Trackers: tensorboard, wandb, trackio."""

    evaluate: tuple[Literal["passkey", "perplexity"], ...] = ("passkey", "perplexity")
    """What is measured before and after at the old window and at max_length, with perplexity the
    NLL by position too; nothing with --evaluate and nothing after it."""
    evaluate_every: int | None = None
    """Updates between evaluations; default: before and after only."""
    samples: int = 20
    """Passkey prompts per evaluation and length."""
    gate: float | None = None
    """Stop when perplexity within the old window gets worse by more than this share."""
    warn: bool = False
    """At the gate, say so and go on."""
    best: bool = False
    """Save the checkpoint that finds most keys at max_length, instead of the last one."""
    replace: bool = False
    """Let the method replace the RoPE scaling that the checkpoint ships with."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load, extend, prepare, train, save."""
        from longctx.train.config import Gate
        from longctx.train.engine.run_folder import RunFolder
        from longctx.train.run import Run

        from ..model import window
        from ..patch import patch_of
        from .training_metrics import figures_of

        recipe = self._recipe()
        self._refuse_unmeasured()
        RunFolder.refuse(self.output_dir, resume=self.resume)
        first = os.environ.get("RANK", "0") == "0"
        model, tokenizer = self._loaded(recipe)
        teacher = None if self.teacher is None else self.device_options.load(self.teacher)[0]
        old = window(model) if patch_of(model) is None else None
        options: dict[str, Any] = {
            "salvage": self.salvage,
            "strict": self.strict,
            "skip_bad": self.skip_bad,
        }
        run = Run(recipe, self.data, self.output_dir, self.template, split=self.split, **options)
        run.extend(model, replace=self.replace)
        patch = patch_of(model)
        known = patch.report().original_window if patch else old
        short = min(known or recipe.max_length, recipe.max_length)
        gate = Gate(
            short=None if self.gate is None else f"perplexity@{short}",
            worse=self.gate or 0.0,
            action="warn" if self.warn else "stop",
            best=f"passkey@{recipe.max_length}" if self.best else None,
        )
        figures = figures_of(
            tokenizer, short, recipe.max_length, tasks=self.evaluate, samples=self.samples
        )
        evaluated = bool(self.evaluate)
        run.check(model, evaluated=evaluated, teacher=teacher, gate=gate, resume=self.resume)
        prepared = run.prepare(tokenizer)
        plan = run.plan(tokenizer, prepared)
        measured = {"tasks": self.evaluate, "samples": self.samples}
        plan = replace(plan, record={**plan.record, "evaluation": measured})
        if first:
            print(patch.report() if patch else "no method: the model is trained as it came")
            print("\n".join(str(part.report) for part in prepared))
            print(plan)
            if recipe.training.warmup >= plan.updates:
                print(
                    f"the warmup of {recipe.training.warmup:,} updates takes the whole run, whose "
                    "learning rate stays below its peak: a smaller --warmup gets there"
                )
        if self.dry_run:
            return 0
        done = run.start(
            model,
            tokenizer,
            plan,
            teacher=teacher,
            evaluate=figures if self.evaluate else None,
            gate=gate,
            resume=self.resume,
        )
        if not first:
            return 0
        for name, after in done.after.items():
            print(f"{name}: {done.before[name]:.4g} → {after:.4g}")
        print(f"{done.updates:,} updates, {done.tokens:,} tokens. {done.saved.message}")
        if done.stopped:
            print(done.stopped)
        return 1 if done.stopped else 0

    def _recipe(self) -> Recipe:
        """The recipe with what was given in its place."""
        from longctx.train.engine.lora import Lora
        from longctx.train.loss.distillation import Distillation
        from longctx.train.loss.load_balance import LoadBalance
        from longctx.train.loss.long_ce import LongCE
        from longctx.train.loss.objective import Contrastive, Losses, Unlikelihood
        from longctx.train.loss.sequence_unlikelihood import SequenceUnlikelihood
        from longctx.train.recipes import RECIPES

        def given(*names: str, **renamed: str) -> dict[str, Any]:
            found = {name: getattr(self, name) for name in names}
            found |= {theirs: getattr(self, ours) for theirs, ours in renamed.items()}
            return {name: value for name, value in found.items() if value is not None}

        base = RECIPES[self.recipe]
        lora = given(r="lora_r", alpha="lora_alpha", target_modules="lora_target_modules")
        lora |= {name: True for name in ("norms", "embeddings") if getattr(self, name)}
        if lora.get("r") == 0 and len(lora) > 1:
            raise RunError(
                "--lora-r 0 trains all weights, and the other options of adapters are given "
                "too: leave one out."
            )
        if lora.get("r") == 0:
            adapters = None
        elif lora and base.lora is None and "r" not in lora:
            raise RunError(f"{', '.join(lora)} without adapters: pass --lora-r too.")
        else:
            adapters = replace(base.lora or Lora(), **lora) if lora else base.lora
        taught = base.losses.distillation
        if self.distillation is not None:
            taught = Distillation(self.distillation) if self.distillation else None
        weighed = given(short="long_ce", step="long_ce_step", gamma="long_ce_gamma")
        if weighed and self.long_ce is None:
            raise RunError("--long-ce-step and --long-ce-gamma are for --long-ce: pass it too.")
        losses = Losses(
            distillation=taught,
            long_ce=LongCE(**weighed) if weighed else None,
            load_balance=None if self.load_balance is None else LoadBalance(self.load_balance),
            unlikelihood=None if self.unlikelihood is None else Unlikelihood(self.unlikelihood),
            contrastive=None if self.contrastive is None else Contrastive(self.contrastive),
            sequence=None
            if self.sequence_unlikelihood is None
            else SequenceUnlikelihood(self.sequence_unlikelihood),
        )
        try:
            training = replace(base.training, report_to=self.report_to, **given(*_TRAINING))
        except RunError as error:
            raise RunError(_by_option(str(error))) from error
        changed = given(*_RECIPE) | ({"shifted": True} if self.shifted else {})
        changed |= {"pack": False} if self.no_pack else {}
        recipe = replace(base, lora=adapters, losses=losses, training=training, **changed)
        if self.window is not None and recipe.positions == "full":
            raise RunError("--window is for --positions schedule, schedule-pose, pose or random.")
        return recipe

    def _refuse_unmeasured(self) -> None:
        """Refuse a gate or a best checkpoint by what is not measured, and options of neither."""
        for given, option, task in (
            (self.gate is not None, "--gate", "perplexity"),
            (self.best, "--best", "passkey"),
        ):
            if given and task not in self.evaluate:
                raise RunError(f"{option} goes by {task}: add it to --evaluate.")
        if self.warn and self.gate is None:
            raise RunError("--warn is for --gate: pass a share that perplexity may get worse by.")
        if self.evaluate and self.samples < 1:
            raise RunError(f"--samples {self.samples}: expected 1 or more.")

    def _loaded(self, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """What is trained is held in float32; a base that only carries adapters may be bfloat16."""
        device_options, lora = self.device_options, recipe.lora
        whole = lora is None or lora.norms or lora.embeddings
        if device_options.dtype == "auto" and whole:
            device_options = replace(device_options, dtype="float32")
        return device_options.load(self.model)


def _by_option(message: str) -> str:
    """An error on a field of `Training`, by the option that was typed.

    >>> _by_option("save_every=0: expected 1 or more.")
    '--save-every 0: expected 1 or more.'
    """
    name, equals, rest = message.partition("=")
    return f"--{name.replace('_', '-')} {rest}" if equals and name in _TRAINING else message


COMMAND = Train
