"""Tiny PEFT adapters, written by PEFT itself on a transformers model, and trained to something large at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn


def write_lora(folder: Path, model: nn.Module, seed: int = 0, **config: Any) -> None:
    """`config` is peft.LoraConfig's; the model is left as it was."""
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    adapted.unload()


def with_lora(model: nn.Module, folder: Path) -> Any:
    """`model` as PEFT runs it on the adapter in `folder`."""
    return peft.PeftModel.from_pretrained(model, folder).eval()
