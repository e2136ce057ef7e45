"""Reads folders that TensorFlow Datasets has prepared, without TensorFlow.

The folders are ``imdb_reviews`` for Text, ``cifar10`` for Image, Long Range
Arena's own ``pathfinder32`` and ``pathfinder128``, and ``lra_listops`` of
:mod:`tfds_builders`. They must be in the array_record format: without
TensorFlow nothing reads TFRecord files, the default of TensorFlow Datasets.

Long Range Arena's validation set of CIFAR-10 is the last tenth of the training
images in the order of this folder: no other form of the files gives this split.
Of Pathfinder, Long Range Arena uses the hard images, 80 : 10 : 10 % in order.
"""

import functools
import importlib.util
import io
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from spectraformer_jax.data import find
from spectraformer_jax.data.formats.grayscale import rgb_to_gray
from spectraformer_jax.data.readers import reader

FORMAT = "array_record"
INFO = "dataset_info.json"
FEATURES = "features.json"

_MAX_DESCRIPTION = 2**20  # bytes of a file beside the records
_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.[A-Za-z_.]+")

_PREPARE_AGAIN = (
  'with TensorFlow installed, `python -c "import tensorflow_datasets as tfds; '
  "tfds.builder('{name}', data_dir='{folder}/array_record', "
  "file_format='array_record').download_and_prepare()\"` prepares it again"
)
_USE_PNG_FILES = "point data_dir at the PNG files of lra_release instead"
_WRITE_HERE = (
  "LraListops of spectraformer_jax.data.tfds_builders writes array_record"
)


class _Form(NamedTuple):
  """Describes the TensorFlow Datasets form of a task."""

  name: str
  field: str  # feature that holds the tokens
  # By part: slice of the data set's splits, and expected number of examples.
  parts: Mapping[str, tuple[str, int]]
  advice: str  # for folders in another format
  num_classes: int = 2
  mark: str = ""
  side: int = 0  # of an image, in pixels; 0 for other content


_REVIEWS = {"train": ("train", 25_000), "test": ("test", 25_000)}
_PHOTOS = {
  "train": ("train[:90%]", 45_000),
  "dev": ("train[90%:]", 5_000),
  "test": ("test", 10_000),
}
_PATHS = {
  "train": ("hard[:80%]", 160_000),
  "dev": ("hard[80%:90%]", 20_000),
  "test": ("hard[90%:]", 20_000),
}
_EXPRESSIONS = {
  "train": ("train", 96_000),
  "dev": ("dev", 2_000),
  "test": ("test", 2_000),
}

_FORMS = {
  "text": _Form("imdb_reviews", "text", _REVIEWS, _PREPARE_AGAIN),
  "image": _Form(
    "cifar10", "image", _PHOTOS, _PREPARE_AGAIN, num_classes=10, side=32
  ),
  "pathfinder": _Form("pathfinder32", "image", _PATHS, _USE_PNG_FILES, side=32),
  "pathx": _Form("pathfinder128", "image", _PATHS, _USE_PNG_FILES, side=128),
  "listops": _Form(
    "lra_listops",
    "tokens",
    _EXPRESSIONS,
    _WRITE_HERE,
    num_classes=10,
    mark="-drawn",
  ),
}


def _find(root: pathlib.Path, form: _Form) -> reader.TaskFiles | None:
  """Finds the folder of one version of the data set."""
  infos: dict[pathlib.Path, dict[str, Any]] = {}

  def is_prepared(folder: pathlib.Path) -> bool:
    if folder not in infos:
      infos[folder] = _read_info(folder)
    return infos[folder].get("name") == form.name

  ready = find.innermost(
    root, lambda f: is_prepared(f) and infos[f].get("fileFormat") == FORMAT
  )
  if ready is None:
    other = find.innermost(root, is_prepared)
    if other is not None:
      found = str(infos[other].get("fileFormat", "tfrecord"))[:20]
      advice = form.advice.format(name=form.name, folder=root)
      raise ValueError(
        f"{other} must be in the format {FORMAT}, which is read without "
        f"TensorFlow, found {found}; {advice}."
      )
    return None
  version = str(infos[ready].get("version", ""))[:20]
  files = sorted(ready.iterdir())
  for path in files:
    _check_file(path)
  _check_features(ready)
  return reader.TaskFiles(
    folder=ready,
    layout=f"TFDS {form.name} {version}".strip(),
    parts={part: size for part, (_, size) in form.parts.items()},
    examples=lambda part: _examples(ready, part, form),
    checksum=find.checksum(files, ready),
    provenance="tfds",
    mark=form.mark,
  )


for _task, _form in _FORMS.items():
  reader.reads(_task, files=f"a TFDS folder {_form.name} (array_record)")(
    functools.partial(_find, form=_form)
  )


