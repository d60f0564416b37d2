"""Where the model speaks in what a chat template writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from longctx.errors import DataError
from longctx.train.data.chat_template import (
    ChatTemplate,
    PrefixError,
    chat_template,
    vicuna,
)
from longctx.train.data.conversations import Turn

from .. import chats

SAID = {
    "one exchange": chats.turns("Hi", "Hello!"),
    "three": chats.turns("Hi", "Hello!", "And?", "Fine.", "Bye", "Bye."),
    "system": chats.turns("Hi", "Hello!", "Hi", "Hello!", system="Be kind."),
    "white space": chats.turns("  Hi \n", "\n Hello!\n\n", "\t", " x"),
    "what the template writes": chats.turns("assistant\n", "user\n", "[INST]", "[/INST] USER: "),
}


@pytest.mark.parametrize("said", SAID.values(), ids=list(SAID))
@pytest.mark.parametrize("source", [chats.CHATML, chats.LLAMA3, chats.LLAMA2, "vicuna"])
def test_linear_rendering_equals_prefixes(source: str, said: tuple[Turn, ...]) -> None:
    tokenizer = chats.tokenizer()
    source = vicuna(tokenizer) if source == "vicuna" else source
    if source == chats.LLAMA2 and said[0].role == "system":
        pytest.skip("it refuses system turns")
    template = ChatTemplate(tokenizer, source, "test")
    assert template.render(said) == template.render_by_prefixes(said)


def test_spans_of_chatml_written_out() -> None:
    rendered = chat_template(chats.tokenizer()).render(chats.turns("q1", "a1", "q2", "a2"))
    assert [rendered.text[slice(*span)] for span in rendered.spans] == [
        "a1<|im_end|>\n",
        "a2<|im_end|>\n",
    ]


def test_rendering_takes_linear_time() -> None:
    calls: list[int] = []

    class Counting:
        """Counts the messages that are rendered."""

        def apply_chat_template(self, messages: list[Any], **settings: Any) -> str:
            calls.append(len(messages))
            return chats.tokenizer().apply_chat_template(messages, **settings)

    counting: Any = Counting()
    template = ChatTemplate(counting, chats.CHATML, "test")
    template.render(chats.turns("q", "a"))
    calls.clear()
    template.render(chats.turns(*["q", "a"] * 100))
    assert calls == [200]


@pytest.mark.parametrize("bos", [False, True])
def test_vicuna_as_fastchat_writes_it(bos: bool) -> None:
    tokenizer = chats.tokenizer(None, bos=bos)
    template = chat_template(tokenizer, "vicuna")
    start = "<s>" if bos else ""
    # fastchat.conversation.get_conv_template("vicuna_v1.1").get_prompt(), with this </s>.
    introduction = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    rendered = template.render(chats.turns("Hi", "Hello!", "And?", "Fine."))
    assert rendered.text == (
        f"{start}{introduction} USER: Hi ASSISTANT: Hello!<|im_end|>USER: And? "
        "ASSISTANT: Fine.<|im_end|>"
    )
    assert [rendered.text[slice(*span)] for span in rendered.spans] == [
        " Hello!<|im_end|>",
        " Fine.<|im_end|>",
    ]
    with_system = template.render(chats.turns("Hi", "Hello!", system="Be kind."))
    assert with_system.text == f"{start}Be kind. USER: Hi ASSISTANT: Hello!<|im_end|>"


def test_a_template_that_forgets_renders_each_answer_as_it_is_served() -> None:
    template = chat_template(chats.tokenizer(chats.FORGETFUL))
    assert template.render(chats.turns("q", "a")).text.endswith("<think></think>a<|im_end|>\n")
    said = chats.turns("q", "a", "q", "a")
    with pytest.raises(PrefixError, match=r"does not preserve prefixes: up to turn 2 of 4.*vicuna"):
        template.render(said)
    last = template.render_last(said)
    assert last.text.count("<think>") == 1
    (span,) = last.spans
    assert last.text[slice(*span)] == "<think></think>a<|im_end|>\n"
    with pytest.raises(DataError, match="does not write an answer as it is served"):
        chat_template(chats.tokenizer(chats.HASTY)).render_last(said)


def test_what_is_not_written_is_named() -> None:
    fields = json.dumps({"name": "Jo", "tool_calls": [{"function": {"name": "f"}}], "id": 3})
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    said = (Turn("user", "q"), Turn("assistant", "", fields=fields), Turn("tool", "7"))
    deaf, able = (
        chat_template(chats.tokenizer(source)) for source in (chats.VICUNISH, chats.TOOLS)
    )
    text = deaf.render_by_prefixes([*said, Turn("assistant", "a")], tools).text
    found = list(deaf.unused([*said, Turn("assistant", "a")], tools, text))
    assert found == ["name", "tool_calls", "call", "id", "tools", "tool"]
    text = able.render_by_prefixes([*said, Turn("assistant", "a")], tools).text
    assert list(able.unused([*said, Turn("assistant", "a")], tools, text)) == ["name", "id"]


def test_what_a_template_refuses_is_named() -> None:
    template = chat_template(chats.tokenizer(chats.LLAMA2))
    with pytest.raises(DataError, match=r"refuses the roles system.*System role not supported"):
        template.render(chats.turns("q", "a", system="s"))


def test_a_base_model_needs_a_template_by_name(tmp_path: Path) -> None:
    base = chats.tokenizer(None)
    with pytest.raises(DataError, match=r"no chat template, as base models do.*--template vicuna"):
        chat_template(base)
    with pytest.raises(DataError, match="template='vicunna': expected 'vicuna' or the path"):
        chat_template(base, "vicunna")
    several = copy.deepcopy(base)
    several.chat_template = {"rag": chats.CHATML, "tool_use": chats.CHATML}
    with pytest.raises(DataError, match="names no default among its chat templates"):
        chat_template(several)
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="expected a Jinja file in UTF-8"):
        chat_template(base, str(tmp_path / "bytes.jinja"))
    file = tmp_path / "chatml.jinja"
    file.write_text(chats.CHATML)
    said = chats.turns("q", "a")
    assert chat_template(base, str(file)).render(said) == chat_template(chats.tokenizer()).render(
        said
    )
