"""Weights that bitsandbytes keeps in 4 bits, on a CPU.

A CPU with AVX-512 BF16 packs the weight of a layer when it first runs in evaluation mode without gradients. The product
with a packed weight has no derivative, and bitsandbytes 0.50 unpacks weights wrongly when they are saved.
"""

from __future__ import annotations

from torch import nn

CAN_PACK = "support_avx512bf16_for_cpu"  # an attribute of the layers


def keep_unpacked(model: nn.Module) -> None:
    """Let no layer pack its weight from now on; the layers compute as they do with gradients.

    >>> keep_unpacked(nn.Linear(2, 2))  # has no weight in 4 bits
    """
    for module in model.modules():
        if getattr(module, CAN_PACK, False):
            setattr(module, CAN_PACK, False)


def check_unpacked(model: nn.Module) -> None:
    """Raise ValueError for a model with packed weights: all that is learned below them would silently get no gradient.

    >>> check_unpacked(nn.Linear(2, 2))
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"expected 4-bit weights that no pass has packed for the CPU, got {name}: load the model again, and "
                "train it before it predicts"
            )
