"""Fitted maps as attention functions for another person's Flax model."""

import contextlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spectraformer_jax.adapters import as_attention_fn
from spectraformer_jax.linearize import layer_files
from spectraformer_jax.study.approximation.pair_spec import parse_pair
from spectraformer_jax.typing import Array

# File of the settings of a conversion, in its folder.
RECORD = "linearize.json"

AttentionFn = Callable[..., Array]


def load(folder: Path | str) -> list[AttentionFn]:
  """Loads the layers of a conversion, as functions for Flax's modules.

  Args:
    folder: ``--out`` of ``python -m spectraformer_jax.linearize``.

  Returns:
    What `as_attention_fn` makes of each layer's map and exact keys, in the
    order of the model.

  Raises:
    ValueError: the folder holds no conversion, or a damaged one.

  Example:
    >>> load("no/such/folder")
    Traceback (most recent call last):
      ...
    ValueError: 'no/such/folder' holds no conversion: no linearize.json.
  """
  folder = Path(folder)
  try:
    record = json.loads((folder / RECORD).read_text())
  except (FileNotFoundError, NotADirectoryError):
    raise ValueError(
      f"{str(folder)!r} holds no conversion: no {RECORD}."
    ) from None
  except ValueError as error:
    raise ValueError(
      f"{str(folder / RECORD)!r} is damaged: {error}."
    ) from error
  feature_map = parse_pair(record["pair"]).build(record["num_features"])
  window = record["window"]
  functions = []
  for entry in record["layers"]:
    _, layer = layer_files.load_layer(
      layer_files.path_of(folder, entry["name"])
    )
    functions.append(
      as_attention_fn(
        feature_map,
        layer.variables,
        is_causal=record["is_causal"],
        window=window and tuple(window),
        num_sinks=record["num_sinks"],
        num_heavy=record["num_heavy"],
      )
    )
  return functions


class InOrder:
  """What `in_order` returns; a context manager, and an attention function.

  Args:
    functions: one for each layer.
  """

  def __init__(self, functions: Sequence[AttentionFn]) -> None:
    self._functions = tuple(functions)
    # Flax passes the arguments that an attention_fn's signature names.
    self.__signature__ = inspect.signature(self._functions[0])
    self._stack = contextlib.ExitStack()
    self._modules: list[tuple[str, ...]] = []
    self._seen: set[tuple[str, ...]] = set()
    self._count = 0
    self._is_open = False

  def __enter__(self) -> "InOrder":
    import flax.linen as linen  # only who has such a model needs it

    if self._is_open:
      raise ValueError("in_order: this `with` is inside another of its own.")
    self._seen, self._count, self._is_open = set(), 0, True
    self._stack.enter_context(linen.intercept_methods(self._follow))
    return self

  def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
    self._is_open = False
    self._stack.close()
    count, layers = self._count, len(self._functions)
    if kind is None and count != layers:
      raise ValueError(
        f"in_order got {count} calls for {layers} layers: the model must call "
        "its attention once for each layer; nn.scan calls it for all at once, "
        "so use a loop over layers."
      )

  def __call__(self, *args: Any, **kwargs: Any) -> Array:
    """Attends with the function of the next layer."""
    if not self._is_open:
      raise ValueError(
        "in_order hands out functions inside `with`: write `with fn: y = "
        "model.apply(...)`, one call of the model in each."
      )
    module = self._modules[-1] if self._modules else None
    if module in self._seen:
      raise ValueError(
        f"in_order: module {'/'.join(module or ())!r} calls its attention "
        "twice, as under nn.scan over layers, which gives all layers the same "
        "function: use a loop over layers."
      )
    if module is not None:
      self._seen.add(module)
    number, layers = self._count, len(self._functions)
    self._count += 1
    if number >= layers:
      raise ValueError(
        f"in_order got call {number + 1} for {layers} layers: the model must "
        "call its attention once for each layer."
      )
    return self._functions[number](*args, **kwargs)

  def _follow(
    self,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Any,
  ) -> Any:
    """Remembers which Linen module is running."""
    self._modules.append(context.module.path)
    try:
      return call(*args, **kwargs)
    finally:
      self._modules.pop()


def in_order(functions: Sequence[AttentionFn]) -> InOrder:
  """Makes one `attention_fn` of several, for a model that takes one for all.

  The first call gets the first function, and so on. Each call of the model must
  stand in a ``with`` block of its own, inside `jax.jit` if there is one; the
  block's end checks that each function was called once.

  Args:
    functions: of each layer, as from `load`.

  Raises:
    ValueError: in a block, another number of calls than there are functions, or
      two calls of the same Linen module; outside of a block, any call.

  Example:
    >>> fn = in_order([lambda x: x + 1, lambda x: 2 * x])
    >>> with fn:
    ...   print(fn(fn(3)))
    8
  """
  return InOrder(functions)
