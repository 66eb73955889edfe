"""What becomes of a run when something goes wrong: python -m benchmarks.faults

    --kills=20         kill -9 that often, in a run of 1 and of 2 processes
    --processes=1,2    only these
    --only=kills,disk,damage,shard,clock
    --config=configs/simclr.py --config.key=value ...   the run; by default the demo

Moments are drawn from --seed over steps, not seconds, and recognised by what the run
said last. Each run is restarted by the same command until it is complete, and held
against one that nobody disturbed: metrics.jsonl line by line, the final state bit by
bit. Two processes talk over loopback; of one host the child, the parent or both are
killed, and when the other has noticed, both are started again.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

FAULTS = ("kills", "disk", "damage", "shard", "clock")
HEARTBEAT = 10  # seconds
AGAIN = 75
LINES = {
  "resumed": re.compile(r"going on from step (\d+) of"),
  "step": re.compile(r"step (\d+)/\d+ "),
  "saving": re.compile(r"step (\d+): saving"),
  "saved": re.compile(r"step (\d+): saved"),
  "evaluating": re.compile(r"step (\d+): evaluating"),
  "evaluated": re.compile(r"step (\d+): evaluated"),
}


class Host:
  """One process of a run as a user starts it; `words` is what it has said of itself."""

  def __init__(self, command: list[str], environment: dict):
    self.command, self.began = command, time.monotonic()
    self.words: list[tuple[str, int, float]] = []  # (key of LINES, step, seconds)
    self.out: list[str] = []
    self.errors: list[str] = []
    self.news = threading.Condition()
    self.process = subprocess.Popen(
      command,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      errors="replace",
    )
    self._readers = [
      threading.Thread(target=self._read, args=(stream, lines), daemon=True)
      for stream, lines in (
        (self.process.stdout, self.out),
        (self.process.stderr, self.errors),
      )
    ]
    for reader in self._readers:
      reader.start()

  def _read(self, stream, lines):
    for line in stream:
      line, now = line.rstrip("\n"), time.monotonic() - self.began
      with self.news:
        lines.append(line)
        for word, pattern in LINES.items():
          if found := pattern.search(line):
            self.words.append((word, int(found[1]), now))
        self.news.notify_all()
    with self.news:
      self.news.notify_all()

  def alive(self) -> bool:
    return self.process.poll() is None

  def kill(self, who: str):
    """kill -9 of the "child" that trains, its "parent" or "both"."""
    pids = [self.process.pid] if who != "child" else []
    if who != "parent":
      pids += children(self.process.pid) or [self.process.pid]
    for pid in pids:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

  def wait(self, seconds: float) -> int | None:
    """The exit code, None if it is still running then; all it said has been read."""
    try:
      code = self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      return None
    for reader in self._readers:
      reader.join(10)
    return code


def children(pid: int) -> list[int]:
  with contextlib.suppress(OSError):
    return [int(x) for x in open(f"/proc/{pid}/task/{pid}/children").read().split()]
  return []


class Run:
  """A run in `directory` and the processes that it consists of."""

  def __init__(self, directory, count: int, arguments: list[str], cache: str):
    self.directory, self.count = pathlib.Path(directory), count
    self.arguments = arguments
    self.environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": cache,  # a restart need not compile again
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
      "PYTHONUNBUFFERED": "1",
    }
    self.hosts: list[Host] = []

  def start(self, prefix=()):
    """Starts each process that is not running."""
    if not any(host.alive() for host in self.hosts):
      self.hosts, port = [], free_port()
      for index in range(self.count):
        command = [*prefix, sys.executable, "-m", "clj.main", *self.arguments]
        command += [f"--workdir={self.directory}", "--config.log_every=1"]
        if self.count > 1:
          command += [f"--coordinator=127.0.0.1:{port}", f"--heartbeat={HEARTBEAT}"]
          command += [f"--num_processes={self.count}", f"--process_id={index}"]
        self.hosts.append(Host(command, self.environment))
    else:
      self.hosts = [
        host if host.alive() else Host(host.command, self.environment)
        for host in self.hosts
      ]

  def wait_for(self, condition, seconds=600) -> bool:
    """Whether `condition(words of the first host)` came before a process ended."""
    until = time.monotonic() + seconds
    first = self.hosts[0]
    with first.news:
      while not condition(first.words):
        if not all(host.alive() for host in self.hosts) or time.monotonic() > until:
          return condition(first.words)
        first.news.wait(0.05)
    return True

  def end(self, seconds=600) -> list[int | None]:
    """Exit codes, None for a process that had to be killed."""
    until = time.monotonic() + seconds
    codes = [host.wait(max(0.0, until - time.monotonic())) for host in self.hosts]
    for host, code in zip(self.hosts, codes):
      if code is None:
        host.kill("both" if self.count > 1 else "parent")
        host.wait(10)
    return codes

  def complete(self, tries=3) -> bool:
    """Starts it until it is complete."""
    for _ in range(tries):
      self.start()
      if (codes := self.end()) == [0] * self.count:
        return True
      if set(codes) != {AGAIN}:
        break
    print(codes, *(line for host in self.hosts for line in host.errors), sep="\n")
    return False


def free_port() -> int:
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]


def state_of(words) -> dict:
  """What a process was doing when it said its last word."""
  last = dict.fromkeys(LINES, -1) | {word: step for word, step, _ in words}
  if last["evaluating"] > last["evaluated"]:
    doing = "evaluation"
  elif last["saving"] > last["saved"]:
    doing = "save"
  elif last["step"] < 0 and last["evaluated"] < 0:
    doing = "start"
  else:
    doing = "step"
  return {
    "at": doing,
    "step": max(last["step"], last["resumed"], 0),
    "saved": max(last["saved"], last["resumed"], 0),
  }


def took(words, begin: str, end: str) -> list[float]:
  """Seconds between the two words of each step."""
  ends = {step: at for word, step, at in words if word == end}
  return [ends[step] - at for word, step, at in words if word == begin and step in ends]


def start_up(words) -> float:
  """Seconds until it first trained or evaluated."""
  return next(at for word, _, at in words if word in ("step", "evaluating"))


def compare(directory, reference) -> dict:
  """How a run differs from the undisturbed one; all zero where it does not."""
  import jax

  from clj.runs import checkpoint

  def lines(path):
    found = {}
    for text in (pathlib.Path(path) / "metrics.jsonl").read_text().splitlines():
      line = json.loads(text)
      kind = "eval" if any(key.startswith("eval/") for key in line) else "train"
      values = {k: v for k, v in line.items() if not k.startswith("perf/")}
      found.setdefault((line["step"], kind), []).append(values)
    return found

  def leaves(path):
    checkpoints = checkpoint.Checkpoints(path)
    step = checkpoints.steps()[-1]
    tree = checkpoints.restore_tree(step)
    tree["rng"] = jax.random.key_data(tree["rng"])
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in named}

  ours, theirs = lines(directory), lines(reference)
  state, expected = leaves(directory), leaves(reference)
  unequal = [
    key
    for key in expected.keys() | state.keys()
    if key not in state
    or key not in expected
    or state[key].tobytes() != expected[key].tobytes()
  ]
  return {
    "lines": len(theirs),
    "lines_twice": sum(len(found) - 1 for found in ours.values()),
    "lines_missing": len(theirs.keys() - ours.keys()),
    "lines_too_many": len(ours.keys() - theirs.keys()),
    "lines_unequal": sum(ours[k][0] != theirs[k][0] for k in ours.keys() & theirs),
    "arrays": len(expected),
    "parameters_unequal": sum("params" in key for key in unequal),
    "optimiser_state_unequal": sum("opt_state" in key for key in unequal),
    "arrays_unequal": len(unequal),
  }


def same(comparison: dict) -> bool:
  return not any(v for k, v in comparison.items() if k not in ("lines", "arrays"))


def draw_moments(words, kills: int, rng) -> list[tuple[int, str, float]]:
  """(step, what to kill it in, how far into it), in the order of the run."""
  steps = [step for word, step, _ in words if word == "step"]
  counts = {
    "save": max(5, round(0.3 * kills)),
    "evaluation": max(3, round(0.2 * kills)),
    "start": max(2, round(0.1 * kills)),
  }
  if kills < sum(counts.values()):
    counts = {"save": kills // 2, "evaluation": kills // 4, "start": kills // 5}
  counts["step"] = kills - sum(counts.values())
  places = {
    "save": [step for word, step, _ in words if word == "saving"],
    "evaluation": [step for word, step, _ in words if word == "evaluating"],
    "start": steps,
    "step": steps,
  }
  moments = []
  for kind, count in counts.items():
    # An evaluation may be hit twice: it is done again. A step, once saved, is not.
    twice = count > len(places[kind])
    for step in rng.choice(places[kind], count, replace=twice):
      moments.append((int(step), kind, float(rng.uniform(0.05, 0.8))))
  order = ("start", "step", "evaluation", "save")
  return sorted(moments, key=lambda moment: (moment[0], order.index(moment[1])))


def kills(report, root, count: int, number: int, seed: int, arguments, cache):
  """Kills a run of `count` processes `number` times; see the module's text."""
  from clj.runs.checkpoint import Checkpoints

  reference = Run(root / f"undisturbed{count}", count, arguments, cache)
  if not reference.complete():
    raise SystemExit("the undisturbed run did not complete")
  words = reference.hosts[0].words
  durations = {
    "save": statistics.median(took(words, "saving", "saved")),
    "evaluation": statistics.median(took(words, "evaluating", "evaluated") or [0.0]),
    "start": start_up(words),
    "step": 0.0,
  }
  rng = np.random.default_rng([seed, count])
  run = Run(root / f"killed{count}", count, arguments, cache)
  began, found, restarts = time.monotonic(), [], 0
  for step, kind, share in draw_moments(words, number, rng):
    word = {"save": "saving", "evaluation": "evaluating", "step": "step"}.get(kind)
    for _ in range(10):
      run.start()
      restarts += 1
      come = lambda words, step=step, word=word: (
        word is None or any(w == word and s >= step for w, s, _ in words)
      )
      if run.wait_for(come):
        break
      if set(run.end(60)) == {0}:
        break  # it was over before that moment came
    if not all(host.alive() for host in run.hosts):
      continue
    time.sleep(share * durations[kind])
    victim, who = int(rng.integers(count)), "process"
    if count > 1:
      who = ("child", "parent", "both")[rng.integers(3)]
    run.hosts[victim].kill("parent" if count == 1 else who)
    killed = time.monotonic()
    run.hosts[victim].wait(60)
    first = run.hosts[0]
    others = [host for host in run.hosts if host is not run.hosts[victim]]
    state = state_of(first.words)
    # At the start the others wait for it, as long as hosts may take to come up.
    patience = 2 * HEARTBEAT + 5 if state["at"] == "start" else 60
    codes = [host.wait(patience) for host in others]
    ended = time.monotonic() - killed
    last = [host.errors[-1] if host.errors else "" for host in others]
    if state["at"] != "start":
      run.end(0)
    if first.words and state["at"] in ("start", "step"):
      with contextlib.suppress(StopIteration):
        durations["start"] = min(durations["start"], start_up(first.words))
    kept = Checkpoints(run.directory).steps()[-1:] or [0]
    found.append(
      {
        "fault": "kill",
        "processes": count,
        "kill": len(found) + 1,
        "aimed_at": f"{kind} {step}",
        **state,
        "killed": who if count == 1 else f"{who} of {victim}",
        "kept": kept[0],
        "steps_lost": max(state["step"] - kept[0], 0),
        "last_line": first.out[-1] if first.out else "",
      }
    )
    if others:
      found[-1] |= {"others": codes, "others_s": round(ended, 1), "others_say": last}
    report(found[-1])
  done = run.complete()
  comparison = compare(run.directory, reference.directory) if done else {}
  by_kind = {k: sum(f["at"] == k for f in found) for k in durations}
  lost = [f["steps_lost"] for f in found if f["at"] != "start"]
  report(
    {
      "fault": "kills",
      "processes": count,
      "kills": len(found),
      **{f"in_{kind}": n for kind, n in by_kind.items()},
      "completed_save_lost": sum(f["kept"] < f["saved"] for f in found),
      "steps_lost_most": max(lost, default=0),
      "steps_lost_mean": round(statistics.mean(lost or [0]), 1),
      "others_ended_within_s": max(
        (f["others_s"] for f in found if None not in f.get("others", [None])), default=0
      ),
      "others_went_on_waiting": sum(None in f.get("others", []) for f in found),
      "restarts": restarts,
      "seconds": round(time.monotonic() - began),
      **comparison,
      "ok": done
      and same(comparison)
      and not any(f["kept"] < f["saved"] for f in found)
      # Only at the start may the others wait, for its restart.
      and all(
        code == AGAIN or (code is None and f["at"] == "start")
        for f in found
        for code in f.get("others", [])
      ),
    }
  )


