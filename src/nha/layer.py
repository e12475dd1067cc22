"""The layer for models trained from scratch: projections, gate and rotary positions around `nha_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nha.ops import NHAState, nha_attention
from nha.ops.exact import WriteOrder, exact_log_gate
from nha.ops.rotary import rotate
from nha.ops.state import check_state, check_window_size
from nha.ops.validation import check_cu_seqlens, check_factors, check_mask
from nha.ops.varlen import sequence_of
from nha.settings import SLOT_WRITES, check_choice

GATE_DIVISOR = 8.0


def log_gate(logits: Tensor, heads: int) -> Tensor:
    """Log-gates [B, T, H, M] of gate logits [B, T, H * M]: logsigmoid(logits) / 8 (arXiv 2510.07019).

    >>> log_gate(torch.zeros(1, 1, 2), heads=1)[0, 0, 0].tolist()  # ln(1/2) / 8
    [-0.08664339780807495, -0.08664339780807495]
    """
    return F.logsigmoid(logits).view(*logits.shape[:-1], heads, -1) / GATE_DIVISOR


def rotary_tables(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, dim] in float32 of the rotary embedding at positions [B, T] (arXiv 2104.09864)."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angle = positions[..., None].float() * theta**-exponent
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def segment_positions(
    batch: int,
    length: int,
    device: torch.device,
    state: NHAState | None,
    mask: Tensor | None,
    cu: Tensor | None,
) -> Tensor:
    """Positions [B, T] of a segment's tokens: counted over real tokens, from 0 in every packed sequence.

    >>> mask = torch.tensor([[False, True, True]])
    >>> segment_positions(1, 3, mask.device, None, mask, None).tolist()
    [[0, 0, 1]]
    """
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
    else:
        positions = torch.arange(length, device=device).expand(batch, -1)
    if cu is not None:
        row = sequence_of(cu, positions[0])
        positions = positions - cu[row]
        return positions if state is None else positions + state.num_tokens[row]
    return positions if state is None else positions + state.num_tokens[:, None]


def write_order(
    x: Tensor, state: NHAState | None, mask: Tensor | None, cu: Tensor | None, kept: Tensor | None = None
) -> WriteOrder:
    """Where the tokens of a segment x [B, T, hidden] stand in their sequences, for exact slots.

    Padding is never written. `kept` [sequences, H] is the number that heads kept before, by default that of the state.

    >>> mask = torch.tensor([[False, True, True]])
    >>> write_order(torch.zeros(1, 3, 8), None, mask, None).token.tolist()
    [[-1, 0, 1]]
    """
    token = segment_positions(x.shape[0], x.shape[1], x.device, state, mask, cu)
    token = token if mask is None else token.masked_fill(~mask, -1)
    return WriteOrder(token, kept if kept is not None or state is None else state.num_kept, cu)


def _check_sizes(least: int = 1, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise ValueError(f"expected {name} to be an int >= {least}, got {size!r}")


class NativeHybridAttention(nn.Module):
    """Native Hybrid Attention as a drop-in attention layer (arXiv 2510.07019).

    Queries and keys of the window carry rotary positions, those of the slots none. The log-gate is
    `logsigmoid(g_proj(x)) / 8` without a bias. Optional sinks are learned, constant key/value pairs.

    With `slot_write="exact"` `g_proj` gives one score per KV head instead, with a bias: a token whose score is above 0
    is kept in a slot of its own (`nha.ops.exact`).

    Args:
        hidden_size: width of the input and output.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of `num_heads`; default `num_heads`.
        num_slots: slots per KV head.
        window_size: tokens in the window; 0 is a pure linear RNN, -1 full attention. May be changed between sequences.
        head_dim: default `hidden_size // num_heads`.
        num_sinks: learned sinks per KV head.
        rope_theta: base of the rotary embedding; None for no positions.
        bias: give q, k, v and output projections a bias.
        slot_write: "soft", every token to all slots by gates, or "exact", kept tokens to one slot each.

    Raises:
        ValueError: a size below 1, heads that do not divide, an odd head dim under rotary positions, or a window or
            `rope_theta` out of bounds.

    >>> _ = torch.manual_seed(0)
    >>> layer = NativeHybridAttention(16, num_heads=4, num_kv_heads=2, num_slots=4, window_size=3)
    >>> x = torch.randn(1, 7, 16)
    >>> whole, _ = layer(x)
    >>> first, state = layer(x[:, :4], return_state=True)
    >>> second, _ = layer(x[:, 4:], state=state)
    >>> torch.allclose(whole, torch.cat([first, second], 1), atol=1e-6)
    True
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        num_slots: int = 64,
        window_size: int = 64,
        head_dim: int | None = None,
        num_sinks: int = 0,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        slot_write: str = "soft",
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, num_slots=num_slots)
        if num_heads % num_kv_heads:
            raise ValueError(f"expected num_heads to be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"expected hidden_size to be a multiple of num_heads, got {hidden_size} and {num_heads}")
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        _check_sizes(head_dim=head_dim)
        _check_sizes(least=0, num_sinks=num_sinks)
        check_window_size(window_size)
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"expected an even head_dim for rotary positions, got {head_dim}")
        check_factors(rope_theta=rope_theta)
        check_choice("slot_write", slot_write, SLOT_WRITES)
        self.slot_write = slot_write
        self.head_dim = head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.num_slots, self.window_size, self.rope_theta = num_slots, window_size, rope_theta
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        exact = slot_write == "exact"
        self.g_proj = nn.Linear(hidden_size, num_kv_heads * (1 if exact else num_slots), bias=exact)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias)
        self.sink_key = nn.Parameter(torch.zeros(num_kv_heads, num_sinks, self.head_dim))
        self.sink_value = nn.Parameter(torch.zeros(num_kv_heads, num_sinks, self.head_dim))

    @property
    def sink(self) -> tuple[Tensor, Tensor] | None:
        """The learned sinks (key [H, S, D], value [H, S, D]), None without any."""
        return (self.sink_key, self.sink_value) if self.sink_key.shape[1] else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, HQ, D], keys [B, T, H, D] and values [B, T, H, D] of x [B, T, hidden], no positions yet."""
        return self.to_heads([project(x) for project in (self.q_proj, self.k_proj, self.v_proj)])

    def project_with_gate(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `project`, and the gate's logits [B, T, H * M], or scores [B, T, H] of exact slots."""
        return *self.project(x), self.g_proj(x)

    def to_heads(self, projected: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, HQ, D], keys and values [B, T, H, D] of what the projections return, [B, T, width] each."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        return q, k, v

    def gates(self, logits: Tensor, order: WriteOrder | None, fill: bool = True) -> tuple[Tensor, Tensor | None]:
        """Log-gates [B, T, H, M] of the gate's logits and the tokens kept after them [sequences, H].

        The latter is None for soft slots, which need no `order`; `fill` as in `exact_log_gate`.
        """
        if self.slot_write == "soft":
            return log_gate(logits, logits.shape[-1] // self.num_slots), None
        assert order is not None
        return exact_log_gate(logits, self.num_slots, order, fill=fill)

    def _check(self, x: Tensor, state: NHAState | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        """Raise for inputs from which positions cannot be counted; `nha_attention` checks all others."""
        width = self.q_proj.in_features
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != width or 0 in x.shape:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected x [B, T, {width}] with at least one sequence and token, got {got}")
        if mask is not None and cu_seqlens is not None:
            raise ValueError("expected attention_mask (padding) or cu_seqlens (packing), got both")
        if mask is not None:
            check_mask(mask, x)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x)
        if state is not None:
            check_state(state)
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            if state.num_tokens.shape[0] != sequences:
                raise ValueError(f"expected a state of {sequences} sequences, got {state.num_tokens.shape[0]}")
            if state.num_tokens.device != x.device:
                raise ValueError(f"expected state on {x.device} like x, got {state.num_tokens.device}")

    def forward(
        self,
        x: Tensor,
        *,
        state: NHAState | None = None,
        return_state: bool = False,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        impl: str = "auto",
    ) -> tuple[Tensor, NHAState | None]:
        """Attend from x [B, T, hidden]; returns (output [B, T, hidden], state after x if asked for).

        `state` continues an earlier segment; `attention_mask` [B, T] bool marks padding and `cu_seqlens` packed
        sequences, as in `nha_attention`.

        Raises:
            ValueError, TypeError: inputs that do not fit together, as in `nha_attention`.
        """
        self._check(x, state, attention_mask, cu_seqlens)
        q, k, v, gate_logits = self.project_with_gate(x)
        q_rope, k_rope = q, k
        if self.rope_theta is not None:
            positions = segment_positions(x.shape[0], x.shape[1], x.device, state, attention_mask, cu_seqlens)
            cos, sin = rotary_tables(positions, self.head_dim, self.rope_theta)
            q_rope, k_rope = rotate(q, cos, sin), rotate(k, cos, sin)
        order = None
        if self.slot_write == "exact":
            order = write_order(x, state, attention_mask, cu_seqlens)
        gate, kept = self.gates(gate_logits, order, fill=state is None or not state.slots_active)
        result = nha_attention(
            q_rope,
            k_rope,
            v,
            gate,
            window_size=self.window_size,
            q_slot=q,
            k_slot=k,
            sink=self.sink,
            state=state,
            return_state=return_state,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            impl=impl,
        )
        if result.state is not None:
            result.state.num_kept = kept
        return self.o_proj(result.out.flatten(2)), result.state
