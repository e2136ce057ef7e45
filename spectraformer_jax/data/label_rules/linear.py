"""Fits simple models of words or pixels, to compare a result with.

* Texts: a linear support vector machine on words and pairs of words (tf-idf).
* Pairs of texts: the cosine of their tf-idf words, with the threshold that
  classifies the training pairs best.
* Images: logistic regression on the pixels of 8,000 training images.

The models see the task's sequences, cut to its length. Their settings are not
tuned.
"""

import warnings
from collections.abc import Iterator, Mapping

import numpy as np

from spectraformer_jax.data.dataset import Dataset
from spectraformer_jax.data.source import SPLITS

IMAGES = 8000  # training images that the model is fitted on
MAX_WORDS = 300_000  # words and pairs of words; the most frequent ones are kept
TEXTS = ("bytes", "words")


def describe(splits: Mapping[str, Dataset]) -> Iterator[str]:
  """Yields a line about the accuracy of the model for the task.

  Args:
    splits: the datasets by split. The model is fitted on ``"train"``.
  """
  train = splits["train"]
  if train.tokenizer == "pixels":
    what, scores = "logistic regression on pixels", pixels(splits)
  elif train.tokenizer in TEXTS and train.pair:
    what, scores = "tf-idf cosine", cosine(splits)
  elif train.tokenizer in TEXTS:
    what, scores = "linear model of words and pairs of words", words(splits)
  else:
    yield f"no linear model for the tokenizer {train.tokenizer!r}"
    return
  shown = ", ".join(f"{split} {score:.3f}" for split, score in scores.items())
  yield f"accuracy of {what}: {shown}"


def words(splits: Mapping[str, Dataset]) -> dict[str, float]:
  """Returns the accuracy, by split, of a linear model of words."""
  # Imported here: scikit-learn takes a second.
  from sklearn.feature_extraction.text import TfidfVectorizer
  from sklearn.svm import LinearSVC

  vectorizer = TfidfVectorizer(
    ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=MAX_WORDS
  )
  inputs = {"train": vectorizer.fit_transform(texts(splits["train"]))}
  for split in SPLITS[1:]:
    inputs[split] = vectorizer.transform(texts(splits[split]))
  model = LinearSVC(random_state=0).fit(inputs["train"], splits["train"].labels)
  return {s: model.score(inputs[s], splits[s].labels) for s in SPLITS}


def cosine(splits: Mapping[str, Dataset]) -> dict[str, float]:
  """Returns the accuracy, by split, of a threshold on the tf-idf cosine."""
  from scipy.sparse import csr_array
  from sklearn.feature_extraction.text import TfidfVectorizer

  vectorizer = TfidfVectorizer(min_df=2, sublinear_tf=True)
  train = splits["train"]
  vectorizer.fit([*texts(train), *texts(train, second=True)])
  cosines = {}
  for split, dataset in splits.items():
    one = csr_array(vectorizer.transform(texts(dataset)))
    two = csr_array(vectorizer.transform(texts(dataset, second=True)))
    cosines[split] = np.asarray(one.multiply(two).sum(axis=1)).ravel()
  cuts = np.unique(cosines["train"])
  is_one = train.labels[np.argsort(cosines["train"], kind="stable")] == 1
  # Number of correct answers if all pairs from rank i on are labelled 1.
  right = np.append(is_one[::-1].cumsum()[::-1], 0)
  right += np.append(0, (~is_one).cumsum())
  order = np.sort(cosines["train"])
  firsts = np.searchsorted(order, cuts)
  cut = cuts[right[firsts].argmax()]
  return {
    split: float(np.mean((cosines[split] >= cut) == dataset.labels))
    for split, dataset in splits.items()
  }


def pixels(splits: Mapping[str, Dataset]) -> dict[str, float]:
  """Returns the accuracy, by split, of logistic regression on pixels."""
  from sklearn.exceptions import ConvergenceWarning
  from sklearn.linear_model import LogisticRegression

  inputs = {
    split: dataset.tokens.reshape(len(dataset), -1) / (dataset.vocab_size - 1)
    for split, dataset in splits.items()
  }
  labels = splits["train"].labels[:IMAGES]
  model = LogisticRegression(max_iter=100)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)
    model.fit(inputs["train"][:IMAGES], labels)
  return {s: model.score(inputs[s], splits[s].labels) for s in splits}


def texts(dataset: Dataset, second: bool = False) -> list[str]:
  """Returns the sequences as text: a byte is a character, a hash is a word."""
  _, tokens, bounds = dataset.sequences()[int(second)]
  offsets = bounds.tolist()
  spans = zip(offsets, offsets[1:], strict=False)
  if dataset.tokenizer == "words":
    # Puts a letter first: the vectorizer ignores words of one character.
    return [" ".join(f"w{i}" for i in tokens[a:b].tolist()) for a, b in spans]
  return [tokens[a:b].tobytes().decode("latin-1") for a, b in spans]
