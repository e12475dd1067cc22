"""A lower bound for the time of a call: the bytes it must move and the operations it must do, over the machine's rates.

Each input is read once and each output written once. Operations are those of matrix products by the definition: a
query reads M slots, its window and the sinks; a token is written into M slots. The backward pass reads what the forward
pass read and wrote, and does 2.5 times its operations (five products for two, as FlashAttention counts).
"""

from __future__ import annotations

from typing import Any

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
BACKWARD = 2.5
SLOTLESS = ("flex-window", "fa2-window")


def keys_seen(length: int, window: int) -> float:
    """Keys in the window of a query, on average over a sequence; -1 is the whole past.

    >>> keys_seen(4, -1), keys_seen(4, 1), keys_seen(4, 2)
    (2.5, 1.0, 1.75)
    """
    window = length if window < 0 else min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length if window else 0.0


def work(row: dict[str, Any]) -> tuple[float, float]:
    """(bytes, operations) of a row of the table of operators."""
    b, t, hq, h, d, m, w = (int(row[n]) for n in ("B", "T", "HQ", "H", "D", "M", "W"))
    size, slots = BYTES[row["dtype"]], 0 if w < 0 or row["impl"] in SLOTLESS else m
    if row["pass"] == "decode":
        return _decode(b, t, hq, h, d, slots, w, size)
    query, key, gate = (b * t * n * size for n in (hq * d, h * d, h * slots))
    moved = 2 * query + 2 * key + gate
    operations = 4.0 * d * b * t * (hq * (slots + keys_seen(t, w)) + h * slots)
    if row["pass"] == "fwd+bwd":
        moved += 4 * query + 4 * key + 2 * gate
        operations *= 1 + BACKWARD
    return float(moved), operations


def _decode(b: int, t: int, hq: int, h: int, d: int, slots: int, window: int, size: int) -> tuple[float, float]:
    """One token of every sequence: the state is read, the slots and the new token are written."""
    seen = t if window < 0 else window
    slot_bytes, window_bytes = 2 * slots * d * 4, seen * (2 * d + slots) * size
    new = (2 * d + slots) * size
    moved = b * (h * (2 * slot_bytes + window_bytes + new) + 2 * hq * d * size)
    return float(moved), 4.0 * d * b * (hq * (slots + seen) + h * slots)


def floor_ms(row: dict[str, Any], ceilings: dict[str, float]) -> float:
    """Milliseconds that a row's call takes at least on a machine with these rates."""
    moved, operations = work(row)
    return 1e3 * max(moved / ceilings["bytes_per_s"], operations / ceilings["operations_per_s"])


def roofline_fraction(row: dict[str, Any], ceilings: dict[str, float]) -> float:
    """The lower bound over a row's time: 1 is as fast as the machine allows."""
    return floor_ms(row, ceilings) / float(row["ms"])
