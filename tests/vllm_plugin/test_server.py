"""`nha serve` on both servers, asked by OpenAI's client as users ask."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_plugin.material import ascii_tokenizer, greedy, make_prompts

pytestmark = pytest.mark.vllm
BACKENDS, KEY, LENGTH = ("vllm", "transformers"), "a-key-of-tests", 512
START_S = 400


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


class Server:
    """`nha serve` in a process of its own."""

    def __init__(self, path: Path, backend: str, log: Path, *settings: str):
        self.backend, self.path, self.log, self.port = backend, path, log, free_port()
        sizes = ["--max-length", str(LENGTH), "--max-requests", "64", "--dtype", "float32", "--drain-s", "60"]
        options = ["--", "--enforce-eager"] if backend == "vllm" else []
        command = [
            "nha",
            "serve",
            str(path),
            "--backend",
            backend,
            "--port",
            str(self.port),
            *sizes,
            *settings,
            *options,
        ]
        cache = {"VLLM_CPU_KVCACHE_SPACE": "1", "NHA_API_KEY": KEY}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command], env=os.environ | cache, stdout=file, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + START_S
        while not healthy(self.port):
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(log.read_text()[-4000:])
            time.sleep(0.5)

    def client(self, key: str = KEY) -> Any:
        import openai  # pyright: ignore[reportMissingImports]

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=120)

    def complete(self, prompt: str, **options: Any) -> Any:
        defaults = {"temperature": 0, "max_tokens": 12}
        return self.client().completions.create(model=str(self.path), prompt=prompt, **(defaults | options))


@pytest.fixture(scope="module", params=BACKENDS)
def server(request, hybrid, tmp_path_factory):
    started = Server(hybrid, request.param, tmp_path_factory.mktemp("log") / "server.log")
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="module")
def asked(hybrid):
    """Prompts and what transformers writes after each, as text."""
    tokenizer = ascii_tokenizer()
    prompts = [tokenizer.decode(ids) for ids in make_prompts([20, 33, 60, 5], seed=4)]
    written = greedy(hybrid, [tokenizer(prompt)["input_ids"] for prompt in prompts], 12)
    return [(prompt, tokenizer.decode(ids)) for prompt, ids in zip(prompts, written, strict=True)]


def test_completions_are_those_of_transformers(server, asked):
    for prompt, written in asked:
        choice = server.complete(prompt).choices[0]
        assert choice.text == written
        assert choice.finish_reason == "length"


def test_chat_and_streaming_write_the_same(server):
    options: dict[str, Any] = dict(
        model=str(server.path), messages=[{"role": "user", "content": "how are you"}], temperature=0, max_tokens=12
    )
    whole = server.client().chat.completions.create(**options)
    parts = server.client().chat.completions.create(**options, stream=True)
    joined = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert joined == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 12


def test_a_stop_string_ends_the_answer(server, asked):
    prompt, written = asked[0]
    stop = written[6]
    choice = server.complete(prompt, stop=[stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert written.startswith(choice.text)  # transformers' server ends with the token that holds the string
    assert len(choice.text) <= written.index(stop) + 2


def test_a_seed_fixes_what_is_sampled(server, asked):
    options = {"temperature": 2.0, "max_tokens": 16}
    found = [server.complete(asked[3][0], seed=seed, **options).choices[0].text for seed in (7, 7, 8, 9, 10)]
    assert found[0] == found[1]
    assert len(set(found)) > 1


def test_several_answers_and_logprobs_are_given_or_refused_by_name(server, asked):
    import openai  # pyright: ignore[reportMissingImports]

    prompt = asked[0][0]
    if server.backend == "vllm":
        found = server.complete(prompt, n=2, temperature=1.0, seed=1, logprobs=2)
        assert len(found.choices) == 2
        assert len(found.choices[0].logprobs.token_logprobs) == 12
        return
    for name, options in (("n", {"n": 2}), ("logprobs", {"logprobs": 2})):
        with pytest.raises(openai.BadRequestError, match=f"no {name}"):
            server.complete(prompt, **options)


def test_clients_side_by_side_get_their_own_answers(server, asked):
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda pair: server.complete(pair[0]).choices[0].text, asked * 4))
    assert found == [written for _, written in asked * 4]


def test_broken_requests_are_answered_and_break_no_other(server, asked):
    import openai  # pyright: ignore[reportMissingImports]

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(server.complete, asked[1][0])
        with pytest.raises(openai.BadRequestError, match=str(LENGTH)):
            server.complete("? " * 600)
        with pytest.raises(openai.AuthenticationError):
            server.client("another").models.list()
        with pytest.raises(openai.APIStatusError):
            server.client().post("/completions", body=[1, 2], cast_to=object)
        with pytest.raises(openai.BadRequestError):
            server.complete(asked[0][0], max_tokens=-1)
        assert other.result().choices[0].text == asked[1][1]


def test_running_answers_end_after_sigterm(server, asked):
    new = 200
    parts = server.complete(asked[0][0], max_tokens=new, stream=True, stop=None, extra_body=ignore_end(server))
    received = [next(iter(parts))]
    server.process.send_signal(signal.SIGTERM)
    received += list(parts)
    text = "".join(part.choices[0].text or "" for part in received if part.choices)
    assert received[-1].choices == [] or received[-1].choices[0].finish_reason in ("length", "stop")
    assert len(text) > 20
    assert server.process.wait(timeout=90) in (0, -signal.SIGTERM)


def ignore_end(server: Server) -> dict[str, Any]:
    return {"ignore_eos": True} if server.backend == "vllm" else {}
