"""The search for files, and what it says when they are not there."""

import logging

import pytest

from spectraformer_jax import data
from spectraformer_jax.data import find
from tests.data import made_up


def error_of(task, data_dir, **options):
  """The message, on one line, that asking for the task ends in."""
  with pytest.raises(ValueError) as caught:
    data.TASKS.build(task, {"data_dir": data_dir, **options})
  message = str(caught.value)
  assert "\n" not in message
  return message


LRA_TASKS = ("image", "pathfinder", "pathx", "retrieval", "text")


@pytest.mark.parametrize("task", LRA_TASKS)
def test_a_missing_flag_is_named_with_what_to_fetch(task):
  message = error_of(task, None)
  assert f"task {task!r} needs data_dir=" in message
  archive = {"text": "aclImdb_v1.tar.gz", "image": "cifar-10-binary.tar.gz"}
  assert archive.get(task, "lra_release.gz") in message


def test_tasks_that_need_no_files_are_named_if_there_are_any(monkeypatch):
  hint = "without the files try 'imdb_half' or 'spam_bodies'."
  assert hint in error_of("text", None)
  factories = dict(data.TASKS._factories)
  del factories["imdb_half"], factories["spam_bodies"]
  monkeypatch.setattr(data.TASKS, "_factories", factories)
  assert "without the files" not in error_of("text", None)


@pytest.mark.parametrize("task", LRA_TASKS)
def test_no_folder(task, tmp_path):
  missing = tmp_path / "nowhere"
  expected = f"data_dir must be an existing folder, got {str(missing)!r}."
  assert error_of(task, missing) == expected
  (tmp_path / "file").write_text("text")
  assert "must be an existing folder" in error_of(task, tmp_path / "file")


def test_nothing_found_says_what_is_there(tmp_path):
  for i in range(12):
    (tmp_path / f"folder{i:02}").mkdir()
  message = error_of("retrieval", tmp_path)
  assert "tsv_data/new_aan_pairs.{train,eval,test}.tsv" in message
  assert "folder00/, folder01/" in message and "and 4 more" in message
  (tmp_path / "empty").mkdir()
  assert "it holds nothing." in error_of("retrieval", tmp_path / "empty")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_an_archive_is_recognised_without_an_extension(
  tmp_path, compress, deep
):
  folder = tmp_path / "download" if deep else tmp_path
  folder.mkdir(exist_ok=True)
  members = {"lra_release/x.tsv": b"x"}
  path = made_up.write_tar(folder / "lra_release", members, compress)
  for data_dir in (tmp_path, path):
    message = error_of("listops", data_dir)
    assert f"{path} is a tar file: unpack it (tar xf {path})" in message
  assert not (folder / "x.tsv").exists()


def test_archives_are_never_unpacked(tmp_path):
  members = {"../escaped": b"x", "/tmp/escaped": b"x", "listops-1000/a": b"x"}
  made_up.write_tar(tmp_path / "lra_release.gz", members, compress=True)
  before = sorted(tmp_path.parent.rglob("*"))
  assert "is a tar file" in error_of("listops", tmp_path)
  assert sorted(tmp_path.parent.rglob("*")) == before


def test_kinds_of_archives(tmp_path):
  for name, content, kind in (
    ("zip", b"PK\3\4" + bytes(30), "zip"),
    ("gzip", b"\x1f\x8b" + bytes(30), "gzip"),
    ("empty", b"", None),
    ("text", b"text", None),
  ):
    (tmp_path / name).write_bytes(content)
    assert find.archive_kind(tmp_path / name) == kind


@pytest.mark.parametrize("levels", range(4))
def test_search_goes_three_levels_down(tmp_path, levels):
  folder = tmp_path.joinpath(*["lra_release"] * levels)
  made_up.write_listops(folder)
  assert data.TASKS.build("listops", {"data_dir": tmp_path}).provenance == (
    "lra-files"
  )


def test_search_goes_no_deeper(tmp_path):
  made_up.write_listops(tmp_path / "a" / "b" / "c" / "d")
  assert "at most three levels down" in error_of("listops", tmp_path)


def test_parent_outer_and_inner_folder_are_the_same_task(tmp_path):
  inner = tmp_path / "lra_release" / "lra_release"
  made_up.write_listops(inner / "listops-1000")
  facts = [
    data.TASKS.build("listops", {"data_dir": folder}).facts()
    for folder in (inner / "listops-1000", inner, inner.parent, str(tmp_path))
  ]
  assert all(fact == facts[0] for fact in facts)


def test_inner_folder_is_preferred_and_both_are_named(tmp_path, caplog):
  outer = made_up.write_listops(tmp_path / "lra_release", count=10)
  inner = made_up.write_listops(outer / "lra_release", count=20)
  with caplog.at_level(logging.INFO):
    train = data.load("listops", "train", data_dir=outer, cache_dir=tmp_path)
  assert len(train) == 20
  assert f"reading the inner one, {inner}, not {outer}" in caplog.text
  assert f"listops: ListOps TSV in {inner}" in caplog.text


def test_two_forms_of_a_task_are_refused(tmp_path):
  made_up.write_listops(tmp_path / "listops-1000")
  made_up.write_pickles(tmp_path / "processed", "lra-listops", [])
  message = error_of("listops", tmp_path)
  assert "must hold one form of 'listops'" in message
  assert "ListOps TSV in" in message and "pickles lra-listops in" in message
  assert "point it at one of them" in message


def test_a_folder_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch):
  made_up.write_listops(tmp_path / "listops-1000")
  (tmp_path / "locked").mkdir()
  scan = find.os.scandir

  def refuse(folder):
    if folder.name == "locked":
      raise PermissionError
    return scan(folder)

  monkeypatch.setattr(find.os, "scandir", refuse)
  data.TASKS.build("listops", {"data_dir": tmp_path})


def test_checksum_changes_with_names_sizes_and_ends(tmp_path):
  path = tmp_path / "a"
  path.write_bytes(bytes(300_000))
  sums = {find.checksum([path], tmp_path)}
  for where in (0, 299_999):
    content = bytearray(300_000)
    content[where] = 1
    path.write_bytes(content)
    sums.add(find.checksum([path], tmp_path))
  path.write_bytes(bytes(300_001))
  sums.add(find.checksum([path], tmp_path))
  sums.add(find.checksum([path.rename(tmp_path / "b")], tmp_path))
  assert len(sums) == 5


def test_lines_are_bounded(tmp_path, monkeypatch):
  path = tmp_path / "lines"
  path.write_bytes(b"one\r\ntwo\n\nlast")
  assert list(find.read_lines(path)) == [
    (1, b"one"),
    (2, b"two"),
    (3, b""),
    (4, b"last"),
  ]
  monkeypatch.setattr(find, "MAX_LINE", 10)
  path.write_bytes(b"short\n" + b"x" * 20)
  with pytest.raises(ValueError, match="line 2: lines must be shorter"):
    list(find.read_lines(path))


def test_changed_files_are_another_dataset(tmp_path):
  folder = made_up.write_listops(tmp_path / "listops-1000", count=10)
  load = lambda: data.load(
    "listops", "dev", data_dir=folder, cache_dir=tmp_path / "cache"
  )
  before = load()
  assert load().fingerprint == before.fingerprint
  made_up.write_listops(folder, count=12)
  assert len(before) == 10 and len(load()) == 12
