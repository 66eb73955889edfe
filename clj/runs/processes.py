"""Many processes: starting them, agreeing on what to do, noticing that one is lost.

JAX's runtime ends a process with abort() when another process of the run is lost;
nothing in that process can then choose an exit code or say what happened. So where a
run has several, `clj.main` is a small parent (`supervise`) of the process that trains,
and never loads JAX. The child tells it through a pipe, in words, that it is alive, what
it is doing and with which exit code it ends.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

from clj.cli import UserError

# JAX is imported where it is needed: the parent must start fast and hold no device.

FAILED, AGAIN = 1, 75  # exit codes: mend something; start the same command again
HEARTBEAT = 40  # seconds without a sign of life after which a process counts as lost
CONNECT = 300  # seconds that the processes of a run wait for each other at the start
BUSY = 3600  # seconds for compilation, an evaluation or a save without any progress
PIPE = "CLJ_PARENT_PIPE"
LOST = (
  "lost another process of this run: its host is dead or stuck, or it ended with an "
  "error of its own; what was saved is kept: start the same command again everywhere"
)

_asked = threading.Event()  # SIGTERM came to this process


@dataclasses.dataclass(frozen=True)
class Run:
  """Of which processes a run consists; None: JAX finds it out from the cluster."""

  count: int
  coordinator: str | None = None  # "host:port" of process 0
  index: int | None = None


def find(
  coordinator: str | None, count: int | None, index: int | None, environ=os.environ
) -> Run:
  """The run that this process belongs to: by flags, or as the cluster describes it.

  A Slurm step, a Cloud TPU slice or slices, and TPU pods on GKE with several hosts are
  several processes; anything else is one. Raises ValueError for flags that do not fit.
  """
  given = {"coordinator": coordinator, "num_processes": count, "process_id": index}
  if any(value is not None for value in given.values()):
    if missing := [f"--{name}" for name, value in given.items() if value is None]:
      raise UserError(f"{', '.join(missing)} missing; give all three flags or none")
    if not coordinator.rpartition(":")[2].isdigit() or ":" not in coordinator:
      raise UserError(f"--coordinator={coordinator} is not HOST:PORT of process 0")
    if not 0 <= index < count:
      raise UserError(
        f"--process_id={index} is not one of 0 to {count - 1} (--num_processes={count})"
      )
    return Run(count, coordinator, index)
  return Run(max(_slurm_tasks(environ), _tpu_hosts(environ)))


def _slurm_tasks(environ) -> int:
  # What `srun` sets, and a shell inside `salloc` does not.
  step = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
  return int(environ.get("SLURM_NTASKS", 1)) if all(k in environ for k in step) else 1


def _tpu_hosts(environ) -> int:
  """Hosts of the Cloud TPU slices that this one is a part of."""
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  described = {}
  if not hosts:  # not GKE; on a TPU VM the metadata server knows
    if "TPU_SKIP_MDS_QUERY" in environ or not _has_tpu(environ):
      return 1
    hosts = _metadata(environ, "worker-network-endpoints")
    lines = _metadata(environ, "tpu-env").splitlines()
    described = dict(line.split(": ", 1) for line in lines if ": " in line)
  slices = environ.get("MEGASCALE_NUM_SLICES") or described.get("MEGASCALE_NUM_SLICES")
  return len(hosts.split(",")) * int((slices or "1").strip(" '"))


def _has_tpu(environ) -> bool:
  return "GCE_METADATA_IP" in environ or any(
    os.path.exists(device) for device in ("/dev/accel0", "/dev/vfio/0", "/dev/vfio/1")
  )


def _metadata(environ, key: str) -> str:
  host = environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
    headers={"Metadata-Flavor": "Google"},
  )
  try:
    with urllib.request.urlopen(request, timeout=10) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, TimeoutError):
    return ""  # not a Cloud TPU VM


def is_child() -> bool:
  return PIPE in os.environ


# The parent.


def supervise(command: list[str], patience: float) -> int:
  """Runs `command` as the child that trains; returns the exit code of the run.

  patience: seconds. A child that gives no sign of life for so long, or whose step takes
  1.5 times as long and five times as long as the longest step before it, is ended.
  """
  reading, writing = os.pipe()
  # SIGTERM waits until the child can be told; the child unblocks it in `listen`.
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
  child = subprocess.Popen(
    command,
    pass_fds=[writing],
    env=os.environ | {PIPE: str(writing)},
    preexec_fn=_die_with_this_process(),
  )
  os.close(writing)
  signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
  signal.signal(signal.SIGINT, lambda *_: child.kill())  # Ctrl-C: at once
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
  watch = Watch(patience, time.monotonic())
  stuck, words = None, b""
  while stuck is None:
    if select.select([reading], [], [], 1.0)[0]:
      if not (data := os.read(reading, 4096)):
        break  # the child has ended
      *lines, words = (words + data).split(b"\n")
      for line in lines:
        watch.note(line.decode(), time.monotonic())
    stuck = watch.stuck(time.monotonic())
  if stuck is not None or watch.code is not None:
    with contextlib.suppress(subprocess.TimeoutExpired):
      # After its last word the child still takes leave of the other processes.
      child.wait(timeout=0 if stuck else patience)
    child.kill()
  status = child.wait()
  if watch.code is not None:
    return watch.code
  if stuck is not None:
    line = stuck
  elif status == -signal.SIGKILL:
    line = "the process that trains was killed (signal 9); is there too little memory?"
  else:
    line = LOST
  print(f"clj: {line}", file=sys.stderr, flush=True)
  return AGAIN


def _die_with_this_process():
  """What a child does first, so that a parent that is killed takes it along."""
  if sys.platform != "linux":
    return None
  libc, parent = ctypes.CDLL(None), os.getpid()

  def bind():
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; outlives exec
    if os.getppid() != parent:
      os._exit(AGAIN)

  return bind


class Watch:
  """What the parent knows of its child: exit code, and whether it is stuck."""

  def __init__(self, patience: float, now: float):
    self.code: int | None = None
    self._patience = patience
    self._longest = 0.0  # step so far, seconds
    self._doing, self._since = "busy", now
    self._alive: float | None = None  # it still loads its modules

  def note(self, word: str, now: float):
    """word: "alive", "step" (one is done), "busy" (with something else), "exit N"."""
    self._alive = now
    if word.startswith("exit"):
      self.code = int(word.split()[1])
    elif word != "alive":
      if word == self._doing == "step":  # nothing but a step lies between the two
        self._longest = max(self._longest, now - self._since)
      self._doing, self._since = word, now

  def stuck(self, now: float) -> str | None:
    """One line where the child is stuck, else None."""
    if self._alive is not None and now - self._alive > self._patience:
      return f"the process that trains gave no sign of life for {self._patience:g} s"
    # The runtime's heartbeats, which find a dead process, come first.
    least = 1.5 * self._patience
    limit = max(least, 5 * self._longest) if self._doing == "step" else BUSY
    if self.code is None and now - self._since > limit:
      what = "step" if self._doing == "step" else "compilation, evaluation or save"
      return (
        f"a {what} did not end within {limit:.0f} s (longest step before: "
        f"{self._longest:.1f} s): this or another process is stuck"
      )
    return None


# The child.


def listen():
  """From here on SIGTERM is a wish, granted at the next moment to stop."""
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, lambda *_: _asked.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextlib.contextmanager
def listening():
  """`listen` for a while; gives a `Stopping`."""
  if threading.current_thread() is not threading.main_thread():
    yield Stopping()  # Python delivers signals to the main thread alone
    return
  before = signal.getsignal(signal.SIGTERM)
  if not _in_runtime():  # whose own handler tells all processes
    listen()
  try:
    yield Stopping()
  finally:
    if not _in_runtime():
      signal.signal(signal.SIGTERM, before)
    _asked.clear()


def connect(run: Run, heartbeat: int):
  """Starts JAX's runtime of several processes and tells the parent so.

  SIGTERM then goes to the runtime, which tells every process.
  """
  import jax

  threading.Thread(target=_show_life, args=(heartbeat / 4,), daemon=True).start()
  jax.distributed.initialize(
    run.coordinator,
    run.count if run.coordinator else None,
    run.index,
    cluster_detection_method="deactivate" if run.coordinator else None,
    initialization_timeout=CONNECT,
    heartbeat_timeout_seconds=heartbeat,
  )
  if _asked.is_set():  # before the runtime could hear it
    os.kill(os.getpid(), signal.SIGTERM)
  if jax.process_index() != 0:  # one process speaks for all; errors go to stderr
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def tell(word: str):
  """Tells the parent what this process is doing; see `Watch.note`."""
  if PIPE in os.environ:
    os.write(int(os.environ[PIPE]), f"{word}\n".encode())


def _show_life(every: float):
  while True:
    tell("alive")
    time.sleep(every)


def leave(code: int):
  """Ends a child, its exit code told to the parent; does not return.

  With an error the others are not waited for: they would be waiting for this one.
  """
  tell(f"exit {code}")
  if code in (0, AGAIN) and _in_runtime():
    import jax

    with contextlib.suppress(Exception):
      jax.distributed.shutdown()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def leave_lost():
  """Ends a child that lost another process: the parent says so, as the last line.

  The runtime's own threads may be about to abort this process, with a stack trace.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(AGAIN)


