"""How long vLLM's scheduler keeps the blocks of hybrid layers: a specification of their caches, and its manager.

A worker sends the specification to the scheduler's process, which imports this module with it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass, fields

from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec


class NHAManager(MambaManager):
    """Keeps a block that ended within drafts until prefix caching has its name.

    A block gets its name in the step after the one in which its last token stood, when vLLM's own manager has already
    given it away if drafts went past its end.
    """

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Give away blocks that end before all tokens of the last step."""
        behind = self.num_speculative_blocks if self.mamba_cache_mode == "align" else 0
        super().remove_skipped_blocks(request_id, max(processed_computed_tokens - behind, 0), num_prompt_tokens)


KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # registers vLLM's own, which it does not do after another


@register_kv_cache_spec(manager_class=NHAManager, uniform_type_base_spec=MambaSpec)
@dataclass(frozen=True)
class NHASpec(MambaSpec):
    """The specification of a hybrid layer's cache."""

    @classmethod
    def of(cls, spec: MambaSpec) -> NHASpec:
        """The same specification as vLLM's own for layers with states."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec) if field.init})
