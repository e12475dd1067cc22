"""`nha serve --memory`: two servers on one directory, and none reads a prompt that either has read."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vllm_plugin.material import ascii_tokenizer, greedy, make_prompts
from tests.vllm_plugin.test_server import Server

pytestmark = pytest.mark.vllm
BLOCK, NEW = 32, 12


def found(server: Server) -> list[int]:
    """How many tokens of each prompt so far a server found."""
    return [int(number) for number in re.findall(r"(\d+) of \d+ tokens found in", server.log.read_text())]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("memory") / "store"


@pytest.fixture(scope="module")
def servers(hybrid, store, tmp_path_factory):
    options = ("--memory", str(store), "--memory-block", str(BLOCK))
    logs = [tmp_path_factory.mktemp("log") / f"{name}.log" for name in "ab"]
    with ThreadPoolExecutor(2) as pool:
        started = list(pool.map(lambda log: Server(hybrid, "transformers", log, *options), logs))
    yield started
    for server in started:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def asked(hybrid):
    """Prompts, of which the second goes on from the first, and what transformers writes after each."""
    tokenizer = ascii_tokenizer()
    prompts = [tokenizer.decode(ids) for ids in make_prompts([110, 90, 70, 20], seed=5)]
    prompts[1] = prompts[0] + prompts[1]
    written = greedy(hybrid, [tokenizer(prompt)["input_ids"] for prompt in prompts], NEW)
    return [(prompt, tokenizer.decode(ids)) for prompt, ids in zip(prompts, written, strict=True)]


def test_what_one_server_read_the_other_finds(servers, asked, store):
    first, second = servers
    (prompt, written), (longer, more) = asked[:2]
    assert first.complete(prompt).choices[0].text == written
    assert found(first) == [0]
    length = len(ascii_tokenizer()(prompt)["input_ids"])
    assert second.complete(prompt).choices[0].text == written
    assert found(second) == [(length - 1) // BLOCK * BLOCK]
    assert second.complete(longer).choices[0].text == more
    assert found(second)[1] >= found(second)[0]
    parts = first.complete(prompt, stream=True)
    assert "".join(part.choices[0].text or "" for part in parts if part.choices) == written
    assert found(first) == [0, found(second)[0]]
    assert store.stat().st_mode & 0o777 == 0o700


def test_a_damaged_entry_is_read_again(servers, asked, store):
    server = servers[0]
    for path in store.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    assert server.complete(asked[0][0]).choices[0].text == asked[0][1]
    assert found(server)[-1] == 0
    assert server.complete(asked[0][0]).choices[0].text == asked[0][1]
    assert found(server)[-1] > 0
    assert "Traceback" not in server.log.read_text()


def test_both_answer_many_clients_at_once(servers, asked):
    with ThreadPoolExecutor(16) as pool:
        pairs = [(server, *each) for server in servers for each in asked * 3]
        texts = list(pool.map(lambda pair: pair[0].complete(pair[1]).choices[0].text, pairs))
    assert texts == [written for _, _, written in pairs]
