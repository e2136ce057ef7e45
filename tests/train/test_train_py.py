"""`python train.py` as a user runs it, in processes of its own."""

import json
import re
import time

import pytest

from configs import digits, listops
from spectraformer_jax.train.config import OPEN_SECTIONS, flatten
from spectraformer_jax.train.run.writers import read_rows
from tests.train.helpers import (
  ROOT,
  TINY,
  as_flags,
  run_python,
  same_arrays,
  saved_arrays,
  start_python,
  without_times,
)

TRAIN = str(ROOT / "train.py")

# Parses the flags as train.py does and prints the config instead of training.
PARSE = f"""
import json, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
names = runpy.run_path({TRAIN!r})
sys.argv[0] = {TRAIN!r}
names["parse_flags"](sys.argv)
config = names["_CONFIG"].value.lock()
print(json.dumps([config.to_dict(), str(names["default_workdir"](config))]))
"""


def parse(*flags: str):
  return run_python("-c", PARSE, *flags)


def other_value(path, value):
  """A value of the key's type that is not its default."""
  if path in OPEN_SECTIONS:
    return {"anything": 3}
  if value is None:
    optional = {
      "progress_bar": True,
      "cache_dir": "x",
      "tokenizer": "full",
      "wandb": "x",
      "init_from": "x",
      "teacher": "x",
    }
    return optional.get(path.split(".")[-1], 7)
  if isinstance(value, bool):
    return not value
  if isinstance(value, tuple):
    return (*value, 7)
  return value + 1 if isinstance(value, int | float) else value + "x"


@pytest.mark.parametrize(
  "experiment, get_config",
  [
    ("digits.py", digits.get_config),
    ("listops.py", listops.get_config),
    (
      "listops.py:quick,recipe=lra",
      lambda: listops.get_config("quick,recipe=lra"),
    ),
  ],
)
@pytest.mark.quick_every(3)
def test_every_key_can_be_overridden(experiment, get_config):
  before = flatten(get_config().to_dict())
  wanted = {path: other_value(path, value) for path, value in before.items()}
  code, out, err = parse(
    f"--config={ROOT}/configs/{experiment}", *as_flags(wanted)
  )
  assert code == 0, err
  config, workdir = json.loads(out)
  # Through JSON, as the config was: it knows no tuples.
  assert flatten(config) == json.loads(json.dumps(wanted))
  name = re.sub(r"\W+", "-", experiment.replace(".py", ""))
  assert workdir == f"runs/{name}-spectralx-seed1"


def test_keywords_of_components_and_matrices():
  code, out, err = parse(
    "--config.feature_map.component_kwargs.A=-0.1",
    "--config.feature_map.component_kwargs.learnable=true",
    "--config.feature_map.weight_matrix_kwargs.scramble=owen",
    "--config.task.kwargs.max_len=128",
  )
  assert code == 0, err
  config, workdir = json.loads(out)
  section = config["feature_map"]
  assert section["component_kwargs"] == {"A": -0.1, "learnable": True}
  assert section["weight_matrix_kwargs"] == {"scramble": "owen"}
  assert config["task"]["kwargs"] == {"max_len": 128}
  assert workdir == "runs/digits-oprf-orf-seed0"


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--config.optim.lrr=1", "'optim.lrr'. Did you mean 'optim.lr'?"),
    ("--config.feature_map.num_features=many", "num_features"),
    ("--config.feature_map.component=opfr", "Did you mean 'oprf'?"),
    ("--config.model.window=wide", "window must be None, an int of 0 or more"),
    ("--config=no/such/file.py", "no/such/file.py"),
    ("--config=configs/listops.py:fast", "Unknown variant 'fast'"),
    ("digits", "Unknown argument 'digits'"),
    *(
      pytest.param(flag, words, marks=pytest.mark.slow)
      for flag, words in (
        ("--config=", "There is no config file ''"),
        ("--config=/dev/null", "There is no config file '/dev/null'"),
        ("--config=" + "x" * 300 + ".py", "x" * 300),
        ("--workdir=", "--workdir must be a folder"),
        ("--workdir=/dev/null", "'/dev/null' is a file"),
        ("--workdir=/dev/null/x/y", "--workdir must be a folder"),
        ("--workdir=" + "x" * 300, "--workdir must be a folder"),
        ("--config.task.cache_dir=/dev/null", "/dev/null"),
        ("--config.model.init_from=" + "x" * 300, "x" * 300),
        ("--config.train.seed=18446744073709551616", "below 2**64"),
        ("--config.train.seed=-1", "integer >= 0"),
        ("--config.feature_map.component_kwargs.kernel=[1]", "got (1,)"),
        ("--config.feature_map.component_kwargs.kernel.x=1", "one name after"),
        ("--config.task.kwargs.max_len.x=1", "one name after"),
        ("--config.task.kwargs.seed=1", "set config.task.seed"),
        ("--config.model.dropout_rate=0.999999", "dropout_rate"),
        ("--config.train.num_steps=none", "num_steps"),
      )
    ),
  ],
)
def test_mistakes_end_in_one_line(flag, message, tmp_path):
  workdir = f"--workdir={tmp_path / 'run'}"
  code, out, err = run_python(TRAIN, workdir, flag)
  assert code == 2 and out == ""
  lines = err.strip().splitlines()
  assert len(lines) == 1, err
  assert lines[0].startswith("error: ") and message in lines[0]
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_bar_and_a_table_without_a_terminal(cache_dir, tmp_path):
  values = TINY | {"task.cache_dir": cache_dir, "train.num_steps": 8}
  del values["logging.progress_bar"]
  command = [TRAIN, f"--workdir={tmp_path}", *as_flags(values)]
  code, out, err = run_python(*command)
  assert code == 0, err
  assert "test accuracy, best-dev parameters" in out
  assert "step 8: dev accuracy" in err and "\x1b" not in err + out
  again, out_again, _ = run_python(*command)
  assert again == 0 and out_again == out
  report = (tmp_path / "report.md").read_text()
  assert f"--workdir={tmp_path} --config.task.name=digits" in report


@pytest.mark.slow
@pytest.mark.parametrize("exact", [{}, {"model.window": "(9, 2)"}])
def test_killed_and_resumed_equals_uninterrupted(exact, cache_dir, tmp_path):
  values = TINY | {"task.cache_dir": cache_dir, "checkpoint.every": 5} | exact
  flags = as_flags(values)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  code, _, err = run_python(TRAIN, f"--workdir={whole}", *flags)
  assert code == 0, err
  with start_python(TRAIN, f"--workdir={killed}", *flags) as process:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= 16 for row in read_rows(killed)):
      assert process.poll() is None, process.communicate()
      assert time.monotonic() < deadline
      time.sleep(0.002)
  assert "test/accuracy" not in read_rows(killed)[-1]
  code, _, err = run_python(TRAIN, f"--workdir={killed}", *flags)
  assert code == 0 and "resumes at step" in err, err
  same_arrays(saved_arrays(killed, 48), saved_arrays(whole, 48))
  assert without_times(read_rows(killed)) == without_times(read_rows(whole))
