"""Standard JSON, with texts for NaN and infinities, which JSON lacks."""

import json
import math
from collections.abc import Callable
from typing import Any

_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any) -> str:
  """Writes JSON that every reader accepts.

  Example:
    >>> dumps({"dev/loss": float("nan"), "step": 3})
    '{"dev/loss": "NaN", "step": 3}'
  """
  return json.dumps(_map(_name, value), allow_nan=False)


def loads(text: str | bytes) -> Any:
  """Reads what `dumps` wrote; also a bare NaN, which older versions wrote.

  Raises:
    ValueError: the text is not JSON; the message says where.

  Example:
    >>> loads('{"dev/loss": "NaN"}'), loads("NaN")
    ({'dev/loss': nan}, nan)
  """
  try:
    return _map(_number, json.loads(text))
  except RecursionError:
    raise ValueError("too deeply nested") from None


def _map(function: Callable[[Any], Any], value: Any) -> Any:
  """Applies `function` to every leaf of nested dicts and lists."""
  if isinstance(value, dict):
    return {name: _map(function, item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_map(function, item) for item in value]
  return function(value)


def _name(value: Any) -> Any:
  if not isinstance(value, float) or math.isfinite(value):
    return value
  return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"


def _number(value: Any) -> Any:
  return _NAMES.get(value, value) if isinstance(value, str) else value
