"""The simplest rule for pairs of texts: how many words they share."""

import re

import numpy as np

from spectraformer_jax.data.dataset import Dataset

OVERLAP = "share of words in common"

_WORD = re.compile(rb"[a-z]{5,}")
_STEPS = 25


def overlap_rule(dataset: Dataset) -> np.ndarray:
  """Sorts pairs of texts by their words in common, in steps of 4 %.

  A word is five letters or more; the share is of the text with fewer words.
  """
  columns = (
    (dataset.tokens, dataset.offsets.tolist()),
    (dataset.tokens_2, dataset.offsets_2.tolist()),
  )
  groups = []
  for i in range(len(dataset)):
    pair = (tokens[o[i] : o[i + 1]].tobytes() for tokens, o in columns)
    groups.append(_group(*pair))
  return np.array(groups, np.int64)


def _group(first: bytes, second: bytes) -> int:
  """The step that the share of two texts is on."""
  one, two = (set(_WORD.findall(text.lower())) for text in (first, second))
  return _STEPS * len(one & two) // max(1, min(len(one), len(two)))
