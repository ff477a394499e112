"""ChatTemplate: conversations as the text that the model's template makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny
import tiny_heads
from carpool.engine.chat import ChatTemplate, text_of
from carpool.engine.errors import ConfigError, InvalidInput
from carpool.engine.framed import Framed

CHATML = (
    "{%- for message in messages %}{{- '<|' + message['role'] + '|>' + message['content'] + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
PARTS = (
    "{%- for message in messages %}{%- for part in message['content'] %}"
    "{{- part['type'] + '=' + part['text'] + ';' }}{%- endfor %}{%- endfor %}"
)
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.fixture(scope="module")
def made(checkpoint: Callable[[str], Path]) -> Callable[..., ChatTemplate]:
    def load(template: str | None) -> ChatTemplate:
        return ChatTemplate.load(checkpoint("qwen2"), template, trust_remote_code=False)

    return load


def test_the_models_own_template_renders_as_transformers_does(fresh: Callable[[str], Path]) -> None:
    path = fresh("qwen2")
    tiny.edit_json(path / "tokenizer_config.json", chat_template=CHATML)
    own = ChatTemplate.load(path, None, trust_remote_code=False)
    theirs = AutoTokenizer.from_pretrained(path)
    each: list[dict[str, Any]] = [{}, {"add_generation_prompt": True}, {"continue_final_message": True}]
    for options in each:
        assert own.render(MESSAGES, **options) == theirs.apply_chat_template(
            MESSAGES, tokenize=False, **options
        )
    assert own.render(MESSAGES) == "<|user|>hi\n<|assistant|>ho\n"


def test_the_users_template_wins_over_the_models(fresh: Callable[[str], Path], tmp_path: Path) -> None:
    path = fresh("qwen2")
    tiny.edit_json(path / "tokenizer_config.json", chat_template=CHATML)
    jinja = tmp_path / "template.jinja"
    jinja.write_text("{{ messages | length }} messages")
    for template in (str(jinja), "{{ messages | length }} messages"):
        given_one = ChatTemplate.load(path, template, trust_remote_code=False)
        assert given_one.render(MESSAGES) == "2 messages"


def test_a_template_file_that_is_not_there_is_said(made: Callable[..., ChatTemplate]) -> None:
    with pytest.raises(ConfigError, match=r"--chat-template nowhere\.jinja: there is no such file"):
        made("nowhere.jinja")


def test_a_template_that_comes_with_a_call_is_never_a_files_name(
    made: Callable[..., ChatTemplate], tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    assert made(CHATML).replaced(str(secret)).render(MESSAGES) == str(secret)


def test_without_a_template_a_conversation_is_refused(made: Callable[..., ChatTemplate]) -> None:
    with pytest.raises(InvalidInput, match="no chat template: send text") as refused:
        made(None).render(MESSAGES)
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "content",
    [
        "hello\nworld",
        ["hello", "world"],
        [{"text": "hello"}, {"type": "text", "text": "world"}],
        [{"type": "input_text", "text": "hello"}, "world"],
    ],
)
def test_text_parts_are_lines_to_a_template_that_wants_a_string(
    content: Any, made: Callable[..., ChatTemplate]
) -> None:
    assert made(CHATML).render([{"role": "user", "content": content}]) == "<|user|>hello\nworld\n"


def test_text_parts_are_parts_to_a_template_that_walks_them(made: Callable[..., ChatTemplate]) -> None:
    parts = ["a", {"type": "input_text", "text": "b"}]
    assert made(PARTS).render([{"role": "user", "content": parts}]) == "text=a;text=b;"


def test_a_message_without_content_is_an_empty_one(made: Callable[..., ChatTemplate]) -> None:
    assert made(CHATML).render([{"role": "user", "content": None}, {"role": "x"}]) == "<|user|>\n<|x|>\n"


@pytest.mark.parametrize("kind", ["image_url", "input_image", "input_audio", "video_url", "image_embeds"])
def test_parts_that_are_no_text_are_refused_and_named(kind: str, made: Callable[..., ChatTemplate]) -> None:
    messages = [*MESSAGES, {"role": "user", "content": ["a", {"type": kind, kind: {"url": "x"}}]}]
    with pytest.raises(InvalidInput, match=r"^This model accepts text only\.$") as refused:
        made(CHATML).render(messages)
    assert refused.value.param == "messages[2].content[1]"


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": 3}, 3, None, {"type": 3}])
def test_a_part_that_is_nothing_is_refused(part: Any) -> None:
    with pytest.raises(InvalidInput, match="must be a") as refused:
        text_of(part, "messages[0].content[0]")
    assert refused.value.param == "messages[0].content[0]"


def test_ending_and_going_on_exclude_each_other(made: Callable[..., ChatTemplate]) -> None:
    with pytest.raises(
        InvalidInput, match="Cannot set both `continue_final_message` and `add_generation_prompt`"
    ):
        made(CHATML).render(MESSAGES, add_generation_prompt=True, continue_final_message=True)


def test_no_message_is_no_conversation(made: Callable[..., ChatTemplate]) -> None:
    with pytest.raises(InvalidInput, match="messages must not be empty"):
        made(CHATML).render([])


@pytest.mark.parametrize("name", ["chat_template", "tools", "tokenize", "messages", "conversation"])
def test_a_templates_own_words_are_not_the_callers(name: str, made: Callable[..., ChatTemplate]) -> None:
    with pytest.raises(InvalidInput, match=f"must not set {name}") as refused:
        made(CHATML).render(MESSAGES, kwargs={name: "x"})
    assert refused.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('not like this') }}", "{{ messages[0].content.no.such }}", "{% for %}"]
)
def test_what_the_template_makes_nothing_of_is_the_callers_fault(
    template: str, made: Callable[..., ChatTemplate]
) -> None:
    with pytest.raises(InvalidInput, match="The chat template does not take these messages"):
        made(template).render(MESSAGES)


@pytest.mark.parametrize(
    "name", ["add_generation_prompt", "continue_final_message", "return_dict", "padding"]
)
def test_arguments_of_the_renderer_in_the_callers_words_are_refused_or_harmless(
    name: str, made: Callable[..., ChatTemplate]
) -> None:
    try:
        text = made(CHATML).render(MESSAGES, kwargs={name: True})
    except InvalidInput:
        return
    assert isinstance(text, str)


def test_a_pair_is_rendered_from_the_roles_query_and_document(made: Callable[..., ChatTemplate]) -> None:
    template = made(tiny_heads.SCORE_TEMPLATE).for_pairs()
    assert template.frames([("q", "d")], None) == [Framed(("judge: q ? d =",), (0,), " =", True)]
    (asked,) = template.frames([("{{ 7 * 7 }}", "d")], {"instruction": "see"})
    assert asked.parts == ("see: {{ 7 * 7 }} ? d =",)


@pytest.mark.parametrize(
    ("template", "tail"),
    [
        ("{{ messages[0].content }}|{{ messages[1].content }}<end>", "<end>"),
        ("{{ messages[1].content }} for {{ messages[0].content }}?", "?"),  # the query may come last
        ("{{ messages[1].content }}{{ messages[0].content }}", ""),
        ("{{ messages[1].content | upper }}!", "!"),
    ],
)
def test_what_a_template_puts_behind_both_texts_is_known(
    template: str, tail: str, made: Callable[..., ChatTemplate]
) -> None:
    pairs = [("the query", "a document"), ("", ""), ("<end>", "<end>"), ("?", "!")]
    for framed in made(template).for_pairs().frames(pairs, None):
        assert framed.tail.endswith(tail)
        assert framed.parts[0].endswith(framed.tail)
    (plain, *_) = made(template).for_pairs().frames(pairs, None)
    assert plain.tail == tail


def test_an_instruction_can_be_a_system_message(made: Callable[..., ChatTemplate]) -> None:
    listing = "{% for message in messages %}{{ message.role }}={{ message.content }};{% endfor %}{{ end }}"

    def text(kwargs: dict[str, Any] | None, **asking: Any) -> str:
        (framed,) = made(listing).for_pairs(options={"end": "."}, **asking).frames([("q", "d")], kwargs)
        assert not asking or not framed.specials
        return framed.parts[0]

    own: dict[str, Any] = {"specials": False, "instruction_is_system": True, "prompt": "judge"}
    assert text(None) == text({"instruction": "see"}) == "query=q;document=d;."
    assert text(None, **own) == "system=judge;query=q;document=d;."
    assert text({"instruction": "see", "end": "!"}, **own) == "system=see;query=q;document=d;!"


@pytest.mark.parametrize(
    ("template", "carries"),
    [
        (CHATML, True),
        (tiny_heads.SCORE_TEMPLATE, True),
        ("{% for message in messages if message.role == 'query' %}{{ message.content }}{% endfor %}", False),
        ("{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}!", False),
        ("{{ raise_exception('no such role') }}", False),
    ],
)
def test_whether_a_template_has_a_place_for_a_pair_is_tried(
    template: str, carries: bool, made: Callable[..., ChatTemplate]
) -> None:
    assert made(template).for_pairs().carries_pairs is carries
