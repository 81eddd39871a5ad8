"""What happened in a run, as records, and what is measured on them. No I/O, no clocks: times are given in seconds.

steady       streams run, nothing fails; ends at a moment drawn from the seed
fault        from the first event until the mesh has settled, or the patience is over
recovered    streams run on; then no new ones begin and the running ones end
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Phase = Literal["steady", "fault", "recovered"]
PHASES: tuple[Phase, ...] = ("steady", "fault", "recovered")

# complete: to its [DONE]. refused: 503. error: the client was told. cut: the connection broke. silent: nothing more
# came. left: the harness itself dropped the connection at the end of its patience.
Ending = Literal["complete", "refused", "error", "cut", "silent", "left"]


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of the time, in seconds."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def holds(self, moment: float) -> bool:
        return self.start <= moment < self.end

    def touches(self, start: float, end: float) -> bool:
        return start < self.end and end > self.start


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model decided: compared with ==."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[Any, ...] = ()

    def first(self, count: int) -> Answer:
        return Answer(tokens=self.tokens[:count], logprobs=self.logprobs[:count])


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One request as its client saw it. `kind`: which of the load's requests; `arrivals`: when, and how many tokens."""

    client: int
    kind: int
    sent: float
    ended: float
    ending: Ending
    arrivals: tuple[tuple[float, int], ...] = ()
    answer: Answer = Answer()
    detail: str = ""
    retry_after: float | None = None

    def tokens_in(self, window: Window) -> int:
        return sum(count for moment, count in self.arrivals if window.holds(moment))

    def gaps(self) -> list[tuple[float, float]]:
        """(start, end) of each time without a token, from the first token to the end of the stream."""
        moments = [moment for moment, _ in self.arrivals]
        return list(itertools.pairwise([*moments, self.ended])) if moments else []

    def longest_gap(self, window: Window) -> float:
        """Seconds of the longest gap that touches the window; 0 where there is none."""
        return max((end - start for start, end in self.gaps() if window.touches(start, end)), default=0.0)


def read_stream(lines: Iterable[tuple[float, bytes]], *, cut: Ending | None, **seen: Any) -> Stream:
    """The stream from the data of its events and their times; `cut`: how it ended when no event says so."""
    arrivals: list[tuple[float, int]] = []
    tokens: list[int] = []
    logprobs: list[Any] = []
    ending, detail = cut or "cut", str(seen.pop("detail", ""))
    for moment, data in lines:
        if data == b"[DONE]":
            ending, detail = "complete", ""
            break
        event = json.loads(data)
        if "error" in event:
            ending, detail = "error", str(event["error"]["message"])
            break
        for choice in event["choices"]:
            new = choice["token_ids"] or []
            tokens += new
            logprobs += _logprobs(choice["logprobs"])
            if new:
                arrivals.append((moment, len(new)))
    answer = Answer(tokens=tuple(tokens), logprobs=tuple(logprobs))
    return Stream(ending=ending, detail=detail, arrivals=tuple(arrivals), answer=answer, **seen)


def _logprobs(given: Mapping[str, Any] | None) -> list[Any]:
    if given is None:
        return []
    tops = [tuple(sorted(top.items())) for top in given["top_logprobs"]]
    return list(zip(given["tokens"], given["token_logprobs"], tops, strict=True))


@dataclass(frozen=True, kw_only=True)
class RankSeen:
    """A rank as /mesh showed it."""

    state: str
    incarnation: int
    pid: int | None = None


@dataclass(frozen=True, kw_only=True)
class ViewSample:
    """What /mesh and /health said at a moment; `ranks` is empty when nobody answered."""

    moment: float
    ranks: Mapping[int, RankSeen] = field(default_factory=dict)
    health: int = 0
    health_body: str = ""

    @property
    def reachable(self) -> bool:
        return bool(self.ranks)

    @property
    def degraded(self) -> bool:
        """Whether the body of /health says so."""
        try:
            return json.loads(self.health_body)["degraded"] is True
        except (ValueError, KeyError, TypeError):
            return False

    @property
    def whole(self) -> bool:
        return self.reachable and all(rank.state == "up" for rank in self.ranks.values())


@dataclass(frozen=True, kw_only=True)
class Occurrence:
    """Something the harness did: `what` for people; `victims`: the lives (rank -> incarnation) it was done to."""

    moment: float
    what: str
    victims: Mapping[int, int] = field(default_factory=dict)
    ends_life: bool = False


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the processes of a mesh hold. Bytes and counts; ranks all together."""

    frontend_rss: int
    ranks_rss: int
    frontend_descriptors: int
    ranks_descriptors: int
    shared_memory: int
    run_files: int
    num_processes: int


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Something that had to be refused: what the refusal must name, and what was said."""

    words: tuple[str, ...]
    said: str
    exit_code: int | None = None


@dataclass(frozen=True, kw_only=True)
class MeshEnd:
    """How the mesh was at the very end, `seconds` after it was told to end or killed."""

    exit_code: int | None
    left: tuple[str, ...]
    seconds: float


@dataclass(kw_only=True)
class History:
    """One repetition of a scenario.

    `problem`: why it could not be carried out to its end. `lateness`: seconds by which the harness itself ran late.
    """

    windows: dict[Phase, Window] = field(default_factory=dict)
    streams: list[Stream] = field(default_factory=list)
    crowd: list[Stream] = field(default_factory=list)
    reference: Sequence[Answer] = ()
    occurrences: list[Occurrence] = field(default_factory=list)
    views: list[ViewSample] = field(default_factory=list)
    resources: dict[Phase, Resources] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    rates: dict[str, list[float]] = field(default_factory=dict)
    end: MeshEnd | None = None
    problem: str = ""
    lateness: float = 0.0
    log: str = ""

    @property
    def struck(self) -> float:
        """When the first event happened; infinite when none did."""
        return min((occurrence.moment for occurrence in self.occurrences), default=math.inf)

    @property
    def last_event(self) -> float:
        return max((occurrence.moment for occurrence in self.occurrences), default=math.inf)

    def longest_gap(self, window: Window, streams: Sequence[Stream] | None = None) -> float:
        chosen = self.streams if streams is None else streams
        return max((stream.longest_gap(window) for stream in chosen), default=0.0)

    def rate(self, window: Window) -> float:
        """Tokens per second of all streams."""
        return sum(stream.tokens_in(window) for stream in self.streams) / window.seconds

    def silence(self, window: Window) -> float:
        """Longest time within the window in which no stream at all got a token."""
        moments = sorted(moment for stream in self.streams for moment, _ in stream.arrivals if window.holds(moment))
        return max(end - start for start, end in itertools.pairwise([window.start, *moments, window.end]))

    def back_at(self) -> float:
        """The first moment after the last event at which every rank was up, none of them in a life that was ended."""
        ended = {life for seen in self.occurrences if seen.ends_life for life in seen.victims.items()}
        for sample in self.views:
            alive = {(rank, seen.incarnation) for rank, seen in sample.ranks.items()}
            if sample.moment > self.last_event and sample.whole and not alive & ended:
                return sample.moment
        return math.inf


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a check found. `value` is its figure where it has one; `bar` and `found` are for people."""

    check: str
    passed: bool
    found: str
    bar: str = ""
    value: float | None = None
    phase: Phase = "recovered"

    def in_phase(self, phase: Phase) -> Self:
        return type(self)(**{**self.__dict__, "phase": phase})
