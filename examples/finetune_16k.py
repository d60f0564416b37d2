r"""Fine-tune a model for a longer window, and measure keys and perplexity before and after.

    python examples/finetune_16k.py
    python examples/finetune_16k.py --model smollm2 --method yarn:2 --data chats.json \
        --max-length 16384 --max-steps 500 --lora-r 16 --gradient-checkpointing layers

Without options it takes the embedded model through a few updates at 512 tokens, which shows that
everything works and teaches it little: less than a minute on two cores. The second command is a
real one and needs a GPU; `longctx plan smollm2 --max-length 16384 --memory 24` says beforehand
whether it fits. `longctx train` does the same from the shell, with recipes and on several GPUs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import longctx
from longctx.eval import Passkey, Perplexity, print_sweep, sweep
from longctx.train import (
    Epochs,
    Lora,
    TokenizeSettings,
    Training,
    finetune,
    pack,
    prepare,
)


def main() -> None:
    """Load, measure, extend, train, save, measure."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="checkpoint folder, hub id or GGUF file")
    parser.add_argument("--method", default="linear:2", help="as `longctx methods` lists them")
    parser.add_argument(
        "--data", default="sample", help='conversations or texts; "sample" ships with longctx'
    )
    parser.add_argument(
        "--template", help='chat template, if the tokenizer has none: "vicuna" or a Jinja file'
    )
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--max-steps", type=int, default=10, help="updates of one row")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--lora-r", type=int, default=0, help="rank of LoRA; 0: all weights")
    parser.add_argument(
        "--gradient-checkpointing", choices=["none", "layers", "offload"], default="none"
    )
    parser.add_argument("--samples", type=int, default=5, help="prompts per length, to measure")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/finetune"))
    args = parser.parse_args()

    # What is trained is held in float32; a base that only carries adapters may be bfloat16.
    model, tokenizer = longctx.load(args.model, dtype="auto" if args.lora_r else "float32")
    if tokenizer.chat_template is None and args.template is None:
        args.template = "vicuna"
    patch = longctx.extend(model, args.method)
    print(patch.report())

    settings = TokenizeSettings(max_length=args.max_length, template=args.template)
    prepared = prepare(args.data, tokenizer, settings)
    print(prepared.report)
    done = finetune(
        model,
        tokenizer,
        Epochs(pack(prepared.dataset, args.max_length), rows=args.max_steps),
        Training(
            learning_rate=args.learning_rate,
            warmup=args.max_steps // 10,
            gradient_checkpointing=args.gradient_checkpointing,
        ),
        output_dir=args.output_dir,
        lora=Lora(r=args.lora_r) if args.lora_r else None,
    )
    print(f"{done.updates} updates: loss {done.losses[0]:.3f} → {done.losses[-1]:.3f}")
    print(done.saved.message)

    tasks = [Passkey(samples=args.samples), Perplexity(windows=args.samples)]
    lengths = [patch.report().original_window, args.max_length]
    for source, methods in ((args.model, ["none", args.method]), (done.saved.path, ["none"])):
        measured, its_tokenizer = longctx.load(source)
        print_sweep(sweep(measured, its_tokenizer, tasks, lengths, methods=methods))


if __name__ == "__main__":
    try:
        main()
    except longctx.LongctxError as error:
        sys.exit(f"{error}")
