"""What a model folder says about itself, in both dialects, and what the user may say over it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tiny
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import PoolerConfig
from carpool.engine.errors import ConfigError, InvalidParameter
from carpool.engine.params import Matryoshka
from carpool.engine.side_files import Dense, Norm, Splade

CONFIG = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "vocab_size": 99,
          "max_position_embeddings": 512}  # fmt: skip


def folder(path: Path, **config: Any) -> Path:
    merged = {**CONFIG, **config}
    tiny.write_json(path / "config.json", {key: value for key, value in merged.items() if value is not ...})
    return path


def read(path: Path, overrides: Mapping[str, Any] | None = None, **pooler: Any) -> Checkpoint:
    return Checkpoint.read(path, overrides or {}, PoolerConfig(**pooler))


# ── without side files ───────────────────────────────────────────────────────────────────────────────────────


def test_a_bare_folder_leaves_the_pooling_to_the_class_and_normalises(tmp_path: Path) -> None:
    checkpoint = read(folder(tmp_path))
    assert checkpoint.pooling == ()
    assert checkpoint.normalize
    assert (checkpoint.dense, dict(checkpoint.prompts), checkpoint.lowercase) == ((), {}, False)
    assert (checkpoint.architectures, checkpoint.vocab_size) == (("BertModel",), 99)


def test_the_text_tower_of_a_larger_model_is_what_counts(tmp_path: Path) -> None:
    path = folder(
        tmp_path, hidden_size=..., vocab_size=..., max_position_embeddings=...,
        text_config={"hidden_size": 48, "vocab_size": 7, "max_position_embeddings": 77, "dtype": "bfloat16"},
    )  # fmt: skip
    checkpoint = read(path)
    assert (checkpoint.vocab_size, checkpoint.max_model_len, checkpoint.matryoshka.size) == (7, 77, 48)
    assert checkpoint.stored_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"torch_dtype": "bfloat16"}, "bfloat16"), ({"dtype": "torch.float16"}, "float16"), ({}, None),
     ({"dtype": None, "torch_dtype": "float32"}, "float32")],
)  # fmt: skip
def test_both_spellings_of_the_stored_dtype(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert read(folder(tmp_path, **config)).stored_dtype == expected


# ── both dialects of sentence-transformers ───────────────────────────────────────────────────────────────────

OURS = {"cls": "cls", "max": "max", "mean": "mean", "mean_sqrt_len_tokens": "mean_sqrt_len",
        "weightedmean": "weighted_mean", "lasttoken": "last"}  # fmt: skip


@pytest.mark.parametrize("dialect", ["old", "new"])
@pytest.mark.parametrize("mode", tiny.ST_MODES)
def test_every_pooling_mode_in_both_dialects(mode: str, dialect: str, tmp_path: Path) -> None:
    tiny.sentence_transformers_files(folder(tmp_path), [mode], dialect=dialect)
    assert read(tmp_path).pooling == (OURS[mode],)


def test_several_old_modes_are_joined_in_the_librarys_order_whatever_the_files(tmp_path: Path) -> None:
    folder(tmp_path)
    tiny.sentence_transformers_files(tmp_path, tiny.ST_MODES)
    path = tmp_path / "1_Pooling" / "config.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    checkpoint = read(tmp_path)
    assert checkpoint.pooling == tuple(OURS.values())
    assert checkpoint.matryoshka.size == 6 * 32


def test_several_new_modes_are_joined_as_they_are_listed(tmp_path: Path) -> None:
    tiny.sentence_transformers_files(folder(tmp_path), ["mean", "cls"], dialect="new")
    assert read(tmp_path).pooling == ("mean", "cls")


@pytest.mark.parametrize("dialect", ["old", "new"])
@pytest.mark.parametrize("normalize", [True, False])
def test_with_modules_only_a_normalize_module_normalises(
    normalize: bool, dialect: str, tmp_path: Path
) -> None:
    tiny.sentence_transformers_files(folder(tmp_path), dialect=dialect, normalize=normalize)
    assert read(tmp_path).normalize is normalize


@pytest.mark.parametrize("dialect", ["old", "new"])
def test_dense_layers_come_in_order_and_set_the_width(dialect: str, tmp_path: Path) -> None:
    tanh, identity = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"
    tiny.sentence_transformers_files(
        folder(tmp_path), dialect=dialect, dense=[(32, 64, tanh), (64, 16, identity)]
    )
    first, second = read(tmp_path).dense
    assert isinstance(first, Dense)
    assert isinstance(second, Dense)
    assert (first.folder.name, first.in_features, first.out_features, first.activation) == (
        "2_Dense",
        32,
        64,
        tanh,
    )
    assert (second.in_features, second.out_features, second.bias, second.activation) == (
        64,
        16,
        True,
        identity,
    )
    assert read(tmp_path).matryoshka.size == 16


def test_lower_case_and_prompts_are_read(tmp_path: Path) -> None:
    tiny.sentence_transformers_files(folder(tmp_path), lowercase=True, prompts={"query": "find: "})
    assert read(tmp_path).lowercase
    assert dict(read(tmp_path).prompts) == {"query": "find: "}


def test_a_prompt_that_is_no_text_is_none(tmp_path: Path) -> None:
    prompts: Any = {"query": "find: ", "document": None, "x": 5}
    tiny.sentence_transformers_files(folder(tmp_path), prompts=prompts)
    assert dict(read(tmp_path).prompts) == {"query": "find: "}


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"]
)
def test_every_spelling_of_sentence_bert_config(name: str, tmp_path: Path) -> None:
    tiny.write_json(folder(tmp_path) / f"sentence_{name}_config.json", {"max_seq_length": 77})
    assert read(tmp_path).max_model_len == 77


def test_a_module_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    tiny.write_json(
        folder(tmp_path) / "modules.json", [{"type": "sentence_transformers.models.CNN", "path": "1"}]
    )
    with pytest.raises(ConfigError, match="CNN"):
        read(tmp_path)


def test_layers_behind_the_pooling_come_in_any_order(tmp_path: Path) -> None:
    """Normalising before a Dense layer gives other vectors than normalising behind it."""
    reordered(tmp_path, 0, 1, 3, 2)
    assert [type(layer) for layer in read(tmp_path).dense] == [Norm, Dense]
    assert not read(tmp_path).normalize, "which the last layer undoes"
    reordered(tmp_path, 0, 1, 3, 2, 3, 3)
    assert [type(layer) for layer in read(tmp_path).dense] == [Norm, Dense]
    assert read(tmp_path).normalize


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 2, 1)])
def test_an_order_of_modules_that_is_not_ours_is_refused(order: tuple[int, ...], tmp_path: Path) -> None:
    reordered(tmp_path, *order)
    with pytest.raises(ConfigError, match="in this order"):
        read(tmp_path)


def test_a_layer_norm_must_fit_and_is_for_one_vector_a_text(tmp_path: Path) -> None:
    reordered(tmp_path, 0, 1, 2)
    listed = json.loads((tmp_path / "modules.json").read_text())
    norm = {"type": "sentence_transformers.models.LayerNorm", "path": "3_LayerNorm"}
    tiny.write_json(tmp_path / "modules.json", [*listed, norm])
    tiny.write_json(tmp_path / "3_LayerNorm" / "config.json", {"dimension": 16})
    assert read(tmp_path).dense[-1] == Norm(tmp_path / "3_LayerNorm", 16)
    tiny.write_json(tmp_path / "3_LayerNorm" / "config.json", {"dimension": 32})
    with pytest.raises(ConfigError, match="3_LayerNorm takes vectors of 32 components and would get 16"):
        read(tmp_path)
    tiny.edit_json(tmp_path / "config_sentence_transformers.json", model_type="MultiVectorEncoder")
    with pytest.raises(
        ConfigError, match="a LayerNorm module, which carpool cannot serve in a model of several"
    ):
        read(tmp_path)


def reordered(path: Path, *order: int) -> None:
    """Transformer 0, Pooling 1, Dense 2 and Normalize 3, as modules.json is to run them."""
    tiny.sentence_transformers_files(folder(path), dense=[(32, 16, "torch.nn.modules.linear.Identity")])
    modules = json.loads((path / "modules.json").read_text())
    tiny.write_json(path / "modules.json", [modules[i] for i in order])


def test_normalising_tokens_is_refused_where_they_are_pooled(tmp_path: Path) -> None:
    tiny.sentence_transformers_files(folder(tmp_path))
    tiny.write_json(tmp_path / "2_Normalize" / "config.json", {"module_input_name": "token_embeddings"})
    with pytest.raises(ConfigError, match="token_embeddings"):
        read(tmp_path)


def test_a_dense_layer_on_tokens_is_refused(tmp_path: Path) -> None:
    tiny.sentence_transformers_files(folder(tmp_path), dense=[(32, 16, "torch.nn.modules.linear.Identity")])
    tiny.edit_json(tmp_path / "2_Dense" / "config.json", module_input_name="token_embeddings")
    with pytest.raises(ConfigError, match="token_embeddings"):
        read(tmp_path)


@pytest.mark.parametrize("pooling", [{}, {"pooling_mode": "attention"}, {"pooling_mode_mean_tokens": False}])
def test_a_pooling_that_is_not_known_is_refused(pooling: dict[str, Any], tmp_path: Path) -> None:
    tiny.sentence_transformers_files(folder(tmp_path))
    tiny.write_json(tmp_path / "1_Pooling" / "config.json", pooling)
    with pytest.raises(ConfigError, match="1_Pooling"):
        read(tmp_path)


# ── precedence ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", ["pooling_type", "seq_pooling_type"])
def test_the_user_wins_over_the_files(key: str, tmp_path: Path) -> None:
    tiny.sentence_transformers_files(folder(tmp_path), ["mean", "cls"])
    choice: dict[str, Any] = {key: "LAST"}
    checkpoint = read(tmp_path, **choice)
    assert checkpoint.pooling == ("last",)
    assert checkpoint.matryoshka.size == 32


@pytest.mark.parametrize("key", ["use_activation", "normalize"])
@pytest.mark.parametrize("value", [True, False])
def test_the_user_decides_on_normalising(key: str, value: bool, tmp_path: Path) -> None:
    tiny.sentence_transformers_files(folder(tmp_path), normalize=not value)
    choice: dict[str, Any] = {key: value}
    assert read(tmp_path, **choice).normalize is value


def test_overrides_are_merged_to_the_bottom(tmp_path: Path) -> None:
    path = folder(tmp_path, rope={"type": "a", "deep": {"x": 1, "y": 2}}, plain=1, replaced={"old": 1})
    checkpoint = read(
        path, {"rope": {"deep": {"y": 3}}, "plain": {"now": "an object"}, "replaced": None, "vocab_size": 5}
    )
    assert checkpoint.config["rope"] == {"type": "a", "deep": {"x": 1, "y": 3}}
    assert checkpoint.config["plain"] == {"now": "an object"}
    assert checkpoint.config["replaced"] is None
    assert checkpoint.vocab_size == 5


@pytest.mark.parametrize(
    ("config", "over", "expected"),
    [
        (
            {"rope_theta": 1.0, "rope_scaling": {"type": "linear"}},
            {"rope_scaling": {"factor": 2}},
            {"rope_theta": 1.0, "rope_scaling": {"type": "linear", "factor": 2}},
        ),
        (
            {"rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}},
            {"rope_scaling": {"type": "yarn"}, "rope_theta": 2.0},
            {"rope_parameters": {"rope_theta": 2.0, "rope_type": "yarn"}},
        ),
        (
            {"rope_theta": 1.0, "rope_scaling": {"rope_type": "linear"}},
            {"rope_parameters": {"rope_type": "yarn"}},
            {"rope_theta": 1.0, "rope_scaling": None, "rope_parameters": {"rope_type": "yarn"}},
        ),
        (  # a base a kind of layer
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            {"rope_theta": 2.0},
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}, "rope_theta": 2.0},
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tower", [False, True])
def test_rotary_positions_are_overridden_in_the_words_that_the_config_has_for_them(
    config: dict[str, Any], over: dict[str, Any], expected: dict[str, Any], tower: bool, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 48, "vocab_size": 7}
    path = folder(tmp_path, **({"text_config": {**sizes, **config}} if tower else config))
    found = read(path, {"text_config": over} if tower else over).text_config
    assert {key: value for key, value in found.items() if key.startswith("rope")} == expected


# ── length ───────────────────────────────────────────────────────────────────────────────────────────────────

ROPE = {"rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 512),
        ({"n_positions": 300}, 300),  # the smallest that is named
        ({"max_position_embeddings": ..., "seq_length": 700, "max_seq_len": 900}, 700),
        ({"max_position_embeddings": ...}, 2048),  # nothing is named
        ({"model_max_length": 9000}, 9000),  # this one wins
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "longformer", "max_position_embeddings": 4098, "pad_token_id": 1}, 4096),
        ({"model_type": "luke", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "ibert", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514}, 512),  # the first two rows are never used
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 0}, 512),
        ({"model_type": "layoutlmv3", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 0}, 513),
        (  # transformers writes its rotary keys for all of them
            {"model_type": "esm", "max_position_embeddings": 1026, "pad_token_id": 1,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            1024,
        ),
        ({**ROPE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 1024),
        (  # the length is named as it was before: it has the factor in it
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 256}},
            512,
        ),
        ({**ROPE, "max_trained_positions": 300}, 300),
        ({**ROPE, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 2048),
        ({**ROPE, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 512),
        (
            {**ROPE, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
            2048,
        ),
        (  # the length that is named has the factor in it, and more
            {"rope_parameters": {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 256}},
            512,
        ),
        (
            {"rope_parameters": {"rope_type": "deepseek_yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
            512,
        ),
        ({**ROPE, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 512),
        ({**ROPE, "rope_scaling": {"type": "su", "factor": 8.0}}, 512),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1.0}}, 1024),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, 512),
        ({"model_type": "gemma3_text", **ROPE, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 512),
    ],
)  # fmt: skip
def test_the_length_that_a_config_names(config: dict[str, Any], expected: int, tmp_path: Path) -> None:
    checkpoint = read(folder(tmp_path, **config))
    assert (checkpoint.max_model_len, checkpoint.longest) == (expected, expected)


@pytest.mark.parametrize(
    ("rope", "limit", "expected"),
    [
        ({}, 510, 510),  # RoBERTa: rows that cannot be used
        ({}, 10**30, 512),  # what tokenizers write when they know of no limit
        ({}, 600, 512),
        (ROPE, 510, 512),  # computed positions have no such rows
    ],
)
def test_the_tokenizer_limits_learned_positions_only(
    rope: dict[str, Any], limit: int, expected: int, tmp_path: Path
) -> None:
    tiny.write_json(folder(tmp_path, **rope) / "tokenizer_config.json", {"model_max_length": limit})
    assert read(tmp_path).max_model_len == expected


def test_a_prompt_may_be_stretched_by_longrope_where_the_user_asks_for_it(tmp_path: Path) -> None:
    rope = {**ROPE, "rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 128}
    checkpoint = read(folder(tmp_path, model_type="phi3", **rope))
    assert (checkpoint.max_model_len, checkpoint.longest) == (128, 512)


@pytest.mark.parametrize(("asked", "longest"), [(128, 512), (600, 600)])
def test_sentence_transformers_length_replaces_the_configs(asked: int, longest: int, tmp_path: Path) -> None:
    tiny.sentence_transformers_files(folder(tmp_path, model_type="qwen2", **ROPE), max_seq_length=asked)
    checkpoint = read(tmp_path)
    assert (checkpoint.max_model_len, checkpoint.longest) == (asked, longest)


def test_no_file_makes_a_table_of_positions_longer(tmp_path: Path) -> None:
    tiny.sentence_transformers_files(folder(tmp_path), max_seq_length=600)
    checkpoint = read(tmp_path)
    assert (checkpoint.max_model_len, checkpoint.longest) == (512, 512)


# ── Matryoshka ───────────────────────────────────────────────────────────────────────────────────────────────

UNSUPPORTED = (
    'Model "m" does not support matryoshka representation, '
    "changing output dimensions will lead to poor results."
)
BELOW = "Dimensions must be greater than 0"
LISTED = (
    'Model "m" only supports [8, 16] matryoshka dimensions, '
    "use other output dimensions will lead to poor results."
)


@pytest.mark.parametrize(
    ("keys", "dimensions", "message", "param"),
    [
        ({}, None, None, None),
        ({}, 32, None, None),  # the native width is always served
        ({}, 16, UNSUPPORTED, None),
        ({}, 0, UNSUPPORTED, None),  # this check comes before the range
        ({}, 33, UNSUPPORTED, None),
        ({"is_matryoshka": False, "matryoshka_dimensions": []}, 16, UNSUPPORTED, None),
        ({"is_matryoshka": True}, 1, None, None),
        ({"is_matryoshka": True}, 31, None, None),
        ({"is_matryoshka": True}, 0, BELOW, "dimensions"),
        ({"is_matryoshka": True}, -5, BELOW, "dimensions"),
        ({"is_matryoshka": True}, 33, r"[1, 32]", "dimensions"),
        ({"matryoshka_dimensions": [16, 8]}, 8, None, None),
        ({"matryoshka_dimensions": [16, 8]}, 32, None, None),
        ({"matryoshka_dimensions": [16, 8]}, 9, LISTED, "dimensions"),
        ({"matryoshka_dimensions": [16, 8], "is_matryoshka": True}, 9, LISTED, "dimensions"),
        ({"matryoshka_dimensions": [16, 8]}, 0, BELOW, "dimensions"),
        ({"matryoshka_dimensions": [16, 8]}, 64, r"[1, 32]", "dimensions"),
    ],
)
@pytest.mark.parametrize("source", ["config.json", "hf_overrides"])
def test_matryoshka(
    keys: dict[str, Any], dimensions: int | None, message: str | None, param: str | None, source: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder(tmp_path, **(keys if source == "config.json" else {}))
    matryoshka = read(tmp_path, keys if source == "hf_overrides" else {}).matryoshka
    if message is None:
        matryoshka.check(dimensions, "m")
        return
    with pytest.raises(InvalidParameter) as refused:
        matryoshka.check(dimensions, "m")
    assert message in str(refused.value)
    assert message.startswith("[") or message == str(refused.value)
    assert refused.value.param == param


def test_the_native_width_is_that_behind_the_last_dense_layer(tmp_path: Path) -> None:
    path = folder(tmp_path, is_matryoshka=True)
    tiny.sentence_transformers_files(path, dense=[(32, 48, "torch.nn.modules.linear.Identity")])
    assert read(path).matryoshka == Matryoshka(48, flexible=True)
    read(path).matryoshka.check(48, "m")
    with pytest.raises(InvalidParameter):
        read(path).matryoshka.check(49, "m")


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "width"), [("opt", 16), ("bert", 32)])
def test_opt_may_project_to_the_width_of_its_word_vectors(kind: str, width: int, tmp_path: Path) -> None:
    path = folder(tmp_path, model_type=kind, word_embed_proj_dim=16)
    assert read(path).matryoshka.size == width


def test_a_folder_without_config_json_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00", "\ufeff{}", '{"a": NaN', "é" * 3])
@pytest.mark.parametrize("name", ["config.json", "modules.json", "sentence_bert_config.json",
                                  "config_sentence_transformers.json", "1_Pooling/config.json",
                                  "2_Dense/config.json"])  # fmt: skip
def test_damaged_json_is_one_sentence_that_names_the_file(name: str, text: str, tmp_path: Path) -> None:
    tiny.sentence_transformers_files(folder(tmp_path), dense=[(32, 16, "torch.nn.modules.linear.Identity")])
    if name == "modules.json" and text == "[1]":
        text = "{}"  # a list is right here
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name.rpartition("/")[2]) as refused:
        read(tmp_path)
    assert "\n" not in str(refused.value)


def test_bytes_that_are_not_utf_8_are_damage(tmp_path: Path) -> None:
    (folder(tmp_path) / "modules.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(ConfigError, match=r"modules\.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"vocab_size": ...}),
        ("config.json", {"vocab_size": "many"}),
        ("config.json", {"hidden_size": ...}),
        ("config.json", {"hidden_size": {}}),
        ("config.json", {"max_position_embeddings": "long"}),
        ("config.json", {"architectures": 3}),
        ("config.json", {"matryoshka_dimensions": ["x"]}),
        ("config.json", {"rope_scaling": "linear"}),
        ("sentence_bert_config.json", {"max_seq_length": "long"}),
        ("config_sentence_transformers.json", {"prompts": ["query"]}),
        ("2_Dense/config.json", {"in_features": ...}),
        ("2_Dense/config.json", {"out_features": None}),
        ("1_Pooling/config.json", {"pooling_mode": 3}),
    ],
)
def test_a_value_of_another_kind_is_a_config_error(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    dense = [(32, 16, "torch.nn.modules.linear.Identity")] if name.startswith("2_Dense") else []
    tiny.sentence_transformers_files(folder(tmp_path), dense=dense)
    tiny.edit_json(tmp_path / name, **changes)
    with pytest.raises(ConfigError) as refused:
        read(tmp_path)
    assert str(tmp_path) in str(refused.value) or "config.json" in str(refused.value)


def test_modules_json_may_not_list_anything_but_objects(tmp_path: Path) -> None:
    tiny.write_json(folder(tmp_path) / "modules.json", ["Transformer"])
    with pytest.raises(ConfigError):
        read(tmp_path)


# ── more than one vector a text ──────────────────────────────────────────────────────────────────────────────


def modules(path: Path, *types: str) -> Path:
    """A folder with these modules: the first in the folder itself."""
    tiny.write_json(
        path / "modules.json",
        [
            {"path": f"{i}_{name.rpartition('.')[2]}" if i else "", "type": name}
            for i, name in enumerate(types)
        ],
    )
    for i, name in enumerate(types[1:], start=1):
        (path / f"{i}_{name.rpartition('.')[2]}").mkdir(parents=True, exist_ok=True)
    return folder(path)


def dense_config(**changes: Any) -> dict[str, Any]:
    named = "torch.nn.modules.linear.Identity"
    return {"in_features": 32, "out_features": 8, "bias": False, "activation_function": named, **changes}


@pytest.mark.parametrize(
    ("side", "types"),
    [
        ({"query_prefix": "[Q] "}, ["sentence_transformers.models.Transformer", "pylate.models.Dense.Dense"]),
        ({}, ["sentence_transformers.models.Transformer", "pylate.models.Dense.Dense"]),
        ({"model_type": "ColBERT"}, ["st.Transformer", "st.Dense"]),
        ({"model_type": "MultiVectorEncoder"}, ["st.Transformer", "st.Dense"]),
    ],
)
def test_a_vector_a_token_is_told_by_the_files(
    side: dict[str, Any], types: list[str], tmp_path: Path
) -> None:
    modules(tmp_path, *types)
    tiny.write_json(tmp_path / "1_Dense" / "config.json", dense_config(use_residual=True))
    tiny.write_json(tmp_path / "config_sentence_transformers.json", side)
    checkpoint = read(tmp_path)
    assert checkpoint.files == "multi_vector"
    assert checkpoint.late is not None
    (layer,) = checkpoint.dense
    assert isinstance(layer, Dense)
    assert (layer.out_features, layer.residual) == (8, True)
    assert checkpoint.matryoshka.size == 8


def test_pylate_normalises_and_its_length_is_what_it_cut_at_last(tmp_path: Path) -> None:
    modules(tmp_path, "st.Transformer", "pylate.models.Dense.Dense")
    tiny.write_json(tmp_path / "1_Dense" / "config.json", dense_config())
    tiny.write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 31})
    tiny.write_json(tmp_path / "config_sentence_transformers.json", {"query_length": 32})
    assert (read(tmp_path).normalize, read(tmp_path).max_model_len) == (True, 512)
    tiny.write_json(tmp_path / "config_sentence_transformers.json", {"model_type": "MultiVectorEncoder"})
    assert (read(tmp_path).normalize, read(tmp_path).max_model_len) == (False, 31)


@pytest.mark.parametrize("kind", ["ColBERT", "SentenceTransformer"])
def test_a_dense_layer_works_on_what_the_model_gives(kind: str, tmp_path: Path) -> None:
    modules(tmp_path, "st.Transformer", "st.Dense")
    wrong = "sentence_embedding" if kind == "ColBERT" else "token_embeddings"
    tiny.write_json(tmp_path / "1_Dense" / "config.json", dense_config(module_input_name=wrong))
    tiny.write_json(tmp_path / "config_sentence_transformers.json", {"model_type": kind})
    with pytest.raises(ConfigError, match=f"works on '{wrong}'"):
        read(tmp_path)


def splade(path: Path, *, masked: bool = True, **pooling: Any) -> Path:
    modules(path, "st.MLMTransformer" if masked else "st.Transformer", "st.SpladePooling")
    tiny.write_json(path / "1_SpladePooling" / "config.json", pooling)
    return path


def test_a_weight_an_entry_is_told_by_the_files(tmp_path: Path) -> None:
    assert read(splade(tmp_path)).files == "sparse"
    assert read(tmp_path).splade == Splade("max", False, None)
    tiny.write_json(tmp_path / "config_sentence_transformers.json", {"max_active_dims": 64})
    splade(tmp_path, pooling_strategy="sum", activation_function="log1p_relu")
    assert read(tmp_path).splade == Splade("sum", True, 64)


@pytest.mark.parametrize("pooling", [{"pooling_strategy": "mean"}, {"activation_function": "gelu"}])
def test_a_splade_pooling_that_is_not_known_is_refused(pooling: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SpladePooling by .* is not known"):
        read(splade(tmp_path, **pooling))


def test_splade_pooling_needs_a_masked_language_model_and_the_other_way_round(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="one of a masked language model and SpladePooling without the other"
    ):
        read(splade(tmp_path, masked=False))
    tiny.write_json(tmp_path / "sentence_bert_config.json", {"transformer_task": "fill-mask"})
    assert read(tmp_path).files == "sparse"
    tiny.write_json(tmp_path / "modules.json", [{"path": "", "type": "st.MLMTransformer"}])
    with pytest.raises(ConfigError, match="without the other"):
        read(tmp_path)


def test_the_prompt_is_left_out_of_pooling_where_the_files_say_so(tmp_path: Path) -> None:
    folder(tmp_path)
    tiny.sentence_transformers_files(tmp_path, ["mean"])
    assert not read(tmp_path).leaves_out_prompts
    tiny.edit_json(tmp_path / "1_Pooling" / "config.json", include_prompt=False)
    assert read(tmp_path).leaves_out_prompts
    tiny.sentence_transformers_files(tmp_path, ["weightedmean"])
    tiny.edit_json(tmp_path / "1_Pooling" / "config.json", include_prompt=False)
    with pytest.raises(ConfigError, match="weightedmean pooling without the prompt"):
        read(tmp_path)


# ── what sentence-transformers does where nobody asks ────────────────────────────────────────────────────────


def test_the_width_that_the_files_cut_to_is_the_default_and_allowed(tmp_path: Path) -> None:
    tiny.sentence_transformers_files(folder(tmp_path))
    tiny.edit_json(tmp_path / "config_sentence_transformers.json", truncate_dim=16)
    checkpoint = read(tmp_path)
    assert (checkpoint.truncate_dim, checkpoint.matryoshka) == (16, Matryoshka(32, False, (16,)))
    assert read(tmp_path, {"is_matryoshka": True}).matryoshka == Matryoshka(32, True, ())
    tiny.edit_json(tmp_path / "config_sentence_transformers.json", truncate_dim=32)
    assert read(tmp_path).truncate_dim is None


@pytest.mark.parametrize(("name", "expected"), [("query", "query"), ("document", None), (None, None)])
def test_a_default_prompt_is_one_that_says_something(
    name: str | None, expected: str | None, tmp_path: Path
) -> None:
    tiny.sentence_transformers_files(folder(tmp_path), prompts={"query": "find: ", "document": ""})
    tiny.edit_json(tmp_path / "config_sentence_transformers.json", default_prompt_name=name)
    assert read(tmp_path).default_prompt == expected


# ── what is no model ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "pytorch_model.bin", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(name: str, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder(tmp_path) / name).write_text(pointer)
    with pytest.raises(ConfigError, match=f"{name} is a pointer of Git LFS .*git lfs pull"):
        read(tmp_path)


def test_an_adapter_alone_is_told_what_to_be_served_with(tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "some/base"})
    with pytest.raises(ConfigError, match=r"adapter and no model: .*\(some/base\) with --lora-modules"):
        read(tmp_path)
    tiny.write_json(tmp_path / "config.json", CONFIG)  # a merged model may keep the file
    assert read(tmp_path).max_model_len == 512
