"""When decoding is measured: from the moment when all sequences generate, for a number of steps. Knows no clock."""

from __future__ import annotations


class DecodeWindow:
    """Opens with the first token of the last sequence to have one, and closes when that one has `num_steps` more.

    Every step of its group in between holds all sequences of the group, so that no step counts in part. Times are
    seconds, and come in ascending order.
    """

    def __init__(self, num_sequences: int, num_steps: int) -> None:
        self._num_steps = num_steps
        self._num_tokens = [0] * num_sequences
        self._opener: int | None = None
        self._opened_at = self._closed_at = 0.0
        self._at_opening: list[int] = []
        self._at_closing: list[int] = []

    @property
    def closed(self) -> bool:
        return bool(self._at_closing)

    def note(self, sequence: int, count: int, now: float) -> None:
        """A sequence has got `count` tokens."""
        if self.closed or not count:
            return
        self._num_tokens[sequence] += count
        if self._opener is None and all(self._num_tokens):
            self._opener, self._opened_at, self._at_opening = sequence, now, list(self._num_tokens)
        elif sequence == self._opener:
            done = self._num_tokens[sequence] - self._at_opening[sequence]
            if done >= self._num_steps:
                self._closed_at, self._at_closing = now, list(self._num_tokens)

    @property
    def tokens_per_s(self) -> float:
        """Over all sequences. Only when closed."""
        return (sum(self._at_closing) - sum(self._at_opening)) / (self._closed_at - self._opened_at)

    @property
    def mean_generated(self) -> float:
        """Tokens that a sequence had generated, on average over the window. Only when closed."""
        return (sum(self._at_opening) + sum(self._at_closing)) / 2 / len(self._num_tokens)
