"""Sweeps: what is run, skipped, resumed, reported."""

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import time

import pytest

from spectraformer_jax.study import __main__ as study
from spectraformer_jax.study.sweep import cells as spec
from spectraformer_jax.study.sweep import command as sweep
from spectraformer_jax.study.sweep.board import Board
from spectraformer_jax.study.sweep.cells import Sweep, expand
from spectraformer_jax.train.lock import workdir_lock
from spectraformer_jax.train.writers import read_rows, result_row
from tests.train.conftest import ROOT, TINY, run_python, start_python

BROKEN = "raise SystemExit(3)"
DIGITS = {"digits": "configs/digits.py"}

RESULT = {
  "step": 48,
  "test/accuracy": 0.5,
  "dev/accuracy_best": 0.5,
  "train_seconds": 10.0,
  "compile_seconds": 2.0,
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


def fake(started, broken=()):
  """Starts processes that write a result at once, or fail."""

  def start(cell, workdir, cpus):
    started.append((cell.name, cpus))
    lines = json.dumps(RESULT) + "\n"
    if cell.attention in broken:
      (workdir / spec.LOG).write_text("Traceback\nValueError: too bad\n\n")
      return subprocess.Popen([sys.executable, "-S", "-c", BROKEN])
    (workdir / "metrics.jsonl").write_text(lines)
    return subprocess.Popen([sys.executable, "-S", "-c", ""])

  return start


def three_cells():
  return expand(Sweep(DIGITS, ["softmax", "oprf-orf", "local"]))


def test_cells_are_tasks_times_attentions_times_seeds():
  cells = expand(
    Sweep(
      {**DIGITS, "lists": "configs/listops.py:quick"},
      {"oprf-orf": {}, "narrow": {"feature_map.num_features": 16}},
      seeds=(0, 3),
      overrides={"train.num_steps": 500, "optim.lr": 0.1},
      task_overrides={"lists": {"optim.lr": 0.5}},
      vary={"model.num_layers": (1, 2)},
    )
  )
  names = [cell.name for cell in cells]
  assert len(names) == len(set(names)) == 2 * 2 * 2 * 2
  assert names[0] == "digits/oprf-orf,num_layers=1/seed0"
  assert names[-1] == "lists/narrow,num_layers=2/seed3"
  first, last = cells[0].config(), cells[-1].config()
  assert (first.optim.lr, last.optim.lr) == (0.1, 0.5)
  assert (first.model.num_layers, last.model.num_layers) == (1, 2)
  assert (first.train.seed, last.train.seed) == (0, 3)
  assert last.feature_map.num_features == 16
  assert last.optim.schedule == "cosine"  # of the variant
  assert spec.cell_from_json(cells[-1].to_json()) == cells[-1]


def test_a_cell_tells_the_command_that_repeats_it(tmp_path):
  cell = expand(Sweep(DIGITS, ["local"], overrides={"optim.lr": 0.5}))[0]
  assert cell.command(tmp_path) == (
    "python train.py --config=configs/digits.py --config.optim.lr=0.5 "
    f"--config.model.attention=local --config.train.seed=0 --workdir={tmp_path}"
  )


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"attentions": ["sofmax"]}, "Did you mean 'softmax'"),
    ({"attentions": {"mine": {"optim.lr": 1.0}}}, "'mine' is no pair"),
    ({"attentions": ["softmax", "softmax"]}, "is there twice"),
    ({"tasks": {"a/b": "configs/digits.py"}}, "cannot be the name"),
    ({"task_overrides": {"texts": {}}}, "no task of this sweep: digits"),
  ],
)
def test_mistakes_in_a_sweep(changes, words):
  options = {"tasks": DIGITS, "attentions": ["softmax"]} | changes
  if options["attentions"] == ["softmax", "softmax"]:
    options["vary"] = {"optim.lr": (0.1, 0.1)}
    options["attentions"] = ["softmax"]
  with pytest.raises(ValueError, match=words):
    expand(Sweep(**options))


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    ({"optim.lrr": 1.0}, "Unknown config key 'optim.lrr'"),
    ({"optim.lr": "fast"}, "config.optim.lr='fast'"),
    ({"optim.lr": -1.0}, "config.optim.lr must be positive"),
  ],
)
def test_a_wrong_override_fails_its_cell_before_it_starts(
  overrides, words, tmp_path
):
  started = []
  cells = expand(Sweep(DIGITS, ["softmax"], overrides=overrides))
  failed = sweep.run_cells(cells, tmp_path, start=fake(started), live=False)
  assert words in failed["digits/softmax/seed0"]
  assert started == []


