"""The documents name files and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_life_of_a_request_names_one_existing_file_in_each_of_at_most_ten_sentences() -> None:
    lines = (ROOT / "docs/life-of-a-request.md").read_text().splitlines()
    sentences = [line for line in lines if re.match(r"\d+\. ", line)]
    assert 1 <= len(sentences) <= 10
    for sentence in sentences:
        (name,) = re.findall(r"`([^`]+\.py)`", sentence)
        assert (ROOT / name).is_file(), f"{name} is gone: {sentence}"


def test_the_readme_names_existing_files() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    assert named
    for name in named:
        assert (ROOT / name).exists(), f"README.md links to {name}, which is gone"


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci/run").read_text()
