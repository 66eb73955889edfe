"""Runs a grid of configs, each in its own workdir, and tabulates what came out.

    python -m launch.sweep --config=configs/simclr.py:cifar10_cpu --workdir=runs/lr \\
      --config.optim.learning_rate=0.3,0.6 --config.seed=0,1,2

Commas outside of brackets and quotes separate the values of a key. Runs that differ in
config.seed alone share a row: mean, sample deviation and the values, from
metrics.jsonl. The same command again goes on where it stopped: complete runs are left
alone, the others resumed. --table prints the table of what there is and runs nothing.

--on=tpu_vm and --on=gke give each run to that launcher with the options of --launcher
and a name of its own, --jobs of them at a time; --on=slurm submits a job for each and
ends: look at them later with --table.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import math
import os
import pathlib
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from typing import NamedTuple

from launch import restarts

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESTART = 75  # clj.main: start me again


class Run(NamedTuple):
  number: int
  values: dict[str, str]  # swept key, without "config.", -> value
  workdir: str
  flags: list[str]  # of clj.main

  def name(self) -> str:
    return " ".join(f"{k}={v}" for k, v in self.values.items()) or self.workdir


def split_values(text: str) -> list[str]:
  """ "0.3,(0.2,1.0),'a,b'" -> ["0.3", "(0.2,1.0)", "a,b"]."""
  values, depth, quote = [""], 0, ""
  for char in text:
    if quote:
      if char == quote:
        quote = ""
        if depth == 0:
          continue
    elif char in "\"'":
      quote = char
      if depth == 0:
        continue
    elif char == "," and depth == 0:
      values.append("")
      continue
    if not quote:
      depth += (char in "([{") - (char in ")]}")
    values[-1] += char
  if quote or depth or "" in values:
    raise ValueError(f"{text!r} is not a list of values separated by commas")
  return values


def grid(args, flags: list[str]) -> list[Run]:
  """Every combination of the values, the last key changing fastest."""
  keys, choices = [], []
  for flag in flags:
    key, equals, text = flag.partition("=")
    if not key.startswith("--config.") or not equals:
      raise ValueError(f"unknown option {flag!r}; --config.key=value[,value...] is one")
    if key in keys:
      raise ValueError(f"{key} is given twice")
    keys.append(key)
    choices.append(split_values(text))
  swept = [len(values) > 1 for values in choices]
  runs = []
  for number, values in enumerate(itertools.product(*choices)):
    chosen = {
      key.removeprefix("--config."): value
      for key, value, varies in zip(keys, values, swept)
      if varies
    }
    parts = [re.sub(r"[^\w.+=-]+", "-", f"{k}={v}") for k, v in chosen.items()]
    workdir = "/".join([args.workdir.rstrip("/"), "_".join(parts)]).rstrip("/")
    train_flags = [f"--config={args.config}", f"--workdir={workdir}"]
    train_flags += [f"{key}={value}" for key, value in zip(keys, values)]
    runs.append(Run(number, chosen, workdir, train_flags))
  if len({run.workdir for run in runs}) < len(runs):
    raise ValueError("two combinations would share a workdir; a value is given twice?")
  return runs


def command(run: Run, args) -> list[str]:
  """What starts `run` where --on says."""
  options = shlex.split(args.launcher)
  name = f"{args.name}-{run.number}"
  return {
    "local": [sys.executable, "-m", "clj.main", *options, *run.flags],
    "tpu_vm": [
      str(ROOT / "launch/tpu_vm.sh"),
      *("train", f"--name={name}", *options, "--", *run.flags),
    ],
    "gke": [
      *(sys.executable, "-m", "launch.gke"),
      *("train", f"--name={name}", *options, "--", *run.flags),
    ],
    "slurm": [
      *("sbatch", f"--job-name={name}", *options),
      *("launch/slurm.sbatch", *run.flags),
    ],
  }[args.on]


def results(run: Run) -> tuple[bool, dict[str, float]]:
  """(complete, metrics) of a run: those of its last evaluation, and the loss.

  Baselines, which are evaluated once at the start, are not among them.
  """
  from clj.runs import log, workdir

  lines = log.read_metrics(run.workdir)
  if not lines:
    return False, {}
  config = workdir.read_config(run.workdir)
  is_eval = lambda line: any(key.startswith("eval/") for key in line)
  trained = [line for line in lines if "train/loss" in line]
  evaluated = [line for line in lines if is_eval(line)]
  ends = trained[-1:] + (evaluated[-1:] if config["evals"] else [])
  complete = len(ends) == 1 + bool(config["evals"])
  complete &= all(line["step"] == config["total_steps"] for line in ends)
  metrics = {
    k: v for line in trained[-1:] for k, v in line.items() if k == "train/loss"
  }
  for line in evaluated[-1:]:
    metrics |= {k: v for k, v in line.items() if k not in ("step", "eval/records")}
  return complete, metrics


def table(runs: list[Run], wanted: str) -> str:
  """Mean, sample deviation and values over the seeds of each combination."""
  from clj.runs import log

  groups: dict[tuple, dict[str, list[float]]] = {}
  missing = []
  for run in runs:
    complete, metrics = results(run)
    if not complete:
      missing.append(run.name())
      continue
    key = tuple((k, v) for k, v in run.values.items() if k != "seed")
    for name, value in metrics.items():
      if re.search(wanted, name) and isinstance(value, int | float):
        groups.setdefault(key, {}).setdefault(name, []).append(value)
  header = next(iter(groups), ())
  rows = []
  for key, metrics in groups.items():
    for name, values in metrics.items():
      finite = len(values) > 1 and all(map(math.isfinite, values))
      rows.append(
        (
          *(v for _, v in key),
          name,
          len(values),
          f"{statistics.fmean(values):.4f}",
          f"{statistics.stdev(values):.4f}" if finite else "",
          " ".join(f"{v:.4f}" for v in values),
        )
      )
  columns = (*(k for k, _ in header), "metric", "runs", "mean", "deviation", "values")
  text = log.table(rows, columns) if rows else "no run is complete yet"
  if missing and rows:
    text += f"\nnot complete, not in the table: {'; '.join(missing)}"
  return text


def log_file(run: Run) -> pathlib.Path:
  """What the run prints, beside its workdir; of a bucket's, under runs/."""
  return pathlib.Path(
    os.path.abspath(re.sub(r"^\w+://", "runs/", run.workdir)) + ".log"
  )


