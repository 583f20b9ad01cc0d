"""The language of settings: how a record declares typed, bounded fields, and how values are parsed and checked.

A record is a frozen dataclass. Each of its fields is another record or a setting; the string literal below a setting
describes it:

  horizon: int = setting(15, "R", low=1, high=10_000)
  \"\"\"Imagined steps H.\"\"\"
"""

import ast
import dataclasses
import inspect
import itertools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from jedi_jax.errors import UserError

TAGS = {
  "C": "certain, stated in the JEDI papers (arXiv:2505.19698, arXiv:2605.13013)",
  "R": "reported for the JEDI papers by a third party",
  "D": "DIAMOND's value (arXiv:2405.12399)",
  "O": "our choice",
}
"""Where the default of a setting comes from."""

_MAX_ENTRIES = 32
"""Maximum length of a tuple: each stage of a network takes about a second to trace."""
_LARGEST, _SMALLEST = 3.4e38, 1.2e-38
"""Magnitudes beyond which float32, the format of all programs, overflows to infinity or underflows to 0."""


def setting(
  default: Any,
  tag: str,
  *,
  low: float | None = None,
  above: float | None = None,
  high: float | None = None,
  choices: tuple[str, ...] | None = None,
  finite: bool = True,
) -> Any:
  """Declares a field of a record. Bounds and choices apply to each element of a tuple.

  Args:
    default: the value of preset `paper` with variant `jedi`.
    tag: a key of `TAGS`.
    low: smallest allowed value.
    above: exclusive lower bound.
    high: largest allowed value.
    choices: the allowed strings.
    finite: whether infinity is refused.
  """
  if tag not in TAGS:
    raise ValueError(f"tag {tag!r} is not one of {', '.join(TAGS)}")
  metadata = {"tag": tag, "low": low, "above": above, "high": high, "choices": choices, "finite": finite}
  return dataclasses.field(default=default, metadata=metadata)


def settings(cls: type) -> Mapping[str, dataclasses.Field]:
  """Returns the field of every setting of a record by dotted path, in the order of declaration."""
  found: dict[str, dataclasses.Field] = {}
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.type):
      inner = settings(typing.cast(type, field.type))
      found |= {f"{field.name}.{path}": setting for path, setting in inner.items()}
    else:
      found[field.name] = field
  return found


def descriptions(cls: type) -> Mapping[str, str]:
  """Returns the description of every setting of a record by dotted path, read from the source."""
  (record,) = ast.parse(inspect.getsource(cls)).body
  assert isinstance(record, ast.ClassDef)
  texts = {
    field.target.id: " ".join(text.value.value.split())
    for field, text in itertools.pairwise(record.body)
    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
  }
  found: dict[str, str] = {}
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.type):
      inner = descriptions(typing.cast(type, field.type))
      found |= {f"{field.name}.{path}": text for path, text in inner.items()}
    else:
      found[field.name] = texts[field.name]
  return found


def convert(path: str, value: Any, kind: Any) -> Any:
  """Converts a value to the type of a setting without losing information.

  Args:
    path: the setting, for the error message.
    value: a string is parsed; a list becomes a tuple and an integer a float where the type requires it.
    kind: str, bool, int, float or `tuple[x, ...]` with one of them as x.

  Raises:
    UserError: the value does not represent the type.
  """
  try:
    return _convert(value, kind)
  except (ValueError, TypeError, KeyError, OverflowError):
    name = f"a tuple of {kind.__args__[0].__name__}" if isinstance(kind, types.GenericAlias) else kind.__name__
    raise UserError(f"{path}={value!r} is not {name}" + (" (true or false)" if kind is bool else "")) from None


def _convert(value: Any, kind: Any) -> Any:
  if isinstance(kind, types.GenericAlias):
    if isinstance(value, str):
      inner = value.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]")
      value = [part.strip() for part in inner.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
      raise TypeError
    return tuple(_convert(part, kind.__args__[0]) for part in value)
  if isinstance(value, str) and kind is not str:
    return {"true": True, "false": False}[value.strip().lower()] if kind is bool else kind(value)
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    raise TypeError
  return value


def check(path: str, value: Any, field: dataclasses.Field) -> None:
  """Checks the type, the bounds and the choices of a setting.

  Raises:
    UserError: one line that names the setting and the fix.
  """
  converted = convert(path, value, field.type)
  if repr(converted) != repr(value):  # A string, a list for a tuple or an integer for a float.
    raise UserError(f"{path}={value!r} is not of its declared type: write {converted!r}")
  if isinstance(value, tuple) and len(value) > _MAX_ENTRIES:
    raise UserError(f"{path} has {len(value)} entries: at most {_MAX_ENTRIES}")
  low, above, high, choices, finite = (field.metadata[key] for key in ("low", "above", "high", "choices", "finite"))
  for item in value if isinstance(value, tuple) else (value,):
    if isinstance(item, float) and math.isnan(item):
      raise UserError(f"{path} is not a number")
    if low is not None and item < low:
      raise UserError(f"{path}={value!r} is too small: at least {low}")
    if above is not None and item < above + _SMALLEST:
      raise UserError(f"{path}={value!r} is too small: it must exceed {above}")
    if high is not None and item > high:
      raise UserError(f"{path}={value!r} is too large: at most {high}")
    if choices is not None and item not in choices:
      raise UserError(f"{path}={value!r} is not one of {', '.join(choices)}")
    if isinstance(item, float) and abs(item) > _LARGEST and finite:
      raise UserError(f"{path} is infinite{'' if math.isinf(item) else ' in float32'}: give a finite number")
