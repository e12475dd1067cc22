"""A power cut at any moment leaves a run that resumes: what was not synced may be lost, torn or empty."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from nha.distill.checkpoint import check_directory, latest_checkpoint, step_of
from nha.distill.run import distill, identity
from tests.distill.material import material, settings, tiny

CALLS = ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir")
ROOT = -1


@dataclass
class Moment:
    """A file system between two calls: what programs see, and what is on the disk for certain.

    Files and directories have numbers; `entries` and `data` are what is seen, `synced_*` what the last sync wrote.
    """

    entries: dict[int, dict[str, int]]
    data: dict[int, bytes]
    synced_entries: dict[int, dict[str, int]]
    synced_data: dict[int, bytes]
    published: int  # step of the newest checkpoint that the run reported

    def crash(self, keep_names: bool, torn: bool) -> dict[str, bytes]:
        """The files after a power cut: with the names as seen or as synced; with unsynced data torn or empty."""
        found: dict[str, bytes] = {}

        def walk(folder: int, path: str) -> None:
            names = self.entries.get(folder, {}) if keep_names else self.synced_entries.get(folder, {})
            for name, number in names.items():
                if number in self.entries or number in self.synced_entries:
                    walk(number, f"{path}{name}/")
                    continue
                synced, seen = self.synced_data.get(number, b""), self.data.get(number)
                found[path + name] = seen[: (len(synced) + len(seen)) // 2] if torn and seen is not None else synced

        walk(ROOT, "")
        return found


@dataclass
class Recorder:
    """Records a `Moment` after every call of a run that changes names or syncs."""

    root: Path
    numbers: dict[int, int] = field(default_factory=dict)  # of inodes, which the system uses again
    synced_entries: dict[int, dict[str, int]] = field(default_factory=dict)
    synced_data: dict[int, bytes] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)
    count: int = 0

    def look(self) -> tuple[dict[int, dict[str, int]], dict[int, bytes]]:
        """Entries of all directories and contents of all files, as programs see them."""
        entries: dict[int, dict[str, int]] = {}
        data: dict[int, bytes] = {}
        seen: set[int] = set()

        def walk(folder: Path, number: int) -> None:
            entries[number] = {}
            for path in folder.iterdir():
                inode = path.stat().st_ino
                seen.add(inode)
                if inode not in self.numbers:
                    self.count += 1
                    self.numbers[inode] = self.count
                child = entries[number][path.name] = self.numbers[inode]
                if path.is_dir():
                    walk(path, child)
                else:
                    data[child] = path.read_bytes()

        walk(self.root, ROOT)
        self.numbers = {inode: number for inode, number in self.numbers.items() if inode in seen}
        return entries, data

    def record(self, synced: int | None = None) -> None:
        """Record what is there now; `synced` is the inode that was synced just now."""
        entries, data = self.look()
        number = ROOT if synced == self.root.stat().st_ino else self.numbers.get(synced or 0)
        if number in data:
            self.synced_data[number] = data[number]
        elif number is not None:
            self.synced_entries[number] = entries[number]
        names = self.synced_entries.get(entries[ROOT].get("run", 0), {})
        steps = [step_of(Path(name)) for name in names]
        published = max([*steps, self.moments[-1].published if self.moments else -1])
        self.moments.append(Moment(entries, data, dict(self.synced_entries), dict(self.synced_data), published))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def recorded(given, tmp_path_factory):
    """The weights after a run, and its moments."""
    root = tmp_path_factory.mktemp("disk")
    recorder = Recorder(root)
    recorder.record()
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, watched(name, getattr(os, name), recorder))
        found = distill(tiny(), given[1], given[0], root / "run", settings())
    return found.model.state_dict(), recorder.moments


def watched(name, call, recorder):
    """A function of `os` that records the moment after it."""

    def run(*args, **kwargs):
        inode = os.fstat(args[0]).st_ino if name == "fsync" else None
        result = call(*args, **kwargs)
        recorder.record(inode)
        return result

    return run


def write(files: dict[str, bytes], root: Path) -> Path:
    root.mkdir()
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root / "run"


def states(moments):
    """Every different set of files that a power cut can leave, with the newest step that it must hold."""
    found: dict[frozenset, tuple[dict[str, bytes], int]] = {}
    for moment in moments:
        for keep_names in (False, True):
            for torn in (False, True):
                files = moment.crash(keep_names, torn)
                key = frozenset(files.items())
                least = max(moment.published, found[key][1] if key in found else -1)
                found[key] = files, least
    return list(found.values())


def test_every_power_cut_leaves_the_newest_checkpoint_whole(given, recorded, tmp_path):
    _, moments = recorded
    wanted = identity(tiny(), given[0], settings(), 1)
    assert {moment.published for moment in moments} == {-1, 2, 4, 6}
    found = states(moments)
    assert len(found) > 60
    for number, (files, least) in enumerate(found):
        run = write(files, tmp_path / str(number))
        check_directory(run, wanted)
        checkpoint = latest_checkpoint(run)
        assert (-1 if checkpoint is None else step_of(checkpoint)) >= least, sorted(files)


def test_runs_resume_from_what_power_cuts_leave(given, recorded, tmp_path):
    """One of each kind: every newest checkpoint, with whatever else a cut can leave beside it."""
    weights, moments = recorded
    chosen = {}
    for files, least in states(moments):
        names = {name.split("/")[1] for name in files if "/" in name}
        kind = (least, frozenset(name for name in names if "checkpoint" in name or name == "run.json"))
        chosen[kind] = files
    assert len(chosen) >= 6
    for number, files in enumerate(chosen.values()):
        found = distill(tiny(), given[1], given[0], write(files, tmp_path / str(number)), settings())
        assert found.finished and [entry["step"] for entry in found.log] == [1, 2, 3, 4, 5, 6]
        for name, value in found.model.state_dict().items():
            assert torch.equal(value, weights[name]), name
