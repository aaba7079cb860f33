"""Saves adapters of the package peft for the models of the zoo, as a training program does."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from support.zoo import Case


def lora(**settings: Any) -> Any:
    """The config of a LoRA adapter on the queries and keys, with other `settings`."""
    from peft import LoraConfig

    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "k_proj"]} | settings)


def save_adapter(case: Case, folder: Path, config: Any = None, dtype: torch.dtype = torch.float32) -> Path:
    """Saves an adapter with random weights for the model of `case`, by default a LoRA one."""
    from peft import get_peft_model

    model = get_peft_model(case.model(dtype=dtype), lora() if config is None else config)
    change = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:  # many start as zeros
                weight.add_(torch.randn(weight.shape, generator=change) * 0.1)
    model.save_pretrained(folder)
    return folder


def adapted(case: Case, adapter: Path, *, merged: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """Returns the whole model of `case` with the adapter, as peft loads it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(case.model(dtype=dtype), str(adapter))
    whole: nn.Module = model.merge_and_unload(safe_merge=True) if merged else model.get_base_model()
    return whole.eval()


def linear_in_attention(case: Case) -> list[str]:
    """Returns the last parts of the names of the linear modules in attention."""
    linear = [name for name, module in case.decoder().named_modules() if isinstance(module, nn.Linear)]
    return sorted({name.rpartition(".")[2] for name in linear if "att" in name})
