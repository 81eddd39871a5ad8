"""Conversations to prompts by the model's own chat template, with the semantics of transformers' apply_chat_template.

A template is the model folder's, never the request's, and runs in Jinja's immutable sandbox: it cannot reach Python's
internals or change its inputs, which are plain JSON values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from moemesh.tokenizer import Tokenizer

Message = Mapping[str, Any]
# Stands behind the message to be continued while the template runs; what follows it in the prompt is cut off.
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"})


class ChatTemplateError(ValueError):
    """A template that is malformed, or that refuses a conversation."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (the library declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def load_chat_template(folder: str | Path, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The template of a model folder, None where it has none.

    chat_template.jinja wins over tokenizer_config.json, where of a named list the one called "default" is taken.
    """
    path = Path(folder) / "chat_template.jinja"
    special_tokens = tokenizer.special_tokens if tokenizer else {}
    if path.is_file():
        return ChatTemplate(path.read_text(encoding="utf-8"), special_tokens=special_tokens)
    source = _template_of_config(tokenizer.config.get("chat_template") if tokenizer else None)
    return None if source is None else ChatTemplate(source, special_tokens=special_tokens)


def _template_of_config(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if not isinstance(value, dict) or not isinstance(value.get("default"), str):
        raise ChatTemplateError('chat_template must be a text, or a list of named templates with one called "default"')
    return str(value["default"])


class ChatTemplate:
    """A compiled template. `render` may be called from any thread."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment(now).from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ChatTemplateError(f"the model's chat template is malformed: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. ChatTemplateError where the template refuses the messages or a variable has a reserved name."""
        for name in variables or {}:
            if name in _RESERVED:
                raise ChatTemplateError(f"{name} is not a variable of the chat template and cannot be set as one")
        conversation = json.loads(json.dumps(list(messages)))
        if continue_final_message:
            _mark_final_message(conversation)
        values = self._special_tokens | dict(variables or {})
        values |= {
            "messages": conversation,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        prompt = self._render(values)
        return _cut_at_mark(prompt) if continue_final_message else prompt

    def _render(self, values: Mapping[str, Any]) -> str:
        try:
            return self._template.render(values)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refused the messages: {error}") from error
        # Whatever else a template trips over, it is these messages that it has no rule for.
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            kind = type(error).__name__
            raise ChatTemplateError(f"the model's chat template cannot render the messages ({kind})") from error


def _environment(now: Callable[[], datetime]) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
    # Python's own classes would be a way out of the sandbox: dict is a function, a namespace has no hidden names.
    environment.globals["dict"] = _new_dict
    environment.globals["namespace"] = _Namespace
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _new_dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Namespace(jinja2.utils.Namespace):
    def __init__(self, *args: Any, **values: Any) -> None:
        for name in dict(*args, **values):
            _refuse_hidden(name)
        super().__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        super().__setitem__(name, value)


def _refuse_hidden(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template cannot store the attribute {name!r} in a namespace")


def _mark_final_message(conversation: list[dict[str, Any]]) -> None:
    if not conversation:
        raise ChatTemplateError("continue_final_message needs a message to continue")
    final = conversation[-1]
    content = final.get("content")
    if isinstance(content, str):
        final["content"] = content + _CONTINUE_MARK
        return
    texts = [part for part in content or () if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not texts:
        raise ChatTemplateError("continue_final_message needs text in the last message")
    texts[-1]["text"] += _CONTINUE_MARK


def _cut_at_mark(prompt: str) -> str:
    """Cut where the mark stands; a template that trims the message has trimmed the mark's space: then trim ours too."""
    position = prompt.rfind(_CONTINUE_MARK.strip())
    if position < 0:
        raise ChatTemplateError("continue_final_message: the model's chat template does not show the last message")
    kept = prompt[:position]
    return kept if prompt.startswith(_CONTINUE_MARK, position) else kept.rstrip()
