"""Checkpoints: Orbax, asynchronous and atomic, guarded by hashes of their files.

    workdir/checkpoints/STEP/   what Orbax wrote: train state, clock, score
    workdir/hashes/STEP.P.json  size and SHA-256 of each file of process P
    workdir/damaged/            what failed the check: renamed, never deleted

Orbax commits a checkpoint by renaming its directory, so that a killed run leaves a
whole one or none; but it restores a file with a flipped bit without a word. Hence the
hashes: a background thread writes them once a checkpoint is committed, `restore` checks
them. Each process hashes what it wrote and checks its share, and all take the same
checkpoint.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from clj import sharding
from clj.cli import UserError
from clj.runs import processes
from clj.runs.workdir import is_remote


class CheckpointError(UserError):
  """No checkpoint that can be restored; the message is one line for the user."""


class Checkpoints:
  """The checkpoints of one workdir, newest `keep` and the best one kept.

  best: (name, sign) of the metric whose highest (1) or lowest (-1) value marks the best
    checkpoint, or None.
  committed: called with the step of each checkpoint that is whole, from another thread.
  """

  def __init__(
    self,
    workdir,
    *,
    keep: int = 2,
    best: tuple[str, int] | None = None,
    committed: Callable[[int], None] = lambda step: None,
  ):
    # Orbax wants whole paths; a bucket's is one.
    whole = is_remote(workdir)
    self.workdir = epath.Path(workdir if whole else os.path.abspath(workdir))
    self.directory = self.workdir / "checkpoints"
    self.best = best or ("", 1)
    self.committed = committed
    self._keep = keep
    self._hashing: list[threading.Thread] = []
    self._over = threading.Event()  # what is not committed by then never will be
    self._saver = None
    self._newest = None  # step that was saved last
    self._failed: Exception | None = None  # in a thread

  def steps(self) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    if not self.directory.exists():
      return []
    found = [p for p in self.directory.iterdir() if p.name.isdigit()]
    return sorted(int(p.name) for p in found if _committed(p))

  def save(self, step: int, state, clock: dict, metrics: dict[str, float]):
    """Starts saving; returns once the state is copied off the device.

    clock: JSON-able, whatever the loop needs beside the state to go on.
    metrics: of the last evaluation; may be empty.
    Raises CheckpointError where this save or an earlier one cannot be written.
    """
    with self._explained():
      self._save(step, state, clock, metrics)

  def _save(self, step: int, state, clock: dict, metrics: dict[str, float]):
    saver = self._open()
    # A checkpoint of this step that somebody removed by hand may have left its hashes,
    # also those of more processes than there are now.
    for manifest in self._manifests(step):
      if _writer(manifest) % jax.process_count() == jax.process_index():
        manifest.unlink(missing_ok=True)
    saver.check_for_errors()
    self._newest = step
    name, sign = self.best
    score = {"score": sign * metrics[name]} if name in metrics else {}
    saver.save(
      self.directory / str(step),
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        clock=ocp.args.JsonSave(clock),
        metrics=ocp.args.JsonSave(score),
      ),
      force=True,
    )
    thread = threading.Thread(target=self._finish, args=(step,), daemon=True)
    thread.start()
    self._hashing = [t for t in self._hashing if t.is_alive()] + [thread]

  def check(self):
    """Raises CheckpointError where a save in the background has failed by now."""
    with self._explained():
      if self._saver is not None:
        self._saver.check_for_errors()
      if self._failed is not None:
        raise self._failed

  def wait(self):
    """Until every save is committed and hashed; raises CheckpointError, as `check`."""
    with self._explained():
      try:
        if self._saver is not None:
          self._saver.wait_until_finished()
      finally:
        self._over.set()
        for thread in self._hashing:
          thread.join()
        self._over.clear()
    self.check()

  @contextlib.contextmanager
  def _explained(self):
    try:
      yield
    except (ValueError, OSError) as error:
      kept = f"step {self.steps()[-1]} is kept" if self.steps() else "none is kept yet"
      raise CheckpointError(
        f"saving step {self._newest} in {self.directory} failed: {_reason(error)}; "
        f"{kept}; mend that, then start the same command again"
      ) from error

  def close(self):
    self.wait()
    if self._saver is not None:
      self._saver.close()

  def restore(self, abstract_state, step: int | None = None):
    """Restores the newest intact checkpoint, or that of `step`.

    abstract_state: a tree of ShapeDtypeStructs with shardings; the checkpoint may have
      been written on another number of devices.
    Returns (state, clock, step), or None if there is no checkpoint at all. A damaged
    checkpoint is renamed and the one before it tried; raises CheckpointError where none
    is left, or where `step` was asked for and cannot be had.
    """
    found = processes.from_first(self.steps())
    if step is not None:
      self._require(step)
    for newest in [step] if step is not None else found[::-1]:
      fault = self.agreed_fault(newest)
      if fault is None:
        expected, _ = self._expected(newest)
        unknown = set(_files(self.directory / str(newest))) - set(expected)
        hashed = processes.from_first(not unknown)
        state, error = None, None
        try:
          state, clock = self._restore(newest, abstract_state)
        except (ValueError, OSError, KeyError, TypeError) as caught:
          error = caught
        fault = _first(processes.from_all(error and _first_line(error)))
        if fault is None:
          if not hashed:  # killed before all of it was hashed
            self._hash(newest)
          return state, clock, newest
        if hashed:  # its files are as they were written
          raise CheckpointError(
            f"checkpoint {self.directory / str(newest)} does not fit this program "
            f"({fault}); take another workdir, with init_from"
          ) from error
      if step is not None:
        raise CheckpointError(f"checkpoint {self.directory / str(step)}: {fault}")
      kept = self._set_aside(newest)
      print(f"checkpoint {newest} is damaged ({fault}); kept as {kept}", flush=True)
    if found:
      raise CheckpointError(
        f"no intact checkpoint is left in {self.workdir}; the damaged ones are in "
        f"{self.workdir / 'damaged'}; start again in another workdir"
      )
    return None

  def restore_tree(self, step: int, make_sharding=None, parts=None):
    """Restores the state of `step`, whatever its structure is, as a nested dict.

    make_sharding: (name, shape-and-dtype struct) -> sharding; default: the first
      device. The name is "params/encoder/..." and so on.
    parts: what is restored, such as ("params", "extra"); the rest is not read. None:
      all of it.
    """
    self._require(step)
    fault = self.fault(step)
    if fault is not None:
      raise CheckpointError(f"checkpoint {self.directory / str(step)}: {fault}")
    path = self.directory / str(step) / "state"
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def struct(keys, leaf):
      plain = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      where = make_sharding(sharding.name(keys), plain) if make_sharding else first
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    try:
      with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        tree = {key: tree[key] for key in tree if parts is None or key in parts}
        abstract = jax.tree_util.tree_map_with_path(
          struct, tree, is_leaf=lambda x: hasattr(x, "shape")
        )
        wanted = ocp.args.PyTreeRestore(
          abstract,
          restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
          partial_restore=True,
        )
        return checkpointer.restore(path, wanted)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
      raise CheckpointError(f"checkpoint {path}: {_first_line(error)}") from error

  def _require(self, step: int):
    found = self.steps()
    if step not in found:
      raise CheckpointError(
        f"no checkpoint of step {step} in {self.directory}; there are {found or 'none'}"
      )

  def _open(self) -> ocp.AsyncCheckpointer:
    # Opened late: reading a workdir must not create anything in it.
    if self._saver is None:
      # It logs with a traceback what it then raises in `save` or `wait`.
      logging.getLogger("absl").addFilter(_not_orbax)
      self._saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
      if jax.process_index() == 0 and self.directory.exists():
        for left in self.directory.iterdir():  # of processes that were killed
          if not left.name.isdigit() and left.is_dir():
            left.rmtree(missing_ok=True)
    return self._saver

  def _prune(self):
    """Removes all but the newest `keep` and the best of what is committed."""
    steps = self.steps()
    best = max(steps, key=lambda step: (self._score(step), step), default=None)
    for step in steps[: -self._keep]:
      if step != best or self._score(step) == -np.inf:
        with contextlib.suppress(FileNotFoundError):  # the thread of another save
          _remove(self.directory / str(step))

  def _score(self, step: int) -> float:
    path = self.directory / str(step) / "metrics" / "metadata"
    try:
      return json.loads(path.read_text()).get("score", -np.inf)
    except (OSError, ValueError):
      return -np.inf

  def _restore(self, step: int, abstract_state):
    path = self.directory / str(step)
    with _quiet(), ocp.StandardCheckpointer() as checkpointer:
      state = checkpointer.restore(path / "state", abstract_state)
    return state, self.clock(step)

  def clock(self, step: int) -> dict:
    """What `save` was given beside the state."""
    path = self.directory / str(step) / "clock" / "metadata"
    return json.loads(path.read_text())

  def _manifest(self, step: int, process: int) -> epath.Path:
    return self.workdir / "hashes" / f"{step}.{process}.json"

  def _manifests(self, step: int) -> list[epath.Path]:
    return sorted((self.workdir / "hashes").glob(f"{step}.*.json"))

  def _finish(self, step: int):
    """Hashes a checkpoint as soon as Orbax has committed it; runs in a thread."""
    try:
      self._hash_when_committed(step)
    except Exception as error:  # raised where the loop looks: in `check` and `wait`
      self._failed = error

  def _hash_when_committed(self, step: int):
    path, wait = self.directory / str(step), 0.02
    while not _committed(path):
      if self._over.wait(wait) and not _committed(path):
        return
      # A newer save may have pushed this one out before we came to look.
      if max(self.steps(), default=step) > step and not path.exists():
        return
      wait = min(2 * wait, 1.0) if is_remote(path) else wait  # each look is a request
    with contextlib.suppress(OSError):  # of a closed terminal
      self.committed(step)
    if jax.process_index() == 0:
      self._prune()
    self._hash(step)

  def _hash(self, step: int):
    path, process = self.directory / str(step), jax.process_index()
    with contextlib.suppress(FileNotFoundError):
      mine = [f for f in _files(path) if _owner(f) % jax.process_count() == process]
      files = {f: _digest(path / f) for f in mine}
      manifest = self._manifest(step, process)
      manifest.parent.mkdir(parents=True, exist_ok=True)
      partial = manifest.parent / (manifest.name + ".partial")
      body = json.dumps(files, sort_keys=True)
      check = hashlib.sha256(body.encode()).hexdigest()
      partial.write_text(json.dumps({"sha256": check, "files": body}))
      partial.replace(manifest)
      for old in manifest.parent.glob("*.json"):
        gone = not (self.directory / old.name.split(".")[0]).exists()
        if gone and _writer(old) % jax.process_count() == process:
          old.unlink(missing_ok=True)

  def fault(self, step: int) -> str | None:
    """What is wrong with the files of a checkpoint, by its hashes; None if nothing.

    A run that was killed between commit and hashing left no hashes: then Orbax's own
    checks must do.
    """
    return self._fault(step, 0, 1)

  def agreed_fault(self, step: int) -> str | None:
    """The same, of all processes together: each checks a share of the files."""
    mine = self._fault(step, jax.process_index(), jax.process_count())
    return _first(processes.from_all(mine))

  def _fault(self, step: int, share: int, shares: int) -> str | None:
    path = self.directory / str(step)
    expected, fault = self._expected(step)
    if fault is not None:
      return fault
    for file, (size, digest) in sorted(expected.items())[share::shares]:
      if not (path / file).exists():
        return f"{file} is missing"
      try:
        found = _digest(path / file)
      except OSError as error:
        return f"{file} cannot be read ({_first_line(error)})"
      if found[0] != size:
        return f"{file} has {found[0]} bytes, not {size}"
      if found[1] != digest:
        return f"{file} has changed"
    if share == 0:
      extra = set(_files(path)) - set(expected)
      hashed = {_writer(manifest) for manifest in self._manifests(step)}
      if extra := {file for file in extra if _owner(file) in hashed}:
        return f"{min(extra)} does not belong to it"
    return None

  def _expected(self, step: int) -> tuple[dict, str | None]:
    """Size and digest of each file that was hashed, and what is wrong with the list."""
    expected = {}
    for manifest in self._manifests(step):
      try:
        record = json.loads(manifest.read_text())
        body = record["files"]
        if hashlib.sha256(body.encode()).hexdigest() != record["sha256"]:
          return {}, f"{manifest.name} does not match itself"
        expected |= json.loads(body)
      except (ValueError, KeyError, TypeError, AttributeError):
        return {}, f"{manifest.name} is not readable"
    return expected, None

  def _set_aside(self, step: int) -> epath.Path:
    aside = self.workdir / "damaged"
    target = aside / str(step)
    if jax.process_index() == 0:
      aside.mkdir(parents=True, exist_ok=True)
      count = 1
      while target.exists():
        count += 1
        target = aside / f"{step}.{count}"
      _move(self.directory / str(step), target)
      for manifest in self._manifests(step):
        _move(manifest, aside / f"{target.name}.{manifest.name}")
    return epath.Path(processes.from_first(os.fspath(target)))  # all wait for it


def _remove(path: epath.Path):
  """Removes a checkpoint: killed on the way, none is left that looks whole."""
  if is_remote(path):
    (path / "commit_success.txt").unlink(missing_ok=True)
  else:
    path = path.rename(path.parent / f"{path.name}.removed")
  path.rmtree(missing_ok=True)


def _committed(path: epath.Path) -> bool:
  return path.exists() and ocp.utils.is_checkpoint_finalized(path)


def _writer(manifest: epath.Path) -> int:
  """The process whose files "STEP.P.json" describes."""
  return int(manifest.name.split(".")[1])


def _first(faults: list[str | None]) -> str | None:
  return next((fault for fault in faults if fault is not None), None)


def _move(path: epath.Path, target: epath.Path):
  if not is_remote(path):
    path.rename(target)
  elif path.is_dir():  # buckets have no directories that could be renamed
    for file in _files(path):
      _move(path / file, target / file)
  else:
    target.write_bytes(path.read_bytes())
    path.unlink()


def _files(path: epath.Path, prefix: str = "") -> list[str]:
  """Names of all files below `path`, sorted; also in a bucket."""
  found = []
  for entry in path.iterdir():
    if entry.is_dir():
      found += _files(entry, f"{prefix}{entry.name}/")
    else:
      found.append(prefix + entry.name)
  return sorted(found)


def _owner(file: str) -> int:
  """The process that wrote a file of a checkpoint: Orbax names its directories so."""
  for part in file.split("/"):
    if part.startswith("ocdbt.process_"):
      return int(part.removeprefix("ocdbt.process_"))
  return 0


def _digest(file: epath.Path) -> tuple[int, str]:
  with file.open("rb") as stream:
    digest = hashlib.sha256()
    size = 0
    while block := stream.read(2**22):
      digest.update(block)
      size += len(block)
  return size, digest.hexdigest()


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:120]


def _reason(error: Exception) -> str:
  """What the system says of it; TensorStore has that in a text of many paths."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  code = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(code[1])) if code else _first_line(error)


def _not_orbax(record: logging.LogRecord) -> bool:
  return "orbax" not in record.pathname


@contextlib.contextmanager
def _quiet():
  """No log lines of Orbax while it reads: what goes wrong is said in one line here."""
  loggers = [logging.getLogger("absl"), logging.getLogger()]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    for logger, level in zip(loggers, levels):
      logger.setLevel(level)
