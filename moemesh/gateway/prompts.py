"""The prompts of a request: from any of the four forms to token ids that fit the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moemesh.chat_template import ChatTemplate, ChatTemplateError
from moemesh.detokenizer import IncrementalDecoder
from moemesh.gateway.errors import ApiError, bad_request
from moemesh.gateway.json_schema import shown
from moemesh.gateway.sampling_fields import check_token_ids
from moemesh.tokenizer import Tokenizer

_NO_TOKENIZER = "this model has no tokenizer.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """`text` is what `echo` shows, None where the client sent ids; `offsets` is where each token begins in it."""

    token_ids: tuple[int, ...]
    text: str | None = None
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PromptReader:
    """Makes prompts of what clients send. All methods may take long: they belong off the event loop."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    vocab_size: int
    max_model_len: int
    max_prompts: int

    def completion_prompts(self, prompt: object, *, add_special_tokens: bool = True) -> list[Prompt]:
        """One or several prompts, each a text or a list of ids. ApiError 400 for anything else."""
        forms = [prompt] if isinstance(prompt, str) or is_id_list(prompt) else prompt
        if not isinstance(forms, list):
            raise bad_request(
                f"prompt must be a text, a list of token ids, or a list of such, not {shown(prompt)}", "prompt"
            )
        if not forms:
            raise bad_request("prompt is empty: send at least one token", "prompt")
        if len(forms) > self.max_prompts:
            raise bad_request(f"prompt holds {len(forms)} prompts, at most {self.max_prompts} are allowed", "prompt")
        if len({isinstance(form, str) for form in forms}) > 1:
            raise bad_request("prompt must hold texts or lists of token ids, not both", "prompt")
        return [self._prompt(form, add_special_tokens) for form in forms]

    def chat_prompt(self, fields: Mapping[str, Any], variables: Mapping[str, Any]) -> Prompt:
        """The prompt that a conversation makes; `variables` are the server's own for the template."""
        tokenizer, template = self.require_tokenizer("messages"), self.template
        if template is None:
            raise bad_request(
                "this model has no chat template (tokenizer_config.json or chat_template.jinja): "
                "use /v1/completions with a prompt",
                "messages",
            )
        continued = fields.get("continue_final_message", False)
        generation_prompt = fields.get("add_generation_prompt", not continued)
        if continued and generation_prompt:
            raise bad_request(
                "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
            )
        try:
            text = template.render(
                template_messages(fields["messages"]),
                add_generation_prompt=generation_prompt,
                continue_final_message=continued,
                variables={**variables, **fields.get("chat_template_kwargs", {})},
            )
        except ChatTemplateError as error:
            raise bad_request(str(error), "messages") from error
        # The template writes the special tokens itself.
        ids = self._encode(tokenizer, text, fields.get("add_special_tokens", False), "messages")
        return Prompt(token_ids=self._checked(ids, "messages"), text=text)

    def require_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer, or ApiError 400 where the model has none."""
        if self.tokenizer is None:
            raise bad_request(f"{_NO_TOKENIZER}: send token ids as the prompt of /v1/completions", param)
        return self.tokenizer

    def echoed(self, prompt: Prompt, *, skip_special_tokens: bool, with_offsets: bool) -> Prompt:
        """The prompt with what `echo` shows: its text, and where each of its tokens begins in that."""
        ids = prompt.token_ids
        if self.tokenizer is None:
            return Prompt(token_ids=ids, text="", offsets=(0,) * len(ids))
        if not with_offsets:
            text = prompt.text
            if text is None:
                text = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
            return Prompt(token_ids=ids, text=text)
        decoder = IncrementalDecoder(self.tokenizer, skip_special_tokens=skip_special_tokens and prompt.text is None)
        pieces, offsets = _decoded(decoder, ids)
        if prompt.text is None:
            return Prompt(token_ids=ids, text=pieces, offsets=offsets)
        # The text as sent stands in the decoded one behind the tokens that were added to it.
        start = max(0, pieces.find(prompt.text))
        shifted = tuple(min(max(0, offset - start), len(prompt.text)) for offset in offsets)
        return Prompt(token_ids=ids, text=prompt.text, offsets=shifted)

    def _prompt(self, form: object, add_special_tokens: bool) -> Prompt:
        if form in ("", []):
            raise bad_request("prompt is empty: send at least one token", "prompt")
        if isinstance(form, str):
            tokenizer = self.require_tokenizer("prompt")
            ids = self._encode(tokenizer, form, add_special_tokens, "prompt")
            return Prompt(token_ids=self._checked(ids, "prompt"), text=form)
        if not is_id_list(form):
            raise bad_request(f"prompt must hold texts or lists of token ids, not {shown(form)}", "prompt")
        assert isinstance(form, list)
        return Prompt(token_ids=self._checked(form, "prompt"))

    def _encode(self, tokenizer: Tokenizer, text: str, add_special_tokens: bool, param: str) -> list[int]:
        # No tokenization of so long a text fits, and finding out how far it does not would take its time.
        if len(text) > self.max_model_len * tokenizer.max_token_chars:
            raise bad_request(
                f"{param}: the text has {len(text)} characters, more than {self.max_model_len} tokens can hold: "
                f"this model's maximum context length is {self.max_model_len} tokens",
                param,
                code="context_length_exceeded",
            )
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _checked(self, ids: list[int], param: str) -> tuple[int, ...]:
        if not ids:
            raise bad_request(f"{param} is empty: send at least one token", param)
        check_token_ids(ids, self.vocab_size, param)
        return tuple(ids)


def _decoded(decoder: IncrementalDecoder, token_ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """The text of the ids, and how much of it was there before each of them."""
    pieces: list[str] = []
    offsets: list[int] = []
    length = 0
    for token_id in token_ids:
        offsets.append(length)
        pieces.append(decoder.push(token_id))
        length += len(pieces[-1])
    pieces.append(decoder.flush())
    return "".join(pieces), tuple(offsets)


def max_tokens_for(
    num_prompt_tokens: int, asked: int | None, default: int | None, *, max_model_len: int, param: str
) -> int:
    """How many tokens a prompt may get: as asked, or the default as far as the context allows.

    ApiError 400 with both numbers where prompt and answer do not fit. `default` None: all that is left.
    `param` is the field that holds the prompt.
    """
    left = max_model_len - num_prompt_tokens
    if asked is not None and asked <= left:
        return asked
    if asked is None and left > 0:
        return left if default is None else min(default, left)
    raise _too_long(num_prompt_tokens, asked, max_model_len, param)


def _too_long(num_prompt_tokens: int, asked: int | None, max_model_len: int, param: str) -> ApiError:
    wanted = "" if asked is None else f" and {asked} tokens are asked for, {num_prompt_tokens + asked} in all"
    return bad_request(
        f"This model's maximum context length is {max_model_len} tokens, but the prompt has {num_prompt_tokens} "
        f"tokens{wanted}: shorten the prompt or ask for fewer tokens",
        param if num_prompt_tokens >= max_model_len else "max_tokens",
        code="context_length_exceeded",
    )


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: the content one text, nothing that is null or empty."""
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: Mapping[str, Any], path: str) -> dict[str, Any]:
    taken = {}
    for name in ("role", "content", "name", "reasoning_content"):
        if message.get(name) is not None:
            taken[name] = message[name]
    for name, value in message.items():
        if name not in taken and value not in (None, "", [], {}):
            raise bad_request(f"{path}.{name[:80]} is not supported by this server", f"{path}.{name[:80]}")
    if isinstance(taken["content"], list):
        parts = [_part_text(part, f"{path}.content[{index}]") for index, part in enumerate(taken["content"])]
        taken["content"] = "\n".join(parts)
    return taken


def _part_text(part: Mapping[str, Any], path: str) -> str:
    if part.get("type") != "text":
        raise bad_request(f"{path}.type {shown(part.get('type'))} is not supported, only text is", f"{path}.type")
    if not isinstance(part.get("text"), str):
        raise bad_request(f"{path}.text must be a string", f"{path}.text")
    return str(part["text"])


def is_id_list(value: object) -> bool:
    """A non-empty list of integers; of a long one every element is looked at, by the quickest means there are."""
    return isinstance(value, list) and bool(value) and set(map(type, value)) == {int}
