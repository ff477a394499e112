"""docs/adding-a-model.md: what stands there runs, in the order it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tiny
from carpool.engine import dialects, rerankers
from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError
from carpool.engine.llm import LLM
from carpool.engine.models.renames import RENAMES
from tree import ROOT
from zoo.measure import TOLERANCE, measure

PAGE = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Every name that the page's Python defines."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/adding-a-model.md", "exec"), names)
    return names


def test_a_class_of_transformers_takes_a_member_and_no_code(page: dict[str, Any], tmp_path: Path) -> None:
    line = measure(page["GRANITE"], tmp_path)
    assert max(line.alone, line.company) <= TOLERANCE
    assert line.family == "GraniteModel"


def test_a_dialect_and_its_names_make_a_foreign_checkpoint_one_of_ours(
    page: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in ("none", "dialect", "both"):
        (tmp_path / step).mkdir()
        if step == "dialect":
            monkeypatch.setattr(dialects, "DIALECTS", (page["ROW"], *dialects.DIALECTS))
        if step == "both":
            monkeypatch.setitem(RENAMES, "acme", page["rename"])
            line = measure(page["ACME"], tmp_path / step)
            assert max(line.alone, line.company) <= TOLERANCE
            return
        with pytest.raises(ConfigError, match="acme_bert" if step == "none" else "lacks .* of the weights"):
            measure(page["ACME"], tmp_path / step)


def test_a_variant_without_a_counterpart_is_refused(page: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"activation 'relu'.* knows only 'gelu'"):
        page["ROW"].translate({"model_type": "acme_bert", "activation": "relu"})


def test_a_row_makes_a_reranker(
    page: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "acme-rerank-1b"
    folder.mkdir()
    words = tiny.byte_bpe(before=["<s>"], pad="</s>")
    words.add_tokens(["yes", "no"])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words.get_vocab_size(),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
    ).eval()
    tiny.inflate(model)
    model.save_pretrained(folder)
    tiny.save_tokenizer(words, folder, pad="</s>", tokenizer_class="PreTrainedTokenizerFast")
    assert build(EngineConfig(model=str(folder), cpu_workers=1)).model.score_type == "bi-encoder"
    monkeypatch.setattr(rerankers, "RERANKERS", (*rerankers.RERANKERS, page["ASKING"]))
    llm = LLM(str(folder), dtype="float32", cpu_workers=1)
    (answer,) = llm.score("where is the cat", "on a mat", use_tqdm=False)
    llm.close()
    theirs = AutoTokenizer.from_pretrained(folder)
    parts = ("Q: where is the cat", "\nD: on a mat", "\nRelevant:")
    ids = [token for part in parts for token in theirs(part, add_special_tokens=False)["input_ids"]]
    ids = [theirs.convert_tokens_to_ids("<s>"), *ids]
    assert answer.prompt_token_ids == ids

    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    expected = logits[theirs.convert_tokens_to_ids(["no", "yes"])].softmax(-1)[1]
    assert answer.outputs.score == pytest.approx(float(expected), abs=2e-5)


def test_the_tables_and_files_that_it_names_are_there() -> None:
    for path in re.findall(r"`((?:engine|tests|docs)/[\w./]+)`", PAGE):
        if path != "engine/dialects/acme.py":  # the one to be written
            assert (ROOT / path).exists(), path