@contextlib.contextmanager
def small_disk(root, size: int):
  """A tmpfs of `size` bytes; None where mounting is not allowed."""
  path = root / "disk"
  path.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
  if subprocess.run(command, capture_output=True).returncode:
    yield None
    return
  try:
    yield path
  finally:
    subprocess.run(["umount", "-l", str(path)], check=False)


def disk(report, root, arguments, cache):
  """The disk becomes full; bytes left: too few for a save, none for a metric line."""
  reference = undisturbed(root, arguments, cache)
  saves = sorted((reference.directory / "checkpoints").iterdir())
  sizes = [f.stat().st_size for f in saves[-1].rglob("*") if f.is_file()]
  one = sum(sizes)
  for share in (0.5, 0.1, 0.0):
    shutil.rmtree(root / "disk", ignore_errors=True)
    with small_disk(root, 8 * one + 2**24) as path:
      directory = (path or root / "disk") / "run"
      run = Run(directory, 1, arguments, cache)
      prefix = ()
      if path is None:
        # A file may not grow beyond this: a save is cut short, metrics are not.
        limit = max(1, int(max(share, 0.1) * max(sizes)) // 1024)
        prefix = ("bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash")
      run.start(() if path else prefix)
      first_save = lambda words: any(word == "saved" for word, *_ in words)
      if path:
        run.wait_for(first_save)
        fill(path, int(share * one))
      (code,) = run.end()
      host = run.hosts[0]
      if path:
        (path / "filler").unlink(missing_ok=True)
      saved = [step for word, step, _ in host.words if word == "saved"]
      again = Run(directory, 1, arguments, cache)
      done = again.complete()
      resumed = [s for word, s, _ in again.hosts[0].words if word == "resumed"]
      comparison = compare(directory, reference.directory) if done else {}
      report(
        {
          "fault": "disk full",
          "by": "tmpfs" if path else "RLIMIT_FSIZE",
          "free_share_of_a_save": share,
          "exit_code": code,
          "error_lines": host.errors,
          "saved": saved,
          "resumed": resumed,
          **comparison,
          "ok": code == 1
          and len(host.errors) == 1
          and done
          and resumed == saved[-1:]
          and same(comparison),
        }
      )


def fill(path, left: int):
  """Writes a file until the disk has about `left` bytes."""
  free = os.statvfs(path)
  size = free.f_bavail * free.f_frsize - left
  with (
    contextlib.suppress(OSError),
    open(path / "filler", "wb", buffering=0) as file,
  ):
    while size > 0:
      size -= file.write(bytes(min(size, 2**16)))


def undisturbed(root, arguments, cache) -> Run:
  run = Run(root / "undisturbed1", 1, arguments, cache)
  if not run.directory.exists() and not run.complete():
    raise SystemExit("the undisturbed run did not complete")
  return run


def damage(report, root, arguments, cache, seed: int):
  """Truncates, deletes, flips a bit of each file of the newest checkpoint in turn."""
  import jax
  import jax.numpy as jnp
  from jax import dtypes

  from benchmarks.recipe import Recipe
  from clj.cli import quiet_libraries
  from clj.runs import workdir
  from clj.runs.checkpoint import Checkpoints

  quiet_libraries()
  reference = undisturbed(root, arguments, cache).directory
  good = Checkpoints(reference)
  abstract = Recipe(workdir.read_config(reference)).program.state
  is_key = lambda x: jnp.issubdtype(x.dtype, dtypes.prng_key)
  numbers = lambda x: jax.random.key_data(x) if is_key(x) else x
  plain = lambda tree: [np.asarray(numbers(x)) for x in jax.tree.leaves(tree)]
  *_, before, newest = good.steps()
  values = {step: plain(good.restore(abstract, step)[0]) for step in (before, newest)}
  saved = pathlib.Path(reference / "checkpoints" / str(newest))
  files = [file for file in sorted(saved.rglob("*")) if file.is_file()]
  names = [os.path.relpath(f, reference) for f in files]
  names += [f"hashes/{newest}.0.json"]
  rng = np.random.default_rng(seed)
  counts = dict.fromkeys(("truncated", "deleted", "flipped"), 0)
  wrong, fell_back, noisy = [], 0, []
  for name in names:
    for how in counts:
      if (reference / name).stat().st_size == 0 and how != "deleted":
        continue
      copy = root / "damaged"
      shutil.rmtree(copy, ignore_errors=True)
      shutil.copytree(reference, copy)
      injure(copy / name, how, rng)
      counts[how] += 1
      with captured() as said:
        state, _, step = Checkpoints(copy).restore(abstract)
      lines = said.getvalue().splitlines()
      fell_back += step == before
      expected = values.get(step, [])
      equal = [a.tobytes() == b.tobytes() for a, b in zip(plain(state), expected)]
      if not equal or not all(equal):
        wrong.append(f"{how} {name}: step {step}")
      if len(lines) != (step == before):
        noisy.append([f"{how} {name}", *lines])
  report(
    {
      "fault": "damaged checkpoint",
      "files": len(names),
      **counts,
      "fell_back": fell_back,
      "newest_restored_unchanged": sum(counts.values()) - fell_back - len(wrong),
      "changed_value_restored": wrong,
      "more_or_less_than_a_line": noisy,
      "ok": not wrong and not noisy,
    }
  )


def injure(path, how: str, rng):
  data = bytearray(path.read_bytes())
  if how == "deleted":
    path.unlink()
    return
  if how == "truncated":
    data = data[: rng.integers(len(data))]
  else:
    bit = int(rng.integers(8 * len(data)))
    data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)


