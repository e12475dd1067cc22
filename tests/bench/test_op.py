"""The benchmark has every row that is asked for, measures ours and peers, and its table can be drawn anywhere."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from nha.bench import model, peers, plots
from nha.bench import op as bench
from nha.bench.roofline import floor_ms, work
from nha.bench.timing import Table, flushes_for, median_ms, read_table

ROOT = Path(__file__).parents[2]
LIMITS = {"bytes_per_s": 3e12, "operations_per_s": 7.5e14}


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


def test_rows_are_on_disk_before_the_table_is_done_and_an_older_table_is_kept(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def broken():
        with Table(path, ["a", "b"]) as table:
            table.add({"a": 1, "b": None})
            assert read_table(table.partial) == [{"a": 1, "b": None}]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert path.read_text() == "old"
    with Table(path, ["a", "b"]) as table:
        table.add({"a": 1.5, "b": "x"})
    assert read_table(path) == [{"a": 1.5, "b": "x"}] and not table.partial.exists()


def test_one_call_is_timed_without_a_gpu():
    calls = []
    assert median_ms(lambda: calls.append(1)) >= 0
    assert len(calls) == 1 or torch.cuda.is_available()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A table as the benchmark writes it, with invented times."""
    folder = tmp_path_factory.mktemp("results")
    with (folder / "ops.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, bench.COLUMNS)
        writer.writeheader()
        for row in fields():
            slots = 0.4 if row["impl"] == "triton" and row["pass"] != "decode" else 0.0
            ms = floor_ms(row, LIMITS) * (1.3 if row["impl"] == "sdpa-cudnn" else 3) + slots + 0.01
            about = {"extra_bytes": 0, "first_call_s": 1, "gpu": "none", "torch": "2", "triton": "3", "date": "2026"}
            writer.writerow(row | about | {"ms": round(ms, 4)})
    (folder / "ceilings.json").write_text(json.dumps(LIMITS))
    return folder


def test_every_picture_is_drawn_from_the_tables_alone(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    about = {"gpu": "none", "date": "2026", "B": 1, "tokens_s": 1, "peak_gib": 1}
    with Table(results / "model.csv", model.COLUMNS) as table:
        for row in model.rows(tiny=False):
            one = {"model": row.model, "task": row.task, "how": row.how, "T": row.length, "ms": row.length / 9}
            table.add(about | one)
    assert plots.main(["--results", str(results), "--out", str(tmp_path)]) == 0
    wanted = {
        "length-llama.png",
        "length-qwen.png",
        "length-smollm.png",
        "speedup.png",
        "roofline.png",
        "decode.png",
        "model.png",
    }
    assert {path.name for path in tmp_path.iterdir()} == wanted
    assert "not enough rows" not in capsys.readouterr().out


def test_the_crossover_is_where_the_curves_meet_for_good():
    records = [{"impl": "triton", "W": 64, "T": t, "ms": 2.0} for t in (1024, 2048, 4096)]
    records += [{"impl": "sdpa-cudnn", "W": -1, "T": t, "ms": ms} for t, ms in ((1024, 1.0), (2048, 1.0), (4096, 4.0))]
    ours, theirs = plots.curve(records, "triton", 64), plots.curve(records, "sdpa-cudnn", -1)
    assert plots.crossover(ours, theirs) == pytest.approx(2048 * 2**0.5)
    assert plots.crossover(theirs, ours) is None
    assert plots.crossover(ours, [(t, 9.0) for t, _ in ours]) == 0.0


def test_tables_in_the_repository_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "length-llama.png").exists()


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(SystemExit, match="found neither"):
        plots.main(["--results", str(tmp_path)])


def test_the_tiny_benchmark_of_a_model_runs(tmp_path, capsys):
    assert model.main(["--tiny", "--out", str(tmp_path), "--only", "T20"]) == 0
    found = read_table(tmp_path / "model.csv")
    assert {(r["model"], r["task"]) for r in found} == {
        (name, task) for name in ("hybrid", "full") for task in ("prefill", "decode", "throughput")
    }
    assert "decode after 20 tokens, graph" in capsys.readouterr().out


def test_the_cache_is_flushed_for_longer_than_the_host_works_but_not_without_end():
    assert flushes_for(0.0) == 1
    for host in (1e-4, 1e-3, 5e-3):
        assert flushes_for(host) * 50e-6 > host
    assert flushes_for(10.0) == 400
