"""From a frozen dataclass to a command line: flags, `key=value` words, files, and errors of one sentence.

Knows no field by name. `argparse` reads the words; this file gives it the flags, turns its complaints into
`ConfigError`, and checks values against the bounds that a field declares.
"""

import argparse
import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

_NOUN: dict[type, str] = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
_BOOLS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


class ConfigError(ValueError):
    """A wish that cannot be met, said in one sentence; `train.py` prints it and exits with code 2."""


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | Callable[[], Sequence[str]] | None = None,
    low: float | None = None,
    high: float | None = None,
    group: str = "",
    fixed: bool = False,
    bare: str | None = None,
) -> Any:
    """Declare a field: its default, its help with the unit, the values it may take, its group in `--help`.

    `low` and `high` are inclusive bounds. `fixed` marks what a resumed run cannot change, because its
    weights, its optimizer state or its place in the data would no longer mean the same. `bare` is the value
    of the flag alone (a bool's is true).
    """
    said = {"help": help, "choices": choices, "low": low, "high": high, "group": group}
    return dataclasses.field(default=default, metadata=said | {"fixed": fixed, "bare": bare})


@dataclass(frozen=True, kw_only=True)
class Field:
    """What a field says of itself; `kind` is its type without None."""

    name: str
    kind: type
    default: Any
    help: str
    choices: Sequence[str] | Callable[[], Sequence[str]] | None
    low: float | None
    high: float | None
    group: str
    fixed: bool
    bare: str | None

    def values(self) -> Sequence[str] | None:
        """Return the values it may take, or None for any of its type."""
        return self.choices() if callable(self.choices) else self.choices


def fields_of(cls: type) -> dict[str, Field]:
    """Return the fields of a dataclass by name."""
    hints = get_type_hints(cls)
    kinds = {name: next((t for t in get_args(h) if t is not NoneType), h) for name, h in hints.items()}
    return {
        one.name: Field(name=one.name, kind=kinds[one.name], default=one.default, **one.metadata)
        for one in dataclasses.fields(cls)
    }


def dashed(name: str) -> str:
    """Return the flag of a field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, the nearest is X` for the closest known name, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", the nearest is {close[0]}" if close else ""


def check(field: Field, value: Any) -> None:
    """Raise ConfigError unless `value` has the field's type and lies within its choices and bounds."""
    kind, name, choices = field.kind, dashed(field.name), field.values()
    numbers = (int, float) if kind is float else kind
    fits = isinstance(value, numbers) and isinstance(value, bool) == (kind is bool)
    if not fits or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{name} wants {_NOUN[kind]}, got {value!r}")
    if choices is not None and value not in choices:
        close = nearest(value, choices)
        raise ConfigError(f"{name} {value!r} does not exist: choose one of {', '.join(choices)}{close}")
    if field.low is not None and value < field.low:
        raise ConfigError(f"{name} must be at least {field.low}, got {value}")
    if field.high is not None and value > field.high:
        raise ConfigError(f"{name} must be at most {field.high}, got {value}")


def convert(field: Field, text: str, *, called: str | None = None) -> Any:
    """Turn a word of the command line or the environment into the field's type, or raise ConfigError."""
    value: Any = None
    if field.kind is bool:
        value = _BOOLS.get(text.strip().lower())
    else:
        try:
            value = field.kind(text)
        except ValueError:
            value = None
    if value is None:
        raise ConfigError(f"{called or dashed(field.name)} wants {_NOUN[field.kind]}, got {text!r}")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.replace("argument ", "", 1))


def parser(
    fields: Mapping[str, Field], help_of: Callable[[str], str], **about: str
) -> argparse.ArgumentParser:
    """Build the command line: one flag a field, in the fields' groups, and `--config FILE`."""
    tree = _Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS, **about)  # type: ignore[arg-type]
    groups: dict[str, Any] = {}
    for name, field in fields.items():
        if field.group not in groups:
            groups[field.group] = tree.add_argument_group(field.group)
        bare = "true" if field.kind is bool else field.bare
        words: dict[str, Any] = {"nargs": "?", "const": bare} if bare is not None else {}
        metavar = "true|false" if field.kind is bool else field.kind.__name__.upper()
        groups[field.group].add_argument(
            dashed(name), dest=name, help=help_of(name), metavar=metavar, **words
        )
    tree.add_argument("--config", metavar="FILE", help="TOML or JSON file of fields; a flag beats it")
    return tree


def read_words(
    tree: argparse.ArgumentParser, fields: Mapping[str, Field], argv: Sequence[str]
) -> tuple[dict[str, Any], Path | None]:
    """Return the fields that the words of a command line give, and the file of `--config`.

    ConfigError names an unknown flag and the nearest known one. `--help` prints and leaves with code 0.
    """
    found, unknown = tree.parse_known_args(_words_to_flags(fields, argv))
    if unknown:
        name = unknown[0].partition("=")[0]
        if not name.startswith("-"):
            raise ConfigError(f"unexpected word {name!r}: flags look like --steps 300 or steps=300")
        raise ConfigError(f"unknown flag {name}{nearest(name, map(dashed, [*fields, 'config']))}")
    texts = vars(found)
    file = texts.pop("config", None)
    given = {name: convert(fields[name], text) for name, text in texts.items()}
    return given, None if file is None else Path(file)


def _words_to_flags(fields: Mapping[str, Field], argv: Sequence[str]) -> list[str]:
    """Rewrite `key=value` words as flags, leaving alone the words that are a flag's value."""
    rewritten: list[str] = []
    for word in argv:
        before = rewritten[-1] if rewritten else ""
        field = fields.get(before[2:].replace("-", "_")) if before.startswith("--") else None
        is_value = before == "--config" or (field is not None and field.kind is not bool)
        if re.match(r"[A-Za-z][\w-]*=", word) and not is_value:
            key, _, value = word.partition("=")
            word = f"{dashed(key)}={value}"
        rewritten.append(word)
    return rewritten


def read_file(fields: Mapping[str, Field], path: Path) -> dict[str, Any]:
    """Read the fields of a TOML or JSON file; ConfigError names the file and what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(
            f"the configuration {path} is no TOML (or, named .json, no JSON): {error}"
        ) from error
    if not isinstance(table, dict):
        raise ConfigError(f"the configuration {path} must be a table of fields, got {type(table).__name__}")
    given = {key.replace("-", "_"): value for key, value in table.items()}
    for key in given:
        if key not in fields:
            raise ConfigError(f"the configuration {path} has an unknown field {key}{nearest(key, fields)}")
    return given
