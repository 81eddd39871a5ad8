"""The benchmark commands: `moemesh bench engine`, `serve` and `dispatch`."""
