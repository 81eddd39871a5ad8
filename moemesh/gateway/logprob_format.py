"""Log-probabilities as completions (the legacy format), chat completions and vLLM's prompt_logprobs write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moemesh.engine_client import TokenLogprob
from moemesh.tokenizer import Tokenizer

# JSON has no infinity; OpenAI writes the logarithm of nothing so.
_LOWEST = -9999.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenNames:
    """How tokens are called in answers: by their text, or `token_id:N` if asked for or there is no tokenizer."""

    tokenizer: Tokenizer | None
    as_ids: bool = False

    def name(self, token_id: int) -> str:
        if self.tokenizer is None or self.as_ids:
            return f"token_id:{token_id}"
        return self.tokenizer.token_text(token_id)

    def bytes_of(self, token_id: int) -> list[int] | None:
        """Joined over the tokens of a text these are its UTF-8 bytes, though one token's alone may be no character."""
        return None if self.tokenizer is None else list(self.tokenizer.token_bytes(token_id))


def legacy_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprob | None],
    offsets: Sequence[int],
    *,
    names: TokenNames,
) -> dict[str, Any]:
    """`logprobs` of a completion choice; an entry is None where nothing precedes the token."""
    return {
        "tokens": [names.name(token_id) for token_id in token_ids],
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry is None else _top_by_name(entry, names) for entry in entries],
        "text_offset": list(offsets),
    }


def chat_logprobs(entries: Sequence[TokenLogprob], *, names: TokenNames) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    return {"content": [_chat_entry(entry, names) for entry in entries], "refusal": None}


def prompt_logprobs(
    entries: Sequence[TokenLogprob | None], *, names: TokenNames
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: for each position token id -> logprob, rank and text; the token itself always."""
    return [None if entry is None else _by_id(entry, names) for entry in entries]


def _top_by_name(entry: TokenLogprob, names: TokenNames) -> dict[str, float]:
    """The best tokens and the token itself, by name, best first.

    Several ids may have one name (parts of characters do). The token itself keeps it; the others are called by their
    id, so that the maximum over the values is the best token's.
    """
    own = names.name(entry.token_id)
    top: dict[str, float] = {}
    for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
        name = names.name(token_id)
        if token_id == entry.token_id:
            top[own] = _finite(entry.logprob)
        else:
            top[f"token_id:{token_id}" if name == own or name in top else name] = _finite(logprob)
    top.setdefault(own, _finite(entry.logprob))
    return top


def _chat_entry(entry: TokenLogprob, names: TokenNames) -> dict[str, Any]:
    top = zip(entry.top_ids, entry.top_logprobs, strict=True)
    return _chat_token(entry.token_id, entry.logprob, names) | {
        "top_logprobs": [_chat_token(token_id, logprob, names) for token_id, logprob in top]
    }


def _chat_token(token_id: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    return {"token": names.name(token_id), "logprob": _finite(logprob), "bytes": names.bytes_of(token_id)}


def _by_id(entry: TokenLogprob, names: TokenNames) -> dict[str, dict[str, Any]]:
    ranked = {entry.token_id: (entry.logprob, entry.rank)}
    for rank, (token_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1):
        ranked.setdefault(token_id, (logprob, rank))
    return {
        str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": names.name(token_id)}
        for token_id, (logprob, rank) in ranked.items()
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
