"""The simplest rule for pairs of texts: how many words they share."""

import re

import numpy as np

from spectraformer_jax.data.dataset import Dataset

OVERLAP = "share of words in common"

_WORD = re.compile(rb"[a-z]{5,}")
_STEPS = 25


def overlap_rule(dataset: Dataset) -> np.ndarray:
  """Sorts pairs of texts by their words in common, in steps of 4 %.

  A word is five letters or more, or any id where the tokens are hashed words;
  the share is of the text with fewer words.
  """
  hashed = dataset.tokenizer == "words"
  columns = (
    (dataset.tokens, dataset.offsets.tolist()),
    (dataset.tokens_2, dataset.offsets_2.tolist()),
  )
  groups = []
  for i in range(len(dataset)):
    pair = (tokens[o[i] : o[i + 1]] for tokens, o in columns)
    groups.append(_group(*(_words(tokens, hashed) for tokens in pair)))
  return np.array(groups, np.int64)


def _words(tokens: np.ndarray, hashed: bool) -> set:
  """The words of a text, each once."""
  if hashed:
    return set(tokens.tolist())
  return set(_WORD.findall(tokens.tobytes().lower()))


def _group(one: set, two: set) -> int:
  """The step that the share of two texts is on."""
  return _STEPS * len(one & two) // max(1, min(len(one), len(two)))
