"""Ask a running `nha serve` as many clients do at once, and count answers that are lost, late or another's.

    nha serve my-hybrid --port 8000 &
    python experiments/serve_load.py my-hybrid --url http://127.0.0.1:8000/v1 --clients 64 --seconds 600

Every client asks for greedy answers to prompts whose answers are known from a first pass, one at a time. A request
that the server refuses because there are too many (HTTP 429) is asked again; one in twenty is a broken one, which has
to be refused. Only loopback addresses are asked. Needs openai.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import random
import statistics
import threading
import time
from collections import Counter
from typing import Any
from urllib.parse import urlparse

PROMPTS, NEW_TOKENS, MAX_REQUESTS = 16, 16, 200_000
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")


def check_loopback(url: str) -> None:
    """Raise ValueError for an address that is not this machine's own."""
    host = urlparse(url).hostname or ""
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        raise ValueError(f"expected a loopback address, got {host}")


def make_prompts(seed: int = 0) -> list[str]:
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(2, 60))) for _ in range(PROMPTS)]


def ask(client: Any, model: str, prompt: str) -> str:
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=NEW_TOKENS, temperature=0)
    return answer.choices[0].text


def run_client(
    number: int, client: Any, model: str, known: dict[str, str], end: float, seen: Counter, waits: list
) -> None:
    """Ask until the time is over; counts go to `seen`, seconds of answers to `waits`."""
    import openai  # pyright: ignore[reportMissingImports]

    source = random.Random(number)
    while time.monotonic() < end and seen["asked"] < MAX_REQUESTS:
        prompt, start = source.choice(sorted(known)), time.monotonic()
        seen["asked"] += 1
        if source.random() < 0.05:
            try:
                client.post("/completions", body=["broken"], cast_to=object)
                seen["broken ones answered"] += 1
            except openai.APIStatusError:
                seen["broken ones refused"] += 1
            continue
        try:
            text = ask(client, model, prompt)
        except openai.RateLimitError:
            seen["told to come back"] += 1
            time.sleep(0.5)
            continue
        except openai.OpenAIError as error:
            seen[f"lost: {type(error).__name__}"] += 1
            continue
        waits.append(time.monotonic() - start)
        seen["right" if text == known[prompt] else "wrong"] += 1


def load(url: str, model: str, key: str, clients: int, seconds: float) -> dict[str, Any]:
    """The counts of a load test, requests a second and the seconds of an answer."""
    import openai  # pyright: ignore[reportMissingImports]

    check_loopback(url)
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=300)
    known = {prompt: ask(client, model, prompt) for prompt in make_prompts()}
    seen: Counter = Counter()
    waits: list[float] = []
    end = time.monotonic() + seconds
    threads = [
        threading.Thread(target=run_client, args=(i, client, model, known, end, seen, waits)) for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    quantiles = statistics.quantiles(waits, n=100) if len(waits) > 1 else [0.0] * 99
    speed = {"requests_per_s": round(len(waits) / seconds, 1), "p50_s": round(quantiles[49], 2)}
    late = {"p95_s": round(quantiles[94], 2), "p99_s": round(quantiles[98], 2)}
    return dict(seen) | speed | late | {"clients": clients, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    asked = parser.parse_args()
    found = load(asked.url, asked.model, asked.key, min(asked.clients, 256), min(asked.seconds, 3600))
    print(json.dumps(found, indent=1))
    if found.get("wrong") or found.get("broken ones answered") or any(name.startswith("lost") for name in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
