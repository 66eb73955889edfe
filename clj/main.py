"""Trains one config: python -m clj.main --config=configs/NAME.py[:VARIANT]

Run it again to go on where it stopped. Exit codes: 0 complete, 1 something that you
must mend (one line says what), 75 stopped on request: start the same command again.
"""

import os
import re
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, with a variant: configs/simclr.py:smoke."
)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run is written; default runs/NAME-VARIANT."
)
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of errors.")


def main() -> int:
  try:
    app.define_help_flags()
    unknown = flags.FLAGS(sys.argv)[1:]
    if unknown:
      raise ValueError(f"unknown argument {unknown[0]!r}; see --help")
    if CONFIG.value is None:
      raise ValueError("no config; give --config=configs/NAME.py, such as simclr.py")
    config = CONFIG.value.to_dict()
    directory = WORKDIR.value or default_workdir(flags.FLAGS["config"].config_filename)
  except Exception as error:
    return complain(error, debug="--debug" in sys.argv)
  quiet_libraries()
  if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    devices = cpu_devices(config["batch_size"])
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(devices))
  from clj.train import train  # after the flags: JAX takes a second to load

  try:
    return train(directory, **config)
  except Exception as error:
    if DEBUG.value or not isinstance(error, user_errors()):
      raise
    return complain(error)


def default_workdir(config_filename: str) -> str:
  """ "configs/simclr.py:smoke" -> "runs/simclr-smoke"."""
  path, _, variant = config_filename.partition(":")
  name = os.path.splitext(os.path.basename(path))[0]
  variant = re.sub(r"[^\w.-]+", "-", variant or "demo")
  return os.path.join("runs", f"{name}-{variant}")


def cpu_devices(batch_size: int) -> int:
  """How many devices a CPU is split into: XLA runs some convolutions on one core each.

  At most the cores that this process may use, and so many that the batch divides and
  each gets 16 examples or more. Accelerators are not concerned.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
  fitting = (n for n in range(cores, 1, -1) if batch_size % n == 0)
  return next((n for n in fitting if batch_size // n >= 16), 1)


def user_errors() -> tuple:
  from clj.checkpoint import CheckpointError
  from clj.data import DataError

  return ValueError, TypeError, FloatingPointError, OSError, CheckpointError, DataError


def complain(error: Exception, debug: bool = False) -> int:
  if debug:
    traceback.print_exception(error)
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  line = lines[0] if lines else type(error).__name__
  # A misspelt key, as ml_collections says it.
  if found := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error)):
    line = f"no key {found[2]!r} in this section; did you mean {found[1]!r}?"
  elif isinstance(error, KeyError | AttributeError):
    line = f"no key {line} in the config"
  if "Traceback (most recent call last):" in lines:
    # config_flags puts the traceback of a config file into the message.
    line = lines[-1].partition(": ")[2] or lines[-1]
  print(f"clj: {line}", file=sys.stderr)
  return 1


def quiet_libraries():
  """Keeps the terminal for what the run says: other libraries report errors only."""
  from absl import logging

  logging.set_verbosity(logging.ERROR)
  logging.set_stderrthreshold("error")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


if __name__ == "__main__":
  sys.exit(main())
