"""What a run tells: metrics.jsonl, TensorBoard, a progress line; first process only.

Object stores cannot append. So where the workdir is in a bucket these files are kept on
the local disk, and uploaded whole before each checkpoint and at the end.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from clj.runs.workdir import is_remote


def read_metrics(workdir) -> list[dict]:
  """The lines of a run's metrics.jsonl; a last line cut short by a kill is left out."""
  path = epath.Path(workdir) / "metrics.jsonl"
  lines = []
  if path.exists():
    for line in path.read_text().splitlines():
      with contextlib.suppress(ValueError):
        lines.append(json.loads(line))
  return lines


def evaluated(workdir, step: int) -> bool:
  """Whether the evaluation of `step` was written to the end."""
  return any(
    m["step"] == step and any(key.startswith("eval/") for key in m)
    for m in read_metrics(workdir)
  )


def last_values(workdir, prefix: str = "") -> dict[str, float]:
  """The newest value of every metric whose name starts with `prefix`."""
  values = {}
  for line in read_metrics(workdir):
    values |= {k: v for k, v in line.items() if k.startswith(prefix) and k != "step"}
  return values


class Meter:
  """Where the wall-clock time of a run goes.

  Training is all but evaluations and saves. A step's time has parts: waiting for the
  batch ("host_wait"), for the call of the step and its result ("device"), and the rest.
  The loop works one step ahead, so that what the host does while the device computes
  costs nothing: a device that waits for its host shows as a long "host_wait".

  flops: of the model, of one device in one step; peak: that the device can do a second.
    With both it tells their quotient, the model FLOP/s utilisation (Chowdhery et al.,
    2022, arXiv:2204.02311, appendix B).
  """

  _OTHERS = ("evaluation", "checkpoint")

  def __init__(
    self,
    batch_size: int,
    step: int,
    seconds: float,
    *,
    flops: float | None = None,
    peak: float | None = None,
  ):
    self._batch_size, self._before = batch_size, seconds
    self._peak_steps = peak / flops if flops and peak else None  # a second
    self._spent, self._began = 0.0, None
    self._mark = (step, 0.0)
    self._parts = {
      "host_wait": 0.0,
      "device": 0.0,
      "evaluation": 0.0,
      "checkpoint": 0.0,
    }

  def start(self):
    self._began = time.monotonic()

  @contextlib.contextmanager
  def part(self, name: str):
    """name: "host_wait", "device", or "evaluation", "checkpoint": not training."""
    began, running = time.monotonic(), self._began is not None
    pause = running and name in self._OTHERS
    if pause:
      self._spent += began - self._began
      self._began = None
    try:
      yield
    finally:
      self._parts[name] += time.monotonic() - began
      if pause:
        self.start()

  def seconds(self) -> float:
    """Of training, those before a restart included."""
    return self._before + self._here()

  def _here(self):
    return self._spent + (time.monotonic() - self._began if self._began else 0.0)

  def speed(self, step: int) -> float:
    """Examples a second since the last line that was written."""
    marked, at = self._mark
    return (step - marked) * self._batch_size / max(self._here() - at, 1e-9)

  def mfu(self, step: int) -> float | None:
    """Share of the peak since the last line that was written; None: not known."""
    if self._peak_steps is None:
      return None
    return self.speed(step) / self._batch_size / self._peak_steps

  def read_part(self, name: str) -> dict[str, float]:
    """Seconds of a part since they were last read."""
    spent, self._parts[name] = self._parts[name], 0.0
    return {f"perf/{name}_seconds": spent}

  def read(self, step: int) -> dict[str, float]:
    """Since the last call; host_wait and device by step, the save in all."""
    (marked, at), now = self._mark, self._here()
    steps = max(step - marked, 1)
    found = {
      "perf/examples_per_s": self.speed(step),
      "perf/train_seconds": self._before + now,
      "perf/step_seconds": (now - at) / steps,
    }
    if self._peak_steps is not None:
      found["perf/mfu"] = self.mfu(step)
    for name in ("host_wait", "device"):
      found |= {key: spent / steps for key, spent in self.read_part(name).items()}
    found |= self.read_part("checkpoint")
    self._mark = (step, now)
    return found


