"""Throughput against batch size, context and ranks, drawn from result files.

    python -m benchmarks.plot RESULT.json ... --output benchmarks/results/2026-11-21-bench-1b

Takes files of `moemesh bench engine` and of benchmarks/compare.py; writes OUTPUT-batch.png and .svg, and -context and
-ranks where the files hold more than one of them. Needs matplotlib: pip install 'moemesh[bench]'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot

SPEEDS = {"prefill_tokens_per_s": "prefill", "decode_tokens_per_s": "decode"}
FORMATS = ("png", "svg")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured case. `ranks` is None where that means nothing."""

    name: str
    batch_size: int
    context: int
    ranks: int | None
    speeds: dict[str, float]


def points_of(result: dict[str, Any]) -> list[Point]:
    """The cases of a result file. Raises ValueError for one of another kind."""
    configuration = result.get("configuration", {})
    if result.get("benchmark") == "bench engine":
        ranks = result["mesh"]["ranks"]
        return [
            Point(
                name=f"moemesh {Path(configuration['model']).name}",
                batch_size=case["batch_size"],
                context=case["prompt_tokens"],
                ranks=ranks,
                speeds={speed: case[speed] for speed in SPEEDS},
            )
            for case in result["cases"]
        ]
    if result.get("benchmark") == "compare":
        return [
            Point(
                name=entry["name"],
                batch_size=entry["batch_size"],
                context=configuration["prompt_tokens"],
                ranks=None,
                speeds={speed: entry[speed] for speed in SPEEDS if entry[speed] is not None},
            )
            for entry in result["summary"]
        ]
    raise ValueError(f"no result of `bench engine` or compare.py: benchmark {result.get('benchmark')!r}")


def lines_of(points: Sequence[Point], axis: str, speed: str) -> dict[str, list[tuple[int, float]]]:
    """By label, the (x, speed) along `axis`, ascending; a line for each combination of everything else.

    Lines of a single point are left out where there are longer ones.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        x = getattr(point, axis)
        if x is None or speed not in point.speeds:
            continue
        others = {"batch_size": f"batch {point.batch_size}", "context": f"{point.context} tokens"}
        if point.ranks is not None:
            others["ranks"] = f"{point.ranks} rank{'s' * (point.ranks > 1)}"
        others.pop(axis, None)
        lines.setdefault(", ".join((point.name, *others.values())), []).append((x, point.speeds[speed]))
    longest = max((len({x for x, _ in line}) for line in lines.values()), default=0)
    return {label: sorted(line) for label, line in lines.items() if longest < 2 or len(line) > 1}


def draw(points: Sequence[Point], axis: str, label: str, output: Path) -> list[Path]:
    """One picture with prefill and decode side by side, in every format; the files written."""
    figure, panels = pyplot.subplots(1, len(SPEEDS), figsize=(11, 4.5), layout="constrained")
    for panel, (speed, title) in zip(panels, SPEEDS.items(), strict=True):
        for name, line in lines_of(points, axis, speed).items():
            panel.plot(*zip(*line, strict=True), marker="o", label=name)
        panel.set(title=title, xlabel=label, ylabel="tokens/s", ylim=(0, None))
        panel.set_xscale("log", base=2)
        ticks = sorted({getattr(point, axis) for point in points if getattr(point, axis) is not None})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.grid(alpha=0.3)
    panels[-1].legend(fontsize="small")
    files = [output.with_name(f"{output.name}.{form}") for form in FORMATS]
    for file in files:
        figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="beginning of the files' names")
    given = parser.parse_args(arguments)
    points = [point for file in given.result for point in points_of(json.loads(file.read_text()))]
    axes = (("batch_size", "sequences", "batch"), ("context", "prompt tokens", "context"), ("ranks", "ranks", "ranks"))
    for axis, label, suffix in axes:
        several = len({getattr(point, axis) for point in points} - {None}) > 1
        if several or axis == "batch_size":
            for file in draw(points, axis, label, given.output.with_name(f"{given.output.name}-{suffix}")):
                print(file)


if __name__ == "__main__":
    main()
