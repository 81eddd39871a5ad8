"""What a scenario must show: each check is data with a bar, and judges a finished history. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tests.chaos.history import History, Phase, Resources, Stream, Verdict, Window

SHOWN = 3


class Check(Protocol):
    """Judges a history; `window` is that of the phase it stands in."""

    def judge(self, history: History, window: Window) -> Verdict: ...


def judge_all(checks: Sequence[tuple[Phase, Check]], history: History) -> list[Verdict]:
    """The verdict of every check; one whose phase was never reached has failed."""
    verdicts = []
    for phase, check in checks:
        window = history.windows.get(phase)
        name = type(check).__name__
        missing = Verdict(check=name, passed=False, found=f"the {phase} phase was never reached")
        verdict = check.judge(history, window) if window is not None else missing
        verdicts.append(verdict.in_phase(phase))
    return verdicts


@dataclass(frozen=True)
class Complete:
    """Every stream that was admitted ended complete, and every stream was admitted, unless it may be `refused`."""

    refused: bool = False

    def judge(self, history: History, window: Window) -> Verdict:
        fine = ("complete", "refused") if self.refused else ("complete",)
        broken = [stream for stream in history.streams if stream.ending not in fine]
        found = describe_endings(broken or history.streams)
        return Verdict(check="complete", passed=bool(history.streams) and not broken, found=found)


@dataclass(frozen=True)
class Identical:
    """Tokens and log-probabilities are as without faults; in streams that broke off, as far as they got."""

    def judge(self, history: History, window: Window) -> Verdict:
        compared = [*history.streams, *history.crowd]
        other = [difference for stream in compared if (difference := first_difference(stream, history))]
        tokens = sum(len(stream.answer.tokens) for stream in compared)
        found = "; ".join(other[:SHOWN]) if other else f"{tokens} tokens of {len(compared)} streams"
        return Verdict(check="identical", passed=tokens > 0 and not other, found=found)


@dataclass(frozen=True)
class LongestGap:
    """No stream waited longer for its next token."""

    seconds: float

    def judge(self, history: History, window: Window) -> Verdict:
        gap = history.longest_gap(window)
        passed = 0 < gap <= self.seconds
        return Verdict(check="gap", passed=passed, found=f"{gap:.2f} s", bar=f"<= {self.seconds:g} s", value=gap)


@dataclass(frozen=True)
class Flowing:
    """Every client got tokens."""

    def judge(self, history: History, window: Window) -> Verdict:
        clients = {stream.client for stream in history.streams}
        fed = {stream.client for stream in history.streams if stream.tokens_in(window)}
        rate = history.rate(window) if window.seconds > 0 else 0.0
        found = f"{rate:.0f} tokens/s"
        if clients - fed:
            found += f", none for {len(clients - fed)} of {len(clients)} clients"
        return Verdict(check="flowing", passed=bool(fed) and fed == clients, found=found)


@dataclass(frozen=True)
class NeverStill:
    """At no time did all streams stand still together for longer."""

    seconds: float

    def judge(self, history: History, window: Window) -> Verdict:
        value = history.silence(window)
        bar = f"<= {self.seconds:g} s"
        return Verdict(check="stillness", passed=value <= self.seconds, found=f"{value:.2f} s", bar=bar, value=value)


@dataclass(frozen=True)
class Undisturbed:
    """So many of the clients (0..1) never waited longer for a token than `seconds`."""

    share: float
    seconds: float

    def judge(self, history: History, window: Window) -> Verdict:
        clients = {stream.client for stream in history.streams}
        slow = {stream.client for stream in history.streams if stream.longest_gap(window) > self.seconds}
        value = 1 - len(slow) / len(clients) if clients else 0.0
        bar = f">= {self.share:.0%} without a gap of {self.seconds:g} s"
        return Verdict(check="undisturbed", passed=value >= self.share, found=f"{value:.0%}", bar=bar, value=value)


@dataclass(frozen=True)
class WholeAgain:
    """Every rank is up so many seconds after the last event, the ones that were killed in a new life."""

    within_s: float

    def judge(self, history: History, window: Window) -> Verdict:
        value = history.back_at() - history.last_event
        found = f"{value:.1f} s" if math.isfinite(value) else "never"
        bar = f"<= {self.within_s:g} s"
        return Verdict(check="whole", passed=value <= self.within_s, found=found, bar=bar, value=value)


@dataclass(frozen=True)
class Degraded:
    """At the end the mesh serves, says that it is degraded, and some rank is not up."""

    def judge(self, history: History, window: Window) -> Verdict:
        if not history.views:
            return Verdict(check="degraded", passed=False, found="nobody answered on /mesh")
        last = [sample for sample in history.views if sample.moment < window.end][-1]
        said = "says" if last.degraded else "does not say"
        missing = "no rank" if last.whole else "a rank" if last.reachable else "everybody"
        found = f"/health {last.health} {said} degraded, {missing} is missing"
        passed = last.reachable and not last.whole and last.health == 200 and last.degraded
        return Verdict(check="degraded", passed=passed, found=found)


@dataclass(frozen=True)
class Crippled:
    """At the end the mesh is there, cannot serve, and says so."""

    def judge(self, history: History, window: Window) -> Verdict:
        seen = [sample for sample in history.views if sample.moment < window.end]
        if not seen:
            return Verdict(check="crippled", passed=False, found="nobody answered on /mesh")
        last = seen[-1]
        passed = last.reachable and last.health == 503 and last.degraded
        said = "says" if last.degraded else "does not say"
        return Verdict(check="crippled", passed=passed, found=f"/health {last.health} {said} degraded")


@dataclass(frozen=True)
class Rate:
    """Tokens per second, against those of the steady phase."""

    at_least: float

    def judge(self, history: History, window: Window) -> Verdict:
        value = history.rate(window) / history.rate(history.windows["steady"])
        bar = f">= {self.at_least:g} of steady"
        return Verdict(check="rate", passed=value >= self.at_least, found=f"{value:.2f}", bar=bar, value=value)


@dataclass(frozen=True)
class RateOfRival:
    """Tokens per second against those of the rival mesh: the median of the ratios of two rounds, one after the other,
    because the machine itself changes from one minute to the next by more than the two differ."""

    at_least: float

    def judge(self, history: History, window: Window) -> Verdict:
        ours, theirs = (history.rates.get(who, [0.0]) for who in ("mesh", "rival"))
        ratios = [mine / other if other else 0.0 for mine, other in zip(ours, theirs, strict=True)]
        value = statistics.median(ratios)
        found = f"{value:.3f} ({statistics.median(ours):.0f} against {statistics.median(theirs):.0f} tokens/s)"
        bar = f">= {self.at_least:g} of the rival"
        return Verdict(check="rate", passed=value >= self.at_least, found=found, bar=bar, value=value)


@dataclass(frozen=True)
class Told:
    """Every client knew soon after the last event how its stream ended: complete, an error, or a broken connection."""

    within_s: float

    def judge(self, history: History, window: Window) -> Verdict:
        silent = [stream for stream in history.streams if stream.ending in ("silent", "left")]
        value = max((stream.ended for stream in history.streams), default=math.inf) - history.last_event
        found = f"{value:.2f} s: {describe_endings(history.streams)}"
        passed = not silent and value <= self.within_s
        return Verdict(check="told", passed=passed, found=found, bar=f"<= {self.within_s:g} s", value=value)


@dataclass(frozen=True)
class NothingLeft:
    """No process, no folder and no shared memory remains."""

    within_s: float

    def judge(self, history: History, window: Window) -> Verdict:
        bar = f"<= {self.within_s:g} s"
        if history.end is None:
            return Verdict(check="left", passed=False, found="the end was not reached", bar=bar)
        end = history.end
        found = f"gone in {end.seconds:.1f} s" if not end.left else f"left: {', '.join(end.left[:SHOWN])}"
        passed = not end.left and end.seconds <= self.within_s
        return Verdict(check="left", passed=passed, found=found, bar=bar, value=end.seconds)


@dataclass(frozen=True)
class EndsWith:
    """The exit code of `moemesh serve`: zero or not."""

    zero: bool

    def judge(self, history: History, window: Window) -> Verdict:
        code = None if history.end is None else history.end.exit_code
        bar = "0" if self.zero else "not 0"
        passed = code is not None and (code == 0) == self.zero
        return Verdict(check="exit", passed=passed, found=f"exit code {code}", bar=bar)


@dataclass(frozen=True)
class FlatResources:
    """Memory, descriptors and shared memory as in the steady phase, but for so much.

    Measured while streams run: at the end, or when the fault is at its worst.
    """

    at: Phase = "recovered"
    rss_growth: float = 0.1
    rss_bytes: int = 32 << 20
    descriptors: int = 8
    run_files: int = 0

    def judge(self, history: History, window: Window) -> Verdict:
        before, after = history.resources.get("steady"), history.resources.get(self.at)
        if before is None or after is None:
            return Verdict(check="resources", passed=False, found="not measured: the mesh was gone")
        grown = [name for name in vars(before) if getattr(after, name) > self._limit(name, before)]
        shown = grown or ["frontend_rss", "ranks_rss", "ranks_descriptors", "shared_memory"]
        found = ", ".join(f"{name} {getattr(before, name)} -> {getattr(after, name)}" for name in shown)
        return Verdict(check="resources", passed=not grown, found=found)

    def _limit(self, name: str, before: Resources) -> float:
        value: int = getattr(before, name)
        if name.endswith("_rss"):
            return value * (1 + self.rss_growth) + self.rss_bytes
        if name == "run_files":
            return value + self.run_files
        return value + self.descriptors if name.endswith("_descriptors") else value


@dataclass(frozen=True)
class CrowdRefused:
    """Of the crowd that came too much, some were refused, each with Retry-After; nobody else was told anything else."""

    def judge(self, history: History, window: Window) -> Verdict:
        refused = [stream for stream in history.crowd if stream.ending == "refused"]
        unsaid = [stream for stream in refused if stream.retry_after is None]
        other = [stream for stream in history.crowd if stream.ending not in ("complete", "refused")]
        found = f"{describe_endings(history.crowd)}; {len(unsaid)} of the refused without Retry-After"
        return Verdict(check="refusals", passed=bool(refused) and not unsaid and not other, found=found)


@dataclass(frozen=True)
class RefusedByName:
    """What could not be served was refused, and the refusal names it."""

    def judge(self, history: History, window: Window) -> Verdict:
        unsaid = [word for refusal in history.refusals for word in refusal.words if word not in refusal.said]
        taken = [refusal for refusal in history.refusals if refusal.exit_code == 0]
        found = "named" if not unsaid else f"nobody said {', '.join(unsaid)}"
        found = found if not taken else "not refused"
        return Verdict(check="refused", passed=bool(history.refusals) and not unsaid and not taken, found=found)


def first_difference(stream: Stream, history: History) -> str:
    """Where a stream differs from the reference, in words; empty where it does not."""
    got = stream.answer
    want = history.reference[stream.kind]
    if stream.ending != "complete":
        want = want.first(len(got.tokens))
    who = f"client {stream.client}, request {stream.kind}"
    if len(got.tokens) != len(want.tokens):
        return f"{who}: {len(got.tokens)} tokens instead of {len(want.tokens)}"
    for position, (mine, theirs) in enumerate(zip(got.tokens, want.tokens, strict=True)):
        if mine != theirs:
            return f"{who}: token {position} is {mine} instead of {theirs}"
    for position, pair in enumerate(zip(got.logprobs, want.logprobs, strict=False)):
        if pair[0] != pair[1]:
            return f"{who}: log-probability {position} is {pair[0]} instead of {pair[1]}"
    if len(got.logprobs) != len(want.logprobs):
        return f"{who}: {len(got.logprobs)} log-probabilities instead of {len(want.logprobs)}"
    return ""


def describe_endings(streams: Sequence[Stream]) -> str:
    """How many ended how, each kind with an example."""
    counts = Counter(stream.ending for stream in streams)
    examples = {stream.ending: stream.detail for stream in reversed(streams) if stream.detail}
    parts = [
        f"{count} {ending}" + (f" ({examples[ending][:120]})" if ending in examples else "")
        for ending, count in sorted(counts.items())
    ]
    return ", ".join(parts) or "no streams"