def test_a_failing_cell_is_reported_and_does_not_stop_the_rest(
  tmp_path, capsys
):
  started = []
  failed = sweep.run_cells(
    three_cells(), tmp_path, start=fake(started, broken=("oprf-orf",))
  )
  assert [name for name, _ in started] == [c.name for c in three_cells()]
  assert failed == {"digits/oprf-orf/seed0": "status 3: ValueError: too bad"}
  err = capsys.readouterr().err
  assert "digits/oprf-orf/seed0: FAILED" in err
  assert "2 finished, 0 running, 0 waiting, 1 failed" in err


def test_finished_cells_are_skipped_and_failed_ones_tried_again(tmp_path):
  sweep.run_cells(
    three_cells(), tmp_path, start=fake([], broken=("oprf-orf",)), live=False
  )
  started = []
  failed = sweep.run_cells(
    three_cells(), tmp_path, start=fake(started), live=False
  )
  assert not failed
  assert [name for name, _ in started] == ["digits/oprf-orf/seed0"]


def test_a_finished_cell_of_another_config_is_not_taken_for_this_one(tmp_path):
  cell = three_cells()[0]
  other = expand(Sweep(DIGITS, ["softmax"], overrides={"optim.lr": 0.5}))[0]
  workdir = tmp_path / cell.name
  workdir.mkdir(parents=True)
  (workdir / "config.json").write_text(
    json.dumps({"config": json.loads(cell.config().to_json_best_effort())})
  )
  (workdir / "metrics.jsonl").write_text(json.dumps(RESULT) + "\n")
  started = []
  run = lambda cell: sweep.run_cells(
    [cell], tmp_path, start=fake(started), live=False
  )
  assert not run(cell)
  assert "config.optim.lr is 0.002 there and 0.5" in run(other)[other.name]
  assert started == []


def test_jobs_run_side_by_side_on_their_own_cores(tmp_path):
  alive, together = [], []

  def start(cell, workdir, cpus):
    (workdir / "metrics.jsonl").write_text(json.dumps(RESULT) + "\n")
    process = subprocess.Popen(
      [sys.executable, "-S", "-c", "import time; time.sleep(0.5)"]
    )
    alive.append(process)
    together.append(sum(p.poll() is None for p in alive))
    return process

  sweep.run_cells(three_cells(), tmp_path, jobs=2, start=start, live=False)
  assert max(together) == 2
  assert sweep.share_of_cpus(0, 1) == ""
  shares = [set(sweep.share_of_cpus(i, 2).split(",")) for i in range(2)]
  assert all(shares)


def test_shards_are_all_cells_each_once():
  cells = list(range(7))
  parts = [sweep.shard(cells, f"{i}/3") for i in (1, 2, 3)]
  assert sorted(sum(parts, [])) == cells
  for wrong in ("3", "0/3", "4/3", "a/b"):
    with pytest.raises(ValueError, match="shard"):
      sweep.shard(cells, wrong)


@pytest.mark.parametrize("finished", [False, True])
def test_a_cell_of_another_process_is_waited_for(finished, tmp_path, capsys):
  cells = three_cells()
  elsewhere = tmp_path / cells[0].name
  held = contextlib.ExitStack()
  held.enter_context(workdir_lock(elsewhere))

  def start(cell, workdir, cpus):
    if cell is cells[2]:  # the last that is free: now the other one ends
      if finished:
        (elsewhere / "metrics.jsonl").write_text(json.dumps(RESULT) + "\n")
      held.close()
    return fake(started)(cell, workdir, cpus)

  started = []
  assert not sweep.run_cells(cells, tmp_path, start=start, live=False)
  names = [cell.name for cell in cells]
  assert [n for n, _ in started] == names[1:] + names[: not finished]
  err = capsys.readouterr().err
  assert err.count(f"{names[0]}: another process runs it") == 1


def test_a_cell_ends_with_its_sweep_however_that_ends():
  cell = subprocess.Popen(
    [
      *(sys.executable, "-c"),
      "import time; from spectraformer_jax.study.sweep import run_cell as r; "
      "r.stop_with_the_sweep(); print('up', flush=True); time.sleep(60)",
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  assert cell.stdout.readline() == b"up\n"
  assert cell.poll() is None
  cell.stdin.close()  # as the kernel does when the sweep is killed
  assert cell.wait(timeout=10) == -signal.SIGTERM
  cell.stdout.close()


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--tasks=digit"], "config file 'configs/digit.py'.*Did you mean 'digits"),
    (["--tasks=listops:quik"], "Unknown variant 'quik'"),
    (["--set=train.num_step=4"], "Did you mean 'train.num_steps'"),
    (["--vary=train.num_step=4,5"], "Did you mean 'train.num_steps'"),
    (["--set=train.num_steps=-4"], "must be a positive integer, got -4"),
    (["--set=train.num_steps"], "must be KEY=VALUE"),
    (["--seeds=-1"], "config.train.seed must be an integer >= 0"),
    (["--shard=3/2"], "i must be from 1 to n"),
  ],
)
def test_a_wrong_flag_is_told_in_one_line(flags, words, tmp_path, capsys):
  base = ["sweep", f"--out={tmp_path}", "--tasks=digits"]
  base += ["--attentions", "softmax", "local"]
  assert study.main(base + flags) == study.USER_ERROR
  (line,) = capsys.readouterr().err.splitlines()
  assert re.search(words, line)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("failed", "status", "words"),
  [({}, 0, "2 of 2"), ({"digits/local/seed0": "full"}, 1, "1 of 2")],
)
def test_the_end_is_told(failed, status, words, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sweep, "run_cells", lambda *_, **__: failed)
  command = ["sweep", f"--out={tmp_path}", "--tasks=digits"]
  assert study.main([*command, "--attentions", "softmax", "local"]) == status
  told = capsys.readouterr()
  assert told.out.startswith(f"{words} cells have finished.")
  assert told.err.count("failed: ") == len(failed)