def is_loss(error: BaseException | None) -> bool:
  """Whether an error is that of another process: its connection broke or timed out."""
  import jax

  while error is not None:
    # From a call that takes JAX's fast path the same comes as a ValueError.
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
      mine = "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND"
      return _in_runtime() and not str(error).startswith(mine)
    error = error.__cause__ or error.__context__
  return False


def _in_runtime() -> bool:
  if "jax" not in sys.modules:
    return False
  import jax

  return jax.distributed.is_initialized()


# Agreeing.


class Stopping:
  """`stopping()`: whether to stop now; every process gets the same answer.

  Every process must ask at the same moments: after each step, between the batches of
  an evaluation. The moments are counted, and JAX's runtime knows of each process at
  which it is. When SIGTERM comes to one, a background thread tells the others, and they
  agree on the first moment that none has reached yet. So asking is a look at a local
  number: no collective, and no wait for the device. (An all-reduced flag in the step
  would cost a collective each, and waiting for it would cost the overlap of host and
  device.)
  """

  def __init__(self):
    self._moment, self._stop = 0, False

  def __call__(self) -> bool:
    if not _in_runtime():
      return _asked.is_set()
    from jax.experimental import multihost_utils

    if not self._stop:
      self._moment += 1
      self._stop = multihost_utils.reached_preemption_sync_point(self._moment)
    return self._stop


def from_all(value) -> list:
  """The JSON-able value of each process, in their order, on all of them."""
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  buffer = np.zeros(-(-int(sizes.max()) // 1024) * 1024, np.uint8)
  buffer[: len(text)] = text
  rows = multihost_utils.process_allgather(buffer)
  return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


def from_first(value):
  """The JSON-able value of the first process, on all of them."""
  return from_all(value)[0]
