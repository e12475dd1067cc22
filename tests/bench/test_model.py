"""`nha bench model` measures originals and hybrids in every way, resumes, splits over GPUs, and shows its losses."""

from __future__ import annotations

import pytest
import torch

from nha.bench import model, model_page, shapes
from nha.bench.model import Cell
from nha.bench.timing import read_table, select
from nha.errors import BadInput

PLAIN = r"T20$"


def tiny_run(tmp_path, only, **options):
    lines: list[str] = []
    rows = select([cell for cell in model.cells(tiny=True) if cell.how != "compiled"], only)
    failed = model.run("llama-3-8b", rows, tmp_path, 500, tiny=True, log=lines.append, **options)
    return failed, lines


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    assert tiny_run(folder, PLAIN)[0] == 0
    return folder, read_table(folder / "llama-3-8b.csv")


def test_originals_and_hybrids_stand_in_one_table(measured):
    _, rows = measured
    assert {row["variant"] for row in rows} == {"original", "original-kernels", "hybrid-1", "hybrid-0"}
    assert {row["task"] for row in rows} == {"prefill", "decode", "throughput", model.LIMITED, model.LIMITED_INT8}
    assert all(row["status"] == "ok" and row["ms"] > 0 and row["nha"] and row["date"] for row in rows)
    assert {"eager", "graph", "generate"} <= {row["how"] for row in rows if row["task"] == "decode"}


def test_the_step_is_measured_compiled_as_well(tmp_path):
    cell = Cell("hybrid-0", "decode", "compiled", 10)
    assert model.run("llama-3-8b", [cell], tmp_path, 500, tiny=True, log=lambda line: None) == 0
    assert read_table(tmp_path / "llama-3-8b.csv")[0]["status"] == "ok"


def test_a_second_run_measures_only_what_is_missing(measured):
    folder, rows = measured
    failed, lines = tiny_run(folder, PLAIN)
    assert failed == 0 and len(lines) == 1
    assert read_table(folder / "llama-3-8b.csv") == rows


def test_rows_of_another_gpu_are_not_mixed_in(measured, tmp_path):
    _, rows = measured
    model.write_rows(tmp_path / "llama-3-8b.csv", [row | {"gpu": "other"} for row in rows])
    with pytest.raises(BadInput, match="other"):
        tiny_run(tmp_path, PLAIN)


def test_rows_of_another_model_of_the_same_name_are_neither_taken_nor_mixed_in(measured, tmp_path):
    _, rows = measured
    path = tmp_path / "llama-3-8b.csv"
    model.write_rows(path, [row | {"model": "elsewhere/llama-3-8b"} for row in rows])
    before = path.read_bytes()
    with pytest.raises(BadInput, match=r"rows of llama-3-8b in .*llama-3-8b\.csv, got rows of elsewhere/llama-3-8b"):
        tiny_run(tmp_path, PLAIN)
    model.write_rows(tmp_path / "llama-3-8b.part-1-of-2.csv", [row | {"T": 7} for row in rows])
    with pytest.raises(BadInput, match="rows of one model in .*, got rows of elsewhere/llama-3-8b, llama-3-8b"):
        model.collect("llama-3-8b", tmp_path)
    assert path.read_bytes() == before


def test_a_name_that_is_no_shape_has_no_tiny_one():
    with pytest.raises(BadInput, match="smollm2-135m, got nowhere"):
        shapes.load_original("nowhere", tiny=True)


def test_memory_that_is_too_small_is_a_row(tmp_path, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.model_measure, "prefill", refuse)
    failed, _ = tiny_run(tmp_path, "^original prefill one call T20")
    rows = read_table(tmp_path / "llama-3-8b.csv")
    assert failed == 0 and [row["status"] for row in rows] == [model.OUT_OF_MEMORY] and rows[0]["ms"] is None
    assert "out of memory" in model_page.page(rows, "x", None)


