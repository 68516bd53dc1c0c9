"""Chat templates: as transformers renders them, and in a sandbox."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

jinja2 = pytest.importorskip("jinja2")
pytest.importorskip("jinja2.sandbox")

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


TWICE = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = @ %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        # Steps that never end.
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
        # Texts and lists that fill the memory.
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ 'aaaaaaaaaa' * 9999999999 }}",
        "{{ ([0] * 10 ** 10) | length }}",
        TWICE.replace("@", "n.x ~ n.x"),
        TWICE.replace("@", "n.x + n.x"),
        TWICE.replace("@", "'%s%s' % (n.x, n.x)"),
        TWICE.replace("@", "n.x.replace('a', n.x)"),
        TWICE.replace("@", "n.x | replace('a', n.x)"),
        TWICE.replace("@", "n.x | list | join(n.x)"),
        TWICE.replace("@", "n.x.join([n.x, n.x])"),
        TWICE.replace("@", "'{}{}'.format(n.x, n.x)"),
        TWICE.replace("@", "'{a}{a}'.format_map({'a': n.x})"),
        TWICE.replace("'aaaaaaaa'", "99999999").replace("@", "n.x * n.x"),
        "{% set x %}{% for i in range(99999) %}{{ messages }}{% endfor %}{% endset %}{{ x | length }}",
        "{{ 'a'.ljust(10 ** 11) }}",
        "{{ 'a' | center(10 ** 11) }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 99999999999) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '%*d' % (99999999999, 1) }}",
        "{{ '%99999999999d' | format(1) }}",
        "{{ 'a\nb' | indent(10 ** 11) }}",
        "{{ [1] | batch(10 ** 10, 'x') | list | length }}",
        "{{ [1] | slice(10 ** 10) | list | length }}",
        "{{ messages | map('center', 10 ** 10) | list }}",
        "{{ messages | tojson(indent=10 ** 10) }}",
        "{{ (1).to_bytes(10 ** 11) }}",
    ],
)
def test_a_template_that_wants_too_much_is_one_clear_error(template):
    with pytest.raises(ValueError, match="chat template cannot be rendered: TooMuch"):
        render(template, MESSAGES)


def test_a_long_conversation_is_not_too_much():
    template = (
        "{% set n = namespace(text='') %}{% for m in messages %}"
        "{% set n.text = n.text ~ m.content.replace('<think>', '').split('</think>')[-1] | trim %}"
        "{{ loop.index ~ '. ' + m.role + ': ' ~ m['content'] | replace('a', 'bb') }}"
        "{% if not loop.last %}{{ '\n' * 2 }}{% endif %}{% endfor %}{{ n.text | length }}"
    )
    messages = [{"role": "user", "content": "a word " * 300}] * 400
    text = render(template, messages)
    assert text.count("bb word") == 300 * 400 and text.endswith(str(2099 * 400))


@given(
    st.recursive(
        st.sampled_from(["7", "'ab'", "messages[1].content", "[1, 'b']", "none"]),
        lambda inner: st.builds(
            "({} {} {})".format, inner, st.sampled_from(["~", "+", "*", "%", "=="]), inner
        ),
        max_leaves=5,
    )
)
def test_operators_compute_what_they_compute_without_a_budget(expression):
    template = "{{ " + expression + " }}"
    try:
        expected = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(template)
        expected = expected.render(messages=MESSAGES)
    except (TypeError, ValueError, ArithmeticError, MemoryError):
        with pytest.raises(ValueError, match="cannot be rendered"):
            render(template, MESSAGES)
        return
    assert render(template, MESSAGES) == expected


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
