"""The command that looks at a task."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from spectraformer_jax import data
from spectraformer_jax.data import __main__ as command
from spectraformer_jax.data import find
from spectraformer_jax.data.commands import lra_figures
from spectraformer_jax.data.commands.check import count_duplicates
from spectraformer_jax.data.dataset import Dataset
from tests.data import made_up

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)

  def run(*args):
    code = command.main([*args])
    out, err = capsys.readouterr()
    return code, out, err

  return run


def test_text(run, tmp_path):
  made_up.write_aclimdb(tmp_path / "lra" / "aclImdb")
  code, out, _ = run(
    "check", "text", "--data_dir=lra", "--cache_dir=cache", "--examples=2"
  )
  assert code == 1
  assert "text-dev_holdout: lra-files, tokenizer bytes, 257 ids" in out
  test = data.load("text", "test", data_dir="lra", cache_dir="cache")
  assert f"checksum test {test.fingerprint}" in out
  assert "test         40        18     18.5       19            0.0%" in out
  assert "test  20 20" in out
  assert "example 0, label 0\n  train neg " in out and "<br />é\n" in out
  assert "DIFFERS examples in test: 40, expected 25,000" in out
  assert "agrees  examples per class in test: 20 to 20, expected equal" in out
  assert out.count("\nexample ") == 2


def test_found_folder_and_choices_are_named(run, tmp_path):
  made_up.write_aclimdb(tmp_path / "a" / "aclImdb")
  made_up.write_aclimdb(tmp_path / "a" / "a" / "aclImdb")
  _, out, _ = run(
    "check", "text", "--data_dir=a", "--cache_dir=cache", "--val=lra"
  )
  assert out.startswith("several folders fit; reading the inner one, a/a/acl")
  assert "\ntext: aclImdb folder in a/a/aclImdb\n" in out


def test_retrieval_shows_both_documents(run, tmp_path):
  made_up.write_aan(tmp_path / "tsv_data")
  _, out, _ = run("check", "retrieval", "--data-dir=.", "--cache_dir=cache")
  assert "(second)" in out
  assert "  b'one \"0\\n'\n  b'two \\xc3\\xa9'\n" in out
  assert "shared by train and dev 20" in out  # the same made-up rows
  assert "expected 147,086" in out


def test_pictures(run, tmp_path):
  made_up.write_pathfinder(tmp_path / "lra")
  code, out, _ = run(
    "check",
    "pathfinder",
    "--data_dir=lra",
    "--cache_dir=cache",
    "--pictures=sheet.png",
  )
  assert "images in sheet.png, rows with labels [0, 1]" in out
  sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
  assert sheet.shape == (2 * 68, 8 * 68)
  train = data.load("pathfinder", "train", data_dir="lra", cache_dir="cache")
  for row in (0, 1):
    first = np.flatnonzero(train.labels == row)[0]
    image = sheet[68 * row : 68 * row + 64 : 2, :64:2]
    assert image.ravel().tolist() == train[int(first)]["tokens"].tolist()
  assert "examples in train+dev+test: 60, expected 200,000" in out
  assert code == 1


def test_pictures_are_drawn_only_when_asked_for(run, tmp_path):
  code, out, _ = run("check", "digits", "--cache_dir=cache")
  assert code == 0 and "Long Range Arena: no figures for this task" in out
  assert "images are drawn with --pictures=PATH" in out
  assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_listops_without_files(run):
  options = ("--num_train=300", "--num_dev=20", "--num_test=20")
  code, out, _ = run("check", "listops", "--cache_dir=cache", *options)
  assert code == 1
  assert "agrees  lengths: " in out and "expected 501 to 1999" in out
  assert "agrees  values that are right: 340, expected 340" in out
  assert "DIFFERS examples in train: 300, expected 96,000" in out
  assert "\n  [" in out  # decoded


def test_wrong_values_are_found(run, tmp_path):
  folder = made_up.write_listops(tmp_path / "listops-1000", count=4)
  text = (folder / "basic_test.tsv").read_text().replace("\t3", "\t4")
  (folder / "basic_test.tsv").write_text(text)
  code, out, _ = run("check", "listops", "--data_dir=.", "--cache_dir=cache")
  assert code == 1
  assert (
    "DIFFERS values that are right: 10 (test example 0 has label 4 and value "
    "3), expected 12\n"
  ) in out


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["check", "texd"], "Did you mean 'text'?"),
    (["check", "text"], "needs data_dir="),
    (
      ["check", "text", "--data_dir=no"],
      "must be an existing folder, got 'no'",
    ),
    (["check", "text", "--data_dir=7"], "must be an existing folder, got '7'"),
    (["check", "digits", "--vol=1"], "has no option 'vol'"),
    (["check", "digits", "--val"], "must be written --name=value, got '--val'"),
    (["check", "digits", "--seed=x"], "--seed: invalid int value: 'x'; see"),
    (["check", "digits", "--examples=-1"], "examples must be an integer >= 0"),
    (["check", "digits", "--cache_dir="], "cache_dir must be a path, got ''"),
    (["check", "digits", "--cache_dir=a_file"], "must be a folder, got 'a_fil"),
    (["check"], "the following arguments are required: task; see --help"),
    (["check", ""], "Unknown task ''"),
    (["check", "text", "--data_dir="], "data_dir must be a path, got ''"),
    (["check", "text", "--data_dir=a_file"], "must be an existing folder, got"),
    (["check", "text", "--data_dir=~no_user/x"], "must be a path, got '~no_u"),
    (["check", "text", "--data_dir=" + "x" * 300], "name too long"),
    (["check", "text", "--data_dir=/dev/null"], "must be an existing folder"),
    (["check", "text", "--data_dir=\udcff"], "existing folder, got '\\udcff'"),
    (
      ["check", "listops", "--tokenizer=[1]"],
      "tokenizer must be one of 'full', 'no_close', got [1]",
    ),
    (["check", "listops", "--max_len={[]:1}"], "max_len must be an integer"),
    (["check", "listops", "--max_len=" + "(" * 9999], "max_len must be an in"),
    (["check", "listops", "--max_len=" + "9" * 9999], "max_len must be an in"),
    (["check", "listops", "x"], "must be written --name=value, got 'x'"),
    (["fetch", ""], "stand-in must be one of"),
    (["fetch"], "the following arguments are required: name"),
    (["fetch", "fashion", "--data_dir="], "data_dir must be a path, got ''"),
    (["fetch", "imdb_half", "--data_dir=a_file"], "must be an existing folder"),
    (["fetch", "digits", "--data_dir=."], "has no option 'data_dir'"),
    (["check", "digits", "--seed=-1"], "seed must be an integer >= 0"),
  ],
)
def test_mistakes_end_in_one_line(run, tmp_path, args, message):
  (tmp_path / "a_file").touch()
  code, out, err = run(*args)
  assert code == 2 and out == ""
  assert err.startswith("error: ") and message in err
  assert len(err.strip().splitlines()) == 1


def test_a_name_that_no_terminal_shows(tmp_path):
  folder = made_up.write_listops(tmp_path / "\udcff\nx", count=4)
  process = subprocess.run(
    [
      sys.executable,
      "-m",
      "spectraformer_jax.data",
      "check",
      "listops",
      f"--data_dir={folder}",
      f"--cache_dir={tmp_path}",
    ],
    env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
    capture_output=True,
    timeout=100,
  )
  assert process.returncode == 1 and process.stderr == b""
  assert b"ListOps TSV in " in process.stdout and b"udcff" in process.stdout


def test_a_folder_that_may_not_be_read(run, tmp_path, monkeypatch):
  def refuse(folder):
    raise PermissionError(13, "Permission denied", str(folder))

  monkeypatch.setattr(find.os, "scandir", refuse)
  code, _, err = run("check", "text", "--data_dir=.")
  assert code == 2
  assert err == "error: data_dir='.' cannot be read: Permission denied.\n"


def test_wrong_values_are_found_in_a_sample(run, tmp_path, monkeypatch):
  monkeypatch.setattr(lra_figures, "EVALUATED", 3)
  folder = made_up.write_listops(tmp_path / "listops-1000", count=4)
  path = folder / "basic_val.tsv"
  path.write_text(path.read_text()[:-2] + "4\n")  # the last
  _, out, _ = run("check", "listops", "--data_dir=.", "--cache_dir=cache")
  assert (
    "DIFFERS values that are right (looked at 3 of 4 in train, 3 of 4 in dev, "
    "3 of 4 in test): 8 (dev example 3 has label 4 and value 2), expected 9"
  ) in out


def test_commands(run):
  assert run("--help")[0] == 0
  assert run()[0] == 2
  code, _, err = run("chekc")
  assert code == 2 and "unknown command 'chekc'" in err


def test_duplicates():
  facts = dict(name="toy", vocab_size=9, num_classes=2, length=4)
  splits = {
    "train": Dataset.from_sequences(
      [[1], [1], [2], [1, 2]], [0, 1, 0, 0], **facts
    ),
    "dev": Dataset.from_sequences([[2], [3]], [1, 1], **facts),
    "test": Dataset.from_sequences([[1, 2], [2], [4]], [1, 1, 0], **facts),
  }
  assert list(count_duplicates(splits)) == [
    "repeated within train 1, dev 0, test 0",
    "shared by train and dev 1, train and test 2, dev and test 1",
  ]
  pairs = {
    split: Dataset.from_sequences([[1, 2], [1]], [0, 1], [[3], second], **facts)
    for split, second in (("train", [2, 3]), ("dev", [3]), ("test", [2, 3]))
  }
  assert list(count_duplicates(pairs)) == [
    "repeated within train 0, dev 0, test 0",
    "shared by train and dev 1, train and test 2, dev and test 1",
  ]


def blank(task, split, count, name, classes):
  """A split of the right size whose labels are balanced."""
  return Dataset(
    name=name,
    vocab_size=256,
    num_classes=classes,
    length=4,
    split=split,
    tokens=np.zeros(count, np.uint8),
    offsets=np.arange(count + 1),
    labels=(np.arange(count) % classes).astype(np.int32),
  )


@pytest.mark.parametrize(
  ("task", "name", "sizes", "classes"),
  [
    ("text", "text-dev_holdout", (22_600, 2_400, 25_000), 2),
    ("text", "text-dev_is_test", (25_000, 25_000, 25_000), 2),
    ("retrieval", "retrieval", (147_086, 18_090, 17_437), 2),
    ("image", "image-hash_split", (45_010, 4_990, 10_000), 10),
    ("pathfinder", "pathfinder-hash_split", (160_000, 20_100, 19_899), 2),
    ("pathx", "pathx-hash_split", (160_000, 20_100, 19_900), 2),
  ],
)
def test_figures_of_the_benchmark_agree(task, name, sizes, classes):
  splits = {
    split: blank(task, split, size, name, classes)
    for split, size in zip(data.SPLITS, sizes, strict=True)
  }
  figures = lra_figures.compare(task, splits)
  assert figures and all(figure.agrees for figure in figures), figures
  for split in data.SPLITS:
    fewer = splits | {
      split: blank(task, split, sizes[0] // 2 + 3, name, classes)
    }
    assert not all(f.agrees for f in lra_figures.compare(task, fewer))
