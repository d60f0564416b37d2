"""The command that chooses a method by measurement: `longctx auto`."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from longctx.eval.choice.settings import ChoiceSettings

from ..errors import RunError
from .device_options import DeviceOptions

__all__ = ["COMMAND", "Auto"]

_BATCH = 65_536  # tokens of an update in the command for training


@dataclass(frozen=True, slots=True)
class Auto:
    """Choose a method for a model and a length by measuring candidates.

    Every candidate is given a few prompts, those that are left some more, and the last few are
    compared with the model as it came on prompts that the screening did not see. Ends with one
    recommendation, its reason, and the command that makes it. The same command goes on where an
    interrupted one was.

    Examples:
        longctx auto demo --target 1k --out runs/auto
        longctx auto smollm2 --target 16k --samples 10 --out runs/auto-smollm2
        longctx auto smollm2 --target 16k --candidates yarn:2 longrope:@runs/search/longrope.json
        longctx auto meta-llama/Llama-3.1-8B --target 256k --replace --tokens 20M
    """

    model: Positional[str]
    """Checkpoint folder, hub id, GGUF file, or "demo"."""
    target: str
    """The window that is wanted: tokens such as 32768 or 32k."""
    candidates: tuple[str, ...] = ()
    """Methods as `longctx sweep --methods` takes them; none means those that work untrained."""
    tokens: str = ""
    """Tokens that could be trained on, such as 20M: the command for it is said too."""
    settings: Annotated[ChoiceSettings, arg(name="")] = field(default_factory=ChoiceSettings)
    out: Path = Path("auto")
    """Folder for the results."""
    batch_tokens: int = 16_384
    """Tokens forwarded at a time; halved on out-of-memory."""
    replace: bool = False
    """Let candidates replace the RoPE scaling that the checkpoint ships with."""
    overwrite: bool = False
    """Replace the report there; results of the same settings are kept."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load, measure, print, write."""
        from longctx.eval.choice.choose import choose
        from longctx.eval.reporting.choice import print_choice, write_choice
        from longctx.eval.results.variants import parse_variant
        from longctx.eval.running.lengths import parse_length

        from ..checkpoint import locate
        from ..folders import refuse_inside, refuse_other_than_folder

        refuse_other_than_folder(self.out)
        target = parse_length(self.target, "--target")
        for candidate in self.candidates:
            parse_variant(candidate)
        tokens = _number(self.tokens) if self.tokens else None
        if (self.out / "choice.json").exists() and not self.overwrite:
            raise RunError(f"{self.out} holds a choice: name another --out, or pass --overwrite.")
        refuse_inside(self.out, locate(self.model))
        model, tokenizer = self.device_options.load(self.model)
        choice = choose(
            model,
            tokenizer,
            target,
            candidates=self.candidates or None,
            settings=self.settings,
            folder=self.out,
            batch_tokens=self.batch_tokens,
            replace=self.replace,
        )
        print_choice(choice)
        write_choice(choice, self.out, overwrite=self.overwrite)
        print(self._command(choice.recommended))
        if tokens is not None:
            print(self._training(target, tokens))
        print(f"choice.json and the sweeps keys/ and inside/ are in {self.out}")
        return 0

    def _command(self, recommended: str) -> str:
        """The command that makes what is recommended."""
        model = shlex.quote(self.model)
        if recommended == "none":
            return f"longctx train {model} --help   # nothing untrained reads that far"
        if recommended.startswith("read:"):
            from ..reading.read import parse_reading

            fields = dataclasses.asdict(parse_reading(recommended)).items()
            said = (
                f"--{key.replace('_', '-')} {value}" for key, value in fields if value is not None
            )
            return f"longctx read {model} {' '.join(said)} --document FILE --question …"
        method = shlex.quote(recommended.replace(" + ", "+"))
        replace = " --replace" if self.replace else ""
        return f"longctx extend {model} OUT --method {method}{replace}"

    def _training(self, target: int, tokens: int) -> str:
        """What to train with so many tokens."""
        batch = max(1, _BATCH // target)
        steps = max(1, tokens // (batch * target))
        replace = " --replace" if self.replace else ""
        return (
            f"With {tokens:,} tokens of training (docs/finetuning.md tells what training added to "
            "the embedded model):\n"
            f"longctx train {shlex.quote(self.model)} --method linear:target={target}{replace} "
            f"--data CONVERSATIONS --max-length {target} --max-steps {steps} --batch-size "
            f"{batch} --output-dir OUT"
        )


def _number(text: str) -> int:
    """Tokens as people write them: 500000, 500k, 20M, 1B."""
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    digits = text[:-1] if scale > 1 else text
    try:
        found = round(float(digits) * scale)
    except (ValueError, OverflowError) as error:
        raise RunError(f"--tokens {text}: expected a number such as 500k or 20M.") from error
    if found < 1:
        raise RunError(f"--tokens {text}: expected at least 1.")
    return found


COMMAND = Auto
