"""Sweeps: what is run, skipped, resumed, reported."""

import re

import pytest

from spectraformer_jax import commands
from spectraformer_jax.study import __main__ as study
from spectraformer_jax.study.sweep import cells as spec
from spectraformer_jax.study.sweep import command as sweep
from spectraformer_jax.study.sweep.cells import Sweep, expand
from tests.train.helpers import ROOT

DIGITS = {"digits": "configs/digits.py"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


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


def test_a_sweep_varies_exact_keys():
  vary = {"model.window": ("none", 31, (31, 0)), "model.num_sinks": (0, 1)}
  cells = expand(Sweep(DIGITS, ["oprf-orf"], vary=vary))
  assert cells[2].name == "digits/oprf-orf,window=31,num_sinks=0/seed0"
  windows = [cell.config().model.window for cell in cells[::2]]
  assert windows == [None, 31, (31, 0)]
  # As run_cell reads it.
  again = spec.cell_from_json(cells[4].to_json())
  assert list(again.config().model.window) == [31, 0]


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


def test_shards_are_all_cells_each_once():
  cells = list(range(7))
  parts = [sweep.shard(cells, f"{i}/3") for i in (1, 2, 3)]
  assert sorted(sum(parts, [])) == cells
  for wrong in ("3", "0/3", "4/3", "a/b"):
    with pytest.raises(ValueError, match="shard"):
      sweep.shard(cells, wrong)


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
  assert study.main(base + flags) == commands.USER_ERROR
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


def test_flags_change_what_the_file_says(tmp_path, capsys):
  file = tmp_path / "mine.py"
  file.write_text(
    "from spectraformer_jax.study.sweep.cells import Sweep\n"
    "def get_sweep():\n"
    "  return Sweep({'d': 'configs/digits.py', 'e': 'configs/digits.py'},\n"
    "    {'softmax': {}, 'local': {'model.attention_kwargs.block_size': 8}},\n"
    "    task_overrides={'d': {'optim.lr': 0.5}, 'e': {}})\n"
  )
  args = sweep.make_parser().parse_args(
    [str(file), "--out=x", "--tasks=d", "--attentions=local"]
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
  assert study.main(["sweep", "--out=x"]) == commands.USER_ERROR
  assert "give a sweep file" in capsys.readouterr().err
