"""The limits around requests: how many, how long, whose, and what the server behind them offers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from nha.serve.limits import VARIABLE, Limits, Policy, Refused, check_fields, count_prompt, limit_length


class Server:
    """An application that answers with the body it got, once it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.bodies: list[bytes] = []
        self.running = self.most = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        self.bodies.append((await receive()).get("body", b""))
        await self.go.wait()
        self.running -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class Tokenizer:
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0] * len(text)}

    def apply_chat_template(self, messages: list[dict], **options: Any) -> dict[str, list[int]]:
        return self("".join(message["content"] for message in messages))


def limits(monkeypatch, server: Server, **policy: Any) -> Limits:
    monkeypatch.setenv(VARIABLE, Policy(**{"max_requests": 2, **policy}).to_json())
    made = Limits(server)
    made.tokenizer = Tokenizer()
    return made


async def ask(app: Limits, body: Any, path: str = "/v1/completions", key: str = "") -> tuple[int, dict]:
    sent: list[Any] = []
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def receive() -> Any:
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    await app({"type": "http", "path": path, "method": "POST", "headers": headers}, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_more_requests_than_allowed_are_told_to_come_back(monkeypatch):
    async def main() -> list[int]:
        server = Server()
        app = limits(monkeypatch, server)
        asked = [asyncio.create_task(ask(app, {})) for _ in range(3)]
        await asyncio.sleep(0.01)
        server.go.set()
        first = [status for status, _ in await asyncio.gather(*asked)]
        return [*first, (await ask(app, {}))[0]]

    assert asyncio.run(main()) == [200, 200, 429, 200]


def test_the_server_gets_the_directory_of_the_model_that_a_client_names(monkeypatch):
    async def main() -> list[str]:
        server = Server()
        app = limits(monkeypatch, server, model="/models/m", max_length=100, name="m")
        server.go.set()
        for name in ("m", "/models/m", "other"):
            await ask(app, {"prompt": "abc", "model": name})
        return [json.loads(body)["model"] for body in server.bodies]

    assert asyncio.run(main()) == ["/models/m", "/models/m", "other"]


def test_where_the_policy_names_a_model_requests_take_turns(monkeypatch):
    async def main() -> int:
        server = Server()
        app = limits(monkeypatch, server, max_requests=8, model="m", max_length=100)
        server.go.set()
        await asyncio.gather(*(ask(app, {"prompt": "abc"}) for _ in range(5)))
        return server.most

    assert asyncio.run(main()) == 1


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"not json", 400),
        ([1], 400),
        ({"prompt": "a" * 101}, 400),
        ({"prompt": "abc", "max_tokens": 98}, 400),
        ({"prompt": "abc", "max_tokens": 0}, 400),
        ({"prompt": 3}, 400),
        ({"messages": [{"role": "user"}]}, 400),
        ({"prompt": "abc", "n": 2}, 400),
        ({"prompt": "abc", "max_tokens": 97}, 200),
        ({"prompt": "abc", "n": 1}, 200),
    ],
)
def test_requests_are_checked_before_the_server_sees_them(body, status, monkeypatch):
    async def main() -> tuple[int, int]:
        server = Server()
        server.go.set()
        app = limits(monkeypatch, server, model="m", max_length=100)
        found, _ = await ask(app, body)
        assert app.active == 0
        return found, len(server.bodies)

    assert asyncio.run(main()) == (status, int(status == 200))


def test_a_key_is_asked_for(monkeypatch):
    async def main() -> list[int]:
        server = Server()
        server.go.set()
        app = limits(monkeypatch, server, key="secret")
        return [(await ask(app, {}, key=key))[0] for key in ("", "secrets", "secret")]

    assert asyncio.run(main()) == [401, 401, 200]


def test_an_answer_without_a_length_gets_what_is_left():
    assert limit_length({"prompt": "a"}, 60, 100)["max_tokens"] == 40
    assert limit_length({"max_completion_tokens": 5}, 60, 100)["max_completion_tokens"] == 5


def test_fields_that_the_server_would_ignore_are_named():
    for name, value in (("logprobs", 2), ("tools", [{}]), ("best_of", 3)):
        with pytest.raises(Refused, match=name):
            check_fields({name: value})
    check_fields({"logprobs": False, "n": 1, "tools": None})


def test_chat_is_counted_with_its_template():
    assert count_prompt(Tokenizer(), {"messages": [{"role": "user", "content": "hello"}]}) == 5
