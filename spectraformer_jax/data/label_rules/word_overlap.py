"""Provides a simple rule for pairs of texts: the share of words in common."""

import re

import numpy as np

from spectraformer_jax.data.dataset import Dataset

OVERLAP = "share of words in common"

_WORD = re.compile(rb"[a-z]{5,}")
_STEPS = 25


def overlap_rule(dataset: Dataset) -> np.ndarray:
  """Groups pairs of texts by their share of words in common, in steps of 4 %.

  A word has five letters or more; if the tokens are hashed words, each id is a
  word. The share is relative to the text with fewer words.
  """
  hashed = dataset.tokenizer == "words"
  groups = []
  for i in range(len(dataset)):
    one, two = (
      _words(tokens[offsets[i] : offsets[i + 1]], hashed)
      for _, tokens, offsets in dataset.sequences()
    )
    fewer = max(1, min(len(one), len(two)))
    groups.append(_STEPS * len(one & two) // fewer)
  return np.array(groups, np.int64)


def _words(tokens: np.ndarray, hashed: bool) -> set:
  """Returns the set of words of a text."""
  if hashed:
    return set(tokens.tolist())
  return set(_WORD.findall(tokens.tobytes().lower()))
