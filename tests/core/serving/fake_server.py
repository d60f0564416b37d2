"""A server that speaks the engines' interfaces and computes a transformers model, in a thread."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(slots=True)
class Served:
    """What the server holds."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    window: int
    asked: list[str] = field(default_factory=list)
    """Paths, in the order in which they were asked for."""

    def logprobs(self, ids: list[int]) -> Tensor:
        """All log-probabilities [N, vocabulary], float32."""
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits.float().log_softmax(-1)

    def get(self, path: str) -> Any:
        """Answer a GET."""
        return {
            "/v1/models": {"data": [{"id": "fake", "max_model_len": self.window}]},
            "/props": {"default_generation_settings": {"n_ctx": self.window}},
            "/get_server_info": {"context_length": self.window},
        }.get(path)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Answer a POST; None is 404, a string 400."""
        if path == "/tokenize":
            return {
                "tokens": self.tokenizer(body.get("prompt") or body.get("content"))["input_ids"]
            }
        if path == "/completion":
            row = self.logprobs(body["prompt"])[-1]
            top = [{"id": i, "logprob": float(p)} for i, p in enumerate(row)]
            return {"completion_probabilities": [{"top_logprobs": top[: body["n_probs"]]}]}
        if path == "/v1/completions" and isinstance(body["prompt"], str):
            ids = self.tokenizer(body["prompt"], return_tensors="pt")["input_ids"]
            assert isinstance(ids, Tensor)
            said = self.model.generate(  # pyright: ignore[reportCallIssue]
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=body["max_tokens"],
            )  # fmt: skip
            text = self.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
            return {"choices": [{"text": text}]}
        ids: Any = body.get("input_ids") or body.get("prompt")
        if path not in ("/generate", "/v1/completions"):
            return None
        if len(ids) + 1 > self.window:
            return f"a prompt of {len(ids)} tokens is beyond {self.window}"
        rows = self.logprobs(ids)
        own = [None, *(float(rows[i - 1, token]) for i, token in enumerate(ids) if i)]
        if path == "/generate":
            return {
                "meta_info": {
                    "input_token_logprobs": [[p, t, None] for p, t in zip(own, ids, strict=True)]
                }
            }
        named = [
            p if p is None else {str(t): {"logprob": p}} for p, t in zip(own, ids, strict=True)
        ]
        return {"choices": [{"text": "", "prompt_logprobs": named}]}


@contextmanager
def running(served: Served) -> Generator[str]:
    """The server's address, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(served.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(served.post(self.path, body))

        def _answer(self, found: Any) -> None:
            served.asked.append(self.path)
            code = 404 if found is None else 400 if isinstance(found, str) else 200
            text = json.dumps({"message": found} if code != 200 else found).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
