"""Play seeds and tell their stories, or play as many as there is time for and tell of those that fail.

python -m tests.simulation 185 208                     # the stories of two seeds
python -m tests.simulation --soak 600 --first 10000    # ten minutes, on all cores, from that seed on
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.simulation.run import play
from tests.simulation.scenario import draw
from tests.simulation.soak import loaded, soak
from tests.simulation.tiny_model import write_model


def main() -> int:
    """The exit code: 1 where anything is to be complained of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="*")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="play seeds for so long")
    parser.add_argument("--first", type=int, default=0, help="the seed to begin with")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name))
        if given.soak is not None:
            return int(not soak(folder, given.first, given.soak))
        model, expected = loaded(folder)
        outcomes = [play(model, draw(seed), expected) for seed in given.seeds]
        print(*outcomes, sep="\n\n")
        return int(any(outcome.complaints for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
