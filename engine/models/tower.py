"""Tower: of a model of texts and images, the part that reads texts, where it alone does all that the whole does."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from carpool.engine.models.masks import attending_by


def text_tower(model: PreTrainedModel) -> PreTrainedModel:
    """Its `language_model`, or the model itself if it has none or does more with a text than that: both are asked."""
    tower = getattr(model, "language_model", None)
    if not isinstance(tower, PreTrainedModel):
        return model
    vocab_size = tower.config.get_text_config().vocab_size
    # Low ones: those that stand for images are among the last.
    ids = torch.randint(min(100, vocab_size), (1, 24), generator=torch.Generator().manual_seed(5))
    ids = ids.to(model.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        with torch.no_grad(), attending_by(model, "eager"):
            whole, alone = (one(**given).last_hidden_state.float() for one in (model, tower))
    except Exception:  # the whole wants an image, or took an id for one
        return model
    return tower if (whole - alone).norm() <= 1e-3 * whole.norm() else model
