"""Rerankers: published models that judge a pair of texts only when they are asked in their own words. Pure.

One row a family: how it is told, its prompt, and, where the checkpoint is a plain language model, the words whose
logits are its answer. A pair in any other prompt gets a score that looks like one and means nothing, so nobody has to
bring the template of a model in this table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Literal

from carpool.engine.errors import InvalidInput
from carpool.engine.framed import Framed

Method = Literal["from_2_way_softmax", "no_post_processing"]

_MARKER = re.compile(r"<\|\w+\|>")
_PLACEHOLDER = re.compile(r"\{(query|document)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reranker:
    """A family: what its checkpoints are called and of which classes they are, and how it is asked.

    `parts`: the prompt, each part tokenised by itself. {document} is the text; {query} is what `query`, or with an
    instruction `instructed`, makes of it. `instruction` is taken where a request brings none. `specials`: the
    tokenizer's own special tokens go around it. `words`, or `token_ids` where no word is meant, and `method` make a
    head of a language model's, the logit of which is divided by `sigma`.
    """

    name: str
    called: re.Pattern[str] | None  # None: `dialect` tells it
    classes: tuple[str, ...]
    dialect: str | None = None
    parts: tuple[str, ...]
    query: str = "{query}"
    instructed: str = "{query}"
    instruction: str = ""
    specials: bool = False
    words: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    method: Method = "from_2_way_softmax"
    sigma: float = 1.0

    @property
    def markers(self) -> list[str]:
        """The special tokens that the prompt is made of."""
        return list(dict.fromkeys(_MARKER.findall("".join(self.parts))))

    def frames(self, pairs: Seq[tuple[str, str]], kwargs: Mapping[str, Any] | None) -> list[Framed]:
        """Each query with its document. `kwargs` may name an `instruction`, as the reference's template does."""
        instruction = instruction_of(kwargs) or self.instruction
        return [self._written(*pair) or self._frame(*pair, instruction) for pair in pairs]

    def _frame(self, query: str, document: str, instruction: str) -> Framed:
        asked = (self.instructed if instruction else self.query).format(query=query, instruction=instruction)
        texts = tuple(part.format(query=asked, document=document) for part in self.parts)
        holds = {name: i for i, part in enumerate(self.parts) for name in _PLACEHOLDER.findall(part)}
        behind = self.parts[holds["document"]].partition("{document}")[2].format(query=asked)
        return Framed(
            texts, tuple(dict.fromkeys((holds["document"], holds["query"]))), behind, specials=self.specials
        )

    def _written(self, query: str, document: str) -> Framed | None:
        """The pair as it came, if it is in the prompt already: clients of the reference wrote it out themselves."""
        opening, closing = self.parts[0].partition("{")[0], self.parts[-1]
        if "{" in closing or not (query.startswith(opening) and document.endswith(closing)):
            return None
        return Framed((query + document,), (0,), closing, specials=True)


def instruction_of(kwargs: Mapping[str, Any] | None) -> str:
    """What a request asks for beside its texts; empty if nothing."""
    asked = kwargs or {}
    instruction = asked.get("instruction") or asked.get("instruct") or ""
    if not isinstance(instruction, str):
        raise InvalidInput("instruction must be a text.", "instruction")
    return instruction


_CHAT = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"

