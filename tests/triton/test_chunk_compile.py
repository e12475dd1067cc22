"""Every kernel of a chunked call compiles within the shared memory of an H100 and of consumer GPUs."""

import pytest

from tests.triton import compilation

# Bytes spilled per thread, by dtype; "mixed": log-gates in float32 beside 16 bits.
MAX_SPILL = {"bf16": 512, "mixed": 768, "fp16": 768, "fp32": 2560}
H100 = [
    {"sinks": 1},
    {"dim": 64, "value_dim": 64, "separate": True},
    {"dtype": "fp16"},
    {"dtype": "fp32", "dim": 64, "value_dim": 64},
    {"slots": 16, "window": 5, "groups": 9, "heads": 1, "kind": "packed"},
    {"window": 0, "length": 700},
    {"window": 512, "length": 700, "wide_gates": True, "sinks": 1},
    {"window": 300, "length": 700, "dim": 64, "value_dim": 96, "groups": 3, "start": "filled", "kind": "packed"},
    {"window": 512, "length": 700, "dtype": "fp16"},
]
LARGEST = {"dim": 256, "value_dim": 256, "slots": 128, "sinks": 1}
CONSUMER = [
    {"capability": 89, "sinks": 1},
    {"capability": 120, "dim": 64, "value_dim": 64, "separate": True},
    {"capability": 89, "dtype": "fp16", **LARGEST},
    {"capability": 89, "dtype": "fp32", "sinks": 1},
    {"capability": 120, **LARGEST},
]
DATA_CENTER = [{"capability": 80, "sinks": 1}, {"capability": 100, "sinks": 1}]


def thirds(shapes):
    """Shapes in three parts: those of a part share a process, which takes longer to start than to compile one."""
    return pytest.mark.parametrize("shapes", [shapes[i::3] for i in range(3)], ids=range(3))


def compiled(shapes):
    """(shape, its compiled kernels) of cases, each checked to be all of its kernels."""
    kernels = compilation.compiled("compile_chunk", *shapes)
    for index, shape in enumerate(shapes):
        own = [row for row in kernels if row["case"] == index]
        names = {row["kernel"] for row in own}
        backward = {"nha_chunk_bwd_kernel_dq", "nha_chunk_bwd_kernel_dstate", "nha_chunk_bwd_kernel_dkv"}
        assert backward | {"nha_chunk_fwd_kernel", "nha_chunk_state_kernel_bwd"} <= names
        scanned = {"nha_chunk_state_kernel_local", "nha_chunk_state_kernel_scan"} <= names
        assert ("nha_chunk_state_kernel_serial" in names) != scanned
        assert ("nha_chunk_tables_kernel" in names) == (shape.get("kind") == "packed")
        yield shape, own


@thirds(H100)
def test_every_kernel_fits_an_h100(shapes):
    for shape, kernels in compiled(shapes):
        for row in kernels:
            assert row["shared"] <= 227 << 10, row
            assert row["stack"] <= MAX_SPILL["mixed" if shape.get("wide_gates") else shape.get("dtype", "bf16")], row


@thirds([{"dtype": "fp16", **LARGEST}, *DATA_CENTER, *CONSUMER])
def test_every_kernel_fits_every_gpu(shapes):
    for shape, kernels in compiled(shapes):
        for row in kernels:
            assert row["shared"] <= compilation.SHARED_MEMORY[shape.get("capability", 90)], row
