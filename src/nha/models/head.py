"""From hidden states to logits, as each family does it, for as many or as few tokens as are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.models.linear import HEAD, after_head

MULTIPLIED = ("hyperclovax",)  # families that multiply logits by what Granite divides by
MAX_BATCH_TOKENS = 1 << 18
ELEMENTS = 1 << 28  # logits at a time in `token_losses`: 1 GiB of float32


def hidden_states(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """The decoder's output [B, T, hidden] for ids [B, T], which the head reads; nothing is cached."""
    return model.get_decoder()(ids, use_cache=False, **kwargs).last_hidden_state


def logit_factors(config: Any) -> tuple[float, float]:
    """The numbers that a family multiplies its logits with (Cohere) and divides them by (Granite).

    >>> from transformers import GraniteConfig
    >>> logit_factors(GraniteConfig(logits_scaling=8.0))
    (1.0, 8.0)
    """
    scaling = getattr(config, "logits_scaling", None) or 1.0
    if config.model_type.removeprefix("nha-") in MULTIPLIED:
        return scaling, 1.0
    return getattr(config, "logit_scale", None) or 1.0, scaling


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., hidden], with the family's factors and cap (Gemma)."""
    config: Any = model.config
    head: Any = model.get_output_embeddings()
    factor, divisor = logit_factors(config)
    logits = head(hidden) * factor / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def read_last_token(head: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The hook of a head that reads one token [1, 1, hidden] cut out of many on a CPU: it gets a tensor of its own.

    With the strides of the many PyTorch computes a batch of products, for which it copies the head's weight in 16 bits.
    The bits of the result are the same.
    """
    if torch.compiler.is_compiling() or not args:
        return None
    x = args[0]
    if x.device.type != "cpu" or x.shape[:-1] != (1, 1) or x.stride(0) == x.stride(1):
        return None
    return x.clone(memory_format=torch.contiguous_format), *args[1:]


def watch_head(model: PreTrainedModel) -> None:
    """Give the head of a model, if it has one, the hook `read_last_token`, and let the decoder know it."""
    head: Any = model.get_output_embeddings()
    if head is None:
        return
    vars(model.get_decoder())[HEAD] = head
    if read_last_token not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(read_last_token)
        head.register_forward_hook(after_head, always_call=True)


@torch.no_grad()
def check_head(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise ValueError for a model whose own logits for ids [B, T] are not those of `head_logits`.

    A family may have a factor or a cap of its own there. The bound is the rounding of the largest logit, 8 times.
    """
    ids = ids[:1, :8].to(model.device)
    own = model(ids, use_cache=False).logits.float()
    off = (head_logits(model, hidden_states(model, ids)).float() - own).abs().max().item()
    if not off <= 8 * torch.finfo(model.dtype).eps * own.abs().max().item():
        family = model.config.model_type
        raise ValueError(f"expected logits that the head alone gives, got {family}, whose own differ by {off:.3g}")


def token_losses(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Losses [N] in nats, float32, of targets [N] given hidden states [N, hidden]; a part of the logits at a time.

    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model = NHAForCausalLM(NHAConfig.tiny())
    >>> ids = torch.arange(40)[None]
    >>> with torch.no_grad():
    ...     hidden = hidden_states(model, ids)[0, :-1]
    ...     ours, theirs = token_losses(model, hidden, ids[0, 1:]).mean(), model(ids, labels=ids).loss
    >>> torch.allclose(ours, theirs)
    True
    """
    step = max(1, ELEMENTS // model.config.get_text_config().vocab_size)
    losses = [
        torch.nn.functional.cross_entropy(head_logits(model, some).float(), wanted, reduction="none")
        for some, wanted in zip(hidden.split(step), targets.split(step), strict=True)
    ]
    return torch.cat(losses)


def batch_tokens(model: PreTrainedModel) -> int:
    """Tokens of one forward pass: as many as half of a GPU's free memory holds, 4,096 on a CPU.

    A token takes the widest activations of one layer, and its keys and values in all layers.
    """
    if model.device.type != "cuda":
        return 4096
    config = model.config.get_text_config()
    heads = config.num_key_value_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    numbers = 3 * config.intermediate_size + 8 * config.hidden_size + 2 * heads * config.num_hidden_layers
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(min(MAX_BATCH_TOKENS, max(4096, free // 2 // (numbers * model.dtype.itemsize))))