def local_copy(workdir) -> epath.Path:
  """`workdir`, or for one in a bucket a local directory that `upload` copies there."""
  return epath.Path(tempfile.mkdtemp() if is_remote(workdir) else workdir)


def upload(local: epath.Path, workdir):
  """Copies all files below `local` to `workdir`, each whole, if that is in a bucket."""
  if not is_remote(workdir):
    return
  for source in pathlib.Path(local).rglob("*"):
    if source.is_file():
      target = epath.Path(workdir) / source.relative_to(local)
      target.write_bytes(source.read_bytes())


def grids(views: dict) -> dict[str, np.ndarray]:
  """Of arrays `[B, V, H, W, 3]` in [0, 1] a picture each, by name."""
  return {
    key: grid((np.asarray(x) * 255).round().astype(np.uint8))
    for key, x in views.items()
    if x.ndim == 5 and x.shape[-1] == 3
  }


def start_trace(workdir) -> Callable:
  """Starts a trace of this process for TensorBoard; returns what ends and writes it."""
  local = local_copy(workdir)
  jax.profiler.start_trace(os.fspath(local))

  def stop():
    jax.profiler.stop_trace()
    upload(local, workdir)

  return stop


class Log:
  """Writes metrics as they come; `start_step` is the step that was restored.

  What an earlier, killed process wrote of later steps is cut away: those steps run
  again, and each line stands once.
  """

  def __init__(self, workdir, *, start_step: int, total_steps: int, quiet=False):
    self._first = jax.process_index() == 0
    if not self._first:
      return
    self._workdir, self._local = workdir, local_copy(workdir)
    self._local.mkdir(parents=True, exist_ok=True)
    path = self._local / "metrics.jsonl"
    kept = [m for m in read_metrics(workdir) if m["step"] <= start_step]
    partial = self._local / "metrics.jsonl.partial"
    partial.write_text("".join(json.dumps(m) + "\n" for m in kept))
    partial.replace(path)
    self._file = open(path, "a")  # noqa: SIM115
    earlier = epath.Path(workdir) / "tensorboard"
    starts = len(list(earlier.iterdir())) if earlier.exists() else 0
    self._board = _Board(self._local / "tensorboard", starts, start_step)
    # A terminal gets a bar that redraws itself, a log file a line now and then.
    self._bar = tqdm(
      initial=start_step,
      total=total_steps,
      unit="step",
      disable=quiet or not sys.stderr.isatty(),
      dynamic_ncols=True,
      smoothing=0.05,
    )
    self._lines = not quiet and not sys.stderr.isatty()
    self._total_steps = total_steps
    self._began, self._began_step = None, start_step

  def write(self, step: int, metrics: dict[str, float]):
    """One line of metrics.jsonl and the same scalars for TensorBoard."""
    if not self._first:
      return
    with self._naming():
      self._file.write(json.dumps({"step": step, **metrics}) + "\n")
      self._file.flush()
      for key, value in metrics.items():
        if math.isfinite(value):
          self._board.scalar(key, value, step)

  def sync(self):
    """Puts what was written on disk or bucket, before a checkpoint vouches for it."""
    if self._first:
      with self._naming():
        os.fsync(self._file.fileno())
        self._board.flush()
        upload(self._local, self._workdir)

  def progress(
    self,
    step: int,
    loss: float,
    examples_per_s: float,
    log_now: bool,
    mfu: float | None = None,
  ):
    if not self._first:
      return
    now = time.monotonic()
    if self._began is None:  # leaves compilation out of the estimate
      self._began, self._began_step = now, step
    self._bar.n = step
    told = [f"loss {loss:.4f}", f"{examples_per_s:.0f} examples/s"]
    if mfu is not None:
      told.append(f"mfu {100 * mfu:.3g} %")
    self._bar.set_postfix_str(", ".join(told), refresh=False)
    self._bar.update(0)
    if self._lines and log_now:
      steps = step - self._began_step
      left = (self._total_steps - step) * (now - self._began) / steps if steps else 0
      _line(f"step {step}/{self._total_steps}  {'  '.join(told)}  {_clock(left)} left")

  def say(self, text: str):
    """A line on the terminal that leaves the progress bar whole."""
    if self._first:
      self._bar.clear()
      _line(text)

  def picture(self, tag: str, image: np.ndarray, step: int):
    """image: `[H, W, 3]` uint8, for TensorBoard."""
    if self._first:
      with self._naming():
        self._board.picture(tag, image, step)

  def close(self):
    if self._first:
      self._bar.close()
      with self._naming():
        self._file.close()
        self._board.close()
        upload(self._local, self._workdir)

  @contextlib.contextmanager
  def _naming(self):
    """Says of an error, such as a full disk, where it was: a stream does not know."""
    try:
      yield
    except OSError as error:
      raise OSError(error.errno, error.strerror, os.fspath(self._local)) from error


