"""Keeps the token cache: builds each split once, then memory-maps it.

A split is a folder ``<cache>/<name>-<tokenizer>-<hash of the facts>/<split>/``:

* ``tokens.npy``: all stored tokens, flat; read through a memory map.
* ``offsets.npy``: int64, where each example starts and ends.
* ``labels.npy``: int32.
* ``tokens_2.npy``, ``offsets_2.npy``: for tasks of pairs.
* ``meta.json``: format, facts, counts, fingerprint, and for each baseline a
  table of the label counts of its groups.

A folder is written under a temporary name and renamed when complete. If two
processes build the same split, both use the folder of the first to finish.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from spectraformer_jax.data.dataset import Dataset
from spectraformer_jax.data.find import as_path, first_line, read_plain
from spectraformer_jax.data.formats.npy import open_array
from spectraformer_jax.data.label_rules import counts
from spectraformer_jax.data.source import ReportProgress, Source
from spectraformer_jax.data.writer import Writer
from spectraformer_jax.registry import check_choice

FORMAT = 1
"""Increase it when the layout changes, so that older folders are not read."""


def default_cache_dir() -> pathlib.Path:
  """Returns ``$SPECTRAFORMER_DATA``, or ``~/.cache/spectraformer_jax``."""
  named = os.environ.get("SPECTRAFORMER_DATA")
  return as_path("$SPECTRAFORMER_DATA", named or "~/.cache/spectraformer_jax")


def cache_root(cache_dir: str | os.PathLike | None) -> pathlib.Path:
  """Returns the root of the cache: `cache_dir`, or the default for None."""
  if cache_dir is None:
    return default_cache_dir()
  root = as_path("cache_dir", cache_dir)
  if root.exists() and not root.is_dir():
    raise ValueError(f"cache_dir must be a folder, got {str(root)!r}.")
  return root


def split_folder(
  source: Source, split: str, cache_dir: str | os.PathLike | None = None
) -> pathlib.Path:
  """Returns the folder of a split, which need not exist yet."""
  facts = json.dumps([FORMAT, source.facts()], sort_keys=True)
  key = hashlib.sha256(facts.encode()).hexdigest()[:8]
  root = cache_root(cache_dir)
  return root / f"{source.name}-{source.tokenizer}-{key}" / split


def load_split(
  source: Source,
  split: str,
  cache_dir: str | os.PathLike | None = None,
  progress: ReportProgress | None = None,
) -> Dataset:
  """Opens a split; builds it first if the cache lacks it.

  Args:
    source: the task.
    split: one of its splits.
    cache_dir: root of the cache; None for :func:`default_cache_dir`.
    progress: called while a split is built.

  Returns:
    The dataset, with its tokens mapped from disk and compared with their hash.
    Its baselines are fitted on the training split, which is built too.

  Raises:
    ValueError: if the task has no such split, or its folder is damaged.
  """
  check_choice("split", split, [s for splits in source.passes for s in splits])
  folder = _ensure(source, split, cache_dir, progress)
  training = _ensure(source, "train", cache_dir, progress)
  with _damage_explained(training):
    fitted = _read_meta(training)["tables"]
  with _damage_explained(folder):
    meta = _read_meta(folder)
    figures = {
      name: counts.accuracy(fitted[name], table)
      for name, table in meta["tables"].items()
    }
    dataset = _read_arrays(folder, source, split, figures)
    if meta["facts"] != source.facts() or meta["split"] != split:
      raise ValueError("meta.json describes another split")
    if meta["fingerprint"] != dataset.fingerprint:
      raise ValueError("the arrays do not match the fingerprint in meta.json")
  return dataset


def _ensure(
  source: Source,
  split: str,
  cache_dir: str | os.PathLike | None,
  progress: ReportProgress | None,
) -> pathlib.Path:
  """Returns the folder of a split; builds the split if it does not exist."""
  folder = split_folder(source, split, cache_dir)
  if not folder.exists():
    (splits,) = [splits for splits in source.passes if split in splits]
    progress = progress or (lambda done, total: None)
    _build(source, splits, folder.parent, progress)
  return folder


def _build(
  source: Source,
  splits: tuple[str, ...],
  root: pathlib.Path,
  progress: ReportProgress,
) -> None:
  """Builds the splits of one pass in temporary folders, then renames them."""
  unique = f"{os.getpid()}-{secrets.token_hex(4)}"
  folders = {split: root / f".{split}-{unique}" for split in splits}
  writers: dict[str, Writer] = {}
  try:
    for split, folder in folders.items():
      folder.mkdir(parents=True)
      writers[split] = Writer(folder, source)
    source.write(writers, progress)
    for split, writer in writers.items():
      writer.finish()
      writer.save_meta(_describe(source, split, folders[split]))
    for split, folder in folders.items():
      _publish(folder, root / split)
  finally:
    for writer in writers.values():
      writer.close()
    for folder in folders.values():
      shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: pathlib.Path, destination: pathlib.Path) -> None:
  """Renames a complete folder, unless another process has published one."""
  try:
    folder.rename(destination)
  except OSError:
    if not destination.exists():
      raise


def _describe(
  source: Source, split: str, folder: pathlib.Path
) -> dict[str, Any]:
  """Returns the content of meta.json."""
  dataset = _read_arrays(folder, source, split, {})
  return {
    "format": FORMAT,
    "facts": source.facts(),
    "split": split,
    "num_examples": dataset.num_examples,
    "num_tokens": len(dataset.tokens),
    "longest": int(np.diff(dataset.offsets).max()),
    "fingerprint": dataset.fingerprint,
    "tables": counts.count_labels(dataset, source.rules),
  }


def _read_meta(folder: pathlib.Path) -> dict[str, Any]:
  """Parses meta.json."""
  meta = json.loads(read_plain(folder / "meta.json"))
  if meta["format"] != FORMAT:
    raise ValueError(f"its format must be {FORMAT}, got {meta['format']!r}")
  return meta


def _read_arrays(
  folder: pathlib.Path, source: Source, split: str, figures: dict[str, float]
) -> Dataset:
  """Returns the dataset whose arrays lie in `folder`, and hashes them.

  The baselines of the dataset get the accuracies in `figures`.
  """
  arrays = {}
  for suffix in ("", "_2") if source.pair else ("",):
    name = f"tokens{suffix}"
    tokens = _open_column(folder / f"{name}.npy", source.token_dtype)
    # A plain view of the map: slicing np.memmap itself is slow.
    arrays[name] = np.asarray(tokens)
    name = f"offsets{suffix}"
    arrays[name] = np.array(
      _open_column(folder / f"{name}.npy", np.dtype(np.int64))
    )
  labels = np.array(_open_column(folder / "labels.npy", np.dtype(np.int32)))
  return Dataset(
    **source.facts(), split=split, labels=labels, baselines=figures, **arrays
  )


def _open_column(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
  """Maps an array; raises ValueError unless it has one axis of type `dtype`."""
  array = open_array(path)
  if array.ndim != 1 or array.dtype != dtype:
    raise ValueError(
      f"{path.name} must have one axis of {dtype}, got "
      f"{array.dtype} {array.shape}"
    )
  return array


@contextlib.contextmanager
def _damage_explained(folder: pathlib.Path) -> Iterator[None]:
  """Turns any error of a damaged file into the advice to delete the folder."""
  try:
    yield
  # meta.json may hold anything, so reading it may raise nearly anything.
  except Exception as error:
    if isinstance(error, PermissionError):
      raise
    raise ValueError(
      f"cache folder {folder} is damaged ({first_line(error)}); delete it and "
      "it will be built again."
    ) from error
