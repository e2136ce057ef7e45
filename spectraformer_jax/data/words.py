"""Encodes texts as their longer words, each hashed to an id.

Needs no vocabulary: an id is a checksum of the word. Some words share an id;
with more ids, fewer words do.
"""

import itertools
import re
import zlib

import numpy as np

from spectraformer_jax.registry import check_int

VOCAB_SIZE = 8192

# Any byte from 128 on counts as a letter: in UTF-8 and in the 8-bit encodings
# of mails it mostly is a letter or a part of one. Words of fewer than five
# letters are left out, since they occur in every text.
_WORD = re.compile(rb"[a-z0-9\x80-\xff]{5,}")


def hash_words(
  text: bytes, max_len: int, vocab_size: int = VOCAB_SIZE
) -> np.ndarray:
  """Returns the ids of the first words of a text.

  Ids lie in ``[1, vocab_size)``, since 0 is the padding. A word is a run of
  five or more letters and digits, with ASCII letters in lower case; everything
  else is left out. A text without words counts as one empty word, since a
  sequence must not be empty.

  Args:
    text: the text, in any encoding that extends ASCII.
    max_len: largest number of words.
    vocab_size: number of ids, including the padding's; 2 to 65,536.

  Returns:
    ``[T]`` uint16, T from 1 to `max_len`.

  Raises:
    ValueError: if `vocab_size` is out of range.

  Example:
    >>> hash_words(b"Never say never: 12345!", max_len=3).tolist()
    [4932, 4932, 6649]
  """
  check_int("vocab_size", vocab_size, 2, 2**16)
  found = _WORD.finditer(text.lower())
  words = [word[0] for word in itertools.islice(found, max_len)] or [b""]
  # Python's own hash() changes with every process.
  ids = [1 + zlib.crc32(word) % (vocab_size - 1) for word in words]
  return np.array(ids, np.uint16)
