"""Classes for what neither transformers has nor a translation reaches, registered with its Auto classes."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    SiglipTextConfig,
    SiglipTextModel,
)

from carpool.engine.models.native.jina_bert import (
    JinaBertConfig,
    JinaBertForSequenceClassification,
    JinaBertModel,
)
from carpool.engine.models.native.nomic_moe import NomicMoeConfig, NomicMoeModel

AutoConfig.register(NomicMoeConfig.model_type, NomicMoeConfig, exist_ok=True)
AutoConfig.register(JinaBertConfig.model_type, JinaBertConfig, exist_ok=True)
AutoModel.register(NomicMoeConfig, NomicMoeModel, exist_ok=True)
AutoModel.register(JinaBertConfig, JinaBertModel, exist_ok=True)
AutoModelForSequenceClassification.register(JinaBertConfig, JinaBertForSequenceClassification, exist_ok=True)
AutoModel.register(SiglipTextConfig, SiglipTextModel, exist_ok=True)
