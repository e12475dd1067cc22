"""Tests of the plugin in a real vLLM: `make test-vllm` runs them in an environment of its own."""

from __future__ import annotations

import pytest

from tests.vllm_plugin.material import make_model


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory):
    """A converted model of every kind of layer: narrow, full, without a window, and with windows per head."""
    return make_model(tmp_path_factory.mktemp("models") / "hybrid", "llama", [8, -1, 0, [16, 4], [-1, 8]])


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """A model as it is trained from scratch: no layer is full, and slots have no positions."""
    return make_model(tmp_path_factory.mktemp("models") / "scratch", "nha", [16, 16])
