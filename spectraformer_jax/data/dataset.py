"""Holds one split of one task: flat tokens, offsets of the examples, labels."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spectraformer_jax.registry import check_choice, check_int

PROVENANCES = ("lra-files", "tfds", "generated", "stand-in")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
  """Holds the properties that all examples of a task share.

  Attributes:
    name: name of the task; it shows all differences from the published form.
    vocab_size: ids lie in ``[0, vocab_size)``.
    num_classes: labels lie in ``[0, num_classes)``.
    length: the task's padded length; no example is longer.
    provenance: origin of the data: ``"lra-files"`` (files of Long Range Arena
      or of the data sets that it uses), ``"tfds"`` (a folder of TensorFlow
      Datasets), ``"generated"`` (drawn here) or ``"stand-in"`` (other data).
    tokenizer: how text or pixels are encoded as ids.
    pair: whether an example is two sequences.
    id_shift: number added to a stored token to get its id. It is 1 for raw
      bytes, since all 256 values occur and id 0 is the padding.
    settings: everything else that decides the content (seed, sizes, generator,
      files), as json values.

  Raises:
    ValueError: if a number is out of range or the provenance unknown.
  """

  name: str
  vocab_size: int
  num_classes: int
  length: int
  provenance: str = "generated"
  tokenizer: str = "ids"
  pair: bool = False
  id_shift: int = 0
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    check_choice("provenance", self.provenance, PROVENANCES)
    check_int("vocab_size", self.vocab_size, 1)
    check_int("num_classes", self.num_classes, 1)
    check_int("length", self.length, 1)
    check_int("id_shift", self.id_shift, 0)

  def facts(self) -> dict[str, Any]:
    """Returns the attributes of :class:`Facts`, as json values."""
    fields = dataclasses.fields(Facts)
    values = {field.name: getattr(self, field.name) for field in fields}
    return json.loads(json.dumps(values))

  @property
  def token_dtype(self) -> np.dtype:
    """The smallest unsigned type for stored tokens."""
    return np.min_scalar_type(self.vocab_size - 1 - self.id_shift)

  @property
  def id_dtype(self) -> np.dtype:
    """The smallest unsigned type for ids."""
    return np.min_scalar_type(self.vocab_size - 1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset(Facts):
  """Holds one split, in memory or mapped from the cache.

  Supports ``len`` and indexing. Has the attributes of :class:`Facts` and these:

  Attributes:
    split: ``"train"``, ``"dev"`` or ``"test"``.
    tokens: the stored tokens of all examples, concatenated.
    offsets: example i is ``tokens[offsets[i]:offsets[i + 1]]``;
      ``[num_examples + 1]`` int64.
    labels: ``[num_examples]`` int32.
    tokens_2: the second sequences of pairs, or None.
    offsets_2: their offsets, or None.
    baselines: accuracy of simple rules on this split, by name of the rule;
      state it beside every result. The rules are fitted on the training split.
    fingerprint: 32 hexadecimal digits that change with each of the facts and of
      the attributes above, except `baselines`; computed if empty.

  Raises:
    ValueError: if the arrays do not fit each other or the facts.

  Example:
    >>> toy = Dataset.from_sequences(
    ...   [[1, 2], [3]], [0, 1], name="toy", vocab_size=5, num_classes=2,
    ...   length=4)
    >>> toy.num_examples, toy.length, toy[1]["tokens"].tolist()
    (2, 4, [3])
  """

  split: str
  tokens: np.ndarray
  offsets: np.ndarray
  labels: np.ndarray
  tokens_2: np.ndarray | None = None
  offsets_2: np.ndarray | None = None
  baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
  fingerprint: str = ""

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.pair and (self.tokens_2 is None or self.offsets_2 is None):
      raise ValueError("pair=True needs tokens_2 and offsets_2.")
    for name, tokens, offsets in self.sequences():
      _check_sequence(self, name, tokens, offsets)
    lowest, highest = self.labels.min(), self.labels.max()
    if lowest < 0 or highest >= self.num_classes:
      raise ValueError(
        f"labels must lie in [0, num_classes={self.num_classes}), got "
        f"{lowest} to {highest}."
      )
    if not self.fingerprint:
      object.__setattr__(self, "fingerprint", _fingerprint(self))

  @classmethod
  def from_sequences(
    cls,
    sequences: Sequence[Any],
    labels: Sequence[int],
    sequences_2: Sequence[Any] | None = None,
    *,
    split: str = "train",
    **facts: Any,
  ) -> "Dataset":
    """Makes a dataset from one list or array of stored tokens per example.

    Args:
      sequences: the tokens of each example, of any length up to ``length``.
      labels: one integer per example.
      sequences_2: the second sequence of each pair; sets ``pair``.
      split: name of the split.
      **facts: attributes of :class:`Facts`.

    Raises:
      ValueError: if a token, a label or a length does not fit.
    """
    shared = Facts(**facts, pair=sequences_2 is not None)
    tokens, offsets = flatten(sequences, shared.token_dtype)
    tokens_2 = offsets_2 = None
    if sequences_2 is not None:
      tokens_2, offsets_2 = flatten(sequences_2, shared.token_dtype)
    return cls(
      **shared.facts(),
      split=split,
      tokens=tokens,
      offsets=offsets,
      labels=cast("labels", labels, np.dtype(np.int32)),
      tokens_2=tokens_2,
      offsets_2=offsets_2,
    )

  @property
  def num_examples(self) -> int:
    """The number of examples."""
    return len(self.labels)

  def __len__(self) -> int:
    return self.num_examples

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns the ids of example `index`, without padding, and its label."""
    index = range(self.num_examples)[index]
    example: dict[str, Any] = {}
    for name, tokens, offsets in self.sequences():
      stored = tokens[offsets[index] : offsets[index + 1]]
      example[name] = np.add(stored, self.id_shift, dtype=self.id_dtype)
    return example | {"label": int(self.labels[index])}

  def sequences(self) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Returns name, tokens and offsets of each sequence: two for pairs."""
    sequences = [("tokens", self.tokens, self.offsets)]
    if self.tokens_2 is not None and self.offsets_2 is not None:
      sequences.append(("tokens_2", self.tokens_2, self.offsets_2))
    return sequences


def flatten(
  sequences: Sequence[Any], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
  """Concatenates sequences; returns their tokens and offsets."""
  lengths = [len(sequence) for sequence in sequences]
  offsets = np.zeros(len(lengths) + 1, np.int64)
  np.cumsum(lengths, out=offsets[1:])
  tokens = np.empty(offsets[-1], dtype)
  for i, sequence in enumerate(sequences):
    tokens[offsets[i] : offsets[i + 1]] = cast("tokens", sequence, dtype)
  return tokens, offsets


def cast(name: str, numbers: Any, dtype: np.dtype) -> np.ndarray:
  """Casts to an integer type; raises ValueError if a number would change."""
  numbers = np.asarray(numbers)
  if numbers.dtype == dtype or not numbers.size:
    return numbers.astype(dtype, copy=False)
  limits = np.iinfo(dtype)
  if numbers.dtype.kind not in "iu":
    raise ValueError(f"{name} must be integers, got dtype {numbers.dtype}.")
  if numbers.min() < limits.min or numbers.max() > limits.max:
    raise ValueError(
      f"{name} must lie in [{limits.min}, {limits.max}], got "
      f"{numbers.min()} to {numbers.max()}."
    )
  return numbers.astype(dtype)


def _check_sequence(
  dataset: Dataset, tokens_name: str, tokens: np.ndarray, offsets: np.ndarray
) -> None:
  """Raises ValueError unless tokens and offsets fit the dataset's facts."""
  offsets_name = tokens_name.replace("tokens", "offsets")
  if not len(offsets) == dataset.num_examples + 1 > 1:
    raise ValueError(
      f"{offsets_name} must have one entry more than labels, which must not "
      f"be empty, got {len(offsets)} and {dataset.num_examples}."
    )
  if offsets[0] != 0 or offsets[-1] != len(tokens):
    raise ValueError(
      f"{offsets_name} must run from 0 to len({tokens_name})={len(tokens)}, "
      f"got {offsets[0]} to {offsets[-1]}."
    )
  lengths = np.diff(offsets)
  if lengths.min() < 1 or lengths.max() > dataset.length:
    raise ValueError(
      f"{tokens_name} must hold 1 to length={dataset.length} tokens per "
      f"example, got {lengths.min()} to {lengths.max()}."
    )
  highest = int(tokens.max()) + dataset.id_shift
  if highest >= dataset.vocab_size:
    raise ValueError(
      f"{tokens_name} must give ids below vocab_size={dataset.vocab_size}, "
      f"got {highest}."
    )


def _fingerprint(dataset: Dataset) -> str:
  """Returns 128 bits of SHA-256 over the facts, the split and all arrays."""
  facts = dataset.facts() | {"split": dataset.split}
  digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
  for name in ("tokens", "offsets", "labels", "tokens_2", "offsets_2"):
    array = getattr(dataset, name)
    if array is not None:
      digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
      digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()[:32]
