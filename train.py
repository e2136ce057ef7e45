"""Trains a random-feature Transformer; `python train.py` needs no flags.

  python train.py [--config=configs/X.py[:variant]] [--workdir=DIR]
                  [--config.section.key=value ...]

The same command again resumes a run that was stopped. For one run on several
machines, use the same command on each with --coordinator=HOST:PORT,
--num_processes=N and --process_id=0 ... N-1, or with --multihost in a cluster.
"""

import logging as python_logging
import os
import re
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from spectraformer_jax.train import config as train_config
from spectraformer_jax.train import loop
from spectraformer_jax.train.devices import host_memory, hosts
from spectraformer_jax.train.run import nonfinite, report, run_folder
from spectraformer_jax.train.run.progress import quiet_other_packages

ROOT = Path(__file__).resolve().parent
# Exit statuses; the last two are those of sysexits.h. The same command resumes
# from the last checkpoint after RESUMABLE, and after IO_ERROR once the disk has
# space.
USER_ERROR, DIVERGED, IO_ERROR, RESUMABLE = 2, 3, 74, 75

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)


def _is_sound(arg: str) -> bool:
  """Whether `config_flags` can read an argument without a traceback."""
  override = _OVERRIDE.match(arg)
  try:
    return not override or train_config.check_key(override[1]) is None
  except ValueError:
    return False


_CONFIG = config_flags.DEFINE_config_file(
  "config",
  str(ROOT / "configs" / "digits.py"),
  "The experiment: a file, and after a colon its variant if it has any, "
  "recipe=NAME for another optimiser, or both with a comma between. "
  "Change any key with --config.section.key=value.",
  # The flag accepts unknown keys. `check_key` refuses them and names the
  # nearest known one; only the sections of options may have any key.
  lock_config=False,
  accept_new_attributes=True,
  # The flag reads the sound arguments here, when it is defined; `parse_flags`
  # reports the mistakes in the others.
  sys_argv=list(filter(_is_sound, sys.argv)),
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; default runs/<config>-<pair>-seed<seed>."
)

_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "Address host:port of process 0, with any free port."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Number of processes of the run."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Number of this process, from 0 on."
)
_MULTIHOST = flags.DEFINE_bool(
  "multihost",
  False,
  "Ask Slurm, Open MPI or Kubernetes for --coordinator, --num_processes and "
  "--process_id.",
)
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
  "heartbeat_seconds", 100, "A process silent for longer counts as gone."
)

flags.FLAGS.set_default("verbosity", logging.INFO)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags with absl; reports a mistake in one line, no traceback."""
  try:
    kept, none_keys = argv[:1], set[str]()
    for arg in argv[1:]:
      if override := _OVERRIDE.match(arg):
        key, value = override.groups()
        train_config.check_key(key)
        none_keys.discard(key)  # the last of several overrides counts
        # An integer flag cannot read "none", so None is set below.
        if train_config.is_none(key, value):
          none_keys.add(key)
          continue
      kept.append(arg)
      config = re.match(r"--?config=([^:]*)", arg)
      if config and not Path(config[1]).is_file():
        raise ValueError(f"There is no config file {config[1]!r}.")
    rest = flags.FLAGS(kept)
    _CONFIG.value.update_from_flattened_dict(dict.fromkeys(none_keys))
    return rest
  except Exception as error:
    fail(error)


def fail(error: Exception, status: int = USER_ERROR) -> NoReturn:
  """Prints one line and exits; --verbosity=1 shows the traceback as well."""
  logging.debug("traceback:", exc_info=error)
  # A long message of a dependency names the cause in its last line.
  lines = [line for line in str(error).splitlines() if line.strip()]
  message = lines[-1].strip() if lines else repr(error)
  print(f"error: {message}", file=sys.stderr)
  leave(status)


def leave(status: int) -> NoReturn:
  """Exits; in a run of several processes, without waiting for the others."""
  if jax.distributed.is_initialized():
    # os._exit skips JAX's shutdown, which would wait, and skips flushing too.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def default_workdir(config: train_config.Config) -> Path:
  """Returns runs/<config>-<pair>-seed<seed>, in the current folder."""
  filename = config_flags.get_config_filename(flags.FLAGS["config"])
  source, _, variant = filename.partition(":")
  variant = re.sub(r"\W+", "-", variant)  # as in "quick,recipe=lra"
  name = Path(source).stem + (f"-{variant}" if variant else "")
  pair = train_config.pair_name(config)
  return Path("runs") / f"{name}-{pair}-seed{config.train.seed}"


def set_up_logging() -> None:
  """Logs time and text of messages; other packages log only from WARNING up."""
  logging.get_absl_handler().setFormatter(
    python_logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S")
  )
  quiet_other_packages()


def main(argv: list[str]) -> None:
  """Runs the experiment."""
  set_up_logging()
  host_memory.keep_freed_memory()
  # SIGTERM raises KeyboardInterrupt, as Ctrl-C does.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    if len(argv) > 1:
      raise ValueError(f"Unknown argument {argv[1]!r}; flags start with --.")
    config = _CONFIG.value.lock()
    if _WORKDIR.value == "":
      raise ValueError("--workdir must be a folder, got ''.")
    workdir = Path(_WORKDIR.value or default_workdir(config))
    command = shlex.join(["python", *sys.argv])
    hosts.connect(
      _COORDINATOR.value,
      _NUM_PROCESSES.value,
      _PROCESS_ID.value,
      detect=_MULTIHOST.value,
      heartbeat_seconds=_HEARTBEAT_SECONDS.value,
    )
    result = loop.train_and_evaluate(config, workdir, command=command)
  except nonfinite.NonFiniteError as error:
    fail(error, DIVERGED)
  except OSError as error:
    is_mistake = error.errno in run_folder.PATH_ERRNOS
    fail(error, USER_ERROR if is_mistake else IO_ERROR)
  except Exception as error:
    if hosts.is_lost_process(error):
      logging.debug("traceback:", exc_info=error)
      print(
        "error: another process of this run has gone; the same command on all "
        "of them goes on from the last checkpoint",
        file=sys.stderr,
      )
      leave(RESUMABLE)
    # A ValueError of one line reports a mistake of the user.
    if isinstance(error, ValueError) and "\n" not in str(error):
      fail(error)
    # With several processes, `raise` would wait for the others at exit.
    if jax.distributed.is_initialized():
      traceback.print_exc()
      leave(1)
    raise
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on from here", file=sys.stderr)
    sys.exit(RESUMABLE)
  if hosts.is_main():
    report.print_summary(workdir)
  if result.get("diverged"):
    message = f"{result['diverged']}; {nonfinite.ADVICE}"
    fail(nonfinite.NonFiniteError(message), DIVERGED)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
