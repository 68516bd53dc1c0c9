"""Chat templates, rendered in a sandbox.

A template is Jinja text out of a model's files. It runs in jinja2's
`ImmutableSandboxedEnvironment`, which gives it no attribute with an underscore, no module and no
way to change what it is given. It has a budget, too, so that it neither runs for ever nor fills the
memory (`slidejax.lm.text.jinja`). The filters and functions are those that published templates use
(https://huggingface.co/docs/transformers/chat_templating).
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["render"]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """A conversation as text.

    Args:
      template: Jinja text.
      messages: mappings with "role" and "content".
      add_generation_prompt: end where the next answer begins.
      **variables: more names for the template, such as `bos_token` or `tools`.

    Raises:
      ValueError: the template is no Jinja, does what the sandbox forbids, or refuses the messages.
      ImportError: jinja2 is not installed.

    >>> render("{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{% endfor %}",
    ...        [{"role": "user", "content": "Hello"}])
    '<user>Hello'
    """
    import_error = _missing()
    if import_error is not None:
        raise ImportError("chat templates need the extra: pip install 'slidejax[lm]'") from (
            import_error
        )
    import jinja2

    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"messages[{i}] must be a mapping with a role, got {message!r}")
    given = {
        "messages": [dict(m) for m in messages],
        "tools": None,
        "documents": None,
        **variables,
        "add_generation_prompt": add_generation_prompt,
    }
    from slidejax.lm.text.jinja import TooMuch, budget

    try:
        with budget(given):
            return _compiled(template).render(given)
    except _Refused as e:
        raise ValueError(f"the chat template refuses the messages: {e}") from e
    except (jinja2.TemplateError, TooMuch, ArithmeticError, AttributeError, LookupError,
            MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as e:  # fmt: skip
        raise ValueError(f"the chat template cannot be rendered: {type(e).__name__}: {e}") from e


class _Refused(Exception):
    """The error that a template raises by `raise_exception`."""


def _missing() -> ImportError | None:
    """Why jinja2 cannot be imported, or None."""
    try:
        import jinja2.sandbox  # noqa: F401
    except ImportError as e:
        return e
    return None


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    """The template, compiled in the sandbox."""
    from slidejax.lm.text.jinja import Bounded

    environment = Bounded()
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment.from_string(template)


def _refuse(message: Any) -> None:
    raise _Refused(str(message))


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
