"""A text that was read once is found again: the same bits, in any process, whatever becomes of the files."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from nha.memory import MemoryStore
from nha.memory import store as store_module
from nha.memory.store import ABANDONED_SECONDS
from nha.models.cache import nha_layers
from tests.models.families import hybrid, sliding, tokens

WINDOWS = {"all hybrid": [8, 3, 0], "one full": [8, -1, 3]}
FEW = 4 << 20  # bytes that hold every entry of a test


def logits(model, ids, memory) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[:, memory.num_tokens :], past_key_values=memory.cache, use_cache=True).logits


def files(store: MemoryStore) -> list[Path]:
    return sorted(path for path in Path(store.path).iterdir() if path.suffix == ".safetensors")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("marks", [(), (50, 77)])
def test_a_hit_gives_the_same_bits_as_reading(family, windows, marks, tmp_path):
    model = hybrid(family, windows, **(sliding(12) if family == "gemma3_text" and -1 in windows else {}))
    ids = tokens(1, 110)
    cold = MemoryStore(tmp_path / "a", FEW, 32, 1).read(model, ids, marks)
    again = MemoryStore(tmp_path / "a", FEW, 32, 1).read(model, ids, marks)
    assert (cold.num_tokens, cold.num_found, again.num_found) == (96, 0, 96)
    anew = MemoryStore(tmp_path / "b", FEW, 32, 1).read(model, ids, marks)
    wanted = logits(model, ids, anew)
    assert torch.equal(logits(model, ids, cold), wanted)
    assert torch.equal(logits(model, ids, again), wanted)


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS.keys())
def test_branches_share_the_longest_stored_prefix(windows, tmp_path):
    model, ids = hybrid("llama", windows), tokens(1, 100)
    store = MemoryStore(tmp_path, FEW, 16, 1)
    store.read(model, ids)
    held = files(store)
    for length in (70, 64, 17, 16, 1):
        branch = torch.cat([ids[:, :length], tokens(1, 30, seed=length)], 1)
        memory = store.read(model, branch)
        assert memory.num_found == length // 16 * 16
        with torch.no_grad():
            wanted = model(branch, use_cache=False).logits[:, memory.num_tokens :]
        torch.testing.assert_close(logits(model, branch, memory), wanted, atol=1e-4, rtol=1e-4)
    assert set(held) < set(files(store))
    assert store.load(model, ids[:, :16]) is None


def test_an_entry_is_written_while_the_next_segment_is_read_and_does_not_change(tmp_path, monkeypatch):
    model, ids = hybrid("llama", [8, -1, 3]), tokens(1, 40)
    marks, segments = [32, 33, 34, 35], []  # segments of one token are written into the state itself
    wanted = logits(model, ids[:, :34], MemoryStore(tmp_path / "a", FEW, 32, 1).read(model, ids[:, :34], marks))
    read_on, write = threading.Event(), store_module.write_tensors

    def write_late(*args: Any) -> None:
        assert read_on.wait(30)
        write(*args)

    def count(*args: Any) -> None:
        segments.append(1)
        if len(segments) > 1:
            read_on.set()

    monkeypatch.setattr(store_module, "write_tensors", write_late)
    hook = model.register_forward_hook(count)
    MemoryStore(tmp_path / "b", FEW, 32, 1).read(model, ids, marks)
    hook.remove()
    found = MemoryStore(tmp_path / "b", FEW, 32, 1).load(model, ids[:, :34], marks)
    assert found is not None and found.num_found == 33
    assert torch.equal(logits(model, ids[:, :34], found), wanted)


def test_generation_goes_on_from_a_found_cache(tmp_path):
    model: Any = hybrid("llama", [8, -1, 3]).double()
    ids = tokens(1, 60)
    store = MemoryStore(tmp_path, FEW, 16, 1)
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        cache = store.read(model, ids).cache
        found = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
        assert torch.equal(found, wanted)


def test_a_long_text_takes_space_in_proportion_to_its_length(tmp_path):
    model = hybrid("llama", [8, -1, -1], slots=1, sinks=0)
    sizes = []
    for length in (513, 1025):
        store = MemoryStore(tmp_path / str(length), 1 << 30, 64, 1)
        store.read(model, tokens(1, length))
        sizes.append(store.nbytes)
    assert sizes[1] < 2.2 * sizes[0]


def test_the_least_recently_used_goes(tmp_path):
    model, texts = hybrid("llama", [8, -1, 3]), [tokens(1, 70, seed=i) for i in range(3)]
    store = MemoryStore(tmp_path / "first", FEW, 32, 1)
    store.read(model, texts[0])
    room = 2 * store.nbytes + store.nbytes // 4  # for two texts
    store = MemoryStore(tmp_path / "bounded", room, 32, 1)
    store.read(model, texts[0])
    store.read(model, texts[1])
    assert store.load(model, texts[0]) is not None  # used after the second
    store.read(model, texts[2])
    assert store.nbytes <= room
    found = [None if memory is None else memory.num_found for memory in (store.load(model, x) for x in texts)]
    assert found[0] == found[2] == 64
    assert found[1] != 64


def test_a_text_that_is_too_long_keeps_its_beginning(tmp_path):
    model, ids = hybrid("llama", [8, -1, 3]), tokens(1, 200)
    store = MemoryStore(tmp_path / "a", FEW, 32, 1)
    store.read(model, ids)
    small = MemoryStore(tmp_path / "b", store.nbytes // 2, 32, 1)
    wanted = logits(model, ids, small.read(model, ids))
    assert small.nbytes <= small.max_bytes
    memory = small.read(model, ids)
    assert 64 <= memory.num_found < 192
    assert torch.equal(logits(model, ids, memory), wanted)


@pytest.mark.parametrize("kind", ["state", "growth"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_entry_is_dropped_and_read_again(kind, damage, tmp_path, caplog):
    model, ids = hybrid("llama", [8, -1, 3]), tokens(1, 70)
    store = MemoryStore(tmp_path, FEW, 32, 1)
    wanted = logits(model, ids, store.read(model, ids))
    path = next(path for path in files(store) if path.name.startswith("00000064") and f".{kind}." in path.name)
    data = bytearray(path.read_bytes())
    if damage == "foreign":
        data[:] = next(p for p in files(store) if p.name.startswith("00000032") and ".state." in p.name).read_bytes()
    elif damage == "flipped":
        data[-3] ^= 1
    path.write_bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(damage, len(data))])
    with caplog.at_level(logging.WARNING):
        memory = store.read(model, ids)
    assert memory.num_found == 32
    assert len(caplog.records) == 1
    assert path.name.split(".")[0] in caplog.text
    assert torch.equal(logits(model, ids, memory), wanted)
    assert store.load(model, ids).num_found == 64  # type: ignore[union-attr]


def test_a_missing_part_is_a_miss(tmp_path):
    model, ids = hybrid("llama", [8, -1, 3]), tokens(1, 100)
    store = MemoryStore(tmp_path, FEW, 32, 1)
    store.read(model, ids)
    next(p for p in files(store) if p.name.startswith("00000064") and ".growth." in p.name).unlink()
    assert store.load(model, ids).num_found == 32  # type: ignore[union-attr]
    assert store.read(model, ids).num_found == 32
    assert store.read(model, ids).num_found == 96


def test_another_model_finds_nothing_and_its_entry_is_refused_by_name(tmp_path, caplog):
    model, other, ids = hybrid("llama", 8), hybrid("llama", 4), tokens(1, 70)
    store = MemoryStore(tmp_path, FEW, 32, 1)
    store.read(model, ids)
    own = files(store)
    assert store.load(other, ids) is None
    store.read(other, ids)
    (theirs,) = (p for p in files(store) if p not in own and p.name.startswith("00000064"))
    (mine,) = (p for p in own if p.name.startswith("00000064"))
    mine.write_bytes(theirs.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert store.load(model, ids).num_found == 32  # type: ignore[union-attr]
    assert "NHALlamaForCausalLM" in caplog.text
    assert not mine.exists()


def test_a_file_in_the_place_of_a_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="directory for memories at .*file"):
        MemoryStore(tmp_path / "file")


def test_a_file_that_cannot_be_read_or_replaced_is_left_out(tmp_path, caplog):
    model, ids = hybrid("llama", [8, -1, 3]), tokens(1, 70)
    wanted = logits(model, ids, MemoryStore(tmp_path / "other", FEW, 32, 1).read(model, ids))
    store = MemoryStore(tmp_path / "store", FEW, 32, 1)
    store.read(model, ids)
    path = next(p for p in files(store) if p.name.startswith("00000064") and ".state." in p.name)
    path.unlink()
    path.mkdir()
    with caplog.at_level(logging.WARNING):
        memory = store.read(model, ids)
    assert (memory.num_found, memory.num_tokens) == (32, 64)
    assert [path.name in record.getMessage() for record in caplog.records] == [True, True]
    told = [record.getMessage() for record in caplog.records]
    assert "cannot be read" in told[0]
    assert "without storing" in told[1]
    assert torch.equal(logits(model, ids, memory), wanted)


def test_a_directory_that_goes_away_is_no_loss(tmp_path, caplog):
    model, ids = hybrid("llama", 8), tokens(1, 70)
    store = MemoryStore(tmp_path / "store", FEW, 32, 1)
    wanted = logits(model, ids, store.read(model, ids))
    shutil.rmtree(tmp_path / "store")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(model, ids, store.read(model, ids)), wanted)
    assert len(caplog.records) <= 1


def test_a_lock_that_another_process_holds_does_not_stop_reading(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.05)
    model, ids = hybrid("llama", 8), tokens(1, 70)
    store = MemoryStore(tmp_path, FEW, 32, 1)
    with FileLock(tmp_path / store_module.LOCK), caplog.at_level(logging.WARNING):
        assert store.read(model, ids).num_tokens == 64
    assert "holds its lock" in caplog.text
    assert store.load(model, ids).num_found == 64  # type: ignore[union-attr]


LIMITED = """
import resource, signal, sys, torch
from nha.memory import MemoryStore
from tests.models.families import hybrid, tokens
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model, ids, store = hybrid("llama", [8, -1, 3]), tokens(1, 70), MemoryStore(sys.argv[1], 1 << 30, 32, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # as a disk that is full after so many bytes
memory = store.read(model, ids)
print(memory.num_tokens, memory.cache.get_seq_length())
"""
READER = """
import sys, torch
from nha.memory import MemoryStore
from tests.models.families import hybrid, tokens
model, store = hybrid("llama", [8, -1, 3]), MemoryStore(sys.argv[1], int(sys.argv[2]), 16, 1)
print("ready", flush=True)
sys.stdin.readline()
for turn in range(int(sys.argv[3])):
    ids = tokens(1, 100, seed=turn % 5)
    memory = store.read(model, ids)
    found = model(ids[:, memory.num_tokens:], past_key_values=memory.cache).logits[:, -1]
    wanted = model(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
print("done", flush=True)
"""


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    result = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["64", "64"], result.stderr
    told = [line for line in result.stderr.splitlines() if "without storing" in line]
    assert len(told) == 1
    assert str(tmp_path) in told[0]
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


def start(path: Path, max_bytes: int, turns: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, str(path), str(max_bytes), str(turns)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_and_one_that_is_killed(tmp_path):
    """Both store, find and remove the same entries at once; a third is killed in between."""
    model = hybrid("llama", [8, -1, 3])
    alone = MemoryStore(tmp_path / "alone", 1 << 30, 16, 1)
    alone.read(model, tokens(1, 100))
    path, room = tmp_path / "shared", 3 * alone.nbytes
    processes = [start(path, room, 12), start(path, room, 12), start(path, room, 10_000)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"  # type: ignore[union-attr]
    for process in processes:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    time.sleep(1)
    processes[2].send_signal(signal.SIGKILL)
    for process in processes[:2]:
        out, errors = process.communicate(timeout=120)
        assert out == "done\n", errors
        assert errors.count("Traceback") == 0
        assert "dropped" not in errors, errors
    processes[2].communicate(timeout=60)
    store = MemoryStore(path, room, 16, 1)
    assert store.nbytes <= room
    for turn in range(5):
        ids = tokens(1, 100, seed=turn)
        assert torch.equal(logits(model, ids, store.read(model, ids)), logits(model, ids, alone.read(model, ids)))


def test_files_of_dead_processes_are_removed_and_new_ones_are_not(tmp_path):
    store = MemoryStore(tmp_path, FEW, 32, 1)
    old, new = tmp_path / ".x.state.safetensors.1.ab.tmp", tmp_path / ".x.state.safetensors.2.cd.tmp"
    for path in (old, new):
        path.write_bytes(b"part")
    os.utime(old, (1.0, time.time() - 2 * ABANDONED_SECONDS))
    store.read(hybrid("llama", 8), tokens(1, 40))
    assert not old.exists()
    assert new.exists()
    store.clear()
    assert store.nbytes == 0


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"block_size": 0}])
def test_refused_settings(options: dict[str, Any], tmp_path):
    with pytest.raises(ValueError, match=next(iter(options))):
        MemoryStore(tmp_path, **options)


def test_refused_texts(tmp_path):
    store = MemoryStore(tmp_path)
    with pytest.raises(ValueError, match=r"\[2, 9\]"):
        store.read(hybrid("llama", 8), tokens(2, 9))
    memory = store.read(hybrid("llama", 8), tokens(1, 9))
    assert (memory.num_tokens, memory.num_found) == (0, 0)
    assert not nha_layers(memory.cache)


def test_only_its_owner_reads_a_store(tmp_path):
    assert os.stat(MemoryStore(tmp_path / "made").path).st_mode & 0o777 == 0o700


def test_entries_lie_further_apart_than_blocks(tmp_path):
    """At every fourth block, at marks and at the last one; a text that goes on builds on any of them."""
    model, ids = hybrid("llama", [8, -1, 3]), tokens(1, 260)
    store = MemoryStore(tmp_path / "a", FEW, 16, 4)
    store.read(model, ids[:, :100], marks=[41])
    stops = {int(path.name.split("-")[0]) for path in files(store)}
    assert stops == {41, 64, 96}
    memory = store.read(model, ids, marks=[41])
    assert (memory.num_found, memory.num_tokens) == (96, 256)
    anew = MemoryStore(tmp_path / "b", FEW, 16, 4).read(model, ids, marks=[41])
    wanted = logits(model, ids, anew)
    assert torch.equal(logits(model, ids, memory), wanted)
    again = store.read(model, ids, marks=[41])
    assert again.num_found == 256
    assert torch.equal(logits(model, ids, again), wanted)
