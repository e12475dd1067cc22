"""The loss of a chunk of logits: the kernel against the formula, in the interpreter or on a GPU."""

import pytest
import torch

from nha.distill.loss import chunk_loss
from tests.distill.test_loss import inputs
from tests.triton.elsewhere import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("divergence", "cross-entropy", "hit", "gradient")


@pytest.mark.parametrize("taught", [True, False], ids=["teacher", "alone"])
@pytest.mark.parametrize("scale, cap, size", [(1.0, None, 1.0), (0.5, None, 1.0), (1.0, 2.0, 1.0), (1.0, None, 1e3)])
def test_the_kernel_gives_what_the_formula_gives(scale, cap, size, taught, monkeypatch):
    from nha.ops.triton import loss

    monkeypatch.setattr(loss, "BLOCK", 16)
    given = inputs(torch.float32)
    given[:2] = [x * size for x in given[:2]]
    given[3][:5] = (given[0] @ given[2].T).argmax(-1)[:5]
    if not taught:
        given[1] = None
    exact = chunk_loss(*(x if x is None or x.dtype == torch.int64 else x.double() for x in given), scale, cap)
    rounded = chunk_loss(*given, scale, cap)
    found = loss.chunk_loss(*(None if x is None else x.to(DEVICE) for x in given), scale, cap)
    assert torch.equal(found[2].cpu(), exact[2]) and exact[2][:5].all()
    for name, mine, theirs, wanted in zip(NAMES, found, rounded, exact, strict=True):
        if name != "hit":
            largest = wanted.abs().max() + (given[0] @ given[2].T).abs().max() * scale  # log-sum-exps cancel
            band = (theirs - wanted).abs().max()
            assert (mine.cpu() - wanted).abs().max() <= 2 * (band + 2**-23 * largest), name


def test_the_kernel_compiles_for_a_gpu_without_spills():
    shapes = [{}, {"vocabulary": 128256, "cap": 30.0}, {"dtype": "float32", "taught": False}]
    rows = compiled("loss_only", *shapes)
    assert [row["kernel"] for row in rows] == ["loss_kernel"] * 3
    assert all(row["stack"] == 0 and row["registers"] <= 128 for row in rows), rows