def test_what_fails_is_tried_again(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no\nsuch kernel")

    with monkeypatch.context() as patch:
        patch.setattr(model.model_measure, "prefill", fail)
        assert tiny_run(tmp_path, "^original prefill one call T20")[0] == 1
    assert read_table(tmp_path / "llama-3-8b.csv")[0]["status"] == "RuntimeError: no such kernel"
    assert tiny_run(tmp_path, "^original prefill one call T20")[0] == 0
    assert [row["status"] for row in read_table(tmp_path / "llama-3-8b.csv")] == ["ok"]


def test_shards_share_the_cells_evenly():
    cells = model.cells()
    parts = [model.shard_of(cells, (i, 4)) for i in range(1, 5)]
    assert sorted(str(cell) for part in parts for cell in part) == sorted(map(str, cells))
    costs = [sum(cell.cost for cell in part) for part in parts]
    assert max(costs) - min(costs) <= max(cell.cost for cell in cells)


def test_parts_come_together_and_the_newest_row_counts(measured, tmp_path):
    _, rows = measured
    parts = [model.table_path(tmp_path, "llama-3-8b", (i, 2)) for i in (1, 2)]
    model.write_rows(parts[0], rows[::2])
    model.write_rows(parts[1], [row | {"status": "out of memory", "ms": None} for row in rows])
    found = model.collect("llama-3-8b", tmp_path)
    assert len(found) == len(rows) and sum(row["status"] == "ok" for row in found) == len(rows[::2])
    model.write_rows(parts[1], [row | {"gpu": "other"} for row in rows[1::2]])
    with pytest.raises(BadInput, match=r"none.*other|other.*none"):
        model.collect("llama-3-8b", tmp_path)
    assert model.collect("qwen3-8b", tmp_path) == []


def test_no_cell_is_started_when_the_time_is_up(tmp_path):
    lines: list[str] = []
    assert model.run("llama-3-8b", model.cells(tiny=True), tmp_path, -1, tiny=True, log=lines.append) == 0
    assert "0 rows" in lines[-1] and read_table(tmp_path / "llama-3-8b.csv") == []


def test_a_hybrid_shares_the_weights_of_the_original():
    variants = shapes.Variants(shapes.load_original("llama-3-8b", tiny=True), 8, 6)
    hybrid = variants.get("hybrid-1")
    assert hybrid.lm_head.weight is variants.original.lm_head.weight
    assert type(variants.original).__name__ == "LlamaForCausalLM"
    assert variants.get("hybrid-0").config.window_sizes == [8] * 4
    assert variants.get("original-kernels").config.window_sizes == [-1] * 4


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_named_shapes_are_configs(name):
    config = shapes.shape_config(name)
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    assert sizes == shapes.SHAPES[name][1:5]


def invented(variant, task, how, length, ms):
    about = {"gpu": "none", "date": "2026", "torch": "2", "transformers": "5", "nha": "0", "peak_gib": 1.0}
    row = {"variant": variant, "task": task, "how": how, "T": length, "ms": ms, "status": "ok", "B": 1}
    return row | about | {"tokens_s": 1e3 / ms}


def test_the_strongest_original_is_what_a_hybrid_is_compared_with():
    rows = [invented("original", "decode", "eager", n, 40.0) for n in (1024, 4096)]
    rows += [invented("original-kernels", "decode", "compiled", n, n / 512) for n in (1024, 4096)]
    rows += [invented("hybrid-4", "decode", "graph", n, 4.0) for n in (1024, 4096)]
    assert model_page.speed_up(rows, "decode", "hybrid-4", 1024) == pytest.approx(0.5)
    assert model_page.crossover_text(rows, "decode", "hybrid-4") == ("faster from 2,048 tokens on", 2048.0)
    text = model_page.page(rows, "a model", None)
    assert "0.50, slower" in text and "kernels of nha (compiled)" in text


def test_a_token_called_eagerly_is_not_compared_where_the_model_has_graphs():
    def token(variant, how, length, ms):
        return {"task": "decode", "variant": variant, "how": how, "T": length, "ms": ms, "tokens_s": 1e3 / ms} | {
            "status": "ok"
        }

    rows = [token("original", "graph", n, 8.0) for n in (256, 2048)]
    rows += [token("hybrid-0", "graph", 256, 7.0), token("hybrid-0", "eager", 2048, 70.0)]
    assert model_page.curve(rows, "decode", ["hybrid-0"]) == [(256.0, 7.0)]
    assert model_page.speed_up(rows, "decode", "hybrid-0", 2048) is None
    assert model_page.curve(rows[2:], "decode", ["hybrid-0"]) == [(256.0, 7.0)]
    assert model_page.curve(rows[3:], "decode", ["hybrid-0"]) == [(2048.0, 70.0)]


def test_the_table_of_the_documentation_names_the_strongest_original():
    rows = [
        invented("original", "prefill", "one call", 2048, 50.0),
        invented("hybrid-4", "prefill", "one call", 2048, 80.0),
    ]
    rows += [invented("original-kernels", "decode", "compiled", 32768, 8.0)]
    rows += [invented("hybrid-4", "decode", "graph", 32768, 4.0)]
    lines = model_page.markdown(rows).splitlines()
    assert lines[2].startswith("| read 2K tokens | 80 ms") and lines[2].endswith("0.62, slower |")
    assert "8.0 ms (original, kernels of nha, compiled) | 2.00 |" in lines[3] and len(lines) == 4


def test_page_and_picture_are_written(measured, tmp_path):
    pytest.importorskip("matplotlib")
    paths = model_page.write(measured[1], "a model", tmp_path / "it")
    assert [path.name for path in paths] == ["it.png", "it.html", "it.md"] and all(
        path.stat().st_size for path in paths
    )
    assert "data:image/png;base64" in paths[1].read_text()
