"""What `/openapi.json` says of the fields of requests beyond their types: written by hand, by name.

A name means the same in every request; where it does not, `Struct.field` comes first. What stands here is laid over
the schema that msgspec makes of the type. Only fields whose types say less than they mean have more than a
sentence: unions that msgspec cannot express (`input`), bounds that are checked later (`dimensions`).
"""

from __future__ import annotations

from typing import Any, get_args

from carpool.engine.params import Task

Schema = dict[str, Any]


def _list(item: Schema, **bounds: int) -> Schema:
    return {"type": "array", "minItems": 1, **bounds, "items": item}


def _either(*schemas: Schema, says: str) -> Schema:
    """One of several, in place of whatever the type says."""
    return {"description": says, "anyOf": [*schemas, NULL]}


def _at_least(minimum: int, says: str) -> Schema:
    return {"description": says, "minimum": minimum}


def _nothing(says: str) -> Schema:
    """Taken for the sake of clients that send it empty."""
    return {"description": says, "type": ["object", "null"], "maxProperties": 0}


NULL: Schema = {"type": "null"}
TEXT: Schema = {"type": "string"}
TOKENS = _list({"type": "integer", "minimum": 0})
PART: Schema = {
    "type": "object",
    "properties": {"type": {"enum": ["text", "input_text"], "default": "text"}, "text": TEXT},
    "required": ["text"],
}
PARTS: Schema = {
    "type": "object",
    "properties": {"content": _list(PART)},
    "required": ["content"],
}
MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "examples": ["user"]},
        "content": {"anyOf": [TEXT, {"type": "array", "items": {"anyOf": [TEXT, PART]}}, NULL]},
    },
    "required": ["role"],
}
CHAT = _list(MESSAGE)
TOOL: Schema = {
    "type": "object",
    "properties": {
        "type": {"enum": ["function"], "default": "function"},
        "function": {"type": "object", "properties": {"name": TEXT}, "required": ["name"]},
    },
    "required": ["function"],
}
PROMPTS = (TEXT, _list(TEXT), TOKENS, _list(TOKENS))
SIDE = _either(TEXT, PARTS, _list({"anyOf": [TEXT, PARTS]}), says="A text, or a list of texts to pair up.")
TEXT_OBJECT: Schema = {"type": "object", "properties": {"text": TEXT}, "required": ["text"]}
DOCUMENT: Schema = {"anyOf": [TEXT, PARTS, TEXT_OBJECT]}
PAIR = _list(TEXT, maxItems=2)
TEXT_PAIR: Schema = {
    "type": "object",
    "properties": {"text": TEXT, "text_pair": {"type": ["string", "null"]}},
    "required": ["text"],
}
LISTED = _list({"anyOf": [TEXT, PAIR, TEXT_PAIR]})
# Without parameters: texts alone are a pair.
JUDGED: Schema = {**LISTED, "contains": {"anyOf": [PAIR, TEXT_PAIR]}}
INPUTS: Schema = {
    "anyOf": list(PROMPTS),
    "description": "A text, one prompt as token ids, or a list of either.",
}
TASKS = "|".join(get_args(Task))
WIDTH = _at_least(1, "Width to cut vectors to, before they are normalised; Matryoshka models only.")
ACTIVATION = {"description": "Older name of use_activation."}
INFINITYS = {
    "description": "Whether to leave the activation out; where it is said, the answer has Infinity's shape."
}

