"""JSON as its standard has it: NaN and infinities, which it lacks, as texts."""

import json
import math
from typing import Any

_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any) -> str:
  """JSON that every reader takes.

  Example:
    >>> dumps({"dev/loss": float("nan"), "step": 3})
    '{"dev/loss": "NaN", "step": 3}'
  """
  return json.dumps(_map(_name, value), allow_nan=False)


def loads(text: str | bytes) -> Any:
  """What `dumps` wrote; bare NaN, which older versions wrote, as well.

  Raises:
    ValueError: no JSON; it says where.

  Example:
    >>> loads('{"dev/loss": "NaN"}'), loads("NaN")
    ({'dev/loss': nan}, nan)
  """
  try:
    return _map(_number, json.loads(text))
  except RecursionError:
    raise ValueError("too deeply nested") from None


def _map(function, value):
  """`function` of every leaf of dicts and lists."""
  if isinstance(value, dict):
    return {name: _map(function, item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_map(function, item) for item in value]
  return function(value)


def _name(value):
  if not isinstance(value, float) or math.isfinite(value):
    return value
  return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"


def _number(value):
  return _NAMES.get(value, value) if isinstance(value, str) else value
