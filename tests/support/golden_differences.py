"""Where the contract decides otherwise than the reference was recorded. Nothing else may differ.

By the names of the recorded cases and models, as regular expressions; `ours` is the status we answer with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Difference:
    cases: str
    ours: int
    reason: str
    models: str = ".*"

    def covers(self, model: str, case: str) -> bool:
        return bool(re.fullmatch(self.cases, case) and re.fullmatch(self.models, model))


EMBEDDERS = "all-MiniLM-L6-v2|bert-matryoshka|qwen3-embed"
CLASSIFIERS = "bert-cls-3|bert-ce-1-identity|xlmr-ce-1|qwen2-cls-3"

DIFFERENCES = (
    Difference("head health", 200, "GET implies HEAD"),
    Difference("get one model", 200, "GET /v1/models/{id} exists"),
    Difference("root", 200, "/ is a page that says where to go"),
    Difference("cls v1 path", 200, "/v1/classify is an alias"),
    Difference(r"proto \S+ no ct", 200, "an absent Content-Type is accepted"),
    Difference("proto .* gzip body", 200, "compressed bodies are read"),
    Difference("emb format null", 200, "null in an optional field means absent"),
    Difference("rerank top_n null", 200, "null in an optional field means absent; 0 and null are all"),
    Difference("emb dims 384", 200, "the native width is always accepted", models="all-MiniLM-L6-v2"),
    Difference("emb dims 64", 200, "the native width is always accepted", models="qwen3-embed"),
    Difference(
        "task pooling task=token_embed",
        200,
        "a server offers every task its model supports at once",
        EMBEDDERS,
    ),
    Difference(
        "task pooling task=token_classify",
        200,
        "a server offers every task its model supports at once",
        CLASSIFIERS,
    ),
    Difference(
        "task (v1 embeddings|v2 embed|pooling task=embed)",
        200,
        "a server offers every task its model supports at once",
        models=r"all-MiniLM-L6-v2\+token_embed",
    ),
    Difference("task pooling task=encode", 200, "`encode` is accepted and means a row a token"),
    Difference("in .* normalize removed", 200, "all names of `use_activation` are accepted"),
    Difference("in .* (softmax|activation) old", 200, "all names of `use_activation` are obeyed"),
    Difference(
        "in /(v1/embeddings|classify) task score removed", 200, "unknown fields are ignored, `task` here too"
    ),
    Difference("cohere inputs", 200, "text parts are texts, also where there is no chat template"),
    Difference("score dict content", 200, "text parts are texts"),
    Difference("rerank docs content", 200, "text parts are texts"),
    Difference(
        "rerank docs objects", 200, "documents may be objects with a `text`, as Jina's clients send them"
    ),
    Difference("rerank texts like tei", 200, "a body with `texts` is answered in TEI's shape"),
    Difference("rerank return_documents false", 200, "`return_documents` is obeyed"),
    Difference(
        "rerank dup docs", 200, "sorting is stable: of equal documents the first comes first", "xlmr-ce-1"
    ),
)


def decided(model: str, case: str) -> Difference | None:
    return next((difference for difference in DIFFERENCES if difference.covers(model, case)), None)