FIELDS: dict[str, Schema] = {
    # every request
    "model": {"description": "One of the served model's names; absent or empty, the served model."},
    "user": {"description": "Taken, and without effect."},
    "truncate_prompt_tokens": {
        "description": "Cut longer prompts to so many tokens; -1: to what the model takes. By default refused.",
        "minimum": -1,
        "not": {"const": 0},
    },
    "truncation_side": {
        "description": "Which side to cut, special tokens not spared; by default they survive."
    },
    "padding": {"description": "Pad, as content, to the model's length."},
    "use_activation": {
        "description": "Vectors of unit length, probabilities; by default the model's own way."
    },
    "normalize": ACTIVATION,
    "softmax": ACTIVATION,
    "activation": ACTIVATION,
    "priority": {"description": "Lower runs first; an integer of 64 bits."},
    "request_id": {"description": "Label for the answer's id, where there is no X-Request-Id."},
    "cache_salt": {
        "description": "Only requests with the same one, or none, share computed prefixes: 1 to 128 characters "
        "without @, /, \\ and NUL."
    },
    "mm_processor_kwargs": _nothing("For models of images, which are not served here; must be empty."),
    # texts and chats
    "input": _either(
        *PROMPTS,
        CHAT,
        _list(CHAT),
        says="A text, one prompt as token ids, one chat, or a list of any of these.",
    ),
    "messages": _either(CHAT, _list(CHAT), says="A chat, or a list of chats, for the model's chat template."),
    "TokenizeRequest.messages": _either(CHAT, says="A chat, for the model's chat template."),
    "prompt": {"description": "The text."},
    "tools": _either(
        {"type": "array", "items": TOOL}, says="Functions that the model's chat template is to tell of."
    ),
    "add_special_tokens": {"description": "By default true for texts and false for chats."},
    "add_generation_prompt": {"description": "Whether the template opens the assistant's turn."},
    "continue_final_message": {"description": "Whether the template leaves the last message open."},
    "chat_template": {"description": "Refused: start the server with --chat-template.", "type": "null"},
    "chat_template_kwargs": {"description": "Variables for the template."},
    "media_io_kwargs": _nothing("For models of images, which are not served here; must be empty."),
    "return_token_strs": {"description": "Whether to answer the tokens as texts, too."},
    "tokens": {"description": "Token ids of the model's vocabulary."},
    # vectors
    "dimensions": WIDTH,
    "output_dimension": WIDTH,
    "encoding_format": {
        "description": "float: JSON numbers. base64: a text a vector. bytes: all vectors end to end, and where each "
        "lies in the header `metadata`. bytes_only: without that header. By default float."
    },
    "embed_dtype": {"description": "Numbers of base64 and bytes; by default float32."},
    "output_dtype": {"description": "Voyage's: of what numbers the vectors are."},
    "embedding_type": {"description": "Jina's and NVIDIA's word for output_dtype."},
    "endianness": {"description": "Byte order of base64 and bytes; by default the server's."},
    "truncation": {"description": "true: cut what is too long."},
    "RerankRequest.truncation": {
        "description": "Voyage's: whether to cut what is too long; where it is said, the results stand in `data`, too."
    },
    "truncate": {"description": "END or true: cut the end of what is too long; START: its beginning."},
    "task": {
        "description": "What to compute; null: the model's own task. encode: a row for each token. Of several tasks, "
        "joined by &, each result is an object of one entry a task.",
        "anyOf": [
            {"enum": [*get_args(Task), "encode", None]},
            {"type": "string", "pattern": f"^({TASKS})(&({TASKS}))+$"},
        ],
    },
    "EmbeddingRequest.task": {
        "description": "Which of the checkpoint's own adapters, such as retrieval.query; without effect if it has none."
    },
    # adapters
    "lora_name": {"description": "What requests call the adapter, as their model.", "minLength": 1},
    "lora_path": {
        "description": "A PEFT folder that the server can read, or the hub's name of one.",
        "minLength": 1,
    },
    "load_inplace": {"description": "Whether to put it in place of one of that name."},
    "is_3d_lora_weight": {"description": "Refused.", "enum": [False, None]},
    "lora_int_id": {"description": "Without effect: adapters go by their names."},
    "data": {"description": "For plugins, which there are none of.", "type": "null"},
    # Cohere
    "texts": {"description": "The texts.", "minItems": 1},
    "CohereEmbedRequest.inputs": _either(_list(PARTS), says="Texts as lists of parts, in place of texts."),
    "images": {"description": "For models of images, which are not served here.", "type": "null"},
    "input_type": {"description": "The name of one of the model's prompts, to put before each text."},
    "PoolingRequest.input_type": {
        "description": "What the texts are to a ColBERT, which writes queries and documents differently; null: as they "
        "are. Without effect on other models.",
        "enum": ["query", "document", None],
    },
    "embedding_types": {"description": "By default float."},
    "max_tokens": {
        "description": "Cut to so many tokens, or refuse what has more if truncate is NONE; null or -1: to what the "
        "model takes."
    },
    # pairs
    "queries": SIDE,
    "items": SIDE,
    "data_1": SIDE,
    "data_2": SIDE,
    "text_1": SIDE,
    "text_2": SIDE,
    "documents": SIDE,
    "query": _either(TEXT, PARTS, TEXT_OBJECT, says="What the documents shall answer to."),
    "RerankRequest.documents": _either(DOCUMENT, _list(DOCUMENT), says="The texts to sort."),
    "max_tokens_per_query": _at_least(0, "Cut each query to so many tokens; 0: not at all."),
    "max_tokens_per_doc": _at_least(0, "Cut each document to so many tokens; 0: not at all."),
    "instruction": {"description": "What is asked of the pair, where the model's prompt has a place for it."},
    "top_n": {"description": "How many results; 0: all."},
    "top_k": {"description": "Voyage's name of top_n; where it is said, the results stand in `data`, too."},
    "return_documents": {
        "description": "Whether results repeat their texts; by default true, with raw_scores false."
    },
    # Text Embeddings Inference
    "TeiEmbedRequest.inputs": INPUTS,
    "TeiInputsRequest.inputs": INPUTS,
    "TeiPredictRequest.inputs": {
        "anyOf": [TEXT, TEXT_PAIR, LISTED],
        "description": "A text, an object for a pair, or a list of these and of lists of one text or two. One or two "
        "texts in a list are one input; with parameters, each text is.",
    },
    "TeiTokenizeRequest.inputs": {
        "anyOf": [TEXT, _list(TEXT)],
        "description": "A text, or a list of texts.",
    },
    "TeiTokenizeRequest.add_special_tokens": {"description": "By default true."},
    "ids": {
        "anyOf": [TOKENS, _list({"type": "array", "items": {"type": "integer", "minimum": 0}})],
        "description": "Token ids of a text, or a list of such lists.",
    },
    "skip_special_tokens": {"description": "Whether to leave special tokens out; by default true."},
    "TeiSimilarityRequest.inputs": {
        "description": "A text, and those that it is compared with.",
        "properties": {"source_sentence": TEXT, "sentences": _list(TEXT)},
        "required": ["source_sentence", "sentences"],
    },
    "TeiSimilarityRequest.parameters": {
        "description": "truncate, truncation_direction and prompt_name, as /embed takes them.",
        "properties": {
            "truncate": {"type": ["boolean", "null"]},
            "truncation_direction": {"enum": ["Left", "Right", "left", "right", None]},
            "prompt_name": {"type": ["string", "null"]},
        },
    },
    "TeiPredictRequest.parameters": {
        "description": "What pipelines of transformers take: top_k, how many classes; function_to_apply, none for the "
        "model's own numbers. Even empty, it has each text of a list judged by itself, and puts a list around the only "
        "answer.",
        "properties": {
            "top_k": {"type": ["integer", "null"], "minimum": 1},
            "function_to_apply": {"enum": ["none", "default", None]},
            "candidate_labels": NULL,
        },
    },
    "TeiRerankRequest.query": {"description": "What the texts shall answer to."},
    "truncation_direction": {"description": "By default right."},
    "prompt_name": {"description": "The name of one of the model's prompts, to put before each text."},
    "raw_scores": {"description": "Whether to leave the activation out."},
    "ClassificationRequest.raw_scores": INFINITYS,
    "RerankRequest.raw_scores": INFINITYS,
    "late_chunking": {"description": "Jina's; refused if true.", "enum": [False, None]},
    "modality": {
        "description": "Infinity's and NVIDIA's: what the input is.",
        "enum": ["text", ["text"], None],
    },
    "return_text": {"description": "Whether results repeat their texts."},
}

