"""Tables: read from YAML, made row by row, resumed, shared by processes, stopped in time, and summarized on a page."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
import yaml

from nha.ablate import recall, run
from nha.ablate.record import read_row, row_file
from nha.ablate.run import Progress, Shard, claimed, processes_for, run_table, write_failure
from nha.ablate.specs import ModelSpec
from nha.ablate.steps import Steps
from nha.ablate.summary import Difference, add_rows, best_rows, compare, judge, remember, write_summary
from nha.ablate.table import Claim, built_in_tables, parse_table, read_table
from nha.train.trainer import TrainingDiverged

TINY = """
name: tiny
title: A tiny table
kind: recall
shape: {hidden_size: 16, intermediate_size: 16}
match: nha
lrs: [1e-3, 0.01]
seeds: [0]
models:
  nha: {windows: 4, num_slots: 4}
  window only: {windows: 4, slots: false}
recall:
  steps: 6
  batch_size: 4
  examples: 8
  train: [{task: in_context_recall, seq_len: 16, vocab_size: 8}]
  test: [{task: in_context_recall, seq_len: 16, vocab_size: 8}, {task: in_context_recall, seq_len: 32, vocab_size: 8}]
notes: [Few steps., Few sizes.]
claims:
  - {says: slots help, model: nha, against: window only}
