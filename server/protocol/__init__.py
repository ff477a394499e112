"""Every struct on the wire, one file a family, and the decoder of each request.

In requests null means absent, so each optional field is `T | None`; unknown fields are ignored. The
`description` of a bound completes the sentence "{field} must be …".
"""

from __future__ import annotations

from carpool.server.protocol.adapters import (
    LoadAdapterRequest,
    UnloadAdapterRequest,
    decode_load_adapter_request,
    decode_unload_adapter_request,
)
from carpool.server.protocol.chat import Conversation, Messages
from carpool.server.protocol.classification import (
    Classification,
    ClassificationRequest,
    ClassificationResponse,
    decode_classification_request,
)
from carpool.server.protocol.cohere import (
    ApiVersion,
    CohereEmbedRequest,
    CohereEmbedResponse,
    EmbeddingsByType,
    EmbeddingType,
    EmbedMeta,
    EmbedUnits,
    decode_cohere_embed_request,
)
from carpool.server.protocol.embedding import (
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    decode_embedding_request,
)
from carpool.server.protocol.formats import (
    BinaryMetadata,
    EmbedDType,
    EncodingFormat,
    Endianness,
    FormattedRequest,
    VectorPlace,
)
from carpool.server.protocol.infinity import (
    InfinityClassifyResponse,
    InfinityRanked,
    InfinityRerankResponse,
)
from carpool.server.protocol.model_request import ModelRequest, TextRequest
from carpool.server.protocol.models import ModelCard, ModelList, ModelPermission
from carpool.server.protocol.pooling import Pooled, PoolingRequest, PoolingResponse, decode_pooling_request
from carpool.server.protocol.rerank import (
    Document,
    Ranked,
    RerankMeta,
    RerankRequest,
    RerankResponse,
    SearchUnits,
    decode_rerank_request,
)
from carpool.server.protocol.scoring import (
    PairRequest,
    Score,
    ScoreRequest,
    ScoreResponse,
    decode_score_request,
)
from carpool.server.protocol.server_info import (
    InfoResponse,
    LoadResponse,
    ServerLimits,
    TeiModel,
    VersionResponse,
)
from carpool.server.protocol.tei import (
    TeiEmbedRequest,
    TeiInputsRequest,
    TeiPrediction,
    TeiPredictRequest,
    TeiRank,
    TeiRequest,
    TeiRerankRequest,
    TeiSimilarityRequest,
    TeiWeight,
    decode_tei_embed_request,
    decode_tei_inputs_request,
    decode_tei_predict_request,
    decode_tei_rerank_request,
    decode_tei_similarity_request,
)
from carpool.server.protocol.tokenization import (
    DetokenizeRequest,
    DetokenizeResponse,
    TeiDecodeRequest,
    TeiToken,
    TeiTokenizeRequest,
    TokenizeRequest,
    TokenizeResponse,
    decode_detokenize_request,
    decode_tei_decode_request,
    decode_tei_tokenize_request,
    decode_tokenize_request,
)
from carpool.server.protocol.usage import BinaryUsage, PromptTokensDetails, Usage

__all__ = [
    "ApiVersion",
    "BinaryMetadata",
    "BinaryUsage",
    "Classification",
    "ClassificationRequest",
    "ClassificationResponse",
    "CohereEmbedRequest",
    "CohereEmbedResponse",
    "Conversation",
    "DetokenizeRequest",
    "DetokenizeResponse",
    "Document",
    "EmbedDType",
    "EmbedMeta",
    "EmbedUnits",
    "Embedding",
    "EmbeddingRequest",
    "EmbeddingResponse",
    "EmbeddingType",
    "EmbeddingsByType",
    "EncodingFormat",
    "Endianness",
    "FormattedRequest",
    "InfinityClassifyResponse",
    "InfinityRanked",
    "InfinityRerankResponse",
    "InfoResponse",
    "LoadAdapterRequest",
    "LoadResponse",
    "Messages",
    "ModelCard",
    "ModelList",
    "ModelPermission",
    "ModelRequest",
    "PairRequest",
    "Pooled",
    "PoolingRequest",
    "PoolingResponse",
    "PromptTokensDetails",
    "Ranked",
    "RerankMeta",
    "RerankRequest",
    "RerankResponse",
    "Score",
    "ScoreRequest",
    "ScoreResponse",
    "SearchUnits",
    "ServerLimits",
    "TeiDecodeRequest",
    "TeiEmbedRequest",
    "TeiInputsRequest",
    "TeiModel",
    "TeiPredictRequest",
    "TeiPrediction",
    "TeiRank",
    "TeiRequest",
    "TeiRerankRequest",
    "TeiSimilarityRequest",
    "TeiToken",
    "TeiTokenizeRequest",
    "TeiWeight",
    "TextRequest",
    "TokenizeRequest",
    "TokenizeResponse",
    "UnloadAdapterRequest",
    "Usage",
    "VectorPlace",
    "VersionResponse",
    "decode_classification_request",
    "decode_cohere_embed_request",
    "decode_detokenize_request",
    "decode_embedding_request",
    "decode_load_adapter_request",
    "decode_pooling_request",
    "decode_rerank_request",
    "decode_score_request",
    "decode_tei_decode_request",
    "decode_tei_embed_request",
    "decode_tei_inputs_request",
    "decode_tei_predict_request",
    "decode_tei_rerank_request",
    "decode_tei_similarity_request",
    "decode_tei_tokenize_request",
    "decode_tokenize_request",
    "decode_unload_adapter_request",
]
