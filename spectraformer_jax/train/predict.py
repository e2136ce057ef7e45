"""The command `predict`: classifies texts or token ids with a trained model."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax import commands
from spectraformer_jax.data.formats.listops_text import CLOSE, encode
from spectraformer_jax.data.words import hash_words
from spectraformer_jax.nn import Classifier, DualClassifier, load_pretrained
from spectraformer_jax.nn.pretrained import damaged, one_line
from spectraformer_jax.train.run import run_folder, strict_json
from spectraformer_jax.typing import Array

# The ids of each input: one sequence, or two for a task of pairs.
Inputs = list[tuple[np.ndarray, ...]]


def predict(
  workdir: Path | str,
  inputs: Inputs,
  *,
  step: int | str = "best",
  batch_size: int = 32,
) -> Iterator[np.ndarray]:
  """Computes the probabilities of the classes for each input.

  Args:
    workdir: of the run.
    inputs: as `read_text` or `read_npz` returns them.
    step: "best" (by dev accuracy), "last", or the number of a checkpoint.
    batch_size: number of inputs that go through the model together.

  Yields:
    ``[classes]`` float32 for each input, in order.

  Raises:
    ValueError: the folder holds no run or no such checkpoint, the checkpoint is
      damaged, or the model is no classifier.
  """
  model, variables = load_pretrained(workdir, step=step)
  if not isinstance(model, Classifier | DualClassifier):
    raise ValueError(
      f"{str(workdir)!r} holds a {type(model).__name__}, which knows no "
      "classes; finetune it (docs/training.md)."
    )
  width = max(len(ids) for sequences in inputs for ids in sequences)

  @jax.jit
  def probabilities(*args: Array) -> Array:
    return jax.nn.softmax(jnp.asarray(model.apply(variables, *args)))

  for first in range(0, len(inputs), batch_size):
    rows = inputs[first : first + batch_size]
    # Copies of its first row fill up the last batch, so that all batches have
    # one shape and the model is compiled once.
    full = rows + rows[:1] * (batch_size - len(rows))
    args = [
      array for part in zip(*full, strict=True) for array in _pad(part, width)
    ]
    yield from np.asarray(probabilities(*args))[: len(rows)]


def _pad(
  sequences: Sequence[np.ndarray], width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pads with 0; returns ids ``[B, width]`` and lengths ``[B]``."""
  tokens = np.zeros((len(sequences), width), np.int32)
  for row, ids in zip(tokens, sequences, strict=True):
    row[: len(ids)] = ids
  return tokens, np.array([len(ids) for ids in sequences], np.int32)


def read_text(lines: Iterable[str], facts: dict[str, Any]) -> Inputs:
  """Reads inputs from lines of text; a pair is two texts with a tab between.

  For the tokenizers "bytes" and "words", a text is cut to the task's length, as
  the task cuts its own texts. An expression of ListOps is written as in the
  files of ListOps. For all other tasks a line holds the ids that the model
  reads, separated by spaces.

  Args:
    lines: with or without newlines.
    facts: of the data, from config.json: tokenizer, id_shift, length, pair,
      vocab_size.

  Raises:
    ValueError: names the line that cannot be read.

  Example:
    >>> facts = {"tokenizer": "bytes", "id_shift": 1, "length": 4,
    ...   "pair": False, "vocab_size": 257}
    >>> read_text(["hello"], facts)[0][0].tolist()
    [105, 102, 109, 109]
  """
  num_texts = 2 if facts["pair"] else 1
  inputs = []
  for number, line in enumerate(lines, 1):
    if number == 1:  # a byte order mark is not part of the text
      line = line.removeprefix("\ufeff")
    texts = (
      line.rstrip("\r\n").split("\t") if num_texts == 2 else [line.strip()]
    )
    try:
      _check_utf8(line)
      if len(texts) != num_texts:
        raise ValueError(
          f"a pair is two texts with a tab between, got {len(texts)}."
        )
      sequences = tuple(_encode(text, facts) for text in texts)
      for ids in sequences:
        _check_ids(ids, facts)
    except ValueError as error:
      raise ValueError(f"Line {number}: {error}") from error
    inputs.append(sequences)
  return inputs


def _check_utf8(line: str) -> None:
  """Refuses a line with bytes that are not UTF-8.

  Such bytes were read as surrogates, which cannot be encoded.
  """
  try:
    line.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"it is not UTF-8, from character {error.start + 1} on."
    ) from None


def _encode(text: str, facts: dict[str, Any]) -> np.ndarray:
  """Returns the ids of one text, by the task's tokeniser."""
  tokenizer = facts["tokenizer"]
  if tokenizer == "bytes":
    raw = np.frombuffer(text.encode()[: facts["length"]], np.uint8)
    return raw.astype(np.int64) + facts["id_shift"]
  if tokenizer == "words":
    ids = hash_words(text.encode(), facts["length"], facts["vocab_size"])
    return ids.astype(np.int64)
  if tokenizer in ("full", "no_close"):  # of ListOps
    ids = encode(text)
    return ids[ids != CLOSE] if tokenizer == "no_close" else ids
  words = text.split()
  # int() alone would accept other texts too, such as "1_0".
  wrong = [word for word in words if not re.fullmatch(r"-?[0-9]+", word)]
  if wrong:
    raise ValueError(
      f"tokenizer {tokenizer!r} has no text; write ids with spaces between, "
      f"got {wrong[0][:40]!r}."
    )
  # A number of 19 digits may not fit into an int64.
  longest = max(words, key=len, default="")
  if len(longest) > 18:
    raise ValueError(
      f"ids must lie in [0, {facts['vocab_size']}), got {longest[:40]}."
    )
  return np.array([int(word) for word in words], np.int64)


