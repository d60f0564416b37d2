"""Small tokenizers, trained on a few pages, of the kinds that llama.cpp knows and of others."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from longctx.prompts.haystacks import held_in

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIZE = 640
_SPECIAL = ["<s>", "</s>", "<pad>"]


def _byte_level(steps: list[Any], *, ignore_merges: bool = False) -> Tokenizer:
    made = Tokenizer(BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=SIZE, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text[:20_000] for text in held_in().documents[:8]], trainer)
    return made


def _split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _sentencepiece(*, whole: bool = True, metaspace: bool = False) -> Tokenizer:
    """Byte fallback and "▁" for spaces, with all merges that the tokens allow, or not."""
    text = [document[:20_000] for document in held_in().documents[:8]]
    source = Tokenizer(BPE(unk_token="<unk>"))
    source.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore[reportAttributeAccessIssue]
    source.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]+"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    trainer = BpeTrainer(vocab_size=380, special_tokens=["<unk>"], show_progress=False)
    source.train_from_iterator(text, trainer)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [t for t, _ in sorted(source.get_vocab().items(), key=lambda kv: kv[1])[1:]]
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *bytes_, *pieces])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    if not whole:
        several = [pair for pair in merges if sum("".join(p) == "".join(pair) for p in merges) > 1]
        merges.remove(several[-1])
    made = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        made.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return made


def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind, with BOS before a text."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    made: dict[str, Any] = {
        "gpt-2": lambda: _byte_level([byte_level]),
        "smollm": lambda: _byte_level([digits, byte_level]),
        "qwen2": lambda: _byte_level(_split(QWEN)),
        "llama-bpe": lambda: _byte_level(_split(LLAMA3), ignore_merges=True),
        "llama": _sentencepiece,
        "metaspace": lambda: _sentencepiece(metaspace=True),
        "other expression": lambda: _byte_level(_split(r"\p{N}{1,3}|\s+|\S+")),
        "prefix space": lambda: _byte_level([pre_tokenizers.ByteLevel(add_prefix_space=True)]),
        "missing merge": lambda: _sentencepiece(whole=False),
        "unigram": lambda: Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0)], 0)),
    }
    tokenizer: Tokenizer = made[kind]()
    if tokenizer.token_to_id("<s>") is not None:
        tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        if kind in ("llama", "metaspace", "missing merge", "unigram") else None,
    )  # fmt: skip
