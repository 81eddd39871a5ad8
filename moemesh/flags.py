"""Options whose every flag is defined once: name, type, default and help are a field of a frozen dataclass.

The command line's parser, the keys of a `--config` file, keyword arguments and JSON are all made from these fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, TypeVar, cast

import yaml

AnyOptions = TypeVar("AnyOptions", bound="Options")
T = TypeVar("T")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)(B?)")
_EXPONENT = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_TRUE_AND_FALSE = {"true": True, "false": False, "on": True, "off": False}


class OptionsError(ValueError):
    """A flag, a key of the config file or an option that cannot be honoured; the message names it and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """What an option accepts. `convert` takes a text or a value of the type, or raises a ValueError saying why not."""

    help: str
    convert: Callable[[object], object]
    metavar: str | None = None
    many: bool = False  # a tuple of values: several after the flag, or the flag several times
    optional: bool = False  # None is a value: decided from the model or the machine
    positional: bool = False
    switch: bool = False  # a flag without a value, and one with no- before its name for the opposite


def text(value: object) -> str:
    """Any non-empty text."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a non-empty text, got {value!r}")
    return value


def one_of(*choices: str) -> Callable[[object], str]:
    """One of some words."""

    def convert(value: object) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {value!r}")
        return str(value)

    return convert


def whole(minimum: int, maximum: int = 2**31 - 1) -> Callable[[object], int]:
    """An integer in a range, both ends included."""

    def convert(value: object) -> int:
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = value
        if not isinstance(number, int) or isinstance(number, bool) or not minimum <= number <= maximum:
            raise ValueError(f"expected a whole number from {minimum} to {maximum}, got {value!r}")
        return number

    return convert


def auto_or(other: Callable[[object], T]) -> Callable[[object], T | str]:
    """The word auto, or what `other` takes."""
    return lambda value: "auto" if value == "auto" else other(value)


def size(value: object) -> int:
    """A positive number of things or bytes, as vLLM reads them.

    K, M, G, T and KiB, MiB, ... are powers of 1024; k, m, g, t and KB, MB, ... of 1000.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"expected a positive size such as 4096, 32k, 512MiB or 4GiB, got {value!r}")
    number, unit, binary, in_bytes = match.groups()
    base = 1024 if binary or (unit.isupper() and not in_bytes) else 1000
    total = int(float(number) * base ** _EXPONENT[unit.lower()])
    if total < 1:
        raise ValueError(f"expected a size of at least 1, got {value!r}")
    return total


def real(minimum: float) -> Callable[[object], float]:
    """A finite number of at least `minimum`."""

    def convert(value: object) -> float:
        try:
            number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < minimum:
            raise ValueError(f"expected a number of at least {minimum:g}, got {value!r}")
        return number

    return convert


def truth(value: object) -> bool:
    """true or false."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE_AND_FALSE:
        return _TRUE_AND_FALSE[value.lower()]
    raise ValueError(f"expected true or false, got {value!r}")


def token_ids(value: object) -> tuple[int, ...]:
    """Token ids separated by commas, or a list of them."""
    return _numbers(value, 0, "token ids such as 1,17,4")


def counts(value: object) -> tuple[int, ...]:
    """Numbers of something, at least 1, separated by commas, or a list of them."""
    return _numbers(value, 1, "numbers such as 1,8,32")


def _numbers(value: object, minimum: int, what: str) -> tuple[int, ...]:
    parts = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError(f"expected {what}, got {value!r}")
    return tuple(whole(minimum)(part) for part in parts)


def flag(default: Any, help: str, convert: Callable[[object], object], **more: Any) -> Any:
    """A field that is also a flag."""
    return dataclasses.field(
        default=default, metadata={"flag": Flag(help=help, convert=convert, optional=default is None, **more)}
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of a command's options: a frozen dataclass whose fields are all made by `flag`. Raises OptionsError."""

    command: ClassVar[str]
    summary: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _converted(field.name, _flag_of(field), getattr(self, field.name)))
        self._check()

    def _check(self) -> None:
        """What concerns several options together."""

    @classmethod
    def from_mapping(cls, given: Mapping[str, object], *, source: str) -> Self:
        """Options from names as fields or flags have them. Raises OptionsError for an unknown one, naming `source`."""
        names = {field.name for field in dataclasses.fields(cls)}
        values = {str(key).replace("-", "_"): value for key, value in given.items()}
        for name in sorted(values.keys() - names):
            raise OptionsError(f"{source}: unknown option {name!r}; known are {', '.join(sorted(names))}")
        return cls(**cast(dict[str, Any], values))

    def to_json(self) -> str:
        """The options with their command's name; `options_from_json` reads it."""
        return json.dumps({"command": self.command, "options": dataclasses.asdict(self)})


class Parser(argparse.ArgumentParser):
    """Raises OptionsError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise OptionsError(f"{message} (try `{self.prog} --help`)")


def add_flags(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    """Give `parser` every flag of a class of options, and `--config`. What is not given is absent afterwards."""
    for field in dataclasses.fields(options):
        _add_flag(parser, field)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with these options as keys; flags given here take precedence"
    )


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    known = _flag_of(field)
    shows_default = not (known.optional or known.many or known.positional)
    more: dict[str, Any] = {"default": argparse.SUPPRESS, "help": known.help.replace("%", "%%")}
    if shows_default:
        more["help"] += f" (default: {_shown(field.default)})"
    if known.positional:
        parser.add_argument(field.name, nargs="?", metavar=field.name.upper(), **more)
    elif known.switch:
        parser.add_argument(_spelled(field.name), action=argparse.BooleanOptionalAction, **more)
    elif known.many:
        parser.add_argument(_spelled(field.name), action="extend", nargs="+", metavar=known.metavar, **more)
    else:
        parser.add_argument(_spelled(field.name), metavar=known.metavar, **more)


def options_from_arguments(
    options: type[AnyOptions], arguments: argparse.Namespace, *, implied: Mapping[str, object]
) -> AnyOptions:
    """Defaults, overridden by `implied`, by the config file, by the command line. Raises OptionsError."""
    names = {field.name for field in dataclasses.fields(options)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    from_file = {} if arguments.config is None else _read_config(Path(arguments.config))
    return options.from_mapping({**implied, **from_file, **given}, source=f"--config {arguments.config}")


def _read_config(path: Path) -> dict[str, object]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise OptionsError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionsError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise OptionsError(f"--config {path} must hold options such as `port: 8000`, not a {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _converted(name: str, known: Flag, value: object) -> object:
    """`value` as its field has it. Raises OptionsError naming the flag."""
    if value is None and known.optional:
        return None
    try:
        if not known.many:
            return known.convert(value)
        several = value if isinstance(value, list | tuple) else (value,)
        return tuple(known.convert(item) for item in several)
    except ValueError as error:
        raise OptionsError(f"{name if known.positional else _spelled(name)}: {error}") from error


def _flag_of(field: dataclasses.Field[Any]) -> Flag:
    return cast(Flag, field.metadata["flag"])


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")
