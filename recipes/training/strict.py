"""Plain values from YAML as dataclasses: every key must be a field, every value must have its field's type."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

import yaml

from audiotok.errors import ConfigError, did_you_mean

T = TypeVar("T")


def build(cls: type[T], values: Any, where: str = "") -> T:
    """An instance of the dataclass `cls`, and of those inside it, from nested dicts and lists.

    Args:
        where: dotted path of `values` in the whole file, ending in a dot; for the error messages.

    Raises:
        ConfigError: an unknown key (with a suggestion) or a value of another type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where.rstrip('.') or 'The configuration'} must be a group of keys, not {values!r}.")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(
                f'Unknown key "{where}{key}".{did_you_mean(str(key), hints)} Legal here: {", ".join(hints)}.'
            )
    return cls(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`: a section, a list, a dict, an optional value or a scalar."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _convert(inner, value, where)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where + ".")
    if origin is list:
        items = enumerate(_expect(list, value, where))
        return [_convert(arguments[0], item, f"{where}.{i}") for i, item in items]
    if origin is dict:
        pairs = _expect(dict, value, where).items()
        return {str(key): _convert(arguments[1], item, f"{where}.{key}") for key, item in pairs}
    return value if kind is Any else _scalar(kind, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is not float:
        return _expect(kind, value, where)
    if isinstance(value, str) and _is_number(value):
        return float(value)  # YAML reads 1e-3, without a dot, as text
    return float(_expect((int, float), value, where))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _expect(kind: type | tuple[type, ...], value: Any, where: str) -> Any:
    """`value` if it is a `kind`; a bool is no number."""
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
    raise ConfigError(f"{where}={value!r} is not legal: a value of type {names} is needed.")


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one key of nested dicts and lists in place.

    Args:
        override: `a.b.c=value`, the value in YAML. An item of a list is named by its position or its `name`.

    Raises:
        ConfigError: no `=`, no YAML, or a path that leads nowhere.
    """
    path, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override!r} has no value: write --set key.name=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {path}: {text!r} is no YAML value: {error}") from error
    *parents, last = path.split(".")
    node: Any = values
    for name in parents:
        node = _open(node, name, path)
    if isinstance(node, list):
        node[_index(node, last, path)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f'--set {path}: "{last}" lies inside a plain value, not inside a group of keys.')


def _open(node: Any, name: str, path: str) -> Any:
    """The child `name` of a dict (made if absent) or list."""
    if isinstance(node, list):
        return node[_index(node, name, path)]
    if not isinstance(node, dict):
        raise ConfigError(f'--set {path}: "{name}" lies inside a plain value, not inside a group of keys.')
    return node.setdefault(name, {})


def _index(items: list[Any], name: str, path: str) -> int:
    names = [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(items)]
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < len(items):
        return int(name)
    raise ConfigError(f'--set {path}: no item "{name}"; there are {", ".join(names)}.{did_you_mean(name, names)}')