QWEN3 = Reranker(  # Qwen/Qwen3-Reranker-0.6B, -4B, -8B, tomaarsen/Qwen3-Reranker-0.6B-seq-cls …
    name="Qwen3-Reranker",
    called=re.compile(r"qwen3[-_]reranker", re.IGNORECASE),
    classes=("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    parts=(
        _CHAT.replace(
            "{system}",
            "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
            'Note that the answer can only be "yes" or "no".',
        ),
        "{query}\n<Document>: {document}",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    instructed="<Instruct>: {instruction}\n<Query>: {query}",
    instruction="Given a web search query, retrieve relevant passages that answer the query",
    words=("no", "yes"),
)
QWEN3_VL = Reranker(  # Qwen/Qwen3-VL-Reranker-2B, -8B, of texts
    name="Qwen3-VL-Reranker",
    called=re.compile(r"qwen3[-_]vl[-_]reranker", re.IGNORECASE),
    classes=("Qwen3VLForConditionalGeneration", "Qwen3VLForSequenceClassification"),
    parts=(QWEN3.parts[0], "{query}\n<Document>:{document}", "<|im_end|>\n<|im_start|>assistant\n"),
    instructed="<Instruct>: {instruction}<Query>:{query}",
    instruction="Given a search query, retrieve relevant candidates that answer the query.",
    words=("no", "yes"),
)
MXBAI = Reranker(  # mixedbread-ai/mxbai-rerank-base-v2, -large-v2
    name="mxbai-rerank-v2",
    called=re.compile(r"mxbai[-_]rerank[-_][a-z]+[-_]v2", re.IGNORECASE),
    classes=("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    parts=(
        _CHAT.replace("{system}", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        "{query}",
        "\n",
        "document: {document}",
        "\n",
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    query="query: {query}",
    instructed="instruction: {instruction}\nquery: {query}",
    words=("0", "1"),
)
BGE_GEMMA = Reranker(  # BAAI/bge-reranker-v2-gemma
    name="bge-reranker-v2-gemma",
    called=re.compile(r"bge[-_]reranker[-_]v2[-_]gemma", re.IGNORECASE),
    classes=("GemmaForCausalLM", "GemmaForSequenceClassification"),
    parts=(
        "{query}",
        "\n",
        "B: {document}",
        "\n",
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing "
        "a prediction of either 'Yes' or 'No'.",
    ),
    query="A: {query}",
    instructed="A: {query}",
    specials=True,
    words=("Yes",),
    method="no_post_processing",
)
ZERANK = Reranker(  # zeroentropy/zerank-2
    name="zerank-2",
    called=re.compile(r"zerank[-_]2", re.IGNORECASE),
    classes=("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    parts=(
        "<|im_start|>",
        "system\n{query}",
        "<|im_end|>\n<|im_start|>",
        "user\n{document}",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    instructed="<query>{query}</query>\n<instruction>{instruction}</instruction>",
    words=("Yes",),
    method="no_post_processing",
    sigma=5.0,
)
ZERANK_1 = replace(  # zeroentropy/zerank-1, -1-small: not taught to heed instructions
    ZERANK, name="zerank-1", called=re.compile(r"zerank[-_]1", re.IGNORECASE), instructed="{query}"
)
CONTEXTUAL = Reranker(  # ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b, -2b, -6b
    name="ctxl-rerank-v2",
    called=re.compile(r"ctxl[-_]rerank[-_]v2", re.IGNORECASE),
    classes=("Qwen3ForCausalLM", "Qwen3ForSequenceClassification", "MistralForCausalLM"),
    parts=(
        "Check whether a given document contains information helpful to answer the query.\n"
        "<Document> {document}\n<Query> {query} ??",
    ),
    instructed="{query} {instruction}",
    specials=True,
    token_ids=(0,),  # trained to be the score, whatever word it stands for
    method="no_post_processing",
)
NEMOTRON = Reranker(  # nvidia/llama-nemotron-rerank-1b-v2, llama-3.2-nv-rerankqa-1b-v2
    name="Llama Nemotron Rerank",
    called=None,
    dialect="llama-bidirectional",
    classes=("LlamaForSequenceClassification",),
    parts=("{query} \n \n passage:{document}",),
    query="question:{query}",
    instructed="question:{query}",
    specials=True,
)
RERANKERS = (QWEN3, QWEN3_VL, MXBAI, BGE_GEMMA, ZERANK, ZERANK_1, CONTEXTUAL, NEMOTRON)


def recognise(
    names: Iterable[str], config: Mapping[str, Any], architectures: Iterable[str], dialect: str | None
) -> Reranker | None:
    """The family of a checkpoint that goes by any of `names`; None if it is none of the table's.

    A name alone decides nothing: the class has to be the family's too. The reference's own flag for Qwen3's is as
    good as a name.
    """
    classes = set(architectures)
    if config.get("is_original_qwen3_reranker"):
        return QWEN3_VL if classes & set(QWEN3_VL.classes) else QWEN3
    called = list(names)
    for family in RERANKERS:
        told = (
            any(family.called.search(name) for name in called) if family.called else dialect == family.dialect
        )
        if told and classes & set(family.classes):
            return family
    return None
