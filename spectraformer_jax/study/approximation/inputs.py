"""Queries, keys and values to measure on, random or from a file."""

import dataclasses
import functools
import hashlib
import re
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from spectraformer_jax import checks

ARRAYS = ("query", "key", "value", "key_mask", "query_mask")


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The inputs of one attention layer, without the factor ``1/sqrt(H)``.

  Attributes:
    name: shown in tables, such as "random" or "layer_0".
    query: ``[B, T, N, H]`` float32; ``[B, T, N G, H]`` if G queries share a key
      head.
    key: ``[B, S, N, H]`` float32.
    value: ``[B, S, N, V]`` float32.
    key_mask: ``[B, S]`` bool, True at visible keys.
    query_mask: ``[B, T]`` bool, True at queries whose outputs count.
  """

  name: str
  query: np.ndarray
  key: np.ndarray
  value: np.ndarray
  key_mask: np.ndarray
  query_mask: np.ndarray

  @property
  def length(self) -> int:
    """S, the number of keys."""
    return self.key.shape[1]

  @functools.cached_property
  def fingerprint(self) -> str:
    """A hash of all numbers and shapes."""
    digest = hashlib.sha256()
    for name in ARRAYS:
      array = getattr(self, name)
      digest.update(f"{name} {array.dtype} {array.shape}".encode())
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:12]

  def cropped(self, length: int | None) -> "Inputs":
    """Returns the first `length` positions, or all if `length` is None.

    Raises:
      ValueError: there are fewer positions, or not as many queries as keys.
    """
    if length is None or length == self.length == self.query.shape[1]:
      return self
    if self.query.shape[1] != self.length:
      raise ValueError(
        f"inputs {self.name!r} have {self.query.shape[1]} queries and "
        f"{self.length} keys, so --lengths cannot shorten them."
      )
    if length > self.length:
      raise ValueError(
        f"inputs {self.name!r} have {self.length} positions, got "
        f"--lengths {length}."
      )
    return dataclasses.replace(
      self, **{name: getattr(self, name)[:, :length] for name in ARRAYS}
    )

  def sequences(self, chosen: slice) -> "Inputs":
    """Returns some of the sequences."""
    return dataclasses.replace(
      self, **{name: getattr(self, name)[chosen] for name in ARRAYS}
    )


def make_inputs(
  name: str,
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  key_mask: np.ndarray | None = None,
  query_mask: np.ndarray | None = None,
  *,
  may_group: bool = False,
) -> Inputs:
  """Makes `Inputs` from arrays of any float dtype.

  Without a key mask, all keys are visible. Without a query mask, the key mask
  holds for the queries, too, if T == S; otherwise all queries count. Several
  query heads may share a key head only with `may_group`.

  Raises:
    ValueError: shapes or masks do not agree, numbers are not finite, or a
      sequence has no visible key or query; the message contains `name`.

  Example:
    >>> x = np.ones((1, 5, 2, 4))
    >>> make_inputs("toy", x, x, x).key_mask.shape
    (1, 5)
  """
  try:
    query, key, value = (np.asarray(x, np.float32) for x in (query, key, value))
    arrays = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    checks.check_attention_inputs(*arrays)
    if query.shape[2] != key.shape[2] and not may_group:
      raise ValueError(
        f"{query.shape[2]} query heads for {key.shape[2]} key heads; repeat "
        "keys and values so that each query head has its own."
      )
    if key_mask is not None:
      checks.check_mask(jnp.asarray(key_mask), arrays[1])
    if query_mask is not None:
      checks.check_mask(jnp.asarray(query_mask), arrays[0], "query_mask")
  except ValueError as error:
    raise ValueError(f"inputs {name!r}: {error}") from None
  if key_mask is None:
    key_mask = np.ones(key.shape[:2], bool)
  if query_mask is None:
    same = query.shape[1] == key.shape[1]
    query_mask = key_mask if same else np.ones(query.shape[:2], bool)
  inputs = Inputs(name, query, key, value, key_mask, query_mask)
  for array in ("query", "key", "value"):
    if not np.isfinite(getattr(inputs, array)).all():
      raise ValueError(f"inputs {name!r}: {array} is not finite everywhere.")
  if not (key_mask.any(axis=1).all() and query_mask.any(axis=1).all()):
    raise ValueError(f"inputs {name!r}: a mask hides a whole sequence.")
  return inputs


def random_inputs(
  *, batch: int, length: int, num_heads: int, head_dim: int, seed: int
) -> Inputs:
  """Draws independent standard normal q, k and v.

  Example:
    >>> random_inputs(
    ...   batch=1, length=8, num_heads=2, head_dim=4, seed=0).query.shape
    (1, 8, 2, 4)
  """
  shape = (3, batch, length, num_heads, head_dim)
  return make_inputs("random", *np.random.default_rng(seed).normal(size=shape))


def read_npz(path: Path, *, may_group: bool = False) -> list[Inputs]:
  """Reads a file that `numpy.savez` wrote; unpickles nothing.

  A file of one layer holds the arrays query, key and value, or q, k and v, and
  perhaps key_mask and query_mask. In a file of several layers, each name starts
  with its layer: "layer_0/query". For `may_group` see `make_inputs`.

  Raises:
    ValueError: the file is not an npz of such arrays.
  """
  try:
    with np.load(path) as file:
      stored = {name: file[name] for name in file.files}
  # TypeError: an npy file gives an array, which is no context manager.
  except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile):
    raise ValueError(f"{str(path)!r} is not an npz file of arrays.") from None
  layers: dict[str, dict[str, np.ndarray]] = {}
  short = {"q": "query", "k": "key", "v": "value"}
  for name, array in stored.items():
    layer, _, leaf = name.rpartition("/")
    leaf = short.get(leaf, leaf)
    if leaf not in ARRAYS:
      raise ValueError(
        f"{str(path)!r} holds {name!r}; arrays are called "
        f"{', '.join(ARRAYS)} (or q, k, v), perhaps after 'layer/'."
      )
    layers.setdefault(layer, {})[leaf] = array
  for layer, arrays in layers.items():
    missing = [name for name in ARRAYS[:3] if name not in arrays]
    if missing:
      where = f"layer {layer!r} of " if layer else ""
      raise ValueError(f"{where}{str(path)!r} has no {', '.join(missing)}.")
  if not layers:
    raise ValueError(f"{str(path)!r} holds no arrays.")
  names = sorted(layers, key=_natural)
  return [
    make_inputs(name or path.stem, **layers[name], may_group=may_group)
    for name in names
  ]


def _natural(name: str) -> list[int | str]:
  """A sort key that puts layer_10 after layer_9: texts and numbers in turn."""
  parts = re.split(r"(\d+)", name)
  return [int(part) if part.isdecimal() else part for part in parts]


def write_npz(path: Path, layers: list[Inputs]) -> None:
  """Writes the layers to a file that `read_npz` reads."""
  np.savez(
    path,
    **{
      f"{layer.name}/{name}": getattr(layer, name)
      for layer in layers
      for name in ARRAYS
    },
  )
