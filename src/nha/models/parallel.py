"""Tensor parallelism: every rank holds the gates and sinks of its own KV heads."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

STYLE = "nha_heads"


def register_style() -> bool:
    """Let transformers shard a parameter [H, ...] by its heads; False for a version that cannot."""
    if not torch.distributed.is_available() or find_spec("transformers.distributed") is None:
        return False
    if find_spec("transformers.distributed.tensor_parallel") is None:
        return False
    from torch.distributed.tensor import Shard, distribute_tensor
    from transformers.distributed import tensor_parallel

    parent: Any = getattr(tensor_parallel, "LocalParamsParallel", None)
    styles: Any = getattr(tensor_parallel, "ALL_PARALLEL_STYLES", None)
    if parent is None or styles is None:
        return False

    class HeadsParallel(parent):
        """Shards a parameter over its first dimension."""

        def shard_param(self, module: Any, param: str, mesh: Any) -> None:
            whole = module._parameters[param]
            sharded = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
            module._parameters[param] = type(whole)(sharded, requires_grad=whole.requires_grad)

    styles.register(STYLE, HeadsParallel())
    return True


SUPPORTED = register_style()


def slot_plan(plan: dict[str, str] | None, owner: str) -> dict[str, str] | None:
    """A family's plan of tensor parallelism with the gates and sinks of module `owner` in it.

    A plan that does not split KV heads stays as it is.

    >>> slot_plan({"layers.*.self_attn.k_proj": "colwise_gather_output"}, "layers.*.self_attn.nha")
    {'layers.*.self_attn.k_proj': 'colwise_gather_output'}
    """
    if not plan or plan.get("layers.*.self_attn.k_proj") != "colwise" or not SUPPORTED:
        return plan
    sinks = {f"{owner}.{name}": STYLE for name in ("sink_key", "sink_value")}
    return plan | {f"{owner}.g_proj": "colwise"} | sinks | {owner: "local_params"}
