"""Limits around every request to a server, as ASGI middleware: how many at a time, how long, and whose."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
VARIABLE = "NHA_SERVE_POLICY"
MAX_BODY = 64 << 20  # bytes
DEFAULT_NEW_TOKENS = 1024  # where a request does not say
ANSWERS = ("/v1/completions", "/v1/chat/completions")
# transformers' server ignores these without a word.
NOT_OFFERED = ("n", "best_of", "logprobs", "top_logprobs", "echo", "tools", "response_format", "presence_penalty")


@dataclass(frozen=True)
class Policy:
    """Limits of a server.

    Attributes:
        max_requests: requests at a time.
        key: what a client must name as its key; None lets everybody in.
        model: directory of the model, whose tokenizer counts tokens; None leaves length and fields to the server.
        max_length: tokens of a prompt and its answer.
        name: what clients may call the model besides its directory.

    >>> Policy.of_json(Policy(2).to_json())
    Policy(max_requests=2, key=None, model=None, max_length=None, name=None)
    """

    max_requests: int
    key: str | None = None
    model: str | None = None
    max_length: int | None = None
    name: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> Policy:
        return cls(**json.loads(text))


class Refused(Exception):
    """A request that is answered with an error: an HTTP status and a line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def check_key(policy: Policy, headers: list[tuple[bytes, bytes]]) -> None:
    """Raise Refused (401) unless a request names the key."""
    given = next((value for name, value in headers if name.lower() == b"authorization"), b"")
    if policy.key is not None and not hmac.compare_digest(given, f"Bearer {policy.key}".encode()):
        raise Refused(401, "expected an API key that this server knows, got none or another")


def check_fields(body: Any) -> None:
    """Raise Refused (400) for a body that is no request, and for what transformers' server would silently ignore."""
    if not isinstance(body, dict):
        raise Refused(400, f"expected a JSON object, got {type(body).__name__}")
    for name in NOT_OFFERED:
        value = body.get(name)
        if value and not (name in ("n", "best_of") and value == 1):
            raise Refused(400, f"expected no {name}, got {value!r}: transformers' server does not offer it, vLLM does")


def count_prompt(tokenizer: Any, body: dict[str, Any]) -> int:
    """Tokens of a request's prompt or messages. Raises Refused (400) for any that cannot be read."""
    try:
        if "messages" not in body:
            return len(tokenizer(body["prompt"])["input_ids"])
        found = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=True)
        return len(found["input_ids"])
    except Exception as error:  # whatever a template raises, the messages are the reason
        text = " ".join(str(error).split())
        raise Refused(
            400, f"expected a prompt or messages that can be read, got {type(error).__name__}: {text}"
        ) from None


def limit_length(body: dict[str, Any], prompt: int, max_length: int) -> dict[str, Any]:
    """The body with a number of new tokens that fits. Raises Refused (400) where nothing or too much is asked for.

    >>> limit_length({"prompt": "a"}, 90, 100)["max_tokens"]
    10
    """
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    asked = body.get(name)
    room = max_length - prompt
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise Refused(400, f"expected {name} to be an int >= 1, got {asked!r}")
    if room < (asked or 1):
        raise Refused(400, f"expected at most {max_length} tokens, got {prompt} and {asked or 1} new ones")
    return body | {name: asked or min(room, DEFAULT_NEW_TOKENS)}


async def read_body(receive: Receive) -> bytes:
    """The body of a request. Raises Refused (413) for one that is too large."""
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY:
            raise Refused(413, f"expected at most {MAX_BODY} bytes, got more")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body first, and what comes later then."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def answer(send: Send, refused: Refused) -> None:
    """Send an error as OpenAI's API words it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    error = {
        "message": str(refused),
        "type": kinds.get(refused.status, "invalid_request_error"),
        "code": refused.status,
    }
    headers = [(b"content-type", b"application/json")]
    headers += [(b"retry-after", b"1")] if refused.status == 429 else []
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


class Limits:
    """Counts the requests that are being answered, and refuses what the policy does not allow.

    The policy is in the environment variable NHA_SERVE_POLICY: vLLM makes middleware by its name alone. Where the
    policy names a model, requests are answered one at a time: transformers' server seeds one generator for all.
    """

    def __init__(self, app: Any):
        self.app = app
        self.policy = Policy.of_json(os.environ[VARIABLE])
        self.active = 0
        self.turn = asyncio.Lock()
        self.tokenizer: Any = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        try:
            check_key(self.policy, scope["headers"])
            if scope["method"] == "GET":
                await self.app(scope, receive, send)
                return
            if self.active >= self.policy.max_requests:
                raise Refused(429, f"expected at most {self.policy.max_requests} requests at a time, got more")
            self.active += 1
            try:
                await self.forward(scope, receive, send)
            finally:
                self.active -= 1
        except Refused as refused:
            await answer(send, refused)

    async def forward(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand a request to the server, in its turn and with a length that fits where the policy names a model."""
        if self.policy.model is None:
            await self.app(scope, receive, send)
            return
        if scope["path"] not in ANSWERS:
            raise Refused(404, f"expected {' or '.join(ANSWERS)}, got {scope['path']}")
        try:
            body = json.loads(await read_body(receive))
        except ValueError as error:
            raise Refused(400, f"expected JSON, got something else: {error}") from None
        check_fields(body)
        if self.policy.name is not None and body.get("model") == self.policy.name:
            body["model"] = self.policy.model
        body = limit_length(body, count_prompt(self.load_tokenizer(), body), self.policy.max_length or 0)
        async with self.turn:
            await self.app(scope, replay(json.dumps(body).encode(), receive), send)

    def load_tokenizer(self) -> Any:
        """The model's tokenizer, read when the first request comes."""
        if self.tokenizer is None:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(self.policy.model)
        return self.tokenizer
