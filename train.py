"""Trains a random-feature Transformer; `python train.py` needs no flags.

  python train.py [--config=configs/X.py[:variant]] [--workdir=DIR]
                  [--config.section.key=value ...]

The same command again goes on where the run was stopped.
"""

import logging as python_logging
import re
import shlex
import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from spectraformer_jax.train import config as train_config
from spectraformer_jax.train import loop, report
from spectraformer_jax.train.nonfinite import NonFiniteError

ROOT = Path(__file__).resolve().parent
# Exit statuses. The last two are those of sysexits.h: the same command goes on
# from the last checkpoint after RESUMABLE, and after IO_ERROR once there is
# space on the disk.
USER_ERROR, DIVERGED, IO_ERROR, RESUMABLE = 2, 3, 74, 75

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  str(ROOT / "configs" / "digits.py"),
  "The experiment: a file, and after a colon its variant if it has any. "
  "Change any key with --config.section.key=value.",
  # New keys are let through here and refused by `check_key`, which knows the
  # sections that take any key and names the nearest one otherwise.
  lock_config=False,
  accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run; default runs/<config>-<pair>-seed<seed>.",
)

flags.FLAGS.set_default("verbosity", logging.INFO)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses with absl; a mistake ends in one line, not in a traceback."""
  try:
    for arg in argv[1:]:
      override = re.match(r"--?(?:no)?config\.([^=]+)", arg)
      if override:
        train_config.check_key(override[1])
      config = re.match(r"--?config=([^:]+)", arg)
      if config and not Path(config[1]).is_file():
        raise ValueError(f"There is no config file {config[1]!r}.")
    return flags.FLAGS(argv)
  except Exception as error:
    fail(error)


def fail(error: Exception, status: int = USER_ERROR) -> None:
  """Prints one line and exits; --verbosity=1 shows the traceback as well."""
  logging.debug("traceback:", exc_info=error)
  # Others' errors may be long; what went wrong is then in the last line.
  lines = [line for line in str(error).splitlines() if line.strip()]
  message = lines[-1].strip() if lines else repr(error)
  print(f"error: {message}", file=sys.stderr)
  sys.exit(status)


def default_workdir(config) -> Path:
  """runs/<config>-<pair>-seed<seed>, in the current folder."""
  source, _, variant = flags.FLAGS["config"].config_filename.partition(":")
  name = Path(source).stem + (f"-{variant}" if variant else "")
  pair = train_config.pair_name(config)
  return Path("runs") / f"{name}-{pair}-seed{config.train.seed}"


def set_up_logging() -> None:
  """Time and text of each line; of other packages only warnings."""
  handler = logging.get_absl_handler()
  handler.setFormatter(
    python_logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S")
  )
  handler.addFilter(
    lambda record: (
      record.levelno > python_logging.INFO
      or "spectraformer_jax" in Path(record.pathname).parts
    )
  )


def main(argv: list[str]) -> None:
  """Runs the experiment."""
  set_up_logging()
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # as for Ctrl-C
  try:
    if len(argv) > 1:
      raise ValueError(f"Unknown argument {argv[1]!r}; flags start with --.")
    config = _CONFIG.value.lock()
    workdir = Path(_WORKDIR.value or default_workdir(config))
    command = shlex.join(["python", *sys.argv])
    loop.train_and_evaluate(config, workdir, command=command)
  except ValueError as error:
    if "\n" in str(error):  # not a mistake of the user's: those have one line
      raise
    fail(error)
  except NonFiniteError as error:
    fail(error, DIVERGED)
  except OSError as error:
    fail(error, IO_ERROR)
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on from here", file=sys.stderr)
    sys.exit(RESUMABLE)
  report.print_summary(workdir)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
