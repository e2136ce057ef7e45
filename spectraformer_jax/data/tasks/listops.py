"""ListOps of Long Range Arena: evaluate a nested expression over lists.

The released sequences were drawn without a seed and cannot be reproduced.
Others are drawn here from the same grammar, with the same sizes, unless
`data_dir` names the folder of the released files.

Tokenisers: ``full`` keeps every token; ``no_close`` drops the closing brackets,
as do the first release of Long Range Arena and code derived from it, so that
expressions become ambiguous.

Source: Tay et al., "Long Range Arena", 2021, section 2.2.1.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping

import numpy as np

from spectraformer_jax.data.dataset import Dataset
from spectraformer_jax.data.formats.listops_text import CLOSE, IDS, MIN
from spectraformer_jax.data.generators import listops as generator
from spectraformer_jax.data.generators.listops import Expressions
from spectraformer_jax.data.label_rules.counts import MAJORITY
from spectraformer_jax.data.readers import reader
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import (
  SPLITS,
  ReportProgress,
  Source,
  with_max_len,
)
from spectraformer_jax.data.writer import Writer
from spectraformer_jax.registry import check_choice, check_int
from spectraformer_jax.seeds import make_generator

TOKENIZERS = ("full", "no_close")

ROOT_OPERATOR = "root operator only"

REFERENCE_BASELINES = {MAJORITY: 0.170, ROOT_OPERATOR: 0.362}
"""For 100,000 sequences of the published grammar: 17 % is the accuracy of the
most frequent label, 36 % that of the best guess from the first token."""

_PUBLISHED = {
  "min_len": 500,
  "max_len": 2000,
  "max_depth": 10,
  "num_train": 96_000,
  "num_dev": 2_000,
  "num_test": 2_000,
}

_PATIENCE = 200  # batches without a new sequence before giving up


@TASKS.register("listops")
def listops(
  *,
  seed: int = 0,
  tokenizer: str = "full",
  data_dir: str | os.PathLike | None = None,
  min_len: int = _PUBLISHED["min_len"],
  max_len: int = _PUBLISHED["max_len"],
  max_depth: int = _PUBLISHED["max_depth"],
  num_train: int = _PUBLISHED["num_train"],
  num_dev: int = _PUBLISHED["num_dev"],
  num_test: int = _PUBLISHED["num_test"],
) -> Source:
  """Returns the task. Its name shows where it differs from the published form.

  Args:
    seed: seed of the expressions, which are the same for both tokenisers.
    tokenizer: ``"full"`` or ``"no_close"``.
    data_dir: a folder with the files of the release, or one up to three levels
      above it. They are read instead of drawing; of the following arguments
      only `max_len` may then be given.
    min_len: exclusive lower bound of the length, with closing brackets.
    max_len: exclusive upper bound of the length; also the padded length.
    max_depth: depth at which all nodes are digits.
    num_train: number of training sequences.
    num_dev: number of dev sequences.
    num_test: number of test sequences.

  Raises:
    ValueError: if an option is unknown or out of range, or `data_dir` holds no
      files of the task.

  Example:
    >>> listops(min_len=20, max_len=128).name
    'listops-min_len20-max_len128'
  """
  check_choice("tokenizer", tokenizer, TOKENIZERS)
  shortest = 1 if data_dir is not None else min_len + 2
  options = {
    "min_len": check_int("min_len", min_len, 1),
    "max_len": check_int("max_len", max_len, shortest),
    "max_depth": check_int("max_depth", max_depth, 2),
    "num_train": check_int("num_train", num_train, 1),
    "num_dev": check_int("num_dev", num_dev, 1),
    "num_test": check_int("num_test", num_test, 1),
  }
  if data_dir is not None:
    return _from_files(data_dir, tokenizer, options)
  changes = [f"-{k}{v}" for k, v in options.items() if v != _PUBLISHED[k]]

  def write(writers: Mapping[str, Writer], progress: ReportProgress) -> None:
    _write(writers, progress, seed, tokenizer, options)

  return Source(
    name="listops" + "".join(changes),
    tokenizer=tokenizer,
    provenance="generated",
    vocab_size=32,  # as in the paper's models; ids end at 16
    num_classes=10,
    length=max_len,
    settings={
      "seed": seed,
      "generator": f"listops_generator {generator.VERSION}",
      "ids": IDS,
      **options,
    },
    write=write,
    rules={ROOT_OPERATOR: _first_token},
  )


def _from_files(
  data_dir: str | os.PathLike, tokenizer: str, options: Mapping[str, int]
) -> Source:
  """Returns the task whose expressions are read from files."""
  for name, value in options.items():
    if name != "max_len" and value != _PUBLISHED[name]:
      raise ValueError(
        f"{name} must be left out where data_dir is given: it says what to "
        f"draw, got {value}."
      )
  found = reader.find_data("listops", data_dir)
  if found.tokenizer and tokenizer != "full":
    raise ValueError(
      f"tokenizer={tokenizer!r} needs expressions as text, found "
      f"{found.layout}, whose ids cannot be decoded; leave it out."
    )
  length = options["max_len"]
  fitting = lambda split: _fitting(found, split, tokenizer, length)
  return reader.make_source(
    dataclasses.replace(found, examples=fitting),
    reader.OWN_SPLITS,
    name=with_max_len("listops", length, _PUBLISHED["max_len"]),
    seed=0,
    settings={} if found.tokenizer else {"ids": IDS},
    tokenizer=found.tokenizer or tokenizer,
    vocab_size=32,
    num_classes=10,
    length=length,
    rules={} if found.tokenizer else {ROOT_OPERATOR: _first_token},
  )


def _fitting(
  found: reader.TaskFiles, split: str, tokenizer: str, length: int
) -> Iterator[reader.Example]:
  """Yields the examples of a split; raises ValueError for a long one."""
  for number, example in enumerate(found.examples(split), start=1):
    tokens = example.tokens
    if tokenizer == "no_close":
      tokens = tokens[tokens != CLOSE]
    if len(tokens) > length:
      raise ValueError(
        f"max_len must be at least {len(tokens)}, the length of expression "
        f"{number} of {split} in {found.folder}, got {length}."
      )
    yield example._replace(tokens=tokens)


def _first_token(dataset: Dataset) -> np.ndarray:
  """Groups examples by their root operator."""
  return dataset.tokens[dataset.offsets[:-1]] - MIN


def _write(
  writers: Mapping[str, Writer],
  progress: ReportProgress,
  seed: int,
  tokenizer: str,
  options: Mapping[str, int],
) -> None:
  """Draws each split from its own stream; no sequence is drawn twice."""
  window = {name: options[name] for name in ("min_len", "max_len", "max_depth")}
  total = sum(options[f"num_{split}"] for split in SPLITS)
  seen: set[bytes] = set()
  for index, split in enumerate(SPLITS):
    writer, wanted = writers[split], options[f"num_{split}"]
    rng = make_generator(seed, index)
    fruitless = 0
    for batch in generator.sample(rng, **window):
      batch = _unseen(batch, seen, wanted - writer.num_examples)
      fruitless = 0 if len(batch.lengths) else fruitless + 1
      if fruitless > _PATIENCE:
        raise ValueError(
          f"{', '.join(f'{k}={v}' for k, v in window.items())} must leave "
          f"room for {total} different sequences, found {len(seen)}."
        )
      tokens, lengths = batch.tokens, batch.lengths
      if tokenizer == "no_close":
        tokens, lengths = _drop_brackets(batch)
      writer.append(tokens, lengths, batch.values)
      progress(len(seen), total)
      if writer.num_examples == wanted:
        break


def _unseen(batch: Expressions, seen: set[bytes], limit: int) -> Expressions:
  """Returns the first `limit` sequences not in `seen`; adds them to it.

  Sequences that differ only in closing brackets count as equal, so that both
  tokenisers give the same expressions and neither repeats one.
  """
  tokens, lengths = _drop_brackets(batch)
  contents = memoryview(tokens.tobytes())
  fresh = np.zeros(len(lengths), bool)
  end = 0
  for i, length in enumerate(lengths.tolist()):
    start, end = end, end + length
    digest = hashlib.blake2b(contents[start:end], digest_size=16).digest()
    if digest not in seen and limit:
      seen.add(digest)
      fresh[i] = True
      limit -= 1
  return Expressions(
    batch.tokens[np.repeat(fresh, batch.lengths)],
    batch.lengths[fresh],
    batch.values[fresh],
  )


def _drop_brackets(batch: Expressions) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens and lengths without the closing brackets."""
  keep = batch.tokens != CLOSE
  kept = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])
  ends = np.cumsum(batch.lengths)
  return batch.tokens[keep], np.diff(kept[ends], prepend=0)