def _read_info(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the description of a prepared folder; empty for another folder."""
  path = folder / INFO
  if not path.exists():
    return {}
  try:
    return _read_json(path)
  except ValueError as error:
    find.LOGGER.warning("%s; its folder is passed over", error)
    return {}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON object in a file."""
  content = find.read_plain(path, _MAX_DESCRIPTION)
  try:
    value = json.loads(content)
  except (RecursionError, ValueError) as error:
    raise ValueError(f"{path} is no JSON ({find.first_line(error)})") from None
  if not isinstance(value, dict):
    raise ValueError(f"{path} is no JSON object")
  return value


def _check_file(path: pathlib.Path) -> None:
  """Raises ValueError unless a path is a plain file of an allowed size.

  Files beside the records are read into memory, so they must be small.
  """
  with find.open_plain(path):
    size = path.stat().st_size
  if f".{FORMAT}" not in path.name and size > _MAX_DESCRIPTION:
    raise ValueError(
      f"{path} must not be larger than {_MAX_DESCRIPTION} bytes, got {size}; "
      "it is damaged."
    )


def _check_features(folder: pathlib.Path) -> None:
  """Raises ValueError if a description names classes of other modules.

  TensorFlow Datasets imports the classes that a description names.
  """
  path = folder / FEATURES
  waiting: list[Any] = [_read_json(path)]
  while waiting:
    value = waiting.pop()
    if isinstance(value, list):
      waiting += value
    elif isinstance(value, dict):
      waiting += value.values()
      # A missing key passes as the prefix of the allowed names.
      for key in ("pythonClassName", "python_class_name", "type"):
        name = value.get(key, "tensorflow_datasets.core.features.")
        if not isinstance(name, str) or not _CLASS.match(name + "x"):
          raise ValueError(
            f"{path} must name features of TensorFlow Datasets only, got "
            f"{str(name)[:60]!r}."
          )
    # JSON as text could name classes that this loop does not see.
    elif isinstance(value, str) and "{" in value:
      raise ValueError(
        f"{path} must not hold JSON as text, got {value[:60]!r}."
      )


def _examples(
  folder: pathlib.Path, part: str, form: _Form
) -> Iterator[reader.Example]:
  """Yields the examples of a part, in the order of the folder."""
  name, _ = form.parts[part]
  source = _open(folder, name)
  for i in range(len(source)):
    where = f"{folder} {name} example {i}"
    try:
      example = source[i]
    # The packages that read the files raise nearly anything.
    except Exception as error:
      raise ValueError(
        f"{where} is damaged ({find.first_line(error)}); prepare the data "
        "again."
      ) from None
    if form.field not in example or "label" not in example:
      raise ValueError(
        f"{where} must have {form.field} and label, got {sorted(example)}."
      )
    label = reader.check_label(example["label"], form.num_classes, where)
    yield reader.Example(_tokens(example[form.field], where, form), label)


def _open(folder: pathlib.Path, split: str) -> Any:
  """Returns a random-access source of examples."""
  if importlib.util.find_spec("array_record") is None:
    raise ValueError(
      f"{folder} needs the package array_record to be read: pip install "
      "array_record; where there is none for your system, use the raw files."
    )
  # Imported here: it takes a second, and only this reader needs it.
  import tensorflow_datasets as tfds

  try:
    # Any: the stubs of `tfds` know neither `info.features` nor
    # `as_data_source`.
    builder: Any = tfds.builder_from_directory(folder)
    # Pictures stay packed: `_unpack` opens them after a check of their size.
    packed = {
      name: tfds.decode.SkipDecoding()
      for name, feature in builder.info.features.items()
      if isinstance(feature, tfds.features.Image)
    }
    return builder.as_data_source(split=split, decoders=packed)
  # The packages that read the files raise nearly anything.
  except Exception as error:
    raise ValueError(
      f"{folder} is damaged ({find.first_line(error)}); prepare the data again."
    ) from None


def _tokens(content: Any, where: str, form: _Form) -> np.ndarray:
  """Returns the stored tokens of a text, an image or an expression."""
  if isinstance(content, bytes) and form.side:
    content = _unpack(content, where, form.side)
  elif isinstance(content, bytes):
    content = np.frombuffer(content.strip(), np.uint8)
  if not isinstance(content, np.ndarray):
    raise ValueError(
      f"{where}: {form.field} must be text or numbers, got a "
      f"{type(content).__name__}."
    )
  if form.side:
    planes = content.shape[2:]
    square = content.shape[:2] == (form.side, form.side)
    if not square or planes not in ((1,), (3,)):
      raise ValueError(
        f"{where} must be {form.side} x {form.side} pixels, gray or in colour, "
        f"got shape {content.shape}."
      )
    if planes == (3,):
      content = rgb_to_gray(*np.moveaxis(content, 2, 0))
  if not content.size:
    raise ValueError(f"{where} must not be empty.")
  kind = content.dtype.kind
  if kind not in "iu" or content.min() < 0 or content.max() > 255:
    raise ValueError(f"{where} must hold integers from 0 to 255.")
  return content.astype(np.uint8, copy=False).ravel()


def _unpack(content: bytes, where: str, side: int) -> np.ndarray:
  """Returns the pixels of a picture, [side, side, 1] or [side, side, 3]."""
  # Imported here: only building the cache needs Pillow.
  from PIL import Image

  try:
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
      size = image.size
      if size == (side, side):
        pixels = np.asarray(
          image if image.mode == "L" else image.convert("RGB")
        )
        return pixels.reshape(side, side, -1)
  # Pillow raises nearly anything.
  except Exception as error:
    raise ValueError(
      f"{where} is no picture ({find.first_line(error)}); prepare the data "
      "again."
    ) from None
  raise ValueError(
    f"{where} must be {side} x {side} pixels, gray or in colour, got shape "
    f"{size[::-1]}."
  )
