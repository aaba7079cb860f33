"""Serves DeepSeek V3: latent attention, which expands keys from a few components and rotates a part of each."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

from qk_sniffer import families


class Family(families.Family):
    """Each head is a part without RoPE, followed by a rotated part. All key heads share one rotated part."""

    def projections(self, module: Any) -> dict[str, nn.Module]:
        query = module.q_proj if module.q_lora_rank is None else module.q_b_proj
        return {"query": query, "latent": module.kv_a_proj_with_mqa, "expanded": module.kv_b_proj}

    def projected(self, module: Any, outputs: Mapping[str, torch.Tensor], head_dim: int) -> families.QueryKey:
        width = module.qk_nope_head_dim + module.v_head_dim
        expanded = families.heads_first(outputs["expanded"].squeeze(1), width)  # the latent has one head
        shared = outputs["latent"][:, None, :, module.kv_lora_rank :].expand(-1, module.num_heads, -1, -1)
        key = torch.cat([expanded[..., : module.qk_nope_head_dim], shared], dim=-1)
        return families.heads_first(outputs["query"], head_dim), key

    def projected_value(self, module: Any, outputs: Mapping[str, torch.Tensor], value_dim: int) -> torch.Tensor:
        expanded = families.heads_first(outputs["expanded"].squeeze(1), module.qk_nope_head_dim + value_dim)
        return expanded[..., module.qk_nope_head_dim :]

    def rotated(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, embeddings: Any, width: int
    ) -> families.QueryKey:
        interleaved = module.config.rope_interleave
        rotary = modeling.apply_rotary_pos_emb_interleave if interleaved else modeling.apply_rotary_pos_emb
        query_part, key_part = rotary(query[..., -width:], key[..., -width:], *embeddings)
        return torch.cat([query[..., :-width], query_part], dim=-1), torch.cat([key[..., :-width], key_part], dim=-1)
