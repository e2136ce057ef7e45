"""``check``: reports what a task holds, beside figures of Long Range Arena."""

import contextlib
import hashlib
import itertools
import logging
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from spectraformer_jax.data.cache import load_split
from spectraformer_jax.data.commands import examples, lra_figures
from spectraformer_jax.data.commands.options import make_parser, parse_options
from spectraformer_jax.data.dataset import Dataset
from spectraformer_jax.data.find import LOGGER
from spectraformer_jax.data.label_rules import linear
from spectraformer_jax.data.registry import TASKS, build_source
from spectraformer_jax.data.source import SPLITS, Source
from spectraformer_jax.registry import check_int
from spectraformer_jax.seeds import check_seed

DIFFERS = 1  # exit status


def main(args: Sequence[str]) -> int:
  """Runs the command.

  Args:
    args: what follows ``check`` on the command line.

  Returns:
    0, or 1 if the task differs from a figure of Long Range Arena.

  Raises:
    ValueError: if a task or an option is unknown, or a file is damaged.
  """
  parser = make_parser(
    "check", "Builds a task into the cache and reports what it holds."
  )
  parser.add_argument("task", help=f"one of {', '.join(TASKS.names())}")
  parser.add_argument(
    "--examples", type=int, default=3, help="number of texts to print"
  )
  parser.add_argument(
    "--linear",
    action="store_true",
    help="also fit the simplest model of words or pixels (takes a minute)",
  )
  parser.add_argument(
    "--pictures", type=pathlib.Path, help="PNG file to draw images into"
  )
  flags, rest = parser.parse_known_args(args)
  options = parse_options(rest)
  shown = check_int("examples", flags.examples, 0)
  options["seed"] = check_seed("seed", flags.seed)
  with _messages_shown():
    source = build_source(flags.task, options, flags.cache_dir)
    splits = load_splits(source, flags.cache_dir)
  figures = lra_figures.compare(flags.task, splits)
  for line in itertools.chain(
    report(splits),
    examples.show(splits["train"], shown, flags.pictures),
    linear.describe(splits) if flags.linear else (),
    lra_figures.describe(figures),
  ):
    print(line)
  return 0 if all(figure.agrees for figure in figures) else DIFFERS


def load_splits(
  source: Source, cache_dir: str | os.PathLike | None
) -> dict[str, Dataset]:
  """Returns all splits of a task; prints the progress of building them."""
  progress = ProgressPrinter()
  return {
    split: load_split(source, split, cache_dir, progress) for split in SPLITS
  }


def report(splits: Mapping[str, Dataset]) -> Iterator[str]:
  """Yields lines about counts, lengths, labels, repeats and checksums."""
  first = splits["train"]
  yield (
    f"{first.name}: {first.provenance}, tokenizer {first.tokenizer}, "
    f"{first.vocab_size} ids, {first.num_classes} classes, length "
    f"{first.length}"
  )
  yield "       examples  shortest     mean  longest  at full length"
  for split, dataset in splits.items():
    for name, _, offsets in dataset.sequences():
      lengths = np.diff(offsets)
      yield (
        f"{split:6}{len(dataset):9,}{lengths.min():10,}{lengths.mean():9.1f}"
        f"{lengths.max():9,}{np.mean(lengths == dataset.length):16.1%}"
        f"{'  (second)' if name == 'tokens_2' else ''}"
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
  """Yields lines about equal examples; labels are not compared."""
  contents = {split: _contents(dataset) for split, dataset in splits.items()}
  repeats = (f"{split} {len(c) - len(set(c))}" for split, c in contents.items())
  yield f"repeated within {', '.join(repeats)}"
  shared = (
    f"{one} and {two} {len(set(contents[one]) & set(contents[two]))}"
    for one, two in (("train", "dev"), ("train", "test"), ("dev", "test"))
  )
  yield f"shared by {', '.join(shared)}"


def _contents(dataset: Dataset) -> list[bytes]:
  """Returns a hash of the tokens of each example."""
  digests = []
  for i in range(len(dataset)):
    digest = hashlib.blake2b(digest_size=12)
    for _, tokens, offsets in dataset.sequences():
      content = tokens[offsets[i] : offsets[i + 1]].tobytes()
      digest.update(b"%d:" % (offsets[i + 1] - offsets[i]))
      digest.update(content)
    digests.append(digest.digest())
  return digests


@contextlib.contextmanager
def _messages_shown() -> Iterator[None]:
  """Prints the log messages of the readers: which files were chosen."""
  handler = logging.StreamHandler(sys.stdout)
  level = LOGGER.level
  LOGGER.addHandler(handler)
  LOGGER.setLevel(logging.INFO)
  try:
    yield
  finally:
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


class ProgressPrinter:
  """Prints at most every 5 seconds how many examples are built."""

  def __init__(self) -> None:
    self._last = time.monotonic()

  def __call__(self, done: int, total: int) -> None:
    """Receives the progress, in examples; see `source.ReportProgress`."""
    if time.monotonic() - self._last > 5:
      self._last = time.monotonic()
      print(f"building: {done:,} of {total:,} examples", file=sys.stderr)
