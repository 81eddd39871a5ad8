"""Finding out whether a launcher of MPI started us, from the environment alone."""

import subprocess
import sys

import pytest

from transport.mpi_runtime import detect_mpi_launch


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "16"}, (3, 16)),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, (0, 2)),
        ({"PMIX_RANK": "1", "PMIX_SIZE": "2", "PMI_RANK": "0"}, (1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "3"}, None),
        ({"PMI_RANK": "-1", "PMI_SIZE": "2"}, None),
        ({"PMI_RANK": "2", "PMI_SIZE": "2"}, None),
        ({"PMI_RANK": "x", "PMI_SIZE": ""}, None),
    ],
)
def test_launch_is_read_from_the_environment(environ: dict[str, str], launch: tuple[int, int] | None) -> None:
    assert detect_mpi_launch(environ) == launch


def test_importing_transport_does_not_load_mpi() -> None:
    code = "import sys, transport; assert 'mpi4py' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
