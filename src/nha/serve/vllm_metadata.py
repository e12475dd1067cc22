"""The attention backend of hybrid layers in vLLM: one description of a batch for all layers."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadataBuilder
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor

from nha.serve.parts import NHAMetadata, plan_parts


class NHAMetadataBuilder(ShortConvAttentionMetadataBuilder):
    """Builds the parts of a batch once for all layers.

    The parent is one of those to which both of vLLM's runners tell how many drafted tokens stood; nothing else of it
    is used.
    """

    supports_update_block_table = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        self.reorder_batch_threshold = None  # any order will do

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """None for whole steps: what lies between hybrid layers is captured, they are not."""
        return AttentionCGSupport.NEVER

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> NHAMetadata:
        """The parts of a batch that nobody reads."""
        counts = torch.ones(common_attn_metadata.num_reqs, dtype=torch.int32, device=self.device)
        return self.build(0, common_attn_metadata, num_accepted_tokens=counts)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: Any,
        fast_build: bool = False,
        *,
        num_accepted_tokens: Tensor | None = None,
        num_decode_draft_tokens_cpu: Tensor | None = None,
    ) -> NHAMetadata:
        """The parts of a batch that vLLM describes. Raises RuntimeError where it drafts and does not say what stood."""
        common = common_attn_metadata
        count = common.num_reqs
        starts = common.query_start_loc_cpu[: count + 1].tolist()
        lengths = common.query_start_loc[: count + 1].diff()
        mode = self.vllm_config.cache_config.mamba_cache_mode
        seq_lens = common.seq_lens[:count]
        columns = mamba_get_block_table_tensor(common.block_table_tensor[:count], seq_lens, self.kv_cache_spec, mode)
        columns = columns[:, : 1 + self.kv_cache_spec.num_speculative_blocks].long()
        if self.kv_cache_spec.num_speculative_blocks and num_accepted_tokens is None:
            raise RuntimeError("expected vLLM to say how many drafted tokens stood, got nothing")
        drafts = [-1] * count
        if num_decode_draft_tokens_cpu is not None:
            drafts = num_decode_draft_tokens_cpu[:count].tolist()
        accepted = None if num_accepted_tokens is None else num_accepted_tokens[:count]
        parts = plan_parts(starts, drafts, (seq_lens - lengths).long(), columns, accepted)
        return NHAMetadata(starts[-1], parts)


class NHABackend(AttentionBackend):
    """The attention backend of hybrid layers."""

    @staticmethod
    def get_name() -> str:
        return "NHA"

    @staticmethod
    def get_builder_cls() -> type[NHAMetadataBuilder]:
        return NHAMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """Whether its layers keep a state of constant size."""
        return True
