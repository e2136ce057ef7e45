"""ListOps of Long Range Arena as its files have it.

``listops-1000/basic_{train,val,test}.tsv``: a header ``Source<TAB>Target``,
then one expression and its value per line, in any form that
:func:`listops_text.encode` takes. Read line by line: the training file has
about 0.6 GB.
"""

import pathlib
from collections.abc import Iterator

from spectraformer_jax.data.find import checksum, innermost, read_lines
from spectraformer_jax.data.listops_text import encode
from spectraformer_jax.data.readers import Found, Row, check_label, reads

NAMES = {"train": "train", "dev": "val", "test": "test"}
ROWS = {"train": 96_000, "dev": 2_000, "test": 2_000}

_HEADER = [b"Source", b"Target"]


@reads("listops", files="listops-1000/basic_{train,val,test}.tsv")
def find_listops(root: pathlib.Path) -> Found | None:
  """The folder of the three files."""
  folder = innermost(root, lambda f: (f / "basic_train.tsv").is_file())
  if folder is None:
    return None
  paths = {s: folder / f"basic_{name}.tsv" for s, name in NAMES.items()}
  for path in paths.values():
    if not path.is_file():
      raise ValueError(f"{folder} must hold {path.name}, which is missing.")
  return Found(
    folder=folder,
    what="ListOps TSV",
    parts=ROWS,
    rows=lambda split: rows(paths[split]),
    checksum=checksum(paths.values(), folder),
  )


def rows(path: pathlib.Path) -> Iterator[Row]:
  """The ids and the value of each expression.

  Raises:
    ValueError: at the first line that is not as it should be, with its number.
  """
  for number, line in read_lines(path):
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
    label = check_label(columns[1], 10, where)
    try:
      tokens = encode(columns[0].decode("utf-8", "replace"))
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from None
    yield Row(tokens, label)
