"""Text to token ids and back, by the `tokenizer.json` of a model folder; no code of the folder is run.

As in transformers 5, tokenizer.json alone says which tokens are added to a text (`add_bos_token` of
tokenizer_config.json is the wish of an older converter, and is not looked at). tokenizer_config.json gives the names
of the special tokens, which chat templates use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
# The decoders that write one character per byte, and the one that writes a byte as <0xE4>.
_BYTE_LEVEL = "ByteLevel"
_SPACE_MARK = "\u2581"


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used, or a text that cannot be encoded."""


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a model folder, None where it has no tokenizer.json. TokenizerError names a malformed file."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        decoder = json.loads(path.read_text(encoding="utf-8")).get("decoder")
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise TokenizerError(f"{path}: not a usable tokenizer.json: {error}") from error
    config_path = path.with_name("tokenizer_config.json")
    return Tokenizer(backend, decoder=decoder, config=_read_config(config_path) if config_path.is_file() else {})


class Tokenizer:
    """A tokenizer and what tokenizer_config.json says beside it. All methods may be called from any thread."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, decoder: object = None, config: Mapping[str, Any] | None = None
    ) -> None:
        # A text is encoded whole, whatever length its maker trained with: too long a prompt is refused, never cut.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.config: Mapping[str, Any] = dict(config or {})
        self._byte_level = _has_byte_level(decoder)
        self._added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_tokens = _special_tokens(self.config)
        self.max_token_chars = max((len(token) for token in backend.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; `add_special_tokens` adds those that tokenizer.json puts around a text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError("the text holds an unpaired surrogate, which has no UTF-8 form") from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of the ids; unknown ids have none, bytes that are no UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact spelling in the vocabulary."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def token_piece(self, token_id: int) -> str:
        """The token as the vocabulary spells it, "" for an id it does not have."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for: joined over a text they are the text, though one alone may be no UTF-8."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self.token_piece(token_id)
        if self._byte_level and all(char in _BYTE_OF_CHAR for char in piece):
            return bytes(_BYTE_OF_CHAR[char] for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: must hold a JSON object, not {type(config).__name__}")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Name to text, as a chat template sees them; a token is written as a string or as an AddedToken object."""
    found = {}
    for name in _SPECIAL_TOKEN_NAMES:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _has_byte_level(decoder: object) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        return any(_has_byte_level(part) for part in decoder.get("decoders", ()))
    return decoder.get("type") == _BYTE_LEVEL


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR: Mapping[str, int] = _byte_alphabet()