class _Board:
  """One event file for TensorBoard, written by the thread that has something to say.

  (The thread of tensorboardX's SummaryWriter dies of a full disk, and the next thing to
  be written then waits for it for ever.)
  """

  def __init__(self, directory: epath.Path, starts: int, start_step: int):
    """starts: how often the run was started before; start_step: what was restored."""
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    self._summary, self._event = summary, Event
    directory.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads files in the order of their names; that of the time, which comes
    # next in them, is another where a clock was set back.
    self._file = EventsWriter(os.fspath(directory / f"events.{starts:05d}"))
    if start_step:  # hides what a killed process wrote of later steps
      session = SessionLog(status=SessionLog.START)
      self._write(step=start_step + 1, session_log=session)

  def _write(self, **content):
    self._file.write_event(self._event(wall_time=time.time(), **content))

  def scalar(self, tag: str, value: float, step: int):
    self._write(step=step, summary=self._summary.scalar(tag, value))

  def picture(self, tag: str, image: np.ndarray, step: int):
    content = self._summary.image(tag, image, dataformats="HWC")
    self._write(step=step, summary=content)

  def flush(self):
    self._file.flush()

  def close(self):
    self._file.close()


def _line(text: str):
  """In one piece: the thread that waits for a save says its lines too."""
  print(f"{text}\n", end="", flush=True)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def table(rows: list[tuple], header: tuple[str, ...]) -> str:
  """Lines up columns: text left, numbers right."""
  cells = [tuple(str(c) for c in row) for row in [header, *rows]]
  widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
  number = [
    bool(rows) and all(isinstance(row[i], int | float) for row in rows)
    for i in range(len(header))
  ]

  def line(row):
    return "  ".join(
      c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, number)
    ).rstrip()

  rule = "  ".join("-" * w for w in widths)
  return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def grid(pictures: np.ndarray, border: int = 2) -> np.ndarray:
  """`[rows, columns, H, W, 3]` uint8 -> one picture with white borders."""
  R, C, H, W, _ = pictures.shape
  canvas = np.full(
    (R * (H + border) + border, C * (W + border) + border, 3), 255, np.uint8
  )
  for r in range(R):
    for c in range(C):
      top, left = border + r * (H + border), border + c * (W + border)
      canvas[top : top + H, left : left + W] = pictures[r, c]
  return canvas


def start_tables(mesh, params) -> str:
  """Devices and parameters, as printed at the start of a run."""
  kinds = {}
  for device in mesh.devices.flat:
    key = (device.platform, device.device_kind, device.process_index)
    kinds[key] = kinds.get(key, 0) + 1
  axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  devices = table(
    [(kind, platform, process, n) for (platform, kind, process), n in kinds.items()],
    ("device", "platform", "process", "count"),
  )
  sizes = jax.tree.map(lambda x: int(np.prod(x.shape)), params)
  rows = [
    (f"{top}/{name}" if name else top, len(leaves), sum(leaves))
    for top, tree in sizes.items()
    for name, leaves in _children(tree)
  ]
  rows.append(("total", sum(r[1] for r in rows), sum(r[2] for r in rows)))
  return (
    f"mesh: {axes}\n{devices}\n\n{table(rows, ('module', 'arrays', 'parameters'))}\n"
  )


def _children(tree):
  if not isinstance(tree, dict) or all(isinstance(v, int) for v in tree.values()):
    return [("", jax.tree.leaves(tree))]
  return [(name, jax.tree.leaves(sub)) for name, sub in tree.items()]
