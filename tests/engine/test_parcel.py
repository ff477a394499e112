"""What a front gets of a model is all that it needs, and no more."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from carpool.engine import parcel
from carpool.engine.build import Parts, build
from carpool.engine.cache.blocks import Prompt
from carpool.engine.cache.cache import Cache
from carpool.engine.config import EngineConfig
from tree import ROOT

CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
TEXTS = ["the cat", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parcel") / "model"
    tiny.bert(path)
    return path


@pytest.fixture(scope="module")
def parts(folder: Path) -> Parts:
    return build(EngineConfig(model=str(folder), device="cpu", cpu_workers=1))


def test_it_has_no_weights_and_needs_no_torch(parts: Parts, tmp_path: Path) -> None:
    """That is what makes a front small and quick to start."""
    (tmp_path / "parcel").write_bytes(parcel.pack(parts))
    code = (
        "import sys, carpool.server.front\n"
        "from carpool.engine import parcel\n"
        "parts = parcel.unpack(open(sys.argv[1], 'rb').read())\n"
        f"print(parts.tokenizer.encode({TEXTS}), *({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "parcel")]
    printed = subprocess.run(command, check=True, env=env, capture_output=True, text=True).stdout
    assert printed.strip() == str(parts.tokenizer.encode(TEXTS))


def test_what_is_known_of_the_model_arrives(parts: Parts) -> None:
    came = parcel.unpack(parcel.pack(parts), trust_remote_code=True)
    assert came.model == parts.model
    assert not came.chat.present
    assert came.framer is None
    assert came.cache is None


def test_templates_arrive(folder: Path) -> None:
    built = build(EngineConfig(model=str(folder), device="cpu", cpu_workers=1, chat_template=CHAT))
    came = parcel.unpack(parcel.pack(built))
    messages = [{"role": "user", "content": "hello"}]
    assert came.chat.render(messages) == built.chat.render(messages)
    assert came.framer is not None
    assert built.framer is not None
    assert came.framer.frames([("a", "b")], None) == built.framer.frames([("a", "b")], None)


def test_prompts_are_named_as_in_the_engines_cache_and_its_content_stays_there(tmp_path: Path) -> None:
    tiny.qwen3(tmp_path / "model")
    config = EngineConfig(
        model=str(tmp_path / "model"), device="cpu", cpu_workers=1, enable_prefix_caching=True
    )
    built = build(config)
    assert built.cache is not None
    pool = built.cache.paging.pool
    pool.allocate(Prompt(40), 40)
    came = parcel.unpack(parcel.pack(built)).cache
    assert isinstance(came, Cache)
    ids = [list(range(40)), [1, 2]]
    assert came.prompts(ids, ("embed",), 1, "salt") == built.cache.prompts(ids, ("embed",), 1, "salt")
    assert came.num_tokens == built.cache.num_tokens
    assert (pool.num_used > 0, came.paging.pool.num_used) == (True, 0)
    assert pickle.loads(pickle.dumps(came)).last_only == built.cache.last_only
