"""The parameters that an attention layer gains as a hybrid: its gate, its sink, and where queries see the slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from nha.layer import log_gate
from nha.models.segment import Initial, Sink
from nha.ops.exact import WriteOrder, exact_log_gate


class SlotInputs(NamedTuple):
    """Gates, sink and slots of a layer, which it reads besides queries, keys and values.

    Attributes:
        log_gate: [B, T, H, M].
        sink: constant keys [H, S, D] and values [H, S, Dv]; None without any.
        tables: cosines and sines [1, 1, R] of the distance at which a query sees the slots.
        initial: slots before the first token (`nha.models.peft_slots`); None where they start empty.
        num_kept: [sequences, H] int64, tokens in exact slots after the segment; None for soft slots.
    """

    log_gate: Tensor
    sink: Sink | None
    tables: tuple[Tensor, Tensor]
    initial: Initial | None = None
    num_kept: Tensor | None = None


class SlotParameters(nn.Module):
    """Gate and sink of one attention layer. Attention gets them from `forward` alone.

    Offloading, tensor parallelism and PEFT act when a module is called: a parameter that is read from outside its
    module may be elsewhere, in part or without its adapter.

    Args:
        hidden_size: width of the hidden states that the gate reads.
        heads, head_dim: KV heads H and their size D.
        num_slots: M.
        num_sinks: S, may be 0.
        tables: [2, 1, 1, R], the family's cosines and sines at the distance at which a query sees the slots.
        slot_write: "soft" for a gate per slot, "exact" for a score per head that says which tokens are kept.

    >>> slots = SlotParameters(8, heads=2, head_dim=4, num_slots=3, num_sinks=1, tables=torch.ones(2, 1, 1, 4))
    >>> tuple(slots(torch.zeros(1, 5, 8)).log_gate.shape)
    (1, 5, 2, 3)
    """

    slot_cos: Tensor
    slot_sin: Tensor
    initial: Initial | None = None  # what slots hold before a sequence's first token

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        head_dim: int,
        num_slots: int,
        num_sinks: int,
        tables: Tensor,
        slot_write: str = "soft",
    ):
        super().__init__()
        self.num_slots, self.slot_write = num_slots, slot_write
        self.g_proj = nn.Linear(hidden_size, heads * (1 if slot_write == "exact" else num_slots))
        self.sink_key = nn.Parameter(torch.empty(heads, num_sinks, head_dim))
        self.sink_value = nn.Parameter(torch.empty(heads, num_sinks, head_dim))
        self.register_buffer("slot_cos", tables[0])
        self.register_buffer("slot_sin", tables[1])
        self.reset_parameters()

    def forward(self, hidden: Tensor, order: WriteOrder | None = None, *, fill: bool = True) -> SlotInputs:
        """Gates, sink and tables for hidden states [B, T, hidden].

        Exact slots need the `order` of the tokens in their sequences. A sequence's first token is not written where a
        sink stands in for it. With `fill`, free slots take tokens that are not kept (`exact_log_gate`).
        """
        logits = self.g_proj(hidden)
        sink = (self.sink_key, self.sink_value) if self.sink_key.shape[1] else None
        tables = self.slot_cos, self.slot_sin
        if self.slot_write == "soft":
            gate, kept = log_gate(logits, logits.shape[-1] // self.num_slots), None
        else:
            assert order is not None
            order = order if sink is None else order._replace(token=order.token - 1)
            gate, kept = exact_log_gate(logits, self.num_slots, order, fill=fill)
        return SlotInputs(gate, sink, tables, self.initial, kept)

    def reset_parameters(self) -> None:
        """Gates that leave the slots nearly alone and a sink of zeros, until calibration or training sets them."""
        init.normal_(self.g_proj.weight, std=0.02)
        init.zeros_(self.g_proj.bias)
        init.zeros_(self.sink_key)
        init.zeros_(self.sink_value)

    def reset_tables(self, cos: Tensor, sin: Tensor) -> None:
        """Set the rotary tables [1, 1, R], unless a checkpoint brought some."""
        init.copy_(self.slot_cos, cos)
        init.copy_(self.slot_sin, sin)

    @torch.no_grad()
    def set_gates(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Write the gate's weight [H * M, hidden] and bias [H * M] (zeros by default); exact slots have H of each."""
        self.g_proj.weight.copy_(weight)
        self.g_proj.bias.zero_() if bias is None else self.g_proj.bias.copy_(bias)

    @torch.no_grad()
    def set_sinks(self, key: Tensor, value: Tensor) -> None:
        """Write the sink's keys [H, S, D] and values [H, S, Dv]."""
        self.sink_key.copy_(key)
        self.sink_value.copy_(value)