"""


@pytest.fixture
def table():
    return parse_table(yaml.safe_load(TINY))


def changed(**changes):
    return yaml.safe_load(TINY) | changes


SIZE = {"task": "in_context_recall", "seq_len": 16, "vocab_size": 8}
RECALL = yaml.safe_load(TINY)["recall"]
CLAIM = {"says": "slots help", "model": "nha", "against": "window only"}


def test_a_table_has_a_row_for_every_model_rate_and_seed(table):
    assert [row.name("t") for row in table.rows] == [
        "t--nha--lr0.001--seed0",
        "t--window-only--lr0.001--seed0",
        "t--nha--lr0.01--seed0",
        "t--window-only--lr0.01--seed0",
    ]
    assert len(table.only(["nha"], seeds=[1, 2], lrs=[0.1]).rows) == 2


def test_a_table_makes_its_chosen_models_unless_others_are_named():
    table = parse_table(changed(chosen=["nha"]))
    assert {row.model.name for row in table.only(seeds=[1]).rows} == {"nha"} and len(table.every_row) == 4
    assert {row.model.name for row in table.only(["window only"]).rows} == {"window only"}


@pytest.mark.parametrize("name", built_in_tables())
def test_built_in_tables_are_whole(name):
    table = read_table(name)
    assert table.name == name and table.claims and table.rows


@pytest.mark.parametrize(
    "found, names",
    [
        (changed(models={"nha": {"window": 4}}), ("window", "windows", "model nha")),
        (changed(kind="poetry"), ("poetry", "recall", "language")),
        (changed(match="x"), ("x", "nha", "window only")),
        (changed(chosen=["x"]), ("x", "nha", "window only")),
        (changed(lrs=[]), ("learning rates",)),
        (changed(models={}), ("models", "none")),
        (changed(recall={"train": [{"task": "copy", "seq_len": 8}], "test": []}), ("copy", "mqar")),
        (changed(claims=[{"says": "x", "model": "nha", "against": "nha", "expect": "below"}]), ("below", "above")),
        (changed(language={"train": {"token": 1}}), ("token",)),
        ([1], ("mapping", "list")),
        (changed(lrs=0.1), ("lrs", "list of numbers", "0.1")),
        (changed(lrs=[-1.0]), ("lrs", "above 0", "-1.0")),
        (changed(lrs=[float("nan")]), ("lrs", "above 0", "nan")),
        (changed(lrs=[1e-3, 0.001]), ("tiny--nha--lr0.001--seed0 twice",)),
        (changed(lrs=[1e-3, 0.00100000001]), ("tiny--nha--lr0.001--seed0 twice",)),
        (changed(seeds=0), ("seeds", "list of ints", "0")),
        (changed(seeds=[0.5]), ("seeds", "int", "0.5")),
        (changed(seeds=[-1]), ("seeds", "at least 0", "-1")),
        (
            changed(models={"nha": {}, "a b": {}, "a-b": {"windows": 8}}, claims=[]),
            ("tiny--a-b--lr0.001--seed0 twice",),
        ),
        (changed(models={"nha": {}, "a/b": {}}, claims=[]), ("names of files", "'a/b'")),
        (changed(models={"nha": {"windows": "4"}}, claims=[]), ("windows of model nha", "an int or a list", "'4'")),
        (changed(models={"nha": {"slots": "no"}}, claims=[]), ("slots of model nha", "True or False", "'no'")),
        (changed(models={"nha": {"num_slots": 0}}, claims=[]), ("num_slots of model nha", "at least 1", "0")),
        (changed(models={"nha": {"config": {"gate": 1}}}, claims=[]), ("config of nha", "NHAConfig", "'gate'")),
        (changed(name="../b"), ("names of files", "'../b'")),
        (changed(name=5), ("name", "text", "5")),
        (changed(notes="Few steps."), ("notes", "list of texts", "'Few steps.'")),
        (changed(shape="x"), ("shape", "mapping", "'x'")),
        (changed(shape={"hidden_sizes": 16}), ("shape of tiny", "NHAConfig", "'hidden_sizes'")),
        (changed(shape={"hidden_size": 15}), ("nha", "15")),
        (changed(language={}), ("plan", "recall alone", "language")),
        (changed(claims=[CLAIM | {"main": "no"}]), ("main of claim 1", "True or False", "'no'")),
        (changed(claims=[CLAIM | {"sizes": "abc"}]), ("sizes of claim 1", "list of texts", "'abc'")),
        (changed(claims=[CLAIM | {"sizes": ["mqar 3"]}]), ("in_context_recall 32", "'mqar 3'")),
        (changed(claims=[CLAIM | {"measure": "nonsense"}]), ("measure", "accuracy", "'nonsense'")),
        *[
            (changed(recall=RECALL | {name: value}), (words,))
            for name, value, words in (
                ("steps", 0, "at least 1, got 0"),
                ("steps", "6", "to be an int, got '6'"),
                ("batch_size", 0, "at least 1, got 0"),
                ("examples", 0, "at least 1, got 0"),
                ("valid_every", -1, "at least 1, got -1"),
                ("train", [SIZE | {"weight": -1}], "weights of recall of at least 0, got -1.0"),
                ("train", [SIZE | {"weight": 0}], "expected weights of at least 0 and one above"),
                ("train", [SIZE | {"seq_len": 0}], "seq_len of a size of at least 1, got 0"),
                ("test", [{"seq_len": 16, "num_items": 50}], "seq_len of at least 200 for 50 pairs, got 16"),
            )
        ],
    ],
)
def test_a_table_that_cannot_be_is_refused_by_name(found, names):
    with pytest.raises(ValueError) as error:
        parse_table(found)
    assert all(name in str(error.value) for name in names)


def test_a_file_that_is_no_table_is_named(tmp_path):
    with pytest.raises(ValueError, match="recall-cpu"):
        read_table("no-such-table")
    path = tmp_path / "broken.yaml"
    for content in (b"a: [1", b"\xff\xfe", b"[" * 100_000, TINY.encode() + b"\ntitle: again\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.yaml"):
            read_table(path)


def test_rows_are_made_once_and_kept(table, tmp_path):
    small = table.only(["nha"], lrs=[1e-3])
    first = run_table(small, tmp_path)
    assert first.made == ["tiny--nha--lr0.001--seed0"] and not first.present
    before = row_file(tmp_path, first.made[0]).read_bytes()
    again = run_table(small, tmp_path)
    assert again.present == first.made and not again.made
    assert row_file(tmp_path, first.made[0]).read_bytes() == before
    row_file(tmp_path, first.made[0]).unlink()
    assert run_table(small, tmp_path).made == first.made


def test_a_process_is_started_for_three_missing_rows_and_at_most_one_a_core(tmp_path, monkeypatch):
    monkeypatch.setattr(run.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    table = read_table("recall-cpu")
    assert [processes_for(table.only(seeds=range(n)), tmp_path) for n in (1, 2, 3)] == [1, 3, 4]
    assert processes_for(read_table("language-cpu"), tmp_path) == 1


def test_rows_that_are_trained_together_are_those_made_one_by_one(table, tmp_path):
    table = table.only(seeds=[0, 1])
    for count in (1, 6):
        made = run_table(table, tmp_path / str(count), together=count).made
        assert sorted(made) == sorted(row.name("tiny") for row in table.rows)
    for name in made:
        one, two = (json.loads(row_file(tmp_path / str(count), name).read_text()) for count in (1, 6))
        assert (one.pop("together"), two.pop("together")) in ((1, 6), (1, 2))
        assert one | {"seconds": None} == two | {"seconds": None}


def test_later_seeds_are_trained_with_the_best_learning_rate_of_the_first(table, tmp_path):
    models = ["nha", "window only"]
    first = run_table(table.only(models, seeds=[0]), tmp_path, together=4).made
    best = {}
    for name in first:
        row = json.loads(row_file(tmp_path, name).read_text())
        best[row["model"]] = max(
            best.get(row["model"], (-1.0, 0.0)), (row["valid"], row["lr"]), key=lambda pair: pair[0]
        )
    expected = [
        f"tiny--{model.replace(' ', '-')}--lr{best[model][1]:g}--seed{seed}" for seed in (1, 2) for model in models
    ]
    assert run_table(table.only(models, seeds=[1, 2]), tmp_path, together=9, best_lr_only=True).made == expected
    again = run_table(table.only(models, seeds=[0, 1, 2]), tmp_path / "again", together=9, best_lr_only=True).made
    assert sorted(again) == sorted(first + expected)


def test_a_row_of_other_settings_is_refused_before_anything_runs(table, tmp_path, monkeypatch):
    small = table.only(["nha"], lrs=[1e-3])
    run_table(small, tmp_path)
    monkeypatch.setattr(run, "_make_recall", lambda *_: pytest.fail("a row was made"))
    other = parse_table(changed(recall=yaml.safe_load(TINY)["recall"] | {"steps": 7})).only(["nha"], lrs=[1e-3])
    with pytest.raises(ValueError, match=r"tiny--nha--lr0\.001--seed0\.json"):
        run_table(other, tmp_path)
    row_file(tmp_path, small.rows[0].name("tiny")).write_text("{")
    with pytest.raises(ValueError, match="another file"):
        run_table(small, tmp_path)


def test_rows_that_do_not_fit_into_the_budget_are_named_and_not_written(table, tmp_path):
    progress = run_table(table, tmp_path, budget=0.0)
    assert progress.late == [row.name("tiny") for row in table.rows]
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("error", [RuntimeError, TrainingDiverged])
def test_a_row_that_fails_does_not_take_the_others_along(error, table, tmp_path, monkeypatch):
    def build(self, *args, **options):
        if self.name == "nha":
            raise error("no such\nkernel")
        return original(self, *args, **options)

    original = ModelSpec.build
    monkeypatch.setattr(ModelSpec, "build", build)
    progress = run_table(table.only(lrs=[1e-3]), tmp_path)
    assert progress.failed == [f"tiny--nha--lr0.001--seed0 ({error.__name__}: no such kernel)"]
    assert progress.made == ["tiny--window-only--lr0.001--seed0"]


def test_a_row_that_fails_keeps_its_whole_traceback_until_it_is_made(table, tmp_path, monkeypatch):
    def place_of_the_failure(*_, **__):
        raise RuntimeError("CUDA error: unspecified launch failure\nSearch for it." + 300 * "x" + "end")

    one, lines = table.only(["nha"], lrs=[1e-3]), []
    name = one.rows[0].name("tiny")
    with monkeypatch.context() as broken:
        broken.setattr(recall, "measure_size", place_of_the_failure)
        broken.setattr(
            run, "_free_memory", place_of_the_failure
        )  # the GPU is lost: what is known is on the disk already
        run_table(one, tmp_path, log=lines.append)
    path = tmp_path / "failures" / f"{name}.txt"
    (said,) = [line for line in lines if "failed" in line]
    text = path.read_text()
    assert str(path) in said and text.startswith("RuntimeError: CUDA error: unspecified launch failure Search")
    assert "in place_of_the_failure" in text and "in _make_recall" in text and text.endswith("xend\n")
    assert run_table(one, tmp_path).made == [name] and not path.exists()


MEMORY = (torch.OutOfMemoryError, MemoryError)


@pytest.mark.parametrize("error", MEMORY)
@pytest.mark.parametrize("place", ["step", "read_loss", "_knows_all", "measure_size"])
def test_a_row_that_runs_out_of_memory_has_failed_and_the_others_are_made(error, place, table, tmp_path, monkeypatch):
    def fail(found):
        def call(first, *args, **options):
            model = first if hasattr(first, "config") else first.model
            if model.config.num_slots == 1:  # the window alone
                raise error("CUDA out of memory.\nTried to allocate 2 GiB")
            return found(first, *args, **options)

        return call

    small = table.only(lrs=[1e-3])
    owner = {"step": Steps, "read_loss": recall.Learner}.get(place, recall)
    name = "__call__" if place == "step" else place
    monkeypatch.setattr(owner, name, fail(getattr(owner, name)))
    progress = run_table(
        dataclasses.replace(small, recall=dataclasses.replace(small.recall, valid_every=2)), tmp_path, together=2
    )
    assert progress.made == ["tiny--nha--lr0.001--seed0"]
    why = f"{error.__name__}: CUDA out of memory. Tried to allocate 2 GiB"
    assert progress.failed == [f"tiny--window-only--lr0.001--seed0 ({why})"]


def test_models_whose_batch_cannot_be_drawn_have_failed_and_the_next_rows_are_made(table, tmp_path, monkeypatch):
    def batches(plan, seed, device):
        if seed == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from original(plan, seed, device)

    original = recall.RecallPlan.batches
    monkeypatch.setattr(recall.RecallPlan, "batches", batches)
    progress = run_table(table.only(seeds=[0, 1], lrs=[1e-3]), tmp_path, together=3)
    assert [name.partition(" ")[0][-1] for name in progress.failed] == ["0", "0"]
    assert [name[-1] for name in progress.made] == ["1", "1"]


def test_after_a_row_that_breaks_the_gpu_no_other_begins_and_a_line_says_so(table, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nSearch for it.")

    small, lines = table.only(lrs=[1e-3]), []
    monkeypatch.setattr(run, "_free_memory", fail)
    with monkeypatch.context() as broken:
        broken.setattr(ModelSpec, "build", fail)
        progress = run_table(small, tmp_path, log=lines.append)
    assert [name.partition(" ")[0] for name in progress.failed] == [small.rows[0].name("tiny")] and not progress.made
    assert "rows left to another run: 1 (" in lines[-1] and "illegal memory access" in lines[-1]
    with pytest.raises(RuntimeError, match="illegal"):  # no row says why
        run_table(small, tmp_path)
    monkeypatch.undo()
    assert len(run_table(small, tmp_path).made) == 1


def test_shards_begin_with_different_rows_and_cover_all(table):
    orders = [Shard(i, 3).order(table.rows) for i in (1, 2, 3)]
    assert len({order[0].name("t") for order in orders}) == 3
    assert all(sorted(r.name("t") for r in order) == sorted(r.name("t") for r in table.rows) for order in orders)
    for text in ("0/2", "3/2", "2", "a/b", "1/0"):
        with pytest.raises(ValueError, match=text):
            Shard.parse(text)


def _hold(out: Path, name: str, begun) -> None:
    with claimed(out, name) as mine:
        assert mine
        begun.set()
        time.sleep(600)  # until it is killed


def test_a_row_that_another_process_makes_is_left_to_it(table, tmp_path):
    small = table.only(["nha"], lrs=[1e-3])
    name = small.rows[0].name("tiny")
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, name, begun))
    process.start()
    try:
        assert begun.wait(60)
        assert run_table(small, tmp_path).elsewhere == [name]
    finally:
        process.kill()
        process.join()
    assert run_table(small, tmp_path).made == [name]  # the lock ended with the process


def test_a_row_that_failed_in_another_process_of_the_run_is_not_repeated_and_has_failed(table, tmp_path, monkeypatch):
    def build(self, *args, **options):
        tried.append(self.name)
        if self.name == "nha":
            raise RuntimeError("no such\nkernel")
        return original(self, *args, **options)

    original, tried, began = ModelSpec.build, [], time.time() - 1
    small = table.only(lrs=[1e-3])
    first, second = (row.name("tiny") for row in small.rows)
    why = f"{first} (RuntimeError: no such kernel)"
    monkeypatch.setattr(ModelSpec, "build", build)
    assert run_table(small.only(["nha"]), tmp_path, since=began).failed == [why]
    found = run_table(small, tmp_path, shard=Shard(2, 2), since=began)
    assert found == Progress(made=[second], failed=[why]) and tried == ["nha", "window only"]
    run_table(small, tmp_path)  # a new run tries it again
    assert tried[2:] == ["nha"]
    monkeypatch.undo()
    assert run_table(small, tmp_path).made == [first]
    assert run_table(small, tmp_path, since=began) == Progress(present=[first, second])


def _fail_when_told(out: Path, name: str, begun, go) -> None:
    with claimed(out, name) as mine:
        assert mine
        begun.set()
        assert go.wait(60)
        write_failure(out, name, "RuntimeError: no room")


def test_a_row_that_fails_in_another_process_while_this_one_ends_has_failed(table, tmp_path, monkeypatch):
    small = table.only(lrs=[1e-3])
    busy, free = (row.name("tiny") for row in small.rows)
    context = multiprocessing.get_context("spawn")
    begun, go = context.Event(), context.Event()
    process = context.Process(target=_fail_when_told, args=(tmp_path, busy, begun, go))
    process.start()
    made = run._make_recall

    def make(*args):
        made(*args)
        go.set()
        process.join(60)

    try:
        assert begun.wait(60)
        monkeypatch.setattr(run, "_make_recall", make)
        assert run_table(small, tmp_path) == Progress(made=[free], failed=[f"{busy} (RuntimeError: no room)"])
    finally:
        process.kill()
        process.join()


def test_processes_say_once_what_failed_in_one_of_them():
    shards = [Progress(made=["a"], failed=["b (why)"]), Progress(present=["a"], failed=["b (why)", "c (why)"])]
    assert Progress.merged(shards) == Progress(made=["a"], failed=["b (why)", "c (why)"])


def test_the_page_holds_claims_rows_and_command_and_the_csv_every_rate(table, tmp_path):
    run_table(table, tmp_path)
    remember(table, tmp_path, "mine.yaml")
    page = write_summary(tmp_path).read_text()
    assert (
        "nha ablate mine.yaml" in page
        and str(tmp_path) not in page
        and "slots help" in page
        and "Few steps. Few sizes." in page
        and "in_context_recall 32" in page
    )
    entries = json.loads((tmp_path / "summary.json").read_text())
    assert (
        len(entries) == 4
        and {"arm", "task", "size", "seed", "state_bytes", "parameters", "tokens"} <= entries[0].keys()
    )
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    assert (tmp_path / "tiny-state.png").read_bytes()[:4] == b"\x89PNG"


def row(model: str, lr: float, seed: int, valid: float, accuracies: dict[str, float]) -> dict:
    sizes = [{"task": "mqar", "size": size, "accuracy": value} for size, value in accuracies.items()]
    return {"table": "t", "kind": "recall", "model": model, "lr": lr, "seed": seed, "valid": valid, "sizes": sizes}


def test_the_best_rate_is_chosen_by_validation_over_all_seeds():
    rows = [
        row("a", 0.1, 0, 0.9, {}),
        row("a", 0.1, 1, 0.1, {}),
        row("a", 0.2, 0, 0.6, {}),
        row("a", 0.2, 1, 0.6, {}),
        row("a", 0.3, 0, 1.0, {}),  # one seed of two
    ]
    assert [(r["lr"], r["seed"]) for r in best_rows(rows)] == [(0.2, 0), (0.2, 1)]


def test_a_difference_is_over_pairs_of_the_same_seed_and_size():
    rows = [row("a", 1, s, 0, {"64/4": 0.9, "64/8": 0.8}) for s in (0, 1)] + [row("b", 1, 0, 0, {"64/4": 0.5})]
    found = compare(rows, Claim("x", "a", "b"))
    assert found is not None and found.count == 1 and found.mean == pytest.approx(0.4)
    assert compare(rows, Claim("x", "a", "b", sizes=("mqar 64/8",))) is None


def test_three_seeds_are_what_an_interval_is_over():
    rows = [row("a", 1, s, 0, {"64/4": 0.5 + gain, "64/8": 0.9 + gain}) for s, gain in enumerate((0.1, 0.2, 0.3))]
    rows += [row("b", 1, s, 0, {"64/4": 0.5, "64/8": 0.5}) for s in range(3)]
    found = compare(rows, Claim("x", "a", "b"))
    assert found is not None and found.seeds == pytest.approx((0.3, 0.4, 0.5))
    assert (found.low, found.high) == pytest.approx((0.3, 0.5))
    two = compare([r for r in rows if r["seed"] < 2], Claim("x", "a", "b"))
    assert two is not None and two.low < 0.3  # over sizes, which differ more than seeds


def test_rows_of_several_devices_live_side_by_side_and_are_named(table, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr(run, "device_name", lambda device: "NVIDIA H200")
    run_table(table.only(["nha", "window only"], lrs=[1e-3]), there)
    monkeypatch.undo()
    run_table(table.only(["nha"], lrs=[1e-3]), here)
    remember(table, here)
    kept = row_file(here, "tiny--nha--lr0.001--seed0").read_bytes()
    assert add_rows(there, here) == (1, 1)
    assert row_file(here, "tiny--nha--lr0.001--seed0").read_bytes() == kept
    page = write_summary(here).read_text()
    assert "CPU (nha: seed 0); NVIDIA H200 (window only: seed 0)" in page
    assert "2 of 4 rows are not run yet" in page
    with (here / "rows.csv").open() as file:
        assert {entry["device"] for entry in csv.DictReader(file)} == {"CPU", "NVIDIA H200"}


def test_rows_of_other_settings_are_not_added(table, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    small = table.only(["nha", "window only"], lrs=[1e-3])
    run_table(small, there)
    run_table(small.only(["nha"]), here)
    path = row_file(there, "tiny--nha--lr0.001--seed0")
    path.write_text(path.read_text().replace('"digest": "', '"digest": "0'))
    with pytest.raises(ValueError, match=r"tiny--nha--lr0\.001--seed0\.json"):
        add_rows(there, here)
    assert [p.stem for p in (here / "rows").iterdir()] == ["tiny--nha--lr0.001--seed0"]
    with pytest.raises(ValueError, match="elsewhere"):
        add_rows(tmp_path / "elsewhere", here)


def test_rows_of_a_built_in_table_of_before_are_not_added(tmp_path):
    name = read_table("recall-cpu").rows[0].name("recall-cpu")
    path = row_file(tmp_path / "there", name)
    path.parent.mkdir(parents=True)
    path.write_text('{"digest": "of before"}')
    with pytest.raises(ValueError, match=name):
        add_rows(tmp_path / "there", tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_table_without_rows_stands_on_the_page_with_its_command(table, tmp_path):
    remember(table, tmp_path)
    page = write_summary(tmp_path).read_text()
    assert "Not run yet" in page and "`nha ablate tiny`" in page


def test_two_pairs_decide_nothing_and_a_claim_without_any_is_not_measured():
    rows = [row(model, 1, seed, 0, {"64/4": value}) for model, value in (("a", 0.9), ("b", 0.1)) for seed in (0, 1)]
    assert judge(rows, Claim("x", "a", "b"), "t") == (
        "+80.0 points of accuracy [+80.0, +80.0], 2 pairs; by seed +80.0, +80.0",
        "undecided",
    )
    assert judge(rows, Claim("x", "a", "c"), "t") == ("", "not measured")


@pytest.mark.parametrize(
    "expect, found, verdict",
    [
        ("above", (0.1, 0.05, 0.15), "agrees"),
        ("above", (0.0, -0.1, 0.01), "disagrees"),
        ("above", (0.1, -0.1, 0.3), "undecided"),
        ("at least", (0.0, -0.01, 0.01), "agrees"),
        ("at least", (-0.1, -0.15, -0.05), "disagrees"),
        ("at least", (-0.1, -0.3, 0.1), "undecided"),
        ("equal", (0.0, -0.01, 0.01), "agrees"),
        ("equal", (-0.1, -0.15, -0.05), "disagrees"),
        ("equal", (0.0, -0.1, 0.1), "undecided"),
    ],
)
def test_verdicts_follow_from_the_interval(expect, found, verdict):
    assert Difference(*found, count=9).verdict(expect, 0.02) == verdict


def test_read_row_gives_nothing_where_nothing_is(tmp_path):
    assert read_row(tmp_path / "no.json", "digest") is None
