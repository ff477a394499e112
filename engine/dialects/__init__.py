"""Dialects: config.json files written for code that a checkpoint brings along, put into transformers' own words.

No remote code is run. A dialect is a row: which config.json speaks it, and what that means in the keys of a class that
transformers (or `engine/models/native/`) has. Where the weights have other names as well, `engine/models/renames.py`
has a row of the same name.
"""

from __future__ import annotations

from carpool.engine.dialects.dialect import Config, Dialect
from carpool.engine.dialects.gte import GTE
from carpool.engine.dialects.internlm import INTERNLM2
from carpool.engine.dialects.jina import JINA_LEARNED, JINA_ROTARY
from carpool.engine.dialects.jina_bert import JINA_BERT, JINA_BERT_CODE
from carpool.engine.dialects.jina_ranking import JINA_RANKING
from carpool.engine.dialects.jina_v5 import JINA_V5
from carpool.engine.dialects.llama import BIDIRECTIONAL_LLAMA
from carpool.engine.dialects.nomic import NOMIC
from carpool.engine.dialects.nomic_moe import NOMIC_MOE
from carpool.engine.dialects.qwen import BIDIRECTIONAL_QWEN3, PLAIN_QWEN2
from carpool.engine.dialects.refused import BIG_BIRD, GRITLM, NV_EMBED, REFORMER
from carpool.engine.dialects.towers import CLIP, SIGLIP

DIALECTS: tuple[Dialect, ...] = (  # the first that fits
    GRITLM,
    NV_EMBED,
    BIG_BIRD,
    REFORMER,
    NOMIC_MOE,
    JINA_BERT_CODE,
    JINA_BERT,
    INTERNLM2,
    BIDIRECTIONAL_LLAMA,
    JINA_RANKING,
    BIDIRECTIONAL_QWEN3,
    PLAIN_QWEN2,
    JINA_V5,
    GTE,
    NOMIC,
    JINA_ROTARY,
    JINA_LEARNED,
    CLIP,
    SIGLIP,
)


def translate(config: Config) -> tuple[Config, str | None]:
    """`config` in transformers' words, and the name of the dialect it was in; unchanged and None if in none.

    Raises ConfigError for a variant of a known dialect that has no counterpart.
    """
    for dialect in DIALECTS:
        if dialect.speaks(config):
            return dialect.translate(config), dialect.name
    return config, None
