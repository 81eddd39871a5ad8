"""What counting alone achieves on the held-out text: a smoothed unigram and an interpolated Kneser-Ney bigram model."""

import numpy as np
import torch
from torch import Tensor

from .corpus import Kind
from .data import SHARES, TokenizedText

DISCOUNT = 0.75


class NgramModels:
    """Both models, counted over the training text with the weights that training gave to its kinds."""

    def __init__(self, training: dict[Kind, TokenizedText], vocab_size: int) -> None:
        unigrams = torch.ones(vocab_size)
        pairs = torch.zeros(vocab_size, vocab_size)
        total = sum(text.num_tokens for text in training.values())
        for kind, text in training.items():
            tokens = torch.from_numpy(np.concatenate(text.documents).astype(np.int64))
            weight = SHARES[kind] * total / text.num_tokens
            unigrams += weight * torch.bincount(tokens, minlength=vocab_size)
            ids = tokens[:-1] * vocab_size + tokens[1:]
            pairs += weight * torch.bincount(ids, minlength=vocab_size**2).view(vocab_size, vocab_size)
        self.unigram_V = unigrams / unigrams.sum()
        seen = pairs > 0
        continuation = seen.sum(0) + 1.0
        context = pairs.sum(1, keepdim=True)
        taken = DISCOUNT * seen.sum(1, keepdim=True) / context
        taken = torch.where(context > 0, taken.clamp(max=1.0), torch.ones_like(context))
        kept = (pairs - DISCOUNT).clamp(min=0) / context.clamp(min=1e-9)
        self.bigram_VV = kept + taken * (continuation / continuation.sum())
        self.bigram_VV /= self.bigram_VV.sum(1, keepdim=True)

    def losses(self, rows_BT: Tensor) -> tuple[float, float]:
        """Nats per token of the unigram and of the bigram model, over the tokens that the model predicts too."""
        inputs, targets = rows_BT[:, :-1], rows_BT[:, 1:]
        unigram = -self.unigram_V[targets].log().mean().item()
        return unigram, -self.bigram_VV[inputs, targets].log().mean().item()