# Fields that have to be there, and not null, though their types let them be absent: all of any one group.
NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "CohereEmbedRequest": (("texts",), ("inputs",)),
    "RerankRequest": (("query", "documents"),),
    "ScoreRequest": (
        ("queries", "documents"),
        ("queries", "items"),
        ("data_1", "data_2"),
        ("text_1", "text_2"),
    ),
    "TokenizeRequest": (("prompt",), ("messages",)),
    **dict.fromkeys(
        ("ClassificationRequest", "EmbeddingRequest", "PoolingRequest"), (("input",), ("messages",))
    ),
}
# Bodies of which one field's meaning depends on another: any one of these, beside what the fields say.
FORMS: dict[str, tuple[Schema, ...]] = {
    "TeiPredictRequest": (
        {"required": ["inputs", "parameters"], "properties": {"parameters": {"not": NULL}}},
        {"required": ["inputs"], "properties": {"inputs": {"anyOf": [TEXT, TEXT_PAIR, PAIR, JUDGED]}}},
    )
}
# Groups that exclude each other.
ALONE = {"CohereEmbedRequest"}
# Fields that only tell one request from another, and are described there.
HIDDEN = {"RerankRequest.texts", "TokenizeRequest.inputs"}

EXAMPLES: dict[str, Schema] = {
    "ClassificationRequest": {"input": ["I love it.", "It broke."]},
    "CohereEmbedRequest": {"texts": ["one", "two"], "embedding_types": ["float"]},
    "DetokenizeRequest": {"tokens": [101, 102]},
    "EmbeddingRequest": {"input": ["one", "two"]},
    "LoadAdapterRequest": {"lora_name": "legal", "lora_path": "/adapters/legal"},
    "PoolingRequest": {"input": ["one", "two"]},
    "RerankRequest": {"query": "What is Berlin?", "documents": ["A city.", "A dance."], "top_n": 1},
    "ScoreRequest": {"text_1": "What is Berlin?", "text_2": ["A city.", "A dance."]},
    "TeiDecodeRequest": {"ids": [101, 102]},
    "TeiEmbedRequest": {"inputs": ["one", "two"]},
    "TeiInputsRequest": {"inputs": ["one", "two"]},
    "TeiPredictRequest": {"inputs": "I love it."},
    "TeiRerankRequest": {"query": "What is Berlin?", "texts": ["A city.", "A dance."]},
    "TeiSimilarityRequest": {
        "inputs": {"source_sentence": "What is Berlin?", "sentences": ["A city.", "A dance."]}
    },
    "TeiTokenizeRequest": {"inputs": ["one", "two"]},
    "TokenizeRequest": {"prompt": "one two"},
    "UnloadAdapterRequest": {"lora_name": "legal"},
}
