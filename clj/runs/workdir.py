"""config.json: what a workdir was trained with; the guard against another recipe."""

import importlib.util
import json
import os
import re
import subprocess
from importlib import metadata

import jax
from etils import epath

from clj.cli import UserError
from clj.runs import processes

# Keys that may change between two starts of a run without changing what it computes.
FREE = (
  "mesh",
  "log_every",
  "eval_every",
  "checkpoint_every",
  "evals",
  "profile",
  "data.data_dir",
  "data.threads",
)

# Of these keys, what may differ between the processes of a run.
HOST = {"data.data_dir", "data.threads"}


def is_remote(path) -> bool:
  """Whether `path` lies in a bucket: "gs://..."."""
  return "://" in str(path)


def open_remote(path):
  """Makes a path in a bucket usable; raises ValueError, one line, where it cannot be.

  Local paths need nothing.
  """
  if not is_remote(path):
    return
  scheme = str(path).partition("://")[0]
  package = {"gs": "gcsfs", "s3": "s3fs"}.get(scheme)
  if package is None:
    raise UserError(f"{path}: no storage {scheme!r}; use gs://, s3:// or a local path")
  if importlib.util.find_spec(package) is None:
    raise UserError(f"{path} needs the package {package}: pip install {package}")
  import fsspec

  # Other processes, and TensorStore in this one, write there too.
  fsspec.config.conf.setdefault({"gs": "gcs"}.get(scheme, scheme), {})[
    "use_listings_cache"
  ] = False


def read_config(workdir) -> dict:
  """The config that the run in `workdir` was last started with."""
  return _history(workdir)[-1]["config"]


def check_is_run(workdir):
  """Raises UserError where `workdir` is not that of a run, of whatever version."""
  open_remote(workdir)
  if not _path(workdir).exists():
    raise UserError(f"{workdir} is not the workdir of a run: it has no config.json")


def check_config(workdir, config: dict):
  """Raises ValueError where `config` would continue another recipe's run.

  Also where the processes of this run were started with different configs.
  """
  if not is_remote(workdir) and (bad := re.search(r"[][*?]", os.path.abspath(workdir))):
    raise UserError(
      f"--workdir={workdir}: checkpoints cannot lie below a path with {bad[0]!r}, "
      "which their library reads as a pattern; take another"
    )
  everyone = [_flat(c) for c in processes.from_all(_plain(config))]
  for key in sorted(set().union(*everyone) - HOST):
    values = [one.get(key) for one in everyone]
    if other := [i for i, value in enumerate(values) if value != values[0]]:
      raise UserError(
        f"{key} is {values[0]!r} in process 0, but {values[other[0]]!r} in process "
        f"{other[0]}; start all processes with the same config"
      )
  history = _history(workdir, missing=[])
  if not history:
    return
  old, new = _flat(history[-1]["config"]), _flat(_plain(config))
  changed = sorted(k for k in old | new if old.get(k) != new.get(k) and not _free(k))
  if changed:
    listed = ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in changed)
    raise UserError(
      f"{workdir} holds a run with another config ({listed}); take another --workdir, "
      f"there with --config.init_from={workdir} to start from its weights"
    )


def record_config(workdir, config: dict, step: int):
  """Appends `config`, if it is new, with the step and the software it holds from."""
  history = [h for h in _history(workdir, missing=[]) if h["step"] <= step]
  entry = {"step": step, "config": _plain(config), **_software()}
  same = history and all(
    history[-1][k] == v for k, v in entry.items() if k not in ("step",)
  )
  if same or jax.process_index() != 0:
    return
  path = _path(workdir)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.parent / "config.json.partial"
  partial.write_text(json.dumps([*history, entry], indent=1) + "\n")
  partial.replace(path)


def _path(workdir) -> epath.Path:
  return epath.Path(workdir) / "config.json"


def _history(workdir, missing=None) -> list[dict]:
  open_remote(workdir)
  path = _path(workdir)
  if missing is None:
    check_is_run(workdir)
  elif not path.exists():
    return missing
  history = json.loads(path.read_text())
  if "size" in history[-1]["config"].get("data", {}):
    raise UserError(
      f"{workdir} was written by an earlier version, whose configs had another form: "
      "go on with that version (its revision is in config.json), or take another "
      f"--workdir, there with --config.init_from={workdir} to start from its weights"
    )
  return history


def _plain(config):
  """As JSON gives it back: tuples become lists."""
  return json.loads(json.dumps(config))


def _flat(config: dict, prefix: str = "") -> dict:
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict) and value:
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def _free(key: str) -> bool:
  if re.fullmatch(r"data\.columns\.\w+\.tokenizer", key):
    return True  # a path, perhaps: the run's own copy decides
  return any(key == free or key.startswith(free + ".") for free in FREE)


def _software() -> dict:
  versions = {
    package: metadata.version(package)
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  }
  try:
    revision = subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=12"],
      capture_output=True,
      text=True,
      timeout=5,
      cwd=epath.Path(__file__).parent,
    ).stdout.strip()
  except (OSError, subprocess.TimeoutExpired):
    revision = ""
  return {"git": revision or None, "versions": versions}
