"""A process compiles a run's layers beside its start: the graphs that the run asks for, and no harm where it fails."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import Gemma3TextConfig

from nha.distill.compiler import HYBRID, ORIGINAL, CompilerProcess
from nha.distill.precompile import compile_stage, few_layers, sample_layers
from nha.distill.run import distill
from nha.distill.student import Distillation
from tests.distill.material import LENGTH, material, settings, tiny


def stand_in(*lines: str) -> CompilerProcess:
    """A process that reads a request and prints some lines."""
    code = "import pickle, sys; pickle.load(sys.stdin.buffer)\n"
    code += "".join(f"print({line!r}, flush=True)\n" for line in lines)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return CompilerProcess(subprocess.Popen([sys.executable, "-c", code], **pipes))  # type: ignore[call-overload]


def test_a_stage_that_fails_is_named_with_its_reason():
    process = stand_in(ORIGINAL, "failed: ValueError: no memory")
    process.request(tiny().config, "float32", settings(), [ORIGINAL, HYBRID])
    assert process.wait(ORIGINAL) and process.wait(ORIGINAL)
    with pytest.warns(UserWarning, match="ValueError: no memory"):
        assert not process.wait(HYBRID)
    process.close()
    assert process.process.returncode is not None


def test_a_process_that_has_died_takes_a_request_and_does_not_hold_up_the_run():
    process = stand_in(HYBRID)
    process.process.kill()
    process.process.wait()
    process.request(tiny().config, "float32", settings(), [HYBRID])
    with pytest.warns(UserWarning, match="ended"):
        assert not process.wait(HYBRID)
    process.close()


def test_a_few_layers_keep_the_kinds_of_their_family():
    config = Gemma3TextConfig(num_hidden_layers=12)
    kinds: list[str] = config.layer_types  # type: ignore[assignment]
    chosen = sample_layers([8, -1] * 6, kinds)
    assert {(i % 2, kinds[i]) for i in chosen} == {(i % 2, kind) for i, kind in enumerate(kinds)}
    assert few_layers(config, chosen).layer_types == [kinds[i] for i in chosen]
    assert few_layers(config, chosen).num_hidden_layers == len(chosen)
    assert config.num_hidden_layers == 12


def test_the_graphs_are_those_that_the_run_asks_for(tmp_path, monkeypatch):
    """Windows differ between heads and layers, and one layer has full attention."""
    corpus, tokenizer = material(tmp_path)
    graphs: set[tuple] = set()

    def keep(graph, inputs):
        found = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        about = [(x.dtype, x.requires_grad) if isinstance(x, torch.Tensor) else type(x) for x in found]
        graphs.add((graph.code, tuple(about)))
        return graph.forward

    plain = Distillation.compile_layers
    monkeypatch.setattr(Distillation, "compile_layers", lambda self: plain(self, backend=keep))
    windows = ((8, 16), (16, 8), -1, 16, (8, 16), -1)
    given = settings(window_size=windows, tokens=2 * 2 * LENGTH, compile="layers", align_steps=0, save_every=9)
    model = tiny(num_hidden_layers=6)
    torch._dynamo.reset()
    compile_stage(model.config, "float32", given, HYBRID, torch.device("cpu"))
    ahead, graphs = graphs, set()
    distill(model, tokenizer, corpus, tmp_path / "run", given)
    torch._dynamo.reset()
    assert graphs and graphs <= ahead