def run_all(runs: list[Run], args) -> list[int]:
  """Exit codes of the runs, which are started again where clj.main asks for it.

  SIGINT and SIGTERM end them all: local runs save, the launchers leave theirs alone.
  """
  children: set[subprocess.Popen] = set()
  stopping = threading.Event()

  def end(child):
    # A launcher waits for what it has started, so that must end too.
    send = child.send_signal if args.on == "local" else partial(os.killpg, child.pid)
    with contextlib.suppress(ProcessLookupError):
      send(signal.SIGTERM)

  def stop(*_):
    stopping.set()
    for child in list(children):
      end(child)

  def once(run) -> int:
    path = log_file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as out:
      # In a session of its own: Ctrl-C reaches it through `stop` alone.
      child = subprocess.Popen(
        command(run, args),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
      children.add(child)
      if stopping.is_set():
        end(child)
      try:
        return child.wait()
      finally:
        children.discard(child)

  def say(run, text):
    print(f"[{run.number + 1}] {run.name()}: {text}", flush=True)

  def until_done(run) -> int:
    began, idle = time.monotonic(), 0
    best = restarts.newest_step(run.workdir) if args.on == "local" else -1
    while not stopping.is_set():
      code = once(run)
      # The other launchers start their runs again themselves.
      again = args.on == "local" and (code == RESTART or code < 0)
      if stopping.is_set():
        break
      if not again:
        minutes = (time.monotonic() - began) / 60
        done = "submitted" if args.on == "slurm" else f"complete, {minutes:.1f} minutes"
        say(run, f"exit code {code}, see {log_file(run)}" if code else done)
        return code
      step = restarts.newest_step(run.workdir)
      best, idle = (step, 0) if step > best else (best, idle + 1)
      if idle > args.max_restarts:
        say(
          run, f"{idle - 1} restarts in a row brought no checkpoint after step {best}"
        )
        return 1
      say(run, f"exit code {code}, starting again from step {best}")
    return RESTART

  before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
  try:
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
      return list(pool.map(until_done, runs))
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def parse(argv: list[str]):
  parser = argparse.ArgumentParser(
    prog="launch.sweep", description=__doc__.splitlines()[0], allow_abbrev=False
  )
  parser.add_argument("--config", required=True, help="configs/NAME.py[:VARIANT]")
  parser.add_argument("--workdir", required=True, help="each run gets a folder in it")
  parser.add_argument(
    "--on", choices=("local", "tpu_vm", "gke", "slurm"), default="local"
  )
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
  parser.add_argument("--launcher", default="", help="its options, as one argument")
  parser.add_argument("--name", help="of what the launcher creates; default: workdir's")
  parser.add_argument(
    "--max-restarts",
    type=int,
    default=3,
    help="of a local run, in a row, that brought no new checkpoint",
  )
  parser.add_argument("--metrics", default="", help="regex; default: all")
  parser.add_argument("--table", action="store_true", help="print it and run nothing")
  parser.add_argument("--dry-run", action="store_true", help="print the commands")
  args, flags = parser.parse_known_args(argv)
  if args.jobs < 1:
    raise ValueError(f"--jobs is {args.jobs}; it must be at least 1")
  if "://" not in args.workdir:
    args.workdir = os.path.abspath(args.workdir)
  last = args.workdir.rstrip("/").rpartition("/")[2].lower()
  args.name = args.name or re.sub(r"[^a-z0-9]+", "-", last).strip("-")
  return args, grid(args, flags)


def main(argv: list[str]) -> int:
  try:
    args, runs = parse(argv)
  except ValueError as error:
    print(f"sweep: {error}", file=sys.stderr)
    return 1
  if args.dry_run:
    for run in runs:
      print(shlex.join(command(run, args)))
    return 0
  worst = 0
  try:
    todo = [run for run in runs if not results(run)[0]]
  except ImportError as error:  # of a bucket's client
    print(f"sweep: {args.workdir}: {error}", file=sys.stderr)
    return 1
  if not args.table:
    print(f"{len(runs)} runs, {len(runs) - len(todo)} complete already", flush=True)
    codes = run_all(todo, args)
    if RESTART in codes:
      print("sweep: stopped; the same command goes on", file=sys.stderr)
      return RESTART
    worst = int(any(codes))
    if args.on == "slurm":
      return worst
  print(table(runs, args.metrics))
  return worst


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
