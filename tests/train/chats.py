"""Chat tokenizers and conversations for the tests, with ids and labels written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from longctx.train.data.conversations import Turn

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n\n' +"
    " message['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}"
)
# As Qwen3's: an answer is written differently once another turn follows it.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek-R1's: it asks for a thought, and writes answers without one.
HASTY = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:<think>{% endif %}"
)
VICUNISH = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'U: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ 'A: ' + message['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDLESS = (
    "{% for message in messages %}{{ '### ' + message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### assistant:' }}{% endif %}"
)

_CORPUS = (
    "Hello there, how are you?\n\nAnswer: it is fine, thank you.\nThe grass is green. USER: "
    "ASSISTANT: system user assistant\n\n\nWhat is the capital of France? Paris, of course.\n"
)


@lru_cache
def tokenizer(template: str | None = CHATML, *, bos: bool = False) -> Any:
    """A byte-level BPE that merges line breaks; the same object for the same arguments."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([_CORPUS] * 20, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
    )


def turns(*texts: str, system: str = "") -> tuple[Turn, ...]:
    """Questions and answers in turn, after a system turn if there is one."""
    roles = ("user", "assistant") * len(texts)
    said = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=False))
    return (Turn("system", system), *said) if system else said


def by_hand(tokenizer: Any, said: Sequence[Turn]) -> tuple[list[int], list[int]]:
    """ChatML as it is served: the prompt in ids, then the answer in ids, piece by piece."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    ids: list[int] = []
    labels: list[int] = []
    for turn in said:
        head, tail = f"<|im_start|>{turn.role}\n", f"{turn.text}<|im_end|>"
        if turn.role == "assistant":
            prompt, answer, rest = encode(head), encode(tail), encode("\n")
            ids += prompt + answer + rest
            labels += [-100] * len(prompt) + answer + [-100] * len(rest)
        else:
            piece = encode(f"{head}{tail}\n")
            ids += piece
            labels += [-100] * len(piece)
    return ids, labels
