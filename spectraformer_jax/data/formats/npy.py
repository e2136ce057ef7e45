"""Opens ``.npy`` files that may be damaged or hostile."""

import pathlib

import numpy as np

from spectraformer_jax.data.find import first_line, open_plain


def open_array(path: pathlib.Path, what: str = "array") -> np.ndarray:
  """Memory-maps the array in a file.

  A header that announces more than the file holds does not cost memory. Pickled
  objects are refused.

  Args:
    path: path of the file.
    what: name of the expected content, for messages.

  Raises:
    ValueError: if the file does not hold an array of plain numbers or texts.

  Example:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "x.npy"
    >>> np.save(path, [1, 2])
    >>> open_array(path).tolist()
    [1, 2]
  """
  open_plain(path).close()
  try:
    return np.load(path, mmap_mode="r", allow_pickle=False)
  # numpy evaluates the header; a damaged one raises nearly anything.
  except Exception as error:
    if isinstance(error, PermissionError):
      raise
    raise ValueError(f"{path} is no {what} ({first_line(error)}).") from None
