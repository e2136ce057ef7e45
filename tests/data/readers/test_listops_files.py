"""ListOps from the files of the release."""

import tracemalloc

import pytest

from spectraformer_jax import data
from spectraformer_jax.data.formats.listops_text import encode, evaluate
from tests.data import made_up


@pytest.fixture
def load(tmp_path):
  def load(split="train", **options):
    options = {"data_dir": tmp_path / "listops-1000"} | options
    return data.load("listops", split, cache_dir=tmp_path / "cache", **options)

  return load


@pytest.fixture
def folder(tmp_path):
  return made_up.write_listops(tmp_path / "listops-1000", count=5)


def test_rows_are_those_of_the_files(load, folder):
  train = load()
  rows = [(e["tokens"].tolist(), e["label"]) for e in train]
  expected = [
    (encode(text).tolist(), 3 - i) for i, text in enumerate(made_up.LISTOPS)
  ]
  assert rows == [expected[i % 2] for i in range(5)]
  assert (train.name, train.provenance, train.tokenizer) == (
    "listops",
    "lra-files",
    "full",
  )
  assert (train.vocab_size, train.length) == (32, 2000)
  # Every root operator has one label here.
  assert load("test").baselines["root operator only"] == 1.0


def test_no_close_drops_brackets(load, folder):
  train = load(tokenizer="no_close")
  assert train[0]["tokens"].tolist() == encode("[MAX 2 3").tolist()
  assert train.tokenizer == "no_close"


def test_other_surface_forms(load, folder):
  text = "Source\tTarget\r\n[MED 1 2 X\t1\r\n[SM 9 9 ]\t8\r\n"
  (folder / "basic_train.tsv").write_text(text)
  rows = [(e["tokens"].tolist(), e["label"]) for e in load()]
  assert rows == [
    (encode("[MED 1 2 ]").tolist(), 1),
    (encode("[SM 9 9 ]").tolist(), 8),
  ]


def test_seed_has_no_effect(load, folder):
  assert load(seed=3).fingerprint == load().fingerprint


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "split of no examples"),
    ("Source,Target\n", "line 1: expected the header 'Source<TAB>Target', got"),
    ("( [MAX 1 ) ]\t1\n", "line 1: expected the header"),
    ("Source\tTarget\n[MAX 1 ]\n", "line 2: expected an expression, a tab"),
    ("Source\tTarget\n[MAX 1 ]\t1\tx\n", "got 3 columns"),
    ("Source\tTarget\n[MAX 1 ]\tten\n", "line 2: the label must be an integer"),
    ("Source\tTarget\n[MAX 1 ]\t10\n", "from 0 to 9, got '10'"),
    ("Source\tTarget\n[MAX 1 ]\t1\n[MIX 1 ]\t1\n", "line 3: Unknown ListOps"),
    ("Source\tTarget\n( [MAX 1 ]\t1\n", "line 2: parentheses must balance"),
    ("Source\tTarget\n\t1\n", "line 2: text must hold at least one token"),
  ],
)
def test_errors_name_file_and_line(load, folder, text, message):
  (folder / "basic_train.tsv").write_text(text)
  with pytest.raises(ValueError, match="basic_train|no examples") as caught:
    load()
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file(load, folder):
  (folder / "basic_val.tsv").unlink()
  with pytest.raises(
    ValueError, match="must hold basic_val.tsv, which is miss"
  ):
    load()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(num_train=5), "num_train must be left out where data_dir is given"),
    (dict(max_depth=3), "max_depth must be left out where data_dir is given"),
    (dict(min_len=3), "min_len must be left out .* what to draw, got 3"),
    (dict(tokenizer="none"), "tokenizer must be one of 'full', 'no_close'"),
  ],
)
def test_options_that_do_not_go_with_files(load, folder, options, message):
  with pytest.raises(ValueError, match=message):
    load(**options)


def test_longer_expressions_need_max_len(load, folder):
  text = "[MAX " + "1 " * 2500 + "]"
  (folder / "basic_train.tsv").write_text(f"Source\tTarget\n{text}\t1\n")
  with pytest.raises(ValueError, match="max_len must be at least 2502, .* got"):
    load()
  longer = load(max_len=2600)
  assert (
    longer.name == "listops-max_len2600" and len(longer[0]["tokens"]) == 2502
  )


def test_a_shorter_length_than_that_of_drawn_expressions(load, folder):
  assert load(max_len=4).length == 4


def test_drawn_expressions_are_written_in_the_form_of_the_release(tmp_path):
  sizes = dict(num_train=40, num_dev=7, num_test=9, min_len=20, max_len=90)
  drawn, folder = {}, tmp_path / "lra_release" / "listops-1000"
  for split in data.SPLITS:
    drawn[split] = data.load("listops", split, cache_dir=tmp_path, **sizes)
    path = data.listops_tsv.export(drawn[split], folder)
    header, *rows = path.read_text().split("\n")
    assert header == "Source\tTarget" and rows.pop() == ""
    assert len(rows) == len(drawn[split])
    for row in rows:
      text, value = row.split("\t")
      assert text.startswith("( ( ") and text.endswith(" ] )")
      assert str(evaluate(encode(text))) == value
  names = sorted(path.name for path in folder.iterdir())
  assert names == ["basic_test.tsv", "basic_train.tsv", "basic_val.tsv"]
  for split in data.SPLITS:
    read = data.load(
      "listops", split, cache_dir=tmp_path, data_dir=tmp_path / "lra_release"
    )
    assert read.tokens.tolist() == drawn[split].tokens.tolist()
    assert read.offsets.tolist() == drawn[split].offsets.tolist()
    assert read.labels.tolist() == drawn[split].labels.tolist()
    assert read.provenance == "lra-files"


def test_nothing_is_left_of_an_export_that_fails(tmp_path):
  facts = dict(name="toy", vocab_size=32, num_classes=10, length=9)
  good = data.Dataset.from_sequences(
    [[12, 3, 4, 15]], [3], tokenizer="full", **facts
  )
  path = data.listops_tsv.export(good, tmp_path)
  before = path.read_bytes()
  unclosed = data.Dataset.from_sequences(
    [[12, 3, 4]], [3], tokenizer="full", **facts
  )
  with pytest.raises(ValueError, match="1 operators without one"):
    data.listops_tsv.export(unclosed, tmp_path)
  no_close = data.Dataset.from_sequences(
    [[12, 3, 4]], [3], tokenizer="no_close", **facts
  )
  with pytest.raises(ValueError, match="tokenizer='full'.*got 'no_close'"):
    data.listops_tsv.export(no_close, tmp_path)
  assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_memory_does_not_grow_with_the_file(load, folder):
  text = "( " * 600 + "[MAX" + " 7 )" * 599 + " ] )\t7\n"
  path = folder / "basic_train.tsv"
  with open(path, "w") as file:
    file.write("Source\tTarget\n")
    for _ in range(4000):
      file.write(text)
  assert path.stat().st_size > 14e6
  tracemalloc.start()
  train = load()
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  # A chunk of 1024 rows has 0.6 MB of tokens.
  assert len(train) == 4000 and peak < 5e6
