"""Options of the whole suite."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test fetches anything; without a network the Hub is asked for 23 s


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="many more random cases: minutes instead of seconds")
