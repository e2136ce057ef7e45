"""``check``: what is in a task, and whether it is as in Long Range Arena."""

import argparse
import ast
import contextlib
import hashlib
import logging
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spectraformer_jax.data import examples, lra_figures
from spectraformer_jax.data._checks import check_int
from spectraformer_jax.data.cache import load_split
from spectraformer_jax.data.dataset import Dataset
from spectraformer_jax.data.find import LOGGER
from spectraformer_jax.data.source import SPLITS
from spectraformer_jax.data.tasks import TASKS

DIFFERS = 1


def main(args: Sequence[str]) -> int:
  """Runs the command.

  Args:
    args: what follows ``check`` on the command line.

  Returns:
    0, or 1 if a figure of Long Range Arena is not met.

  Raises:
    ValueError: if a task, an option or a file is not as it should be.
  """
  known, options = _parse(args)
  options["seed"] = check_int("seed", known.seed, 0)
  with _messages_shown():
    source = TASKS.build(known.task, options)
    show_progress = _Progress()
    splits = {
      split: load_split(source, split, known.cache_dir, show_progress)
      for split in SPLITS
    }
  for line in report(splits):
    print(line)
  pictures = known.pictures or pathlib.Path(f"{source.name}.png")
  for line in examples.show(splits["train"], known.examples, pictures):
    print(line)
  figures = lra_figures.compare(known.task, splits)
  for line in lra_figures.describe(figures):
    print(line)
  return 0 if all(figure.agrees for figure in figures) else DIFFERS


def report(splits: Mapping[str, Dataset]) -> Iterator[str]:
  """Lines about counts, lengths, labels, checksums and duplicates."""
  first = splits["train"]
  yield (
    f"{first.name}: {first.provenance}, tokenizer {first.tokenizer}, "
    f"{first.vocab_size} ids, {first.num_classes} classes, length "
    f"{first.length}"
  )
  yield "       examples  shortest     mean  longest  at full length"
  for split, dataset in splits.items():
    for suffix in ("", "_2") if dataset.pair else ("",):
      lengths = np.diff(getattr(dataset, "offsets" + suffix))
      yield (
        f"{split:6}{len(dataset):9,}{lengths.min():10,}{lengths.mean():9.1f}"
        f"{lengths.max():9,}{np.mean(lengths == dataset.length):16.1%}"
        f"{'  (second)' if suffix else ''}"
      )
  yield "labels"
  for split, dataset in splits.items():
    counts = np.bincount(dataset.labels, minlength=dataset.num_classes)
    yield f"{split:6}{' '.join(f'{count:,}' for count in counts)}"
  for name in first.baselines:
    shares = (f"{s} {d.baselines[name]:.3f}" for s, d in splits.items())
    yield f"accuracy of {name}: {', '.join(shares)}"
  yield from count_duplicates(splits)
  for split, dataset in splits.items():
    yield f"checksum {split} {dataset.fingerprint}"


def count_duplicates(splits: Mapping[str, Dataset]) -> Iterator[str]:
  """Lines about examples that occur more than once, whatever their label."""
  contents = {split: _contents(dataset) for split, dataset in splits.items()}
  repeats = (f"{split} {len(c) - len(set(c))}" for split, c in contents.items())
  yield f"repeated within {', '.join(repeats)}"
  shared = (
    f"{one} and {two} {len(set(contents[one]) & set(contents[two]))}"
    for one, two in (("train", "dev"), ("train", "test"), ("dev", "test"))
  )
  yield f"shared by {', '.join(shared)}"


def _contents(dataset: Dataset) -> list[bytes]:
  """A digest of the tokens of each example."""
  columns = [(dataset.tokens, dataset.offsets.tolist())]
  if dataset.pair:
    columns.append((dataset.tokens_2, dataset.offsets_2.tolist()))
  digests = []
  for i in range(len(dataset)):
    digest = hashlib.blake2b(digest_size=12)
    for tokens, offsets in columns:
      digest.update(b"%d:" % (offsets[i + 1] - offsets[i]))
      digest.update(np.ascontiguousarray(tokens[offsets[i] : offsets[i + 1]]))
    digests.append(digest.digest())
  return digests


@contextlib.contextmanager
def _messages_shown() -> Iterator[None]:
  """Prints what readers say about the files that they find."""
  handler = logging.StreamHandler(sys.stdout)
  level = LOGGER.level
  LOGGER.addHandler(handler)
  LOGGER.setLevel(logging.INFO)
  try:
    yield
  finally:
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


class _Progress:
  """Says every few seconds how far the building of a split is."""

  def __init__(self):
    self._last = time.monotonic()

  def __call__(self, done: int, total: int) -> None:
    if time.monotonic() - self._last > 5:
      self._last = time.monotonic()
      print(f"building: {done:,} of {total:,} examples", file=sys.stderr)


def _parse(args: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
  """Options of the command, and those of the task."""
  parser = argparse.ArgumentParser(
    prog="python -m spectraformer_jax.data check",
    description=(
      "Builds a task into the cache and says what is in it. Options of the "
      "task itself are given as --name=value: --data_dir=DIR, --val=lra, "
      "--tokenizer=no_close and the like."
    ),
    allow_abbrev=False,
  )
  parser.add_argument("task", help=f"one of {', '.join(TASKS.names())}")
  parser.add_argument("--cache_dir", help="root of the token cache")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--examples", type=int, default=3, help="how many texts to show"
  )
  parser.add_argument(
    "--pictures",
    type=pathlib.Path,
    help="where to draw images; default NAME.png in the current folder",
  )
  known, rest = parser.parse_known_args(args)
  options = {}
  for argument in rest:
    name, equals, text = argument.partition("=")
    if not name.startswith("--") or not equals:
      raise ValueError(
        f"options must be written --name=value, got {argument!r}."
      )
    name = name[2:].replace("-", "_")
    options[name] = text if name == "data_dir" else _value(text)
  return known, options


def _value(text: str) -> Any:
  """A number where the text is one."""
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text
