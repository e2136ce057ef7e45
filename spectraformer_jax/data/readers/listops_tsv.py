"""Reads and writes the ListOps files of Long Range Arena.

``listops-1000/basic_{train,val,test}.tsv``: a header ``Source<TAB>Target``,
then one expression and its value per line, in any form that
:func:`listops_text.encode` accepts; :func:`export` writes the form of the
release. Files are read and written line by line, since the training file has
about 0.6 GB.
"""

import os
import pathlib
import secrets
from collections.abc import Iterator

from spectraformer_jax.data import find
from spectraformer_jax.data.dataset import Dataset
from spectraformer_jax.data.formats.listops_text import (
  check_complete,
  decode,
  encode,
)
from spectraformer_jax.data.readers import reader

NAMES = {"train": "train", "dev": "val", "test": "test"}
SIZES = {"train": 96_000, "dev": 2_000, "test": 2_000}

_HEADER = [b"Source", b"Target"]


@reader.reads("listops", files="listops-1000/basic_{train,val,test}.tsv")
def find_listops(root: pathlib.Path) -> reader.TaskFiles | None:
  """Finds the folder of the three files."""
  folder = find.folder_with(root, "basic_train.tsv")
  if folder is None:
    return None
  paths = {s: folder / f"basic_{name}.tsv" for s, name in NAMES.items()}
  find.check_present(folder, paths.values())
  return reader.TaskFiles(
    folder=folder,
    layout="ListOps TSV",
    parts=SIZES,
    examples=lambda split: read_examples(paths[split]),
    checksum=find.checksum(paths.values(), folder),
  )


def read_examples(path: pathlib.Path) -> Iterator[reader.Example]:
  """Yields the ids and the value of each expression.

  Incomplete expressions are refused. The values are those of the file; only the
  command ``check`` computes some to compare them.

  Raises:
    ValueError: at the first malformed line, with its number.
  """
  number = 0
  for number, line in find.read_lines(path):
    where = f"{path} line {number}"
    columns = line.split(b"\t")
    if number == 1:
      if columns != _HEADER:
        shown = line[:40].decode("utf-8", "replace")
        raise ValueError(
          f"{where}: expected the header 'Source<TAB>Target', got {shown!r}."
        )
      continue
    if len(columns) != 2:
      raise ValueError(
        f"{where}: expected an expression, a tab and its value, got "
        f"{len(columns)} columns."
      )
    label = reader.check_label(columns[1], 10, where)
    try:
      tokens = encode(columns[0].decode("utf-8", "replace"))
      check_complete(tokens)
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from None
    yield reader.Example(tokens, label)
  if number < 2:
    raise ValueError(
      f"{path} must hold the header 'Source<TAB>Target' and expressions, it "
      f"has {number} lines: a split of no examples."
    )


def export(dataset: Dataset, folder: str | os.PathLike) -> pathlib.Path:
  r"""Writes a split of ListOps as the corresponding file of the release.

  Args:
    dataset: the split; its tokeniser must be ``"full"``, since the form needs
      closing brackets.
    folder: created if it does not exist; an existing file is replaced when the
      new one is complete.

  Returns:
    The path of the file.

  Raises:
    ValueError: if the dataset has another tokeniser.

  Example:
    >>> import tempfile
    >>> toy = Dataset.from_sequences(
    ...   [[12, 3, 4, 15]], [3], split="dev", name="toy", vocab_size=32,
    ...   num_classes=10, length=4, tokenizer="full")
    >>> path = export(toy, tempfile.mkdtemp())
    >>> path.name, path.read_text().splitlines()[1]
    ('basic_val.tsv', '( ( ( [MAX 2 ) 3 ) ] )\t3')
  """
  if dataset.tokenizer != "full":
    raise ValueError(
      "dataset must have tokenizer='full', whose ids can be written as "
      f"expressions, got {dataset.tokenizer!r} of {dataset.name!r}."
    )
  path = pathlib.Path(folder) / f"basic_{NAMES[dataset.split]}.tsv"
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
  try:
    with open(unfinished, "w", encoding="ascii", newline="\n") as file:
      file.write("Source\tTarget\n")
      for index in range(len(dataset)):
        example = dataset[index]
        text = decode(example["tokens"].tolist(), "lra")
        file.write(f"{text}\t{example['label']}\n")
    unfinished.replace(path)
  finally:
    unfinished.unlink(missing_ok=True)
  return path
