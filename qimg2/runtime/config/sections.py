"""Sections of a config as frozen dataclasses: a key that is unknown or missing and a value of a wrong type are named with their place.

A section is a `ConfigDict` or a dict, as a config file, the command line or config.json gives it. `from_section` makes a dataclass of it by the
types of its fields, `plain` goes back; `plain` of a dataclass has every field, those with a default too.
"""

import dataclasses
import difflib
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

Dataclass = TypeVar("Dataclass")
WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", tuple: "a tuple", Mapping: "a section", type(None): "None"}


def plain(value: Any) -> Any:
  """`value` with every ConfigDict and dataclass as a dict and every list as a tuple, at any depth."""
  if isinstance(value, (ConfigDict, Mapping)):
    return {key: plain(item) for key, item in value.items()}
  if hasattr(value, "section"):
    return plain(value.section())
  if dataclasses.is_dataclass(value):
    return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
  return tuple(plain(item) for item in value) if isinstance(value, (tuple, list)) else value


def from_section(cls: type[Dataclass], section: Any, where: str, **given: Any) -> Dataclass:
  """The dataclass `cls` of a section; `given` are fields that are there already.

  Raises:
    ValueError: a key that the dataclass does not have, with the nearest that it has; one without a default that is missing; a value of another
      type, or one that the dataclass refuses. Each begins with the place, such as "config.stages[sft].optimizer".
  """
  hints = typing.get_type_hints(cls)
  names = [field.name for field in dataclasses.fields(cls) if field.name not in given]
  required = [field.name for field in dataclasses.fields(cls)
              if field.name in names and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING]
  values = checked(section, {name: hints[name] for name in names}, required, where)
  return placed(where, cls, **given, **values)


def checked(section: Any, hints: Mapping[str, Any], required: Iterable[str], where: str) -> dict[str, Any]:
  """The values of a section whose keys are those of `hints`, each converted to its type there.

  Raises:
    ValueError: as `from_section`.
  """
  values = plain(section)
  if not isinstance(values, dict):
    raise ValueError(f"{where} is {values!r}: give a section with the keys {', '.join(hints)}.")
  for key in values:
    if key not in hints:
      near = difflib.get_close_matches(str(key), hints, 1)
      raise ValueError(f"{where} has no key {key!r}" + (f": did you mean {near[0]!r}?" if near else f": it has {', '.join(hints) or 'none'}."))
  for key in required:
    if key not in values:
      raise ValueError(f"{where} lacks {key!r}: give it {words(hints[key])}; configs/base.py has every key.")
  return {key: convert(hints[key], value, f"{where}.{key}") for key, value in values.items()}


def placed(where: str, make: Any, *args: Any, **values: Any) -> Any:
  """make(*args, **values), whose `ValueError` gets to name the place, which it knows at most in part."""
  try:
    return make(*args, **values)
  except ValueError as error:
    text, (parent, _, last) = str(error), where.rpartition(".")
    if text.startswith("config."):
      raise
    raise ValueError(f"{parent}.{text}" if parent and text.startswith(f"{last}.") else f"{where}: {text}") from error


def convert(hint: Any, value: Any, where: str) -> Any:
  """`value` as the type `hint`: a list as a tuple, a whole number as a float where that is asked for, a section as a dataclass.

  Raises:
    ValueError: it is of another type.
  """
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return value
  if origin in (typing.Union, types.UnionType):
    return _convert_union(hint, value, where)
  if dataclasses.is_dataclass(hint):
    return from_section(hint, value, where)
  base = origin or hint
  if base is tuple and isinstance(value, (tuple, list)):
    kinds = args[:1] * len(value) if args[-1:] == (Ellipsis,) else args
    if len(kinds) != len(value):
      raise ValueError(f"{where} is {value!r}: give {words(hint)}.")
    return tuple(convert(kind, item, f"{where}[{number}]") for number, (kind, item) in enumerate(zip(kinds, value)))
  if base is Mapping and isinstance(value, dict):
    return {convert(args[0], key, where): convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
  accepted = {int: numbers.Integral, float: numbers.Real}.get(base, base)
  if base in (tuple, Mapping) or not isinstance(value, accepted) or (isinstance(value, bool) and base in (int, float)):
    raise ValueError(f"{where} is {value!r}: give {words(hint)}.")
  return base(value) if base in (int, float) else value


def _convert_union(hint: Any, value: Any, where: str) -> Any:
  """None where that may be; else by the only other type, or by the first of several that the value is of."""
  options = [option for option in typing.get_args(hint) if option is not type(None)]
  if value is None and type(None) in typing.get_args(hint):
    return None
  for option in options[:-1]:
    try:
      return convert(option, value, where)
    except ValueError:
      continue
  if len(options) == 1 and dataclasses.is_dataclass(options[0]):
    return convert(options[0], value, where)
  try:
    return convert(options[-1], value, where)
  except ValueError as error:
    raise ValueError(f"{where} is {value!r}: give {words(hint)}.") from error


def words(hint: Any) -> str:
  """What to give where `hint` is asked for."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return " or ".join(words(option) for option in typing.get_args(hint))
  args = typing.get_args(hint)
  if typing.get_origin(hint) is tuple and args[-1] is not Ellipsis:
    return f"a tuple of {len(args)}"
  return "a section" if dataclasses.is_dataclass(hint) else WORDS.get(typing.get_origin(hint) or hint, "a value")
