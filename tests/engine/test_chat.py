"""ChatTemplate: conversations as the text that the model's template makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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


@pytest.mark.parametrize(("shape", "seen"), [("auto", "c"), ("string", "c"), ("openai", "p")])
def test_the_shape_of_contents_can_be_said(checkpoint: Callable[[str], Path], shape: Any, seen: str) -> None:
    template = "{{ 'c' if messages[0].content is string else 'p' }}"
    fast = AutoTokenizer.from_pretrained(checkpoint("qwen2"))
    assert ChatTemplate.of(fast, template, content_format=shape).render(MESSAGES) == seen


def test_the_template_may_tell_of_tools(made: Callable[..., ChatTemplate]) -> None:
    chat = made("{{ tools[0].function.name if tools else 'none' }}")
    assert chat.render(MESSAGES) == "none"
    tool = {"type": "function", "function": {"name": "f", "description": None, "parameters": None}}
    assert chat.render(MESSAGES, tools=[tool]) == "f"


def test_variables_have_defaults_and_calls_win(checkpoint: Callable[[str], Path]) -> None:
    fast = AutoTokenizer.from_pretrained(checkpoint("qwen2"))
    template = "{{ a }}{{ b }}{{ add_generation_prompt }}"
    defaults = {"a": 1, "b": 2, "add_generation_prompt": True}
    chat = ChatTemplate.of(fast, template, kwargs=defaults)
    assert chat.render(MESSAGES) == "12False"  # which every call says
    assert chat.render(MESSAGES, kwargs={"b": 3}) == "13False"
    assert chat.replaced("{{ b }}{{ a }}").render(MESSAGES) == "21"
    with pytest.raises(ConfigError, match=r"^--default-chat-template-kwargs must not set messages\.$"):
        ChatTemplate.of(fast, template, kwargs={"messages": []})


def test_a_template_file_that_is_not_there_is_said(made: Callable[..., ChatTemplate]) -> None:
    with pytest.raises(ConfigError, match=r"--chat-template nowhere\.jinja: there is no such file"):
        made("nowhere.jinja")


@pytest.mark.parametrize("template", ["{{ broken", "{% for %}", "{% for m in messages %}"])
def test_a_template_that_is_none_is_said_before_anyone_asks(
    template: str, made: Callable[..., ChatTemplate]
) -> None:
    with pytest.raises(ConfigError, match=r"^--chat-template is no Jinja template: .* \(line 1\)\.$"):
        made(template)


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


@pytest.mark.parametrize(
    "template",
    [
        PARTS,
        "{% for m in messages %}{%for each in m.content%}{{ each.type }}={{ each.text }};{% endfor %}{% endfor %}",
        "{% for m in messages %}{% set said = m.content %}{% for each in said %}{{ each.type }}={{ each.text }};"
        "{% endfor %}{% endfor %}",
    ],
)
def test_a_plain_text_is_one_part_to_a_template_that_walks_them(
    template: str, made: Callable[..., ChatTemplate]
) -> None:
    for content in ("hello", ["hello"], [{"type": "text", "text": "hello"}]):
        assert made(template).render([{"role": "user", "content": content}]) == "text=hello;"


@pytest.mark.parametrize("name", ["m.content", "m['content']", "content"])
def test_a_template_that_takes_both_is_given_parts(name: str, made: Callable[..., ChatTemplate]) -> None:
    both = "{% for m in messages %}{% set content = m.content %}{% if m.content is string %}{{ m.content }}"
    both += "{% else %}{% for part in " + name + " %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    assert made(both).render([{"role": "user", "content": ["a", "b"]}]) == "ab"


def test_an_empty_part_is_no_line(made: Callable[..., ChatTemplate]) -> None:
    assert made(CHATML).render([{"role": "x", "content": ["", "a", ""]}]) == "<|x|>a\n"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "output_text", "text": "no"},
        {"type": "refusal", "refusal": "no"},
        {"type": "thinking", "thinking": "no"},
    ],
)
def test_what_an_assistant_said_is_text(part: dict[str, str], made: Callable[..., ChatTemplate]) -> None:
    assert made(CHATML).render([{"role": "assistant", "content": [part]}]) == "<|assistant|>no\n"


def test_of_named_templates_it_is_the_default_one() -> None:
    def named(**templates: str) -> Any:
        return SimpleNamespace(
            chat_template=templates, apply_chat_template=lambda _, chat_template, **__: chat_template
        )

    both = named(default="the default", tool_use="tools")
    assert ChatTemplate.of(both, None).render(MESSAGES) == "the default"
    assert not ChatTemplate.of(named(tool_use="tools"), None).present


def test_a_variable_of_the_template_is_the_requests_to_set(made: Callable[..., ChatTemplate]) -> None:
    rendered = made(CHATML).render(MESSAGES, kwargs={"add_generation_prompt": True})
    assert rendered.endswith("<|assistant|>")


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
    "template", ["{{ raise_exception('not like this') }}", "{{ messages[0].content.no.such }}"]
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


def test_what_a_template_has_against_a_pair_names_what_the_request_gave_it(
    made: Callable[..., ChatTemplate],
) -> None:
    refusing = made("{{ raise_exception('no') }}").for_pairs()
    for kwargs, param in (({"tone": "kind"}, "chat_template_kwargs"), (None, None)):
        with pytest.raises(InvalidInput, match="no") as refused:
            refusing.frames([("q", "d")], kwargs)
        assert refused.value.param == param


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
    pairs = made(template).for_pairs()
    assert pairs.carries_pairs is carries
    assert pairs.drops_pairs is (not carries and "raise_exception" not in template)


@pytest.mark.parametrize(("shape", "seen"), [("string", "cc"), ("openai", "pp")])
def test_the_shape_that_is_said_is_also_a_pairs(
    shape: Any, seen: str, checkpoint: Callable[[str], Path]
) -> None:
    template = "{% for m in messages %}{{ 'c' if m.content is string else 'p' }}{% endfor %}"
    fast = AutoTokenizer.from_pretrained(checkpoint("qwen2"))
    (framed,) = ChatTemplate.of(fast, template, content_format=shape).for_pairs().frames([("q", "d")], None)
    assert framed.parts == (seen,)


@pytest.mark.parametrize("shown", ["part.text", "part['text'].strip()"])
def test_a_pair_is_given_in_parts_to_a_template_that_walks_them(
    shown: str, made: Callable[..., ChatTemplate]
) -> None:
    walking = (
        "{% for message in messages %}{% for part in message.content %}{{ "
        + shown
        + " }};{% endfor %}{% endfor %}"
    )
    (framed,) = made(walking).for_pairs().frames([("q", "d")], None)
    assert framed.parts == ("q;d;",)
    (framed,) = made("").pairs_by(walking).frames([("q", "d")], None)
    assert framed.parts == ("q;d;",)
    with pytest.raises(InvalidInput, match="no place for a query and a document") as refused:
        made("").pairs_by("{{ messages[0].content }}")
    assert refused.value.param == "chat_template"
