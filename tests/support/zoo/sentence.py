"""Members with sentence-transformers' files: that library itself is the reference, its tokenizer's ids included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor, nn

import tiny
from carpool.engine.params import Task
from zoo.member import Member, Reference
from zoo.stock import type_name

# It strips texts, which the server does not: what has blanks at its ends is not compared.
TEXTS = tuple(text.strip() for text in tiny.TEXTS if text)


@dataclass(frozen=True, slots=True)
class Dense:
    """A layer behind the pooling: `kind` is the activation's class in torch.nn.modules."""

    inner: int
    outer: int
    kind: str = "linear.Identity"
    bias: bool = True
    pickled: bool = False

    def save(self, folder: Path, seed: int) -> None:
        activation = f"torch.nn.modules.{self.kind}"
        config = {"in_features": self.inner, "out_features": self.outer, "bias": self.bias}
        tiny.write_json(folder / "config.json", {**config, "activation_function": activation})
        generator = torch.Generator().manual_seed(seed)
        weights = {
            "linear.weight": torch.randn(self.outer, self.inner, generator=generator) / self.inner**0.5
        }
        if self.bias:
            weights["linear.bias"] = torch.randn(self.outer, generator=generator)
        if self.pickled:
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            save_file(weights, folder / "model.safetensors")


def member(
    name: str,
    model_type: str,
    mode: str,
    words: Callable[[], Tokenizer],
    *,
    tokenizer: Mapping[str, Any],
    dense: Seq[Dense] = (),
    of: str = "AutoModel",
    bare: bool = False,
    width: int | None = None,
    options: Mapping[str, Any] | None = None,
    side: Mapping[str, Any] | None = None,
    reading: Mapping[str, Any] | None = None,
    note: str = "",
    **config: Any,
) -> Member:
    """An embedding model as it lies on the hub.

    `mode` is sentence-transformers' name of its pooling; `tokenizer` goes into tokenizer_config.json, `side` are
    options of `tiny.sentence_transformers_files`. `of` is the class that config.json names; `bare`: the weights have
    the names of its backbone alone. `width`: vectors are cut to it. `reading`: what the reference's tokenizer is told.
    """

    def make(folder: Path) -> Reference:
        made_words = words()
        sizes = {"vocab_size": made_words.get_vocab_size(), "num_hidden_layers": 2, **config}
        torch.manual_seed(0)
        auto = getattr(transformers, of)
        model = auto.from_config(transformers.AutoConfig.for_model(model_type, **sizes))
        tiny.inflate(model)
        model.save_pretrained(folder)
        if bare:
            weights = load_file(folder / "model.safetensors")
            save_file(
                {key.removeprefix("model."): weight for key, weight in weights.items()},
                folder / "model.safetensors",
                {"format": "pt"},
            )
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256, **tokenizer}
        tiny.save_tokenizer(made_words, folder, **own)
        tiny.sentence_transformers_files(
            folder, [mode], dense=[(layer.inner, layer.outer, "") for layer in dense], **(side or {})
        )
        for i, layer in enumerate(dense, start=2):
            (folder / f"{i}_Dense" / "model.safetensors").unlink()
            layer.save(folder / f"{i}_Dense", seed=i)
        return SentenceReference(folder, width, reading)

    return Member(name, type_name(model_type, of), make, options=options or {}, texts=TEXTS, note=note)


class SentenceReference:
    """SentenceTransformer, one text at a time. Asked about ids that it would not make of any text, it refuses."""

    def __init__(
        self, folder: Path, width: int | None = None, reading: Mapping[str, Any] | None = None
    ) -> None:
        self._model = SentenceTransformer(
            str(folder),
            device="cpu",
            model_kwargs={"dtype": torch.float32},
            processor_kwargs=dict(reading or {}),
        )
        self._known = {tuple(self._model.preprocess([text])["input_ids"][0].tolist()) for text in TEXTS}
        self._width = width

    @torch.no_grad()
    def __call__(
        self, task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        assert tuple(ids) in self._known, "sentence-transformers makes other ids of these texts"
        row = torch.tensor([ids])
        features = {"input_ids": row, "attention_mask": torch.ones_like(row), "modality": "text"}
        vector: Tensor = self._model(features)["sentence_embedding"][0].float()
        return vector if self._width is None else nn.functional.normalize(vector[: self._width], dim=0)
