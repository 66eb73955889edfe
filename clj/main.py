"""Trains one config: python -m clj.main --config=configs/NAME.py[:VARIANT]

Run it again to go on where it stopped. Exit codes: 0 complete, 1 something that you
must mend (one line says what), 75 stopped on request or by the loss of another process:
start the same command again.

On Cloud TPU, on GKE and under Slurm the processes of a run find each other. Elsewhere
start one on each host with --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import errno
import logging
import os
import re
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

from clj import processes

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, with a variant: configs/simclr.py:smoke."
)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run is written; default runs/NAME-VARIANT."
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0; not needed on a known cluster."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
HEARTBEAT = flags.DEFINE_integer(
  "heartbeat",
  processes.HEARTBEAT,
  "Seconds without a sign of life after which a process of the run counts as lost.",
  lower_bound=1,
)
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of errors.")


def main() -> int:
  processes.listen()
  try:
    app.define_help_flags()
    unknown = flags.FLAGS(sys.argv)[1:]
    if unknown:
      raise ValueError(f"unknown argument {unknown[0]!r}; see --help")
    if CONFIG.value is None:
      raise ValueError("no config; give --config=configs/NAME.py, such as simclr.py")
    config = CONFIG.value.to_dict()
    directory = WORKDIR.value or default_workdir(flags.FLAGS["config"].config_filename)
    run = processes.find(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
  except Exception as error:
    return complain(error, debug="--debug" in sys.argv)
  if run.count > 1 and not processes.is_child():
    command = [sys.executable, "-m", "clj.main", *sys.argv[1:]]
    return processes.supervise(command, HEARTBEAT.value)
  quiet_libraries()
  split_cpu(max(1, config["batch_size"] // run.count))
  if run.count == 1:
    return guarded(lambda: train(directory, config))
  code = guarded(lambda: train(directory, config, run))
  return processes.leave(code)


def train(directory: str, config: dict, run: processes.Run | None = None) -> int:
  from clj.train import train  # after the flags: JAX takes a second to load

  if run is not None:
    processes.connect(run, HEARTBEAT.value)
  return train(directory, **config)


def guarded(action) -> int:
  """The exit code of `action`; what the user must mend is said in one line."""
  try:
    return action()
  except Exception as error:
    if processes.is_loss(error):
      if DEBUG.value:
        traceback.print_exception(error)
      processes.leave_lost()
    if DEBUG.value or not isinstance(error, user_errors()):
      traceback.print_exception(error)
      return processes.FAILED
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


def split_cpu(batch_size: int):
  """Splits the CPU into `cpu_devices`, unless the environment says into how many."""
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  if "JAX_NUM_CPU_DEVICES" in os.environ:
    return
  devices = cpu_devices(batch_size)
  os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
  if "jax" in sys.modules:  # which has read its environment
    sys.modules["jax"].config.update("jax_num_cpu_devices", devices)


def user_errors() -> tuple:
  from clj.checkpoint import CheckpointError
  from clj.data import DataError

  return ValueError, TypeError, FloatingPointError, OSError, CheckpointError, DataError


def complain(error: Exception, debug: bool = False) -> int:
  if debug:
    traceback.print_exception(error)
  if isinstance(error, BrokenPipeError):  # `--help | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  line = lines[0] if lines else type(error).__name__
  if isinstance(error, OSError) and error.strerror:
    line = ": ".join(filter(None, (str(error.filename or ""), error.strerror)))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      line += "; make room there, then start the same command again"
  # A misspelt key, as ml_collections says it.
  if found := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error)):
    line = f"no key {found[2]!r} in this section; did you mean {found[1]!r}?"
  elif isinstance(error, KeyError | AttributeError):
    key = line.strip("\"'")
    line = f"no key {key!r} in this section of the config; the file explains its keys"
  if "Traceback (most recent call last):" in lines:
    # config_flags puts the traceback of a config file into the message.
    line = lines[-1].partition(": ")[2] or lines[-1]
  print(f"clj: {line}", file=sys.stderr)
  return 1


def quiet_libraries():
  """Keeps the terminal for what the run says: other libraries report errors only."""
  from absl import logging as absl_logging

  absl_logging.set_verbosity(absl_logging.ERROR)
  absl_logging.set_stderrthreshold("error")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  # Where one write of a save fails, Orbax raises that, and what becomes of the others
  # is printed with tracebacks, by asyncio and as "unraisable".
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  sys.unraisablehook = lambda error: (
    None
    if str(error.exc_value) == "Event loop is closed"
    else sys.__unraisablehook__(error)
  )


if __name__ == "__main__":
  sys.exit(main())
