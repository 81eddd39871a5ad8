"""Made-up histories for tests of what judges them."""

from __future__ import annotations

from collections.abc import Sequence

from tests.chaos.history import Answer, Ending, History, RankSeen, Stream, ViewSample, Window

REFERENCE = (
    Answer(tokens=(5, 6, 7, 8), logprobs=(-0.5, -0.25, -1.0, -2.0)),
    Answer(tokens=(9, 9, 9, 9), logprobs=(-0.1, -0.1, -0.1, -0.1)),
)
WINDOWS = {
    "steady": Window(start=0.0, end=10.0),
    "fault": Window(start=10.0, end=20.0),
    "recovered": Window(start=20.0, end=30.0),
}


def stream(
    moments: Sequence[float], *, client: int = 0, ended: float = 0.0, ending: Ending = "complete", **seen: object
) -> Stream:
    """One token at each moment, those of the reference."""
    answer = REFERENCE[client % 2].first(len(moments))
    values = {"answer": answer, "kind": client % 2, "sent": 0.0} | seen
    arrivals = tuple((moment, 1) for moment in moments)
    last = moments[-1] if moments else 0.0
    return Stream(client=client, arrivals=arrivals, ended=ended or last, ending=ending, **values)  # type: ignore[arg-type]


def history(*streams: Stream) -> History:
    """Three phases of ten seconds each."""
    return History(streams=list(streams), reference=REFERENCE, windows=dict(WINDOWS))  # type: ignore[arg-type]


def view(moment: float, *ranks: tuple[str, int], health: int = 200, body: str = "") -> ViewSample:
    """A sample whose ranks have these states and incarnations."""
    seen = {rank: RankSeen(state=state, incarnation=life) for rank, (state, life) in enumerate(ranks)}
    return ViewSample(moment=moment, ranks=seen, health=health, health_body=body)
