"""The command that searches divisors: `longctx search`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from longctx.eval.searching.settings import SearchSettings

from ..errors import RunError
from .device_options import DeviceOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from longctx.eval import Passkey
    from longctx.eval.searching.search import FoundDivisors

__all__ = ["COMMAND", "Search"]

_NEARLY_ALL = 0.05  # nats per token of a key, which is a probability of 95%


@dataclass(frozen=True, slots=True)
class Search:
    """Search the divisors of longrope for one model and one length.

    An evolution from PI, NTK, YaRN and no change, judged by how well the model says keys at the new
    window and inside the old one. Ends with a sweep on other keys and texts, beside yarn and the
    model as it came. OUT gets longrope.json, which `longrope:@OUT/longrope.json` reads, and the
    sweep's files. The same command goes on where an interrupted one was.

    Examples:
        longctx search demo --target 2k --out runs/search
        longctx extend demo demo-2k --method longrope:@runs/search/longrope.json
        longctx search smollm2 --target 16k --prompts 48 --out runs/smollm2-search
    """

    model: Positional[str]
    """Checkpoint folder, hub id, GGUF file, or "demo"."""
    target: str
    """The new window: tokens such as 32768 or 32k."""
    out: Path
    """Folder for the divisors, the evaluations and the sweep."""
    settings: Annotated[SearchSettings, arg(name="")] = field(default_factory=SearchSettings)
    report_samples: int = 40
    """Passkey prompts per method and length of the sweep at the end; 0 leaves it out."""
    report_seed: int = 1
    """Of those prompts."""
    batch_tokens: int = 16_384
    """Tokens forwarded at a time; halved on out-of-memory in the sweep."""
    replace: bool = False
    """Replace the RoPE scaling that the checkpoint ships with."""
    overwrite: bool = False
    """Replace the divisors and the sweep that are there; evaluations of the same settings stay."""
    device_options: Annotated[DeviceOptions, arg(name="")] = field(default_factory=DeviceOptions)

    def run(self) -> int:
        """Load, search, write what was found, measure on other prompts."""
        from longctx.eval import Passkey
        from longctx.eval.running.lengths import parse_length
        from longctx.eval.searching.search import search, write_found

        from ..checkpoint import locate
        from ..folders import refuse_inside, refuse_other_than_folder

        refuse_other_than_folder(self.out)
        target = parse_length(self.target, "--target")
        keys = (  # here, to be refused before the search, which may take hours
            Passkey(samples=self.report_samples, seed=self.report_seed)
            if self.report_samples
            else None
        )
        path = self.out / "longrope.json"
        interrupted = (  # the divisors are written before the report, of which this is the last
            keys is not None
            and (self.out / "evaluations.jsonl").exists()
            and not (self.out / "sweep.svg").exists()
        )
        if path.exists() and not interrupted and not self.overwrite:
            raise RunError(f"{path} is there: name another --out, or pass --overwrite.")
        refuse_inside(self.out, locate(self.model))
        model, tokenizer = self.device_options.load(self.model)
        found = search(
            model,
            tokenizer,
            target,
            settings=self.settings,
            folder=self.out,
            batch_tokens=self.batch_tokens,
            replace=self.replace,
        )
        write_found(found, path, overwrite=self.overwrite)
        known = ", ".join(f"{name} {loss:.3g}" for name, loss in found.known_losses.items())
        best, least = min(found.known_losses.items(), key=lambda item: item[1])
        result = (
            f"no better than {best}, whose divisors these are" if found.loss >= least else "new"
        )
        print(
            f"{found.evaluations} divisors tried; this run took {found.seconds / 60:.1f} minutes. "
            f"Loss on the finalists' prompts: {found.loss:.3g} ({known}), in nats per token of the "
            f"key. The result: {result}.\n--method longrope:@{path}"
        )
        if least < _NEARLY_ALL:
            print(
                f"note: {best} says nearly all keys of these prompts as it is ({least:.3f} nats): "
                "there was little to find. A longer target tells more."
            )
        return 0 if keys is None else self._report(model, tokenizer, found, target, keys)

    def _report(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        found: FoundDivisors,
        target: int,
        keys: Passkey,
    ) -> int:
        """Sweep on keys and texts of the evaluation, and compare with yarn."""
        from longctx.eval import (
            Perplexity,
            compare,
            print_comparison,
            print_sweep,
            sweep,
            write_sweep,
        )
        from longctx.eval.results.variants import original_window

        factor = found.fields["factor"]
        window = original_window(model)
        result = sweep(
            model,
            tokenizer,
            [keys, Perplexity()],
            [window or target, target],
            methods=[f"yarn:{factor!r}", None, found.method],
            results=self.out / "results.jsonl",
            batch_tokens=self.batch_tokens,
            replace=self.replace,
            overwrite=self.overwrite,
        )
        print_sweep(result)
        print_comparison(compare({"search": result}))
        write_sweep(result, self.out, overwrite=self.overwrite)
        return 1 if any(row.failed for row in result.rows) else 0


COMMAND = Search