def test_the_time_left_is_that_of_the_task_shared_by_the_jobs(tmp_path):
  cells = expand(
    Sweep(
      {**DIGITS, "lists": "configs/listops.py:quick"},
      ["softmax", "gaussian", "local"],
    )
  )
  board = Board(cells, tmp_path, jobs=2, live=False)
  assert board.seconds_left() is None
  board.skip(cells[0], RESULT)
  assert board.seconds_left() == pytest.approx(5 * 12 / 2)
  board.skip(cells[3], RESULT | {"train_seconds": 98.0})
  # Two of 12 s and two of 100 s remain.
  assert board.seconds_left() == pytest.approx((2 * 12 + 2 * 100) / 2)


def test_the_live_table_is_drawn(tmp_path):
  cells = three_cells()
  board = Board(cells, tmp_path, jobs=1, live=True)
  board._live.console.file = out = io.StringIO()
  with board:
    board.skip(cells[0], RESULT)
    board.fail(cells[1], "status 1: bad")
    board.start(cells[2])
  text = out.getvalue()
  assert "finished" in text and "failed: status 1: bad" in text
  assert "1 finished, 1 running, 0 waiting, 1 failed, ETA" in text


def test_flags_change_what_the_file_says(tmp_path, capsys):
  file = tmp_path / "mine.py"
  file.write_text(
    "from spectraformer_jax.study.sweep.cells import Sweep\n"
    "def get_sweep():\n"
    "  return Sweep({'d': 'configs/digits.py', 'e': 'configs/digits.py'},\n"
    "    {'softmax': {}, 'local': {'model.attention_kwargs.block_size': 8}},\n"
    "    task_overrides={'d': {'optim.lr': 0.5}, 'e': {}})\n"
  )
  args = study.make_parser().parse_args(
    ["sweep", str(file), "--out=x", "--tasks=d", "--attentions=local"]
    + "--seeds 1 2 --set optim.lr=0.25 --vary model.num_heads=1,2".split()
  )
  cells = expand(sweep.make_sweep(args))
  assert [c.attention for c in cells[:2]] == [
    "local,num_heads=1",
    "local,num_heads=2",
  ]
  config = cells[0].config()
  assert config.optim.lr == 0.25 and config.model.num_heads == 1
  assert config.model.attention_kwargs.block_size == 8
  assert {c.seed for c in cells} == {1, 2}

  status = study.main(["sweep", str(file), f"--out={tmp_path}", "--list"])
  assert status == 0
  assert capsys.readouterr().out.splitlines()[0] == "to do     d/softmax/seed0"
  assert study.main(["sweep", "--out=x"]) == study.USER_ERROR
  assert "give a sweep file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_finishes(tmp_path):
  """Real cells: one killed in training, one that cannot be built."""
  tiny = {k: v for k, v in TINY.items() if k != "task.name"}
  tiny |= {"train.num_steps": 300, "checkpoint.every": 20, "eval.every": 100}
  tiny |= {"task.cache_dir": tmp_path / "cache"}
  sets = [f"{key}={value}" for key, value in tiny.items()]
  flags = ["-m", "spectraformer_jax.study", "sweep", f"--out={tmp_path}"]
  flags += ["--tasks", "digits", "--attentions", "local", "oprf-nothing"]
  flags += ["--set", *sets]
  workdir = tmp_path / "digits/local/seed0"

  limit = 600  # of machines that others use, too
  deadline = time.monotonic() + limit
  with start_python(*flags) as process:
    while len(read_rows(workdir)) < 6 and time.monotonic() < deadline:
      time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=limit)
  assert process.returncode == sweep.INTERRUPTED, err
  assert result_row(read_rows(workdir)) is None
  steps = read_rows(workdir)[-1]["step"]
  assert steps >= 40

  code, _, err = run_python(*flags, timeout=limit)
  assert code == 1, err
  assert "oprf-nothing/seed0: FAILED: status 1: error: Unknown weight" in err
  assert result_row(read_rows(workdir))["pair"] == "local"
  assert "resumes at step" in (workdir / spec.LOG).read_text()
