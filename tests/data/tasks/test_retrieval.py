"""Retrieval from the TSV files of the release."""

import pytest

from spectraformer_jax import data
from tests.data import made_up


@pytest.fixture
def folder(tmp_path):
  return made_up.write_aan(tmp_path / "tsv_data")


@pytest.fixture
def load(tmp_path, folder):
  return lambda split="train", **options: data.load(
    "retrieval",
    split,
    data_dir=tmp_path / "tsv_data",
    cache_dir=tmp_path / "cache",
    **options,
  )


def texts(dataset):
  return [
    tuple(bytes((e[name] - 1).astype("u1")) for name in ("tokens", "tokens_2"))
    + (e["label"],)
    for e in dataset
  ]


def test_texts_are_kept_as_they_stand(load):
  for split in data.SPLITS:
    dataset = load(split)
    assert texts(dataset)[1] == (
      rb"""b'one "1\n'""",
      rb"b'two \xc3\xa9'",
      1,
    )
    assert len(dataset) == 20 and dataset.pair
  assert (dataset.name, dataset.provenance) == ("retrieval", "lra-files")
  assert (dataset.vocab_size, dataset.length) == (257, 4000)


def test_decode(load):
  dataset = load(literal="decode")
  assert texts(dataset)[1] == (b'one "1\n', "two é".encode(), 1)
  assert dataset.name == "retrieval-decoded"
  assert dataset.settings["literal"] == "decode"
  assert load().settings["literal"] == "keep"


def test_both_documents_are_cut(load):
  dataset = load(max_len=5)
  assert texts(dataset)[0] == (b"b'one", b"b'two", 0)
  assert dataset.name == "retrieval-max_len5"
  batch = next(data.Batches(dataset, 4, seed=0, train=False, pad_to_multiple=8))
  assert batch["tokens"].shape == batch["tokens_2"].shape == (4, 8)
  assert batch["length_2"].tolist() == [5] * 4


def test_labels_may_be_integers(load, folder):
  made_up.write_aan(folder, [b"1\ta\tb\tx\ty", b"0\ta\tb\tx\ty"])
  assert load().labels.tolist() == [1, 0]


GOOD = b"1.0\ta\tb\tx\ty"


@pytest.mark.parametrize(
  ("row", "message"),
  [
    (
      b"1.0\tA1\tA2",
      "line 2: it has 3 columns: these are the pairs by id alone",
    ),
    (b"1.0\ta\tb\tx", "line 2: expected 5 columns .* got 4"),
    (b"1.0\ta\tb\tx\ty\tz", "got 6"),
    (b"", "got 1"),
    (b"0.5\ta\tb\tx\ty", "line 2: the label must be .* 0 to 1, got '0.5'"),
    (b"nan\ta\tb\tx\ty", "got 'nan'"),
    (b"2\ta\tb\tx\ty", "got '2'"),
    (b"yes\ta\tb\tx\ty", "got 'yes'"),
    (b"1\ta\tb\t\ty", "line 2: expected two texts, got an empty one"),
  ],
)
def test_errors_name_file_and_line(load, folder, row, message):
  made_up.write_aan(folder, [GOOD, row])
  with pytest.raises(ValueError, match=message) as caught:
    load()
  assert "new_aan_pairs.train.tsv" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_header(load, folder):
  made_up.write_aan(folder, [b"label\tid1\tid2\ttext1\ttext2", GOOD])
  with pytest.raises(ValueError, match="line 1: expected no header, got one"):
    load()


@pytest.mark.parametrize(
  "text",
  [
    b"plain",
    b"'text'",
    b"b'open",
    b"__import__('os').system('true')",
    b"b'a' + b'b'",
    b"(" * 5000,
    b"\xff",
  ],
)
def test_only_literals_are_decoded(load, folder, text):
  made_up.write_aan(folder, [b"1\ta\tb\tb'x'\t" + text])
  with pytest.raises(
    ValueError, match="line 1: literal='decode' needs"
  ) as error:
    load(literal="decode")
  assert "\n" not in str(error.value)


def test_only_ids_are_recognised(tmp_path):
  folder = tmp_path / "lra"
  row = b"1.0\tP1\tP2"
  made_up.write_aan(folder, [row], "new_aan_pairs.{}.only_ids.tsv")
  with pytest.raises(
    ValueError, match="only_ids.tsv: these are .* lra_release"
  ):
    data.load("retrieval", "train", data_dir=folder, cache_dir=tmp_path)


def test_missing_file_and_options(load, folder):
  with pytest.raises(
    ValueError, match="literal must be one of 'keep', 'decode', got 'raw'"
  ):
    load(literal="raw")
  (folder / "new_aan_pairs.eval.tsv").unlink()
  with pytest.raises(ValueError, match="must hold new_aan_pairs.eval.tsv"):
    load()
