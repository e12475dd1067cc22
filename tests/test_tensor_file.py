"""Tensors go between files and the memory of any device as they are; what is damaged is refused by name."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nha import tensor_file
from nha.io import read_tensors, write_tensors
from nha.tensor_file import DTYPES, fill, fill_all, open_tensors


@pytest.fixture(params=[True, False], ids=["in place", "through buffers"])
def addressable(request, monkeypatch):
    """Whether the host reads memory itself, or a device copies it from and to small buffers."""
    monkeypatch.setattr(tensor_file, "is_addressable", lambda device: request.param)
    monkeypatch.setattr(tensor_file, "PIECE", 64)
    return request.param


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 8)
    found = {f"of {name}": torch.ones(3, 5).to(dtype) for name, dtype in DTYPES.items()}
    found |= {"part": x[:, :, 7:33], "turned": x.transpose(1, 3), "one": x[0, 0, 0, 0], "none": x[:, :0]}
    return found | {"same": x, "also": x.bfloat16(), "column": x[0, 0, :, 1], "of one byte": torch.ones(3).bool()}


@pytest.mark.usefixtures("addressable")
def test_files_hold_the_tensors_for_us_and_for_the_library(tmp_path):
    path, tensors = tmp_path / "x", some_tensors()
    write_tensors(path, tensors, {"format": "test", "é": "ü"})
    found, metadata = read_tensors(path)
    library = load_file(path)
    assert metadata["format"] == "test" and metadata["é"] == "ü"
    assert found.keys() == library.keys() == tensors.keys()
    for name, x in tensors.items():
        for got in (found[name], library[name]):
            assert got.dtype == x.dtype and got.shape == x.shape, name
            assert torch.equal(
                got.contiguous().reshape(-1).view(torch.uint8), x.contiguous().reshape(-1).view(torch.uint8)
            )


@pytest.mark.usefixtures("addressable")
def test_several_files_fill_parts_of_one_tensor(tmp_path):
    whole = torch.randn(1, 2, 60, 4)
    sizes = [13, 7, 40]
    for place, part in enumerate(whole.split(sizes, 2)):
        write_tensors(tmp_path / str(place), {"keys": part}, {})
    target = torch.full_like(whole, torch.nan)
    opened = [open_tensors(tmp_path / str(place)) for place in range(3)]
    jobs = [(file, {"keys": x}) for file, x in zip(opened, target.split(sizes, 2), strict=True)]
    assert fill_all(jobs, target.device) == [None, None, None]
    assert torch.equal(target, whole)
    with pytest.raises(ValueError, match=r"keys .*\(1, 2, 60, 4\).*0.*\(1, 2, 13, 4\)"):
        fill(opened[0], {"keys": target})
    for file in opened:
        file.file.close()


def test_a_file_of_the_library_with_our_checksum_is_read(tmp_path):
    tensors, metadata = {"b": torch.randn(3), "a": torch.arange(4)}, {"format": "test"}
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, x in sorted(tensors.items()):
        digest.update(json.dumps([name, list(x.shape), str(x.dtype)]).encode() + x.numpy().tobytes())
    path = tmp_path / "x"
    save_file(tensors, path, {**metadata, "sha256": digest.hexdigest()})
    assert torch.equal(read_tensors(path)[0]["b"], tensors["b"])
    write_tensors(tmp_path / "y", tensors, metadata)
    with safe_open(tmp_path / "y", "pt") as ours:
        assert ours.metadata()["sha256"] == digest.hexdigest()
    save_file(tensors, path, metadata)  # nothing to check
    assert torch.equal(read_tensors(path)[0]["a"], tensors["a"])


def header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


CHANGES = {
    "dtype": lambda x: x["a"].update(dtype="F3"),
    "shape": lambda x: x["a"].update(shape=[2, 3]),
    "negative": lambda x: x["a"].update(shape=[-1, -4]),
    "offsets": lambda x: x["a"].update(data_offsets=[8, 24]),
    "text": lambda x: x["__metadata__"].update(format=3),
    "list": lambda x: x.update(a=[1]),
    "missing": lambda x: x.pop("a"),
    "checksum": lambda x: x["__metadata__"].update(format="other"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_header_is_refused_by_name(change, tmp_path):
    path = tmp_path / "some"
    write_tensors(path, {"a": torch.ones(4)}, {"format": "test"})
    found, data = header(path)
    change(found)
    text = json.dumps(found).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(ValueError, match="expected .*some"):
        read_tensors(path)


@pytest.mark.usefixtures("addressable")
def test_files_that_are_cut_or_changed_are_refused_by_name(tmp_path):
    path = tmp_path / "some"
    write_tensors(path, {"a": torch.randn(100)}, {"format": "test"})
    data = path.read_bytes()
    broken = [data[:n] for n in (0, 7, 8, 40, len(data) - 1)] + [data + b"0", b"\xff" * 16, bytes(8) + b"{}"]
    broken += [
        data[:-1] + bytes([data[-1] ^ 1]),
        (3).to_bytes(8, "little") + b"[1]",
        (2).to_bytes(8, "little") + b"\xff{",
    ]
    for text in broken:
        path.write_bytes(text)
        with pytest.raises(ValueError, match="expected .*some"):
            read_tensors(path)
    path.write_bytes(data)
    with open_tensors(path) as opened:
        path.write_bytes(data[:-50])
        with pytest.raises(ValueError, match="expected .*some"):
            fill(opened, opened.empty("cpu"))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [0, 2**70]},
        {"shape": [0, 2**61, 2**61]},
        {"shape": [-1, 0]},
        {"shape": "x"},
        {"dtype": "F99"},
        {"dtype": ["F32"]},
        {"data_offsets": [0.0, 0.0]},
        {"data_offsets": None},
    ],
    ids=str,
)
def test_a_header_that_nobody_wrote_is_refused(tmp_path, change):
    entry = {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]} | change
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="whole safetensors file at .*x"):
        open_tensors(tmp_path / "x")
