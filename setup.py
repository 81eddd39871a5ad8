"""Builds the optional C extension kernels._native; everything else is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup

NATIVE = Extension(
    "kernels._native",
    sources=sorted(glob("kernels/csrc/*.c")),
    depends=sorted(glob("kernels/csrc/*.h")),
    # No contraction: which products are fused is written in the source, the same for every instruction set.
    # Alignment: where a loop happens to begin makes 5 % of what one row takes.
    extra_compile_args=[
        *("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread"),
        *("-falign-functions=64", "-falign-loops=64"),
    ],
    extra_link_args=["-pthread"],
    optional=True,  # without a compiler the torch reference serves, slower and not exact; moemesh says so at start
)

setup(ext_modules=[NATIVE])
