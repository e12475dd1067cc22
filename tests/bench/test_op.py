"""The benchmark of the operator has every row, counts work by the definition, and its peers compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nha.bench import op as bench
from nha.bench import peers
from nha.bench.roofline import work
from nha.bench.timing import read_table

ROOT = Path(__file__).parents[2]


def fields():
    return [row.fields for row in bench.rows(tiny=False)]


def test_every_length_window_shape_and_batch_is_measured():
    ours = [r for r in fields() if r["impl"] == "triton"]
    whole = [r for r in ours if r["pass"] == "fwd+bwd"]
    for shape in (bench.LLAMA, bench.QWEN, bench.SMOLLM):
        mine = [r for r in whole if all(r[n] == x for n, x in shape.items())]
        lengths = {r["T"] for r in mine if r["W"] == 64 and r["B"] * r["T"] in (bench.TOKENS, r["T"])}
        assert lengths == {2**n for n in range(10, 18)}
        assert {r["W"] for r in mine} == {0, 32, 64, 128, 512, 2048, -1}
        assert {r["B"] for r in ours if r["pass"] == "decode" and r["HQ"] == shape["HQ"]} == {1, 8, 64, 256}
    alone = {r["T"] for r in whole if r["B"] == 1 and r["W"] == 64 and r["HQ"] == 32}
    assert alone == {2**n for n in range(10, 18)}
    peers_of = {r["impl"].removesuffix("-graph") for r in fields()}
    assert peers_of == {
        "triton",
        "chunked",
        "sdpa-cudnn",
        "sdpa-flash",
        "flex-window",
        "fa2-window",
        "gsa",
        "gsa-expanded",
        "gsa+window",
        "w0+window",
    }
    texts = [str(row) for row in bench.rows(tiny=False)]
    assert len(set(texts)) == len(texts)


def test_the_window_alone_stands_beside_every_hybrid_row():
    found = bench.rows(tiny=False)
    alone = {(row.kind, row.shape) for row in found if row.impl == "flex-window"}
    hybrids = [row for row in found if row.impl == "triton" and row.kind != "decode" and row.dtype == "bf16"]
    assert not [str(row) for row in hybrids if dict(row.shape)["W"] > 0 and (row.kind, row.shape) not in alone]


@pytest.mark.parametrize("window", [1, 37, 128, 200, 4000])
def test_the_block_mask_of_a_window_is_that_of_flex_attention(window):
    from torch.nn.attention.flex_attention import create_block_mask

    length = 512
    ours = peers.window_mask(length, window, "cpu")
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=peers.BLOCK)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert theirs.full_kv_num_blocks is not None
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)


def test_the_window_of_a_peer_is_ours():
    flat = {"q": torch.randn(1, 70, 4, 16), "k": torch.randn(1, 70, 2, 16), "v": torch.randn(1, 70, 2, 16)}
    flat["log_gate"] = torch.zeros(1, 70, 2, 0)
    out = peers.forward_of("flex-window", 9, flat)()
    exact = peers.forward_of("chunked", 9, flat)()
    assert torch.allclose(out, exact, atol=1e-5)


def test_work_is_counted_by_the_definition():
    row = {"impl": "triton", "pass": "fwd", "B": 2, "T": 8, "HQ": 4, "H": 2, "D": 16, "M": 3, "W": 1, "dtype": "bf16"}
    q, k, gate = 2 * 8 * 4 * 16 * 2, 2 * 8 * 2 * 16 * 2, 2 * 8 * 2 * 3 * 2
    moved, operations = work(row)
    assert moved == 2 * q + 2 * k + gate
    assert operations == 4 * 16 * 2 * 8 * (4 * (3 + 1) + 2 * 3)
    assert work(row | {"pass": "fwd+bwd"}) == (6 * q + 6 * k + 3 * gate, 3.5 * operations)
    assert work(row | {"W": -1}) == (2 * q + 2 * k, 4 * 16 * 2 * 8 * 4 * 4.5)
    state = 2 * (2 * 2 * 3 * 16 * 4) * 2 + 2 * 2 * (1 + 1) * (2 * 16 + 3) * 2
    assert work(row | {"pass": "decode"})[0] == state + 2 * 2 * 4 * 16 * 2


def test_the_tiny_benchmark_runs_in_the_interpreter(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "nha", "bench", "op", "--tiny", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_table(tmp_path / "ops.csv")
    assert tuple(found[0]) == bench.COLUMNS
    assert {"triton", "triton-graph", "sdpa-cudnn", "sdpa-flash", "chunked"} == {r["impl"] for r in found}
    assert "gsa: flash-linear-attention is not installed" in done.stdout
    assert set(json.loads((tmp_path / "ceilings.json").read_text())) >= {"bytes_per_s", "operations_per_s"}


def test_rows_that_were_measured_are_taken_by_the_next_call_and_the_table_has_what_is_there(tmp_path, monkeypatch):
    wanted = [row for row in bench.rows(tiny=True) if row.kind != "decode" and row.impl in ("chunked", "sdpa-cudnn")]
    names = [str(row) for row in wanted]
    broken, calls = {names[1]}, []

    def measure(row):
        calls.append(str(row))
        if len(calls) == 3:
            raise KeyboardInterrupt
        if str(row) in broken:
            raise RuntimeError("no room")
        return {"ms": len(calls), "extra_bytes": 1, "first_call_s": 1.0}

    def go(rows=wanted, budget_s=60.0):
        calls.append("call")
        failed = bench.run(rows, tmp_path, budget_s, True, lambda line: None)
        return failed, [row["ms"] for row in read_table(tmp_path / "ops.csv")]

    assert len(names) == 4 and wanted[1].impl == "sdpa-cudnn"
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench.peers, "missing", lambda impl: None)
    kept = tmp_path / "ops.csv.cases"
    with pytest.raises(KeyboardInterrupt):
        go()
    assert calls == ["call", *names[:2]] and kept.exists() and not (tmp_path / "ops.csv").exists()
    assert go(budget_s=0.0) == (0, [2])  # no time: what is there
    assert go() == (0, [2, 7, 8]) and calls[4:] == ["call", *names[1:]]  # one of another library failed
    assert go(wanted[:1]) == (0, [2]) and kept.exists()  # a part of the table leaves the other rows
    broken.clear()
    assert go()[1][2:] == [7, 8] and calls[-2:] == names[:2] and not kept.exists()
    broken.add(names[2])
    assert go()[0] == (wanted[2].impl == "chunked") and calls[-4:] == names  # a whole table is measured anew
    monkeypatch.setattr(bench, "code_digest", lambda: "of other kernels")
    go()
    assert calls[-4:] == names


def test_the_digest_is_that_of_the_code_of_the_operator(monkeypatch, tmp_path):
    before = bench.code_digest()
    assert before == bench.code_digest()
    monkeypatch.setattr(bench.nha.ops, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "kernel.py").write_text("x = 1")
    assert bench.code_digest() != before
