"""Token streams: one per kind of text, packed into rows; a held-out part that training never sees."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from .corpus import ASSISTANT, BOS, EOS, KINDS, USER, Document, Kind

# The share of the training tokens that each kind gets; prose and dialogues are repeated, sources are not.
SHARES: dict[Kind, float] = {"docs": 0.38, "dialogue": 0.40, "source": 0.22}
# In the last part of training this share of the rows comes from the core documents instead.
CORE_SHARE, CORE_FROM = 0.45, 0.66
ROW_LENGTHS = (512, 256, 512, 512, 256, 1024, 512, 256, 512, 2048)
RESUME_TAIL = 200


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """Documents of one kind as token ids, each opened by BOS and closed by EOS; `num_bytes` leaves those marks out."""

    documents: list[NDArray[np.uint16]]
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(map(len, self.documents))


def plain_bytes(text: str) -> int:
    """The length of a text in UTF-8, without special tokens."""
    for special in (BOS, EOS, USER, ASSISTANT):
        text = text.replace(special, "")
    return len(text.encode())


def tokenize(tokenizer: Tokenizer, documents: list[Document]) -> dict[Kind, TokenizedText]:
    """All documents as ids, by kind."""
    by_kind = {kind: [document.text for document in documents if document.kind == kind] for kind in KINDS}
    return {kind: tokenize_texts(tokenizer, texts) for kind, texts in by_kind.items()}


def tokenize_texts(tokenizer: Tokenizer, texts: list[str]) -> TokenizedText:
    """Texts as ids, each opened by BOS and closed by EOS."""
    closed = [text if text.endswith(EOS) else text + EOS for text in texts]
    encodings = tokenizer.encode_batch([BOS + text for text in closed], add_special_tokens=False)
    ids = [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]
    return TokenizedText(documents=ids, num_bytes=sum(map(plain_bytes, texts)))


class RowStream:
    """Endless rows of one kind: documents shuffled anew in each epoch, laid end to end.

    A row begins where the last one ended; what is left of a document is dropped when it is short, so that most rows
    begin at the beginning of a text, as prompts do.
    """

    def __init__(self, documents: list[NDArray[np.uint16]], seed: int) -> None:
        self.documents = documents
        self.random = np.random.default_rng(seed)
        self.order: list[int] = []
        self.rest: NDArray[np.uint16] = np.zeros(0, dtype=np.uint16)

    def _next_document(self) -> NDArray[np.uint16]:
        if not self.order:
            self.order = self.random.permutation(len(self.documents)).tolist()
        return self.documents[self.order.pop()]

    def row(self, length: int) -> NDArray[np.uint16]:
        """The next `length` tokens."""
        parts = [self.rest if len(self.rest) >= RESUME_TAIL else self._next_document()]
        while sum(map(len, parts)) < length:
            parts.append(self._next_document())
        tokens = np.concatenate(parts)
        self.rest = tokens[length:]
        return tokens[:length]


def shares_at(done: float) -> list[float]:
    """The shares of the three kinds and of the core documents, when `done` (0 to 1) of the training is over."""
    core = CORE_SHARE if done >= CORE_FROM else 0.0
    return [*(share * (1 - core) for share in SHARES.values()), core]


class Batches:
    """Training batches of about `batch_tokens` tokens: row lengths in turn, streams drawn by their shares."""

    def __init__(self, texts: list[TokenizedText], *, batch_tokens: int, seed: int) -> None:
        self.streams = [RowStream(text.documents, seed + i) for i, text in enumerate(texts)]
        self.batch_tokens = batch_tokens
        self.random = np.random.default_rng(seed)
        self.index = 0

    def next(self, shares: list[float]) -> Tensor:
        """Rows, each of a stream drawn by its share, with one token more than the model reads: inputs and targets."""
        length = ROW_LENGTHS[self.index % len(ROW_LENGTHS)]
        self.index += 1
        drawn = self.random.choice(len(shares), size=max(1, self.batch_tokens // length), p=shares)
        rows = [self.streams[stream].row(length + 1) for stream in drawn]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def held_out_rows(text: TokenizedText, length: int = 512) -> Tensor:
    """The held-out documents of one kind end to end, cut into rows that share one token with the next."""
    tokens = np.concatenate(text.documents).astype(np.int64)
    count = (len(tokens) - 1) // length
    rows = [tokens[i * length : (i + 1) * length + 1] for i in range(count)]
    return torch.from_numpy(np.stack(rows))