def read_npz(path: Path | str, facts: dict[str, Any]) -> Inputs:
  """Reads inputs from arrays of ids.

  Args:
    path: a file of `numpy.savez`: tokens [n, T] ints, and length [n] ints if
      rows are shorter than T; for pairs also tokens_2 and length_2. A batch of
      `data.Batches` has this form.
    facts: as for `read_text`.

  Raises:
    ValueError: names the array or the row that is wrong.
  """
  try:
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
      raise ValueError("it is a single array, an .npy")
    with file:
      arrays = dict(file)
  except OSError:
    raise
  except Exception as error:  # zipfile, zlib and others raise many kinds
    raise ValueError(
      f"{str(path)!r} is no .npz of arrays: {one_line(error)}"
    ) from error
  first = _sequences(arrays, "")
  parts = [first, _sequences(arrays, "_2")] if facts["pair"] else [first]
  if len({len(part) for part in parts}) != 1:
    raise ValueError(
      f"tokens and tokens_2 must have as many rows, got {len(parts[0])} and "
      f"{len(parts[1])}."
    )
  inputs = list(zip(*parts, strict=True))
  for number, sequences in enumerate(inputs):
    for ids in sequences:
      try:
        _check_ids(ids, facts)
      except ValueError as error:
        raise ValueError(f"Row {number}: {error}") from error
  return inputs


def _sequences(
  arrays: Mapping[str, np.ndarray], suffix: str
) -> list[np.ndarray]:
  """Returns the rows of the tokens, each cut to its length."""
  tokens = arrays.get(f"tokens{suffix}")
  if tokens is None or tokens.ndim != 2 or tokens.dtype.kind not in "iu":
    got = "none" if tokens is None else f"{tokens.dtype}{tokens.shape}"
    raise ValueError(f"tokens{suffix} must be ints [n, T], got {got}.")
  rows, width = tokens.shape
  name = f"length{suffix}"
  lengths = arrays.get(name, np.full(rows, width))
  if lengths.shape != (rows,) or lengths.dtype.kind not in "iu":
    raise ValueError(
      f"{name} must be ints [{rows}], got {lengths.dtype}{lengths.shape}."
    )
  if rows and not 0 <= lengths.min() <= lengths.max() <= width:
    raise ValueError(
      f"{name} must lie in [0, {width}], got {lengths.min()} to "
      f"{lengths.max()}."
    )
  return [ids[:length] for ids, length in zip(tokens, lengths, strict=True)]


def _check_ids(ids: np.ndarray, facts: dict[str, Any]) -> None:
  """Refuses ids that the model cannot read."""
  if not 1 <= len(ids) <= facts["length"]:
    raise ValueError(
      f"an input must have 1 to {facts['length']} tokens, got {len(ids)}."
    )
  if ids.min() < 0 or ids.max() >= facts["vocab_size"]:
    raise ValueError(
      f"ids must lie in [0, {facts['vocab_size']}), got {ids.min()} to "
      f"{ids.max()}."
    )


def main(argv: Sequence[str]) -> None:
  """Prints for each input a line: its label and probabilities, as JSON."""
  parser = commands.Parser(
    "spectraformer_jax.train predict",
    "Prints the label and the probabilities of all labels for each input, as\n"
    "a JSON object a line. Inputs are lines of text (two with a tab between\n"
    "for a task of pairs), of ids with spaces between for a task without\n"
    "text, or an .npz with tokens [n, T] and length [n].",
  )
  parser.add_argument(
    "input", nargs="?", default="-", help="a file, or - for standard input"
  )
  parser.add_argument("--workdir", required=True)
  parser.add_argument(
    "--step", default="best", help="best (by dev accuracy), last, or a number"
  )
  parser.add_argument("--batch_size", type=int, default=32)
  args = parser.parse_args(argv)
  if args.batch_size < 1:
    raise ValueError(f"--batch_size must be positive, got {args.batch_size}.")
  facts = _read_facts(Path(args.workdir))
  name = "standard input" if args.input == "-" else args.input
  try:
    if args.input.endswith(".npz"):
      inputs = read_npz(args.input, facts)
    elif args.input == "-":
      inputs = read_text(sys.stdin, facts)
    else:
      path = Path(args.input)
      # `read_text` reports bytes that are not UTF-8, with their line.
      with path.open(encoding="utf-8", errors="surrogateescape") as file:
        inputs = read_text(file, facts)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error
  if not inputs:
    raise ValueError(f"{name} holds no input.")
  for row in predict(
    args.workdir, inputs, step=args.step, batch_size=args.batch_size
  ):
    prediction = {
      "label": int(row.argmax()),
      "probabilities": [round(float(p), 6) for p in row],
    }
    print(strict_json.dumps(prediction))


def _read_facts(workdir: Path) -> dict[str, Any]:
  """Reads the facts about the data from config.json.

  Raises:
    ValueError: the folder holds no run, or the file is damaged.
  """
  facts = run_folder.stored_run(workdir)["data"].get("train", {})
  names = ("tokenizer", "id_shift", "length", "pair", "vocab_size")
  missing = [name for name in names if name not in facts]
  if missing:
    raise damaged(workdir, f"its data.train has no {missing[0]!r}")
  return facts
