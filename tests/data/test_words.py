"""Texts to ids of words."""

import zlib

import numpy as np
import pytest

from spectraformer_jax.data.words import VOCAB_SIZE, hash_words


def test_ids_are_those_of_stored_data_and_checkpoints():
  # Written down: another hash, other words or another vocabulary would read
  # stored data and trained embeddings as noise, without an error.
  ids = hash_words(
    b"The answers, 42000: don't PANIC.\r\n\xe9t\xe9s\xe9 A_b", 100
  )
  assert ids.tolist() == IDS
  assert ids.dtype == np.uint16
  assert VOCAB_SIZE == 8192


IDS = [3233, 1390, 5878, 326]


@pytest.mark.parametrize("vocab_size", [2, 3, 300, 2**16])
def test_ids_fill_the_vocabulary_but_for_the_padding(vocab_size):
  text = b" ".join(b"word%d" % i for i in range(3000))
  ids = hash_words(text, 3000, vocab_size)
  assert len(ids) == 3000
  assert ids.min() >= 1 and ids.max() < vocab_size
  seen, room = len(np.unique(ids)), vocab_size - 1
  # Balls into bins: as many as of an even hash, within 5 %.
  assert seen == pytest.approx(room * -np.expm1(-3000 / room), rel=0.05)


def test_what_a_word_is():
  same = [
    b"Seven a eight-THREE",
    b"  seven\neight,three. ",
    b"(SEVEN)eight_three",
  ]
  first, *others = (hash_words(text, 10).tolist() for text in same)
  assert len(first) == 3 and others == [first, first]
  ids = hash_words("Stra\u00dfe stra\u00dfe".encode(), 10)
  assert len(ids) == 2 and ids[0] == ids[1]
  assert hash_words(b"1234a 5678", 10).tolist() == [
    1 + zlib.crc32(b"1234a") % (VOCAB_SIZE - 1)
  ]


def test_a_text_is_cut_and_never_empty():
  text = b"first second third fourth"
  whole = hash_words(text, 10).tolist()
  assert len(whole) == 4
  assert hash_words(text, 2).tolist() == whole[:2]
  assert hash_words(b"", 10).tolist() == hash_words(b"?! ...", 10).tolist()
  assert len(hash_words(b"--", 10)) == 1


@pytest.mark.parametrize("vocab_size", [1, 0, -5, 2**16 + 1])
def test_a_vocabulary_that_has_no_room(vocab_size):
  message = f"vocab_size must be an integer from 2 to 65536, got {vocab_size}"
  with pytest.raises(ValueError, match=message):
    hash_words(b"a", 10, vocab_size)
