r"""Extend a model that you already have, look at the proof, save it, and take the method off again.

    python examples/patch_existing_model.py
    python examples/patch_existing_model.py --model smollm2 --method yarn:target=16384 \
        --out smollm2-16k

Without options it runs on the embedded model, in a few seconds on two cores. `--model` takes a
checkpoint folder, a hub id or a GGUF file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import longctx


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of every token, float32 [1, S, V]."""
    with torch.inference_mode():
        return model(input_ids=ids.to(model.device)).logits.float().cpu()


def main() -> None:
    """Extend, save, load as anybody would, remove."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="checkpoint folder, hub id or GGUF file")
    parser.add_argument("--method", default="yarn:4", help="as `longctx methods` lists them")
    parser.add_argument("--tokens", type=int, default=600, help="length of the input compared")
    parser.add_argument("--out", type=Path, default=Path("runs/patched"), help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint there")
    args = parser.parse_args()

    # Any decoder of transformers will do in place of this: the patch goes onto the instance.
    model, tokenizer = longctx.load(args.model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (1, args.tokens), generator=generator)
    before = logits_of(model, ids)

    with longctx.extend(model, args.method) as patch:
        print(patch.report())
        extended = logits_of(model, ids)
        saved = longctx.save(model, tokenizer, args.out, overwrite=args.overwrite)
        print(saved.message)

    after = logits_of(model, ids)
    print(f"logits moved by up to {(extended - before).abs().max():.3g} under {args.method}")
    print(f"patch removed: the same logits to the last bit: {torch.equal(after, before)}")
    if saved.plain:  # nothing of longctx is needed to read what was saved
        plain = AutoModelForCausalLM.from_pretrained(
            saved.path, dtype=model.dtype, device_map={"": model.device}
        )
        apart = (logits_of(plain, ids) - extended).abs().max()
        print(f"plain transformers reads {saved.path}: logits within {apart:.2g}")


if __name__ == "__main__":
    try:
        main()
    except longctx.LongctxError as error:
        sys.exit(f"{error}")
