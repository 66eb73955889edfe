"""What the entry points share: errors in one line, quiet libraries, a CPU's devices.

Only what the user can mend is one line: `UserError`, and what the system says of files.
A slip in code is a traceback. Both end with exit code 1.
"""

import argparse
import difflib
import errno
import inspect
import logging
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence

from ml_collections import ConfigDict

# JAX is imported where it is needed: it reads the environment that is prepared here.

FAILED = 1  # exit code: something to mend


class UserError(ValueError):
  """What only the user can mend; the message is one line with the way out."""


class UnknownKey(UserError, TypeError):
  """A key that does not exist; as a call with a wrong keyword, a TypeError too."""


def check_keywords(function: Callable, given: Iterable[str], where: str):
  """Refuses keys of a config that `function` does not take as keyword arguments.

  where: what the keys are of, such as "method". Raises UserError, with a suggestion.
  """
  parameters = inspect.signature(function).parameters.values()
  if any(p.kind == p.VAR_KEYWORD for p in parameters):
    return
  check_keys(given, [p.name for p in parameters], where)


def check_keys(given: Iterable[str], known: Iterable[str], where: str):
  """Refuses keys that are not `known`, with a suggestion; raises UnknownKey."""
  known = list(known)
  for key in given:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1)
      hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
      raise UnknownKey(f"no key {key!r} in {where}; {hint}")


def guarded(action: Callable[[], int], debug: bool = False) -> int:
  """The exit code of `action`; what the user must mend is said in one line."""
  try:
    return action()
  except Exception as error:
    return failed(error, debug)


def failed(error: Exception, debug: bool = False) -> int:
  """Says an error, of the user's in one line; returns the exit code."""
  if debug or not isinstance(error, UserError | FloatingPointError | OSError):
    traceback.print_exception(error)
    return FAILED
  return complain(error)


def complain(error: Exception) -> int:
  """Says an error in one line; returns the exit code."""
  if isinstance(error, BrokenPipeError):  # `--help | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED
  print(f"clj: {one_line(error)}", file=sys.stderr)
  return FAILED


def one_line(error: Exception) -> str:
  """What an error says, in one line."""
  if isinstance(error, OSError) and error.strerror:
    line = ": ".join(filter(None, (str(error.filename or ""), error.strerror)))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      line += "; make room there, then start the same command again"
    return line
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return lines[0] if lines else type(error).__name__


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


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    raise UserError(f"{message}; see --help")


def parser(module: str, description: str) -> argparse.ArgumentParser:
  """A parser of flags, whose complaints are `UserError`s.

  module: such as "clj.main". description: of the command, its first line for --help.
  """
  return _Parser(
    prog=f"python -m {module}",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def add_process_flags(to: argparse.ArgumentParser):
  """Flags that say which process of a run this is."""
  to.add_argument("--coordinator", help="HOST:PORT of process 0; not on known clusters")
  to.add_argument("--num_processes", type=int, help="processes of the run")
  to.add_argument("--process_id", type=int, help="which one this is, from 0")
  to.add_argument(
    "--heartbeat",
    type=int,
    default=40,
    help="seconds without a sign of life after which a process counts as lost",
  )


CONFIG_HELP = (
  "--config=configs/NAME.py[:VARIANT] names a recipe; --config.key=value changes it"
)


def read_config(argv: Sequence[str]) -> tuple[dict, str]:
  """The config that --config and --config.key=value describe, and its file's name.

  A key may be one that the recipe does not state: what takes its section refuses those
  that do not exist. Raises UserError for what else there is in `argv`.
  """
  from absl import flags
  from ml_collections import config_flags

  argv = [*argv]
  for i, argument in enumerate(argv[:-1]):
    if argument in ("--config", "-config"):  # its value comes apart
      argv[i : i + 2] = [f"--config={argv[i + 1]}"]
  names = [a.partition("=")[2] for a in argv if re.match(r"--?config=", a)]
  if not names:
    raise UserError("no config; give --config=configs/NAME.py, such as simclr.py")
  overrides = [a for a in argv if not re.match(r"--?config=", a)]
  recipe = load_recipe(names[-1])
  config, values = ConfigDict(recipe), flags.FlagValues()
  for each in overrides:
    if found := re.match(r"--?(?:no)?config\.([^=]*)", each):
      _make_room(config, found[1])
  try:
    config_flags.DEFINE_config_dict(
      "config",
      config,
      flag_values=values,
      sys_argv=["clj", *overrides],
      accept_new_attributes=True,
      lock_config=False,
    )
    unknown = values(["clj", *overrides])[1:]
  except (ValueError, KeyError, AttributeError, flags.Error) as error:
    raise UserError(one_line(error).strip('"').removeprefix("flag ")) from error
  if unknown:
    raise UserError(f"unknown argument {unknown[0]!r}; see --help")
  config = values["config"].value.to_dict()
  check_keys(config, recipe, "the config")
  return config, names[-1]


def _make_room(config, path: str):
  """Makes the sections that lead to a key which the recipe does not have."""
  *sections, _ = path.split(".")
  for section in sections:
    if section not in config:
      config[section] = {}
    if not isinstance(config[section], ConfigDict):
      return  # its value is no section; the parser says so
    config = config[section]


def load_recipe(name: str) -> dict:
  """The recipe FILE.py[:VARIANT]; raises UserError where there is none."""
  path, _, variant = name.partition(":")
  if not os.path.isfile(path):
    raise UserError(f"there is no file {path}; the recipes of clj are in configs/")
  return runpy.run_path(path)["get_config"](variant or None).to_dict()


def default_workdir(config_filename: str) -> str:
  """ "configs/simclr.py:smoke" -> "runs/simclr-smoke"."""
  path, _, variant = config_filename.partition(":")
  name = os.path.splitext(os.path.basename(path))[0]
  variant = re.sub(r"[^\w.-]+", "-", variant or "demo")
  return os.path.join("runs", f"{name}-{variant}")
