"""The window in which decoding is measured."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moemesh.bench.decode_window import DecodeWindow


def test_it_opens_with_the_last_first_token_and_closes_after_whole_steps() -> None:
    window = DecodeWindow(2, 2)
    window.note(0, 1, 1.0)
    window.note(0, 1, 2.0)  # the second prompt is still being read
    window.note(1, 1, 3.0)  # opens
    window.note(0, 1, 3.5)
    window.note(1, 1, 4.0)
    window.note(0, 1, 4.5)
    assert not window.closed
    window.note(1, 1, 5.0)  # closes
    window.note(0, 1, 5.5)
    assert window.closed
    assert window.tokens_per_s == 4 / 2.0
    assert window.mean_generated == ((2 + 1) + (4 + 3)) / 2 / 2


def test_an_output_without_tokens_opens_nothing() -> None:
    window = DecodeWindow(1, 1)
    window.note(0, 0, 1.0)
    window.note(0, 1, 2.0)
    window.note(0, 1, 4.0)
    assert window.tokens_per_s == 0.5


@given(st.integers(1, 5), st.integers(1, 10), st.data())
def test_lockstep_counts_every_sequence_in_every_step(batch: int, steps: int, data: st.DataObject) -> None:
    """Whatever the order within a step and whenever sequences begin, the rate is batch / step time."""
    starts = data.draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    window = DecodeWindow(batch, steps)
    for step in range(max(starts) + steps + 2):
        for sequence in range(batch):
            if starts[sequence] <= step:
                window.note(sequence, 1, step * 0.25)
    assert window.closed
    assert window.tokens_per_s == batch / 0.25
