"""Templates rendered as Hugging Face Transformers renders them, and the sandbox around them."""

import datetime

import pytest

from jaxllm.errors import InvalidRequestError
from jaxllm.text.chat_template import ChatTemplate
from jaxllm.text.tokenizer import Tokenizer
from tests.text.conftest import load_golden

GOLDEN = load_golden("templates.json")
USER = [{"role": "user", "content": "Hi"}]


def test_the_default_models_template(smollm2):
    for chat in load_golden("smollm2.json")["chats"]:
        text = smollm2.apply_chat_template(chat["messages"], add_generation_prompt=chat["prompt"])
        assert text == chat["text"]
        assert smollm2.encode(text, add_special_tokens=False) == chat["ids"]


@pytest.mark.parametrize("name", list(GOLDEN["templates"]))
def test_what_templates_use(name, smollm2):
    entry = GOLDEN["templates"][name]
    cases = [(messages, tools) for messages in GOLDEN["conversations"] for tools in (None, GOLDEN["tools"])]
    for (messages, tools), expected in zip(cases, entry["texts"], strict=True):
        text = smollm2.apply_chat_template(
            messages, tools, chat_template=entry["template"], chat_template_kwargs={"enable_thinking": True}
        )
        assert text == expected


def test_dates():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(USER) == str(datetime.datetime.now().year)


def test_refusals_are_the_requests_fault(smollm2):
    def render(template, messages=USER):
        return smollm2.apply_chat_template(messages, chat_template=template)

    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="no valid Jinja"):
        render("{% if %}")
    with pytest.raises(InvalidRequestError, match="refused by the chat template"):
        render("{{ 1 // 0 }}")
    with pytest.raises(InvalidRequestError, match="refused by the chat template"):
        smollm2.apply_chat_template([{"role": "user"}])
    for messages in ("Hi", {"role": "user"}, ["Hi"], [None]):
        with pytest.raises(InvalidRequestError, match="list of dicts"):
            render("x", messages)
    with pytest.raises(InvalidRequestError, match="must not be empty"):
        render("x", [])
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer(smollm2.backend).apply_chat_template(USER)
    assert smollm2.has_chat_template and not Tokenizer(smollm2.backend).has_chat_template


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ range(10**9) | list | length }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ],
)
def test_the_sandbox(template, smollm2):
    with pytest.raises(InvalidRequestError):
        smollm2.apply_chat_template(USER, chat_template=template)


def test_the_insides_of_functions_read_as_nothing(smollm2):
    assert smollm2.apply_chat_template(USER, chat_template="{{ raise_exception.__globals__ }}") == ""
    assert smollm2.apply_chat_template(USER, chat_template="{{ dict.__subclasses__ }}") == ""


def test_templates_see_plain_data_only(smollm2):
    class Trap:
        def leak(self):
            return "secret"

    template = "{{ messages[0].content }}"
    assert smollm2.apply_chat_template([{"role": "user", "content": Trap()}], chat_template=template) == "<Trap>"


def test_the_size_is_bounded(smollm2):
    with pytest.raises(InvalidRequestError, match="exceeds"):
        loop = "{% for i in range(90000) %}{{ 'x' * 10000 }}{% endfor %}"
        smollm2.apply_chat_template(USER, chat_template=loop)
