"""The counters of a rank's parts under the keys of `Stats`: see RANK_COUNTERS and RANK_GAUGES in metrics."""

from __future__ import annotations

from experts.client import DispatchStats
from moemesh.group_member import GroupMember
from moemesh.scheduler_records import SchedulerStats
from transport.links import LinkStats
from transport.mailbox import Mailbox


def frame_counters(link: LinkStats, mailbox: Mailbox, num_malformed: int) -> dict[str, float]:
    """Frames sent, and those that came in vain; `num_malformed`: their contents were not what their kind has."""
    counters: dict[str, float] = {f"frames_sent:{kind.name.lower()}": count for kind, count in link.frames_sent.items()}
    counters["bytes_sent"] = link.bytes_sent
    counters["frames_refused:damaged"] = link.protocol_errors
    counters["frames_refused:malformed"] = num_malformed
    counters["frames_refused:stale"] = link.stale
    counters["frames_refused:late"] = mailbox.dropped
    counters["frames_refused:duplicate"] = link.duplicates + mailbox.duplicates
    counters["frames_unsent"] = link.dropped
    return counters


def dispatch_counters(stats: DispatchStats) -> dict[str, float]:
    """What a caller of experts has seen."""
    return {
        "dispatch_bytes": stats.bytes_sent,
        "dispatch_seconds": stats.seconds,
        "expert_calls_repeated:late": stats.hedged,
        "expert_calls_repeated:gone": stats.rerouted,
        "expert_answers_dropped:late": stats.late_answers,
        "expert_answers_dropped:double": stats.double_answers,
        "expert_answers_dropped:malformed": stats.malformed_answers,
    }


def member_counters(member: GroupMember) -> dict[str, int]:
    """What grows for as long as a generation lasts."""
    counters = {"steps": member.num_steps}
    if member.scheduler is not None:
        stats = member.scheduler.stats()
        counters["computed_tokens"] = member.num_tokens
        counters["preemptions"] = stats.num_preemptions
        counters["prefix_cache_queries"] = stats.num_prefix_queries
        counters["prefix_cache_hits"] = stats.num_prefix_hits
        counters["nonfinite_logits"] = stats.num_not_finite
    return counters


def scheduler_gauges(stats: SchedulerStats) -> dict[str, float]:
    """What a leader has to do now."""
    return {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "cache_blocks": stats.num_blocks,
        "cache_blocks_used": stats.num_blocks_used,
        "cache_usage": stats.num_blocks_used / stats.num_blocks,
    }
