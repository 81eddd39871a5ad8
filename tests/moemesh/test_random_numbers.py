"""Random numbers: the published vectors, and that each belongs to its seed and position alone."""

import pytest

from moemesh.random_numbers import choice_seed, philox, uniform


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, int, int, int], key: int, words: tuple[int, int, int, int]
) -> None:
    # Known answers of philox4x32-10 from the authors' library, Random123.
    assert philox(counter, key) == words


def test_random_numbers_are_spread_and_belong_to_seed_and_position() -> None:
    numbers = [uniform(seed, position) for seed in (-1, 0, 7, 2**63 - 1) for position in range(500)]
    assert len(set(numbers)) == len(numbers)
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.03
    assert uniform(7, 3) == uniform(7, 3) == uniform(7 + 2**64, 3)


def test_choices_have_seeds_of_their_own() -> None:
    seeds = [choice_seed(seed, choice) for seed in (-5, 0, 1, 2**63 - 1) for choice in range(128)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert choice_seed(3, 1) == choice_seed(3, 1)
