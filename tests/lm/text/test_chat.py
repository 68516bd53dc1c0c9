"""Chat templates: as transformers renders them, and in a sandbox."""

import pytest

pytest.importorskip("jinja2")

from slidejax.lm.text.chat import render

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello <you> & 'me'"},
    {"role": "assistant", "content": "Hi"},
]

TEMPLATES = {
    "a loop, trimmed": """{% for m in messages %}
    {% if m['role'] == 'system' %}
[{{ m['content'] | trim }}]
    {% else %}
<{{ m.role }}>{{ m.content }}</{{ m.role }}>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}""",
    "tools and JSON": "{{ {'ä': [1, '<']} | tojson }}{{ messages[1] | tojson(indent=2) }}"
    "{% if tools is none %}none{% else %}{{ tools | tojson }}{% endif %}",
    "controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{{ loop.index }}{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ bos_token }}{{ strftime_now('%Y')[:2] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_give_what_transformers_gives(name, prompt):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    theirs = utils.render_jinja_template(
        conversations=[MESSAGES],
        chat_template=TEMPLATES[name],
        add_generation_prompt=prompt,
        bos_token="<s>",
        tools=None,
    )[0][0]
    ours = render(TEMPLATES[name], MESSAGES, add_generation_prompt=prompt, bos_token="<s>")
    assert ours == theirs


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ self._TemplateReference__context }}{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{% set _ = messages.append({'role': 'system'}) %}",
        "{% set _ = messages[0].update({'content': 'x'}) %}",
        "{% for i in range(99999999) %}{% endfor %}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for m in messages %}",
    ],
)
def test_what_a_template_must_not_do_is_one_clear_error(template):
    with pytest.raises(ValueError, match="chat template cannot be rendered"):
        render(template, MESSAGES)


def test_the_messages_stay_as_they_are():
    with pytest.raises(ValueError, match="cannot be rendered"):
        render("{% set _ = messages[0].pop('role') %}", MESSAGES)
    assert MESSAGES[0]["role"] == "system"


def test_a_template_may_refuse():
    with pytest.raises(ValueError, match="refuses the messages: no system please"):
        render("{{ raise_exception('no system please') }}", MESSAGES)


@pytest.mark.parametrize("messages", [["hi"], [{"content": "hi"}]])
def test_messages_have_roles(messages):
    with pytest.raises(ValueError, match=r"messages\[0\]"):
        render("", messages)
