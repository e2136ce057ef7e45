import dataclasses

import numpy as np
import pytest

from spectraformer_jax.data import Dataset, Facts

FACTS = dict(name="toy", vocab_size=5, num_classes=2, length=3)


def test_examples_come_back_as_given():
  data = Dataset.from_sequences([[1, 2], [3], [4, 0, 4]], [0, 1, 1], **FACTS)
  assert len(data) == data.num_examples == 3
  assert data.tokens.dtype == np.uint8
  assert data.offsets.tolist() == [0, 2, 3, 6]
  assert [e["tokens"].tolist() for e in data] == [[1, 2], [3], [4, 0, 4]]
  assert [e["label"] for e in data] == [0, 1, 1]
  assert data[-1]["label"] == 1


def test_raw_bytes_are_shifted_past_the_padding():
  facts = FACTS | dict(vocab_size=257, id_shift=1)
  data = Dataset.from_sequences([[0, 97, 255]], [0], **facts)
  assert data.tokens.dtype == np.uint8
  assert data[0]["tokens"].tolist() == [1, 98, 256]


def test_pairs_have_two_sequences():
  data = Dataset.from_sequences([[1], [2]], [0, 1], [[3, 3], [4]], **FACTS)
  assert data.pair
  assert data[0]["tokens"].tolist() == [1]
  assert data[0]["tokens_2"].tolist() == [3, 3]


def test_fingerprint_tells_everything_but_baselines_apart():
  def build(sequences=((1, 2), (3,)), labels=(0, 1), split="train", **facts):
    return Dataset.from_sequences(
      sequences, labels, split=split, **FACTS | facts
    ).fingerprint

  base = build()
  assert len(base) == 32
  assert build() == base
  others = [
    build(sequences=((1, 3), (3,))),
    build(sequences=((1,), (2, 3))),
    build(labels=(1, 1)),
    build(split="dev"),
    build(vocab_size=6),
    build(tokenizer="other"),
    build(settings={"seed": 1}),
  ]
  assert len({base, *others}) == 1 + len(others)
  data = Dataset.from_sequences([[1, 2], [3]], [0, 1], **FACTS)
  scored = dataclasses.replace(data, baselines={"x": 1.0}, fingerprint="")
  assert scored.fingerprint == base


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(sequences=[[1, 5]]), r"ids below vocab_size=5, got 5\."),
    (dict(sequences=[[1, 1, 1, 1]]), r"1 to length=3 tokens .* got 4 to 4\."),
    (dict(sequences=[[]]), r"1 to length=3 tokens .* got 0 to 0\."),
    (dict(sequences=[[-1]]), r"tokens must lie in \[0, 255\], got -1 to -1\."),
    (dict(sequences=[[0.5]]), r"tokens must be integers, got dtype float64\."),
    (dict(labels=[2]), r"labels must lie in \[0, num_classes=2\), got 2 to 2"),
    (dict(labels=[-1]), r"labels must lie in .* got -1 to -1\."),
    (dict(labels=[0.5]), r"labels must be integers, got dtype float64\."),
    (dict(labels=[0, 0]), r"one entry more than labels, .* got 2 and 2\."),
    (dict(sequences=[], labels=[]), r"must not be empty, got 1 and 0\."),
    (dict(sequences_2=[[1], [1]]), r"offsets_2 must have one entry more"),
    (dict(provenance="lra"), r"got 'lra'. Did you mean 'lra-files'"),
    (dict(vocab_size=0), r"vocab_size must be an integer >= 1, got 0\."),
    (dict(num_classes=True), r"num_classes must be an integer >= 1, got True"),
    (dict(length=2.0), r"length must be an integer >= 1, got 2\.0\."),
    (dict(id_shift=-1), r"id_shift must be an integer >= 0, got -1\."),
  ],
)
def test_what_does_not_fit_is_refused(change, message):
  arguments = dict(sequences=[[1]], labels=[0]) | FACTS | change
  with pytest.raises(ValueError, match=message):
    Dataset.from_sequences(**arguments)


def test_arrays_that_do_not_belong_together_are_refused():
  arrays = dict(
    split="train",
    tokens=np.ones(3, np.uint8),
    offsets=np.array([0, 2]),
    labels=np.zeros(1, np.int32),
  )
  with pytest.raises(ValueError, match=r"from 0 to len\(tokens\)=3, got 0 to"):
    Dataset(**FACTS, **arrays)
  arrays["offsets"] = np.array([0, 3])
  with pytest.raises(ValueError, match="pair=True needs tokens_2 and offsets_"):
    Dataset(**FACTS, **arrays, pair=True)


def test_facts_are_plain_json_values():
  facts = Facts(**FACTS, settings={"sizes": (1, 2)})
  assert facts.facts()["settings"] == {"sizes": [1, 2]}
  assert Facts(**facts.facts()).facts() == facts.facts()