@contextlib.contextmanager
def captured():
  """Gives a StringIO that has afterwards what the process wrote, also from C++."""
  said = io.StringIO()
  sys.stdout.flush()
  kept = os.dup(1), os.dup(2)
  with tempfile.TemporaryFile() as file:
    for stream in (1, 2):
      os.dup2(file.fileno(), stream)
    try:
      yield said
    finally:
      sys.stdout.flush()
      for stream, old in zip((1, 2), kept):
        os.dup2(old, stream)
        os.close(old)
      file.seek(0)
      said.write(file.read().decode(errors="replace"))


def shard(report, root, arguments, cache):
  """A shard of an ArrayRecord data set is removed between two starts of a run."""
  from PIL import Image

  rng = np.random.default_rng(0)
  pictures = root / "pictures"
  for kind in ("one", "two"):
    (pictures / kind).mkdir(parents=True)
    for i in range(200):
      image = Image.fromarray(rng.integers(0, 256, (40, 40 + i % 2, 3), np.uint8))
      image.save(pictures / kind / f"{i}.png")
  out = root / "tfds" / "pictures"
  command = [sys.executable, "-m", "clj.data.ingest", str(pictures), str(out)]
  subprocess.run([*command, "--shard_records=60"], check=True, capture_output=True)
  shards = sorted(out.rglob("*.array_record-*"))
  data = [
    "--config=configs/simclr.py:smoke",
    "--config.data.source=pictures",
    f"--config.data.data_dir={out.parent}",
    "--config.data.train_split=train[:80%]",
    "--config.data.test_split=train[80%:]",
    "--config.evals={}",
    "--config.total_steps=400",
    "--config.checkpoint_every=20",
  ]
  # Of several sizes, so that they are not decoded once and held.
  run = Run(root / "sharded", 1, data, cache)
  run.start()
  run.wait_for(lambda words: any(word == "saved" for word, *_ in words))
  run.hosts[0].kill("parent")
  run.end()
  gone = shards[1]
  aside = gone.rename(root / gone.name)
  again = Run(run.directory, 1, data, cache)
  again.start()
  (code,) = again.end()
  errors = again.hosts[0].errors
  aside.rename(gone)
  done = Run(run.directory, 1, data, cache).complete()
  report(
    {
      "fault": "data shard removed",
      "shards": len(shards),
      "exit_code": code,
      "error_lines": errors,
      "completes_when_it_is_back": done,
      "ok": code == 1 and len(errors) == 1 and gone.name in errors[0] and done,
    }
  )


