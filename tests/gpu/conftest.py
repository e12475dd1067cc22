"""Checks on a GPU are collected only by `-m gpu`. Their inputs come from one seed a run; GPU_TEST_SEED repeats it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.setting import Setting

SEED = "GPU_TEST_SEED"


def asked(config: pytest.Config) -> bool:
    return "gpu" in config.option.markexpr.replace("not gpu", "")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name.startswith("test_") and not asked(config) else None


def pytest_configure(config: pytest.Config) -> None:
    if not asked(config):
        return
    os.environ.setdefault(SEED, str(random.randrange(2**31)))  # processes side by side inherit it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config.addinivalue_line("filterwarnings", "ignore")


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not asked(config):
        return []
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return [f"{SEED}={os.environ[SEED]}, {name}, torch {torch.__version__}"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the seed and the largest error as a fraction of its bound."""
    if not asked(config):
        return
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    found = [value for report in reports for name, value in report.user_properties if name == "error / bound"]
    largest = f"; largest error / bound {max(found):.2f}" if found else ""
    terminalreporter.write_line(f"{SEED}={os.environ[SEED]}{largest}")


@pytest.fixture(scope="session")
def setting() -> Setting:
    assert torch.cuda.is_available(), "expected a CUDA device, found none"
    torch.set_num_threads(1)
    return Setting("cuda", int(os.environ[SEED]))


@pytest.fixture(autouse=True)
def _sound_context() -> Iterator[None]:
    """End the process if a kernel has broken its CUDA context, so that the next test gets a new one."""
    yield
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise
