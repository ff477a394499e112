"""Loading: what is missing, mismatched, foreign or unsafe is refused in one sentence, and never run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from carpool.engine.architecture import Architecture
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import PoolerConfig
from carpool.engine.errors import ConfigError
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.loader import Loaded, Loader
from carpool.engine.packing import pack_ids

CPU = torch.device("cpu")


def load(
    path: Path, *, max_model_len: int = 64, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Backbone:
    checkpoint = Checkpoint.read(path, overrides, PoolerConfig())
    loader = Loader(dtype=dtype, device=CPU, max_model_len=max_model_len, trust_remote_code=False)
    return loader.load(checkpoint, Architecture.of(checkpoint.architectures, "embed")).backbone


def rewrite(path: Path, change: Callable[[str], str | None]) -> None:
    """Rename weights; None drops one."""
    weights = load_file(path / "model.safetensors")
    renamed = {new: weight for name, weight in weights.items() if (new := change(name)) is not None}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})


def add(path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Store one more weight."""
    weights = {**load_file(path / "model.safetensors"), name: torch.ones(shape)}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_any_single_missing_weight_is_fatal_and_named(family: str, fresh: Callable[[str], Path]) -> None:
    folder = fresh(family)
    names = [name for name in load_file(folder / "model.safetensors") if "pooler" not in name]
    gone = names[len(names) // 2]
    rewrite(folder, lambda name: None if name == gone else name)
    with pytest.raises(ConfigError, match="lacks 1 of the weights") as refused:
        load(folder)
    assert gone.removeprefix("model.") in str(refused.value)


def test_the_pooler_that_nobody_reads_may_be_missing(fresh: Callable[[str], Path]) -> None:
    folder = fresh("bert")
    rewrite(folder, lambda name: None if name.startswith("pooler.") else name)
    load(folder)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("qwen3", "model.layers.0.self_attn.q_proj.bias", (32,)),  # config.json says that there is none
        ("qwen3", "model.layers.1.mlp.up_proj.weight_scale_inv", (1, 1)),  # of 8-bit floats
        ("bert", "encoder.layer.1.attention.self.distance_embedding.weight", (9, 8)),  # of relative positions
        ("bert", "bert.encoder.layer.0.attention.self.gate.weight", (32, 32)),
        ("bert", "embeddings.projection.weight", (32, 32)),
    ],
)
def test_a_weight_that_a_layer_has_no_place_for_is_fatal_and_named(
    family: str, name: str, shape: tuple[int, ...], fresh: Callable[[str], Path]
) -> None:
    """Left out, it would change results and nothing else."""
    folder = fresh(family)
    add(folder, name, shape)
    with pytest.raises(ConfigError, match=r"holds 1 weight that .* no place for") as refused:
        load(folder)
    assert name.removeprefix("model.").removeprefix("bert.") in str(refused.value)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("bert", "cls.predictions.transform.dense.weight", (32, 32)),  # a head
        ("bert", "pooler.other.weight", (32, 32)),
        ("bert", "embeddings.position_ids", (1, 64)),
        ("bert", "encoder.layer.0.attention.self.rotary_emb.inv_freq", (4,)),
        ("qwen3", "model.layers.1.attn.attention.bias", (1, 1, 8, 8)),  # GPT Neo's causal mask
        ("qwen3", "model.layers.2.mlp.up_proj.weight", (48, 32)),  # one layer more than config.json wants
        ("qwen3", "visual.patch_embed.weight", (32, 32)),
        ("qwen3", "lm_head.weight", (60, 32)),
    ],
)
def test_what_lies_beside_the_layers_is_no_fault(
    family: str, name: str, shape: tuple[int, ...], fresh: Callable[[str], Path]
) -> None:
    folder = fresh(family)
    add(folder, name, shape)
    load(folder)


def test_a_pickle_that_runs_code_is_not_read_nor_is_it_said_how_to(fresh: Callable[[str], Path]) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("run",))

    folder = fresh("bert")
    torch.save({**load_file(folder / "model.safetensors"), "x": Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="could run code: have it saved as safetensors") as refused:
        load(folder)
    assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_where_quantized_weights_cannot_be_read_the_original_ones_are_asked_for(
    method: str, fresh: Callable[[str], Path]
) -> None:
    folder = fresh("qwen3")
    tiny.edit_json(
        folder / "config.json", quantization_config={"quant_method": method, "bits": 4, "group_size": 32}
    )
    with pytest.raises(ConfigError, match=rf"weights are quantized \({method}\): take the original ones"):
        load(folder)


def test_weights_of_another_architecture_under_a_known_name_are_refused(fresh: Callable[[str], Path]) -> None:
    """jina-embeddings-v3 calls itself "xlm-roberta": loaded as one it would be random, and look fine."""
    folder = fresh("xlmr")
    rewrite(
        folder, lambda name: "roberta." + name.replace("attention.self", "mixer").replace("LayerNorm", "norm")
    )
    tiny.edit_json(
        folder / "config.json",
        auto_map={"AutoModel": "jinaai/xlm-roberta-flash-implementation--modeling.Model"},
    )
    with pytest.raises(ConfigError, match=r"code of its own .*modeling\.Model.* no class of that name"):
        load(folder)
    with pytest.raises(ConfigError, match=r"lacks .* weights that XLMRobertaModel needs"):
        load(folder, auto_map=None)


@pytest.mark.parametrize(
    ("code", "known"),
    [
        ({"AutoModel": "modeling_llama_encoder.BertEncoderModel"}, False),  # as LLM2Vec's: looks both ways
        (
            {
                "AutoModel": "someone/code--modeling.BertForGuardModel",
                "AutoModelForMaskedLM": "m.BertForMaskedLM",
            },
            False,
        ),
        ({"AutoModelForSequenceClassification": "modeling.BertScorer"}, False),
        ({"AutoModel": "modeling_bert.BertModel", "AutoModelForMaskedLM": "modeling_bert.OwnMaskedLM"}, True),
        ({"AutoConfig": "configuration.OwnConfig"}, True),
    ],
)
def test_code_that_nobody_has_read_is_refused_though_the_weights_fit(
    code: dict[str, str], known: bool, fresh: Callable[[str], Path]
) -> None:
    folder = fresh("bert")
    tiny.edit_json(folder / "config.json", auto_map=code)
    if not known:
        with pytest.raises(ConfigError, match=r"code of its own .*not run.*\"auto_map\": null") as refused:
            load(folder)
        assert "\n" not in str(refused.value)
    load(folder, auto_map=code if known else None)


@pytest.mark.parametrize(
    "overrides", [{"num_hidden_layers": 3}, {"intermediate_size": 49}, {"vocab_size": 5000}]
)
def test_an_override_that_the_weights_do_not_fit_is_refused(
    overrides: dict[str, Any], checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(
        ConfigError, match=r"weights? .*(layer\.2|intermediate\.dense|word_embeddings)"
    ) as refused:
        load(checkpoint("bert"), **overrides)
    assert "\n" not in str(refused.value)


def test_overrides_reach_the_model(checkpoint: Callable[[str], Path]) -> None:
    shortened = load(checkpoint("bert"), num_hidden_layers=1).module
    assert {name.split(".")[2] for name, _ in shortened.named_parameters() if ".layer." in name} == {"0"}
    batch = pack_ids([[5, 6, 7, 8]], CPU)
    wide, narrow = load(checkpoint("mistral")), load(checkpoint("mistral"), sliding_window=2)
    with torch.inference_mode():
        assert not torch.allclose(wide.forward(batch), narrow.forward(batch))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
OLD = {"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": None}  # before transformers 5
NEW = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


@pytest.mark.parametrize(
    ("stored", "overrides"),
    [
        ({**OLD, "rope_scaling": YARN}, {}),
        ({"rope_parameters": {**YARN, "rope_theta": 1e6}}, {}),
        (OLD, {"rope_scaling": YARN}),
        (OLD, {"rope_parameters": YARN}),
        (NEW, {"rope_parameters": YARN}),
        (NEW, {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
        ({**OLD, "rope_theta": 1e4}, {"rope_scaling": YARN, "rope_theta": 1e6}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"rope_scaling": YARN, "rope_theta": 1e6}),
        ({**OLD, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": YARN}),
    ],
)  # fmt: skip
def test_yarn_makes_room_for_longer_prompts_however_it_is_spelled(
    stored: dict[str, Any], overrides: dict[str, Any], fresh: Callable[[str], Path]
) -> None:
    folder = fresh("qwen3")
    tiny.edit_json(
        folder / "config.json", rope_scaling=..., rope_theta=..., rope_parameters={**YARN, "rope_theta": 1e6}
    )
    stock = transformers.AutoModel.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tiny.edit_json(folder / "config.json", **{"rope_parameters": ..., **stored})
    assert Checkpoint.read(folder, overrides, PoolerConfig()).longest == 4 * 128
    ids = torch.arange(300) % 90
    with torch.inference_mode():
        own = load(folder, max_model_len=512, **overrides).forward(pack_ids([ids.tolist()], CPU))
        expected = stock(input_ids=ids[None]).last_hidden_state[0]
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("damage", ["cut off", "no file", "not weights"])
def test_damaged_weights_are_refused(damage: str, fresh: Callable[[str], Path]) -> None:
    folder = fresh("bert")
    weights = folder / "model.safetensors"
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no file":
        weights.unlink()
    else:
        weights.write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="cannot be loaded") as refused:
        load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model_type", "needs"),
    [
        ("new", "made for another class"),
        ("no-such-model", r"no-such-model.* code of its own \(code\.Model\)"),
        (None, r"code of its own \(code\.Model\)"),
    ],
)
def test_an_unknown_family_is_refused_without_a_question_on_stdin(
    model_type: str | None, needs: str, fresh: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fresh("bert")
    tiny.edit_json(
        folder / "config.json",
        model_type=model_type or ...,
        auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"},
    )
    (folder / "code.py").write_text("raise SystemExit('remote code was run')")
    monkeypatch.setattr(sys, "stdin", None)  # asking would fail in another way
    with pytest.raises(ConfigError, match=needs):
        load(folder)


def test_code_in_the_folder_is_not_run_unasked(fresh: Callable[[str], Path], tmp_path: Path) -> None:
    folder = fresh("bert")
    code = {"AutoConfig": "code.Config", "AutoModel": "code.BertModel"}
    tiny.edit_json(folder / "config.json", auto_map=code)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("family", ["bert", "xlmr"])
def test_more_tokens_than_positions_are_refused_with_the_number_that_fits(
    family: str, checkpoint: Callable[[str], Path]
) -> None:
    load(checkpoint(family), max_model_len=128)
    with pytest.raises(ConfigError, match="--max-model-len 128"):
        load(checkpoint(family), max_model_len=129)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_frozen_and_of_the_dtype_that_was_asked_for(
    dtype: torch.dtype, checkpoint: Callable[[str], Path]
) -> None:
    module = load(checkpoint("modernbert"), dtype=dtype).module
    assert not module.training
    for weight in module.parameters():
        assert weight.dtype == dtype
        assert not weight.requires_grad
    assert torch.get_default_dtype() == torch.float32, "nobody else's dtype was touched"


T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60}


@pytest.mark.parametrize(
    "kind", ["T5EncoderModel", "T5Model", "T5ForConditionalGeneration", "MT5Model", "UMT5Model"]
)
def test_of_an_encoder_and_a_decoder_the_encoder_embeds(kind: str, tmp_path: Path) -> None:
    model_class = getattr(transformers, kind)
    full = model_class(model_class.config_class(**T5))
    tiny.inflate(full)
    full.save_pretrained(tmp_path)
    backbone = load(tmp_path)
    assert type(backbone.module).__name__.endswith("T5EncoderModel")
    assert not any("decoder" in name for name, _ in backbone.module.named_parameters())
    ids = [5, 6, 7, 8, 9]
    stock = full.get_encoder().eval()
    stock.config._attn_implementation = "eager"
    with torch.inference_mode():
        own = backbone.forward(pack_ids([ids, [9, 9]], CPU))[:5]
        truth = stock(input_ids=torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(own, truth, rtol=1e-5, atol=1e-5)


def test_an_encoder_that_lacks_a_weight_is_refused_whatever_its_decoder_has(tmp_path: Path) -> None:
    full = transformers.T5Model(transformers.T5Config(**T5))
    full.save_pretrained(tmp_path)
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rewrite(tmp_path, lambda key: None if key == name else key)
    with pytest.raises(ConfigError, match="relative_attention_bias"):
        load(tmp_path)


def test_a_class_with_a_table_of_layers_by_attention_is_loaded_by_another_name(tmp_path: Path) -> None:
    """GPT-Neo looks its layers up by the name of the attention, and does not know ours."""
    config = transformers.GPTNeoConfig(
        vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    transformers.GPTNeoModel(config).save_pretrained(tmp_path)
    assert load(tmp_path).module.config._attn_implementation == "eager"  # type: ignore[union-attr]


def classifier(path: Path, kind: str, **config: Any) -> Loaded:
    model_class = getattr(transformers, kind)
    model_class(model_class.config_class(vocab_size=60, num_labels=3, **config)).save_pretrained(path)
    checkpoint = Checkpoint.read(path, {}, PoolerConfig())
    loader = Loader(dtype=torch.float32, device=CPU, max_model_len=64, trust_remote_code=False)
    return loader.load(checkpoint, Architecture.of(checkpoint.architectures, "classify"))


def test_a_head_that_wants_more_than_one_row_is_refused_in_one_sentence(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
    with pytest.raises(ConfigError, match=r"^XLNetForSeq\w+ cannot be served: its head wants") as refused:
        classifier(tmp_path, "XLNetForSequenceClassification", **sizes)
    assert "\n" not in str(refused.value)


def test_barts_head_scores_the_last_token_of_its_decoder(tmp_path: Path) -> None:
    loaded = classifier(
        tmp_path, "BartForSequenceClassification", d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    assert loaded.pooling == "last"
    assert loaded.head is not None
    assert loaded.head(torch.zeros(2, 32)).shape == (2, 3)


@pytest.mark.parametrize("key", [{"return_dict": False}, {"chunk_size_feed_forward": 7}])
def test_how_a_model_was_run_when_it_was_saved_does_not_matter(
    key: dict[str, Any], checkpoint: Callable[[str], Path], fresh: Callable[[str], Path]
) -> None:
    folder = fresh("bert")
    tiny.edit_json(folder / "config.json", **key)
    batch = pack_ids([[5, 6, 7], [8, 9]], CPU)
    torch.testing.assert_close(load(folder).forward(batch), load(checkpoint("bert")).forward(batch))


def test_what_transformers_tells_a_script_is_left_as_it_was(fresh: Callable[[str], Path]) -> None:
    folder, speech = fresh("bert"), transformers.utils.logging
    before = speech.get_verbosity(), speech.is_progress_bar_enabled()
    try:
        speech.set_verbosity_info()
        speech.enable_progress_bar()
        load(folder)
        assert (speech.get_verbosity(), speech.is_progress_bar_enabled()) == (speech.INFO, True)
        rewrite(folder, lambda name: None)
        with pytest.raises(ConfigError):
            load(folder)
        assert (speech.get_verbosity(), speech.is_progress_bar_enabled()) == (speech.INFO, True)
    finally:
        speech.set_verbosity(before[0])
        if not before[1]:
            speech.disable_progress_bar()