SHIFTED = """
import runpy, sys, time
for name, unit in (("time", 1), ("time_ns", 10**9)):
  real = getattr(time, name)
  setattr(time, name, lambda real=real, unit=unit: real() - 7 * 86400 * unit)
sys.argv[0] = "clj.main"
runpy.run_module("clj.main", run_name="__main__", alter_sys=True)
"""


def clock(report, root, arguments, cache):
  """Restarted with the clock a week back, and under another host name."""
  reference = undisturbed(root, arguments, cache)
  run = Run(root / "clock", 1, arguments, cache)
  run.start()
  run.wait_for(lambda words: any(word == "saved" for word, *_ in words))
  run.hosts[0].kill("parent")
  run.end()
  # Python's clock for the process, and a name of its own where that is allowed.
  command = run.hosts[0].command
  shifted = [sys.executable, "-c", SHIFTED, *command[3:]]
  named = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere; exec "$@"', "sh"]
  renamed = not subprocess.run([*named, "true"], capture_output=True).returncode
  host = Host([*(named if renamed else []), *shifted], run.environment)
  code = host.wait(600)
  comparison = compare(run.directory, reference.directory) if code == 0 else {}
  lines = (run.directory / "metrics.jsonl").read_text().splitlines()
  spent = [json.loads(line).get("perf/train_seconds") for line in lines]
  spent = [seconds for seconds in spent if seconds is not None]
  events = sorted(p.name for p in (run.directory / "tensorboard").iterdir())
  report(
    {
      "fault": "clock a week back" + (", another host name" if renamed else ""),
      "exit_code": code,
      "error_lines": host.errors,
      "train_seconds_grow": spent == sorted(spent) and spent[0] >= 0,
      "event_files": events,
      **comparison,
      "ok": code == 0
      and not host.errors
      and spent == sorted(spent)
      and same(comparison),
    }
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--processes", default="1,2")
  parser.add_argument("--only", default=",".join(FAULTS))
  parser.add_argument("--config", default="configs/simclr.py")
  parser.add_argument("--seed", type=int, default=0)
  options, rest = parser.parse_known_args()
  if wrong := [a for a in rest if not a.startswith("--config.")]:
    parser.error(f"unknown argument {wrong[0]}")
  chosen = options.only.split(",")
  if wrong := set(chosen) - set(FAULTS):
    parser.error(f"--only={min(wrong)}: there are {', '.join(FAULTS)}")
  arguments = [f"--config={options.config}", *rest]
  table = []

  def report(line: dict):
    print(json.dumps(line), flush=True)
    if "ok" in line:
      table.append(line)

  with tempfile.TemporaryDirectory(dir=os.getcwd(), prefix=".faults-") as name:
    root, cache = pathlib.Path(name), os.path.join(name, "cache")
    if "kills" in chosen:
      for count in map(int, options.processes.split(",")):
        kills(report, root, count, options.kills, options.seed, arguments, cache)
    if "disk" in chosen:
      disk(report, root, arguments, cache)
    if "damage" in chosen:
      damage(report, root, arguments, cache, options.seed)
    if "shard" in chosen:
      shard(report, root, arguments, cache)
    if "clock" in chosen:
      clock(report, root, arguments, cache)
  for line in table:
    print(
      f"\n{line['fault']}: {'as it should be' if line['ok'] else 'NOT as it should'}"
    )
    for key, value in line.items():
      if key not in ("fault", "ok"):
        print(f"  {key:28s} {value}")
  sys.exit(not all(line["ok"] for line in table))


if __name__ == "__main__":
  main()
