"""Holds the registry of tasks, and :func:`load`."""

import os
from collections.abc import Mapping
from typing import Any

from spectraformer_jax.data.cache import load_split
from spectraformer_jax.data.dataset import Dataset
from spectraformer_jax.data.source import ReportProgress, Source
from spectraformer_jax.registry import Registry
from spectraformer_jax.seeds import check_seed

TASKS = Registry("task")
"""Factories of :class:`Source`: each takes ``seed`` and its own options."""


def list_tasks() -> tuple[str, ...]:
  """Returns the sorted names of all tasks.

  Example:
    >>> "listops" in list_tasks()
    True
  """
  return TASKS.names()


def load(
  task: str,
  split: str,
  *,
  cache_dir: str | os.PathLike | None = None,
  seed: int = 0,
  tokenizer: str | None = None,
  progress: ReportProgress | None = None,
  **task_kwargs: Any,
) -> Dataset:
  """Loads one split of a task from the cache; builds it first if necessary.

  Args:
    task: a name of :func:`list_tasks`.
    split: ``"train"``, ``"dev"`` or ``"test"``.
    cache_dir: root of the token cache; None: ``$SPECTRAFORMER_DATA`` or
      ``~/.cache/spectraformer_jax``.
    seed: seed of generated examples and of splits by content; below 2**64.
    tokenizer: name of a tokeniser of the task; None: its default.
    progress: ``progress(done, total)``, called while a split is built.
    **task_kwargs: options of the task.

  Returns:
    A :class:`Dataset`.

  Raises:
    ValueError: if a name, an option or its value is unknown, or if the folder
      in the cache is damaged.

  Example:
    >>> import tempfile
    >>> digits = load("digits", "train", cache_dir=tempfile.mkdtemp())
    >>> digits.vocab_size, digits.num_classes, digits.length
    (17, 10, 64)
  """
  options = task_kwargs | {"seed": check_seed("seed", seed)}
  if tokenizer is not None:
    options["tokenizer"] = tokenizer
  source = build_source(task, options, cache_dir)
  return load_split(source, split, cache_dir, progress)


def build_source(
  task: str,
  options: Mapping[str, Any],
  cache_dir: str | os.PathLike | None = None,
) -> Source:
  """Calls the factory of a task.

  Args:
    task: name of the task.
    options: options of the task.
    cache_dir: root of the token cache; passed to the tasks that read a package
      from there.
  """
  if "cache_dir" in TASKS.options(task):
    options = {**options, "cache_dir": cache_dir}
  return TASKS.build(task, options)
