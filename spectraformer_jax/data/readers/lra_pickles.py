"""Reads pickles from the code of Spectraformer, Skyformer and Nystromformer.

The files are ``lra-<task>.{train,dev,test}.pickle``, without ``lra-`` in
Nystromformer. Each holds a list of dicts of ``input_ids_0``, perhaps
``input_ids_1`` (read for pairs only), and ``label``; ids are padded with 0.
Nothing in a file is run, see :mod:`pickles`; a file is held in memory as a
whole.

Ids of bytes and pixels mean the same as in this package. Those of ListOps come
from the order of a Python set, so they differ from file to file and cannot be
decoded, and the code that makes the files drops the brackets. The splits are
those of the files: dev of Text is the test set, and dev of Pathfinder is a new
random draw in every run of that code.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from spectraformer_jax.data.find import checksum, folder_with
from spectraformer_jax.data.formats import pickles
from spectraformer_jax.data.readers import reader

SPLITS = ("train", "dev", "test")
MAX_IDS = 2**20  # in one sequence
MAX_BYTES = 2**34  # the training pairs of retrieval take 4.7 GB
CONTOUR = "curv_contour_length_14"


class _Form(NamedTuple):
  """Describes file names and content of a task's pickles."""

  names: tuple[str, ...]
  counts: tuple[int, int, int]  # examples of each split
  num_classes: int = 2
  lowest: int = 0  # id in the files of what is stored as token 0
  highest: int = 255  # largest id in the files
  pixels: int = 0  # of an image; 0 if the task has no images


_BYTES = {"lowest": 1, "highest": 256}
_PATHS = (160_000, 20_000, 20_000)

_FORMS = {
  "listops": _Form(
    ("listops",), (96_000, 2_000, 2_000), num_classes=10, highest=31
  ),
  "text": _Form(("text",), (25_000, 25_000, 25_000), **_BYTES),
  "retrieval": _Form(("retrieval",), (147_086, 18_090, 17_437), **_BYTES),
  "image": _Form(
    ("image",), (45_000, 5_000, 10_000), num_classes=10, pixels=32**2
  ),
  "pathfinder": _Form(
    (f"pathfinder32-{CONTOUR}", "pathfinder"), _PATHS, pixels=32**2
  ),
  "pathx": _Form((f"pathfinder128-{CONTOUR}",), _PATHS, pixels=128**2),
}


def _find(root: pathlib.Path, task: str) -> reader.TaskFiles | None:
  """Finds the pickles of a task."""
  form = _FORMS[task]
  stems = [prefix + name for name in form.names for prefix in ("lra-", "")]
  for stem in stems:
    files = [f"{stem}.{split}.pickle" for split in SPLITS]
    folder = folder_with(root, *files)
    if folder is not None:
      break
  else:
    return None
  for name in files:
    if not (folder / name).is_file():
      hint = (
        "; the script that writes it repeats the images without end, take the "
        "CIFAR-10 batches instead"
        if task == "image"
        else ""
      )
      raise ValueError(f"{folder} must hold {name}, which is missing{hint}.")
  return reader.TaskFiles(
    folder=folder,
    layout=f"pickles {stem}",
    parts=dict(zip(SPLITS, form.counts, strict=True)),
    examples=lambda split: read_examples(
      folder / f"{stem}.{split}.pickle", task
    ),
    checksum=checksum([folder / name for name in files], folder),
    mark="-pickled",
    tokenizer="pickled_ids" if task == "listops" else None,
  )


for _task, _form in _FORMS.items():
  reader.reads(
    _task, files=f"[lra-]{_form.names[0]}.{{train,dev,test}}.pickle"
  )(functools.partial(_find, task=_task))


def read_examples(path: pathlib.Path, task: str) -> Iterator[reader.Example]:
  """Yields the examples in a file.

  Raises:
    ValueError: if the file is damaged, needs more than plain values, or holds
      a malformed example.
  """
  form = _FORMS[task]
  examples = pickles.load(path, MAX_BYTES)
  if not isinstance(examples, list):
    raise ValueError(f"{path} must hold a list, got {type(examples).__name__}.")
  for number, example in enumerate(examples):
    where = f"{path} example {number}"
    if not isinstance(example, dict) or "label" not in example:
      raise ValueError(
        f"{where}: expected a dict with input_ids_0 and label, got "
        f"{type(example).__name__}."
      )
    sequences = [
      _tokens(example.get(name), f"{where}: {name}", form)
      for name in ("input_ids_0", "input_ids_1")
      if name == "input_ids_0" or task == "retrieval"
    ]
    label = reader.check_label(example["label"], form.num_classes, where)
    yield reader.Example(sequences[0], label, *sequences[1:])


def _tokens(ids: Any, where: str, form: _Form) -> np.ndarray:
  """Returns the stored tokens of a sequence: unpadded and counted from 0."""
  if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
    raise ValueError(f"{where} must be an array of integers.")
  if ids.size > MAX_IDS:
    raise ValueError(
      f"{where} must hold at most {MAX_IDS} ids, got {ids.size}."
    )
  ids = ids.ravel()
  if not form.pixels:
    ids = np.trim_zeros(ids, "b")  # not in images, where 0 is black
  elif len(ids) != form.pixels:
    raise ValueError(f"{where} must hold {form.pixels} pixels, got {len(ids)}.")
  if not len(ids) or ids.min() < form.lowest or ids.max() > form.highest:
    raise ValueError(
      f"{where} must hold ids from {form.lowest} to {form.highest}, got "
      f"{f'{ids.min()} to {ids.max()}' if len(ids) else 'none'}."
    )
  return (ids - form.lowest).astype(np.uint8)
