"""Texts as their longer words, each hashed to an id: nothing is fitted.

Long Range Arena's code for texts offers words and subwords beside bytes. Here
no vocabulary is kept: an id is a checksum of the word. Some words share an id,
more of them the smaller the vocabulary.
"""

import itertools
import re
import zlib

import numpy as np

VOCAB_SIZE = 8192

# Any byte from 128 on counts as a letter: in UTF-8 and in the 8-bit encodings
# of mails it is a letter or a part of one more often than not.
# Shorter words stand in every text and tell little about it.
_WORD = re.compile(rb"[a-z0-9\x80-\xff]{5,}")


def hash_words(
  text: bytes, max_len: int, vocab_size: int = VOCAB_SIZE
) -> np.ndarray:
  """The ids of the first words of a text.

  They go from 1 to ``vocab_size - 1``, since 0 is the padding. A word is a run
  of five letters and digits or more, the rest is left out; ASCII letters become
  small. A text without any is one empty word, since no sequence may be empty.

  Args:
    text: in any encoding that has ASCII in it.
    max_len: how many words are read.
    vocab_size: at least 2, at most 65,536.

  Returns:
    ``[T]`` uint16, T from 1 to `max_len`.

  Raises:
    ValueError: if `vocab_size` is out of range.

  Example:
    >>> hash_words(b"Never say never: 12345!", max_len=3).tolist()
    [4932, 4932, 6649]
  """
  if not 2 <= vocab_size <= 2**16:
    raise ValueError(
      f"vocab_size must be an integer from 2 to 65536, got {vocab_size!r}."
    )
  found = _WORD.finditer(text.lower())
  words = [word[0] for word in itertools.islice(found, max_len)] or [b""]
  # Python's own hash() changes with every process.
  ids = [1 + zlib.crc32(word) % (vocab_size - 1) for word in words]
  return np.array(ids, np.uint16)
