"""The mailbox's fence: late frames and duplicates are dropped, early ones wait."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transport.frame import Frame, Header, Kind
from transport.mailbox import Mailbox, MailKey, key_of


def answer(*, sender: int = 1, generation: int = 0, step: int = 0, attempt: int = 0) -> Frame:
    return Frame(Header(Kind.ANSWER, sender, generation=generation, step=step, attempt=attempt), (torch.ones(1),))


def test_key_names_the_work_and_the_sender_but_not_the_attempt() -> None:
    frame = Frame(Header(Kind.COLLECTIVE, 5, 9, 1, 9, 2, 3, 4, 9, 6))
    assert key_of(frame) == MailKey(Kind.COLLECTIVE, 1, 2, 3, 4, 6, 5)


def test_each_key_is_accepted_once() -> None:
    mailbox = Mailbox()
    first, again = answer(), answer(attempt=1)
    mailbox.deliver(first)
    mailbox.deliver(again)
    assert mailbox.has([key_of(first)])
    assert mailbox.take(key_of(first)) is first
    mailbox.deliver(again)
    assert mailbox.take(key_of(first)) is None
    assert (mailbox.duplicates, mailbox.dropped) == (2, 0)


def test_has_wants_all_keys() -> None:
    mailbox = Mailbox()
    mailbox.deliver(answer(sender=1))
    keys = [key_of(answer(sender=sender)) for sender in (1, 2)]
    assert not mailbox.has(keys)
    mailbox.deliver(answer(sender=2))
    assert mailbox.has(keys)
    assert mailbox.has([])


def test_newer_generation_is_parked_and_older_is_dropped() -> None:
    mailbox = Mailbox()
    old, parked = answer(generation=1, step=9), answer(generation=2)
    mailbox.deliver(old)
    mailbox.deliver(parked)
    mailbox.discard(2)
    assert mailbox.take(key_of(old)) is None
    mailbox.deliver(old)
    assert mailbox.dropped == 2
    assert mailbox.take(key_of(parked)) is parked


def test_fence_never_goes_back() -> None:
    mailbox = Mailbox()
    mailbox.discard(2, 5)
    with pytest.raises(ValueError, match=r"at \(generation, step\) \(2, 5\) and cannot go back to \(1, 9\)"):
        mailbox.discard(1, 9)


FRAMES = st.lists(st.builds(answer, sender=st.integers(0, 2), generation=st.integers(0, 2), step=st.integers(0, 3)))


@given(FRAMES, FRAMES, st.tuples(st.integers(0, 2), st.integers(0, 3)))
def test_books_close(before: list[Frame], after: list[Frame], floor: tuple[int, int]) -> None:
    mailbox = Mailbox()
    for frame in before:
        mailbox.deliver(frame)
    mailbox.discard(*floor)
    for frame in after:
        mailbox.deliver(frame)
    assert mailbox.num_waiting + mailbox.dropped + mailbox.duplicates == len(before) + len(after)
    held = {key_of(f) for f in before + after if (f.header.generation, f.header.step) >= floor}
    assert mailbox.num_waiting == len(held)
    assert mailbox.has(held)
