"""Several processes over loopback: the same run as in one; none lost with another."""

import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from clj.runs import checkpoint, log, processes
from clj.train import train
from configs import simclr
from tests import pods_worker

EVALS = {"knn": {"k": 20, "temperature": 0.1}, "diagnostics": {}}


def smoke(**changes):
  config = simclr.get_config("smoke").to_dict()
  return config | {"log_every": 1, "checkpoint_every": 10, "evals": EVALS} | changes


def free_port():
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]


def start(command, index, devices=4, **kwargs):
  """Starts one process; its compiled programs come from the cache of the tests."""
  env = os.environ | {
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
  }
  return subprocess.Popen(
    [sys.executable, *map(str, command)],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


class Pair:
  """`clj.main` in two processes of four devices each."""

  def __init__(
    self, directory, *arguments, config="configs/simclr.py:smoke", count=2, devices=4
  ):
    address = f"127.0.0.1:{free_port()}"
    self.children = [
      start(
        [
          "-m",
          "clj.main",
          f"--config={config}",
          f"--workdir={directory}",
          f"--coordinator={address}",
          f"--num_processes={count}",
          f"--process_id={index}",
          *arguments,
        ],
        index,
        devices,
      )
      for index in range(count)
    ]

  def end(self, timeout=400):
    """Exit codes, outputs and errors of all."""
    timer = threading.Timer(timeout, lambda: [c.kill() for c in self.children])
    timer.start()
    texts = [child.communicate() for child in self.children]
    timer.cancel()
    return [c.returncode for c in self.children], *zip(*texts)


def run(directory, *arguments, **kwargs):
  codes, outputs, errors = Pair(directory, *arguments, **kwargs).end()
  assert set(codes) == {0}, errors
  return outputs


ARGUMENTS = (
  "--config.log_every=1",
  "--config.evals.knn.k=20",
)


def values_of(directory, step, prefix):
  return {
    key: value
    for line in log.read_metrics(directory)
    if line["step"] == step
    for key, value in line.items()
    if key.startswith(prefix)
  }


def assert_close(found, expected, tolerance):
  assert found.keys() == expected.keys() and expected
  for key, value in expected.items():
    np.testing.assert_allclose(
      found[key], value, rtol=tolerance, atol=tolerance, err_msg=key
    )


def test_two_processes_are_one(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  outputs = run(two, *ARGUMENTS, "--config.total_steps=2")
  assert train(one, **smoke(total_steps=2, evals={"knn": EVALS["knn"]})) == 0
  assert_close(values_of(two, 0, "eval/"), values_of(one, 0, "eval/"), 1e-6)
  assert_close(values_of(two, 1, "train/loss"), values_of(one, 1, "train/loss"), 1e-6)
  assert_close(values_of(two, 1, "train/grad"), values_of(one, 1, "train/grad"), 1e-5)
  # The second says nothing; each line stands once.
  said = [[line for line in out.splitlines() if "Gloo" not in line] for out in outputs]
  assert said[0] and not said[1]
  steps = [line["step"] for line in log.read_metrics(two)]
  assert steps == [0, 1, 2, 2]
  assert len(list((two / "tensorboard").iterdir())) == 1
  # Each has hashed what it wrote, and one process restores what two have written.
  assert len(list((two / "hashes").iterdir())) == 2
  assert "complete, all 2 steps" in run_alone(two)


def run_alone(directory, *arguments):
  child = start(
    [
      *("-m", "clj.main", "--config=configs/simclr.py:smoke"),
      f"--workdir={directory}",
      *(*ARGUMENTS, "--config.total_steps=2", *arguments),
    ],
    0,
    8,
  )
  out, error = child.communicate(timeout=240)
  assert child.returncode == 0, error
  return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The same 20 steps in one process with 8 devices and in two with 4 each."""
  one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
  run(two, *ARGUMENTS, "--config.total_steps=20", "--config.checkpoint_every=10")
  assert train(one, **smoke(total_steps=20)) == 0
  return one, two


def probe_two(directory, steps, tmp_path, mesh=()):
  """What `pods_worker.probe` finds in each of two processes."""
  address = f"127.0.0.1:{free_port()}"
  outs = [tmp_path / f"{index}.npy" for index in range(2)]
  children = [
    start(
      [
        *("-m", "tests.pods_worker", directory, outs[i], address, 2, i),
        *(",".join(map(str, steps)), *mesh),
      ],
      i,
    )
    for i in range(2)
  ]
  ends = [child.communicate(timeout=400) for child in children]
  assert [child.returncode for child in children] == [0, 0], ends
  return [np.load(out, allow_pickle=True).item() for out in outs]


@pytest.mark.slow
@pytest.mark.parametrize("written_by", ["one", "two"])
def test_batches_losses_gradients_evaluations_are_the_same(runs, written_by, tmp_path):
  directory = runs[("one", "two").index(written_by)]
  steps = [0, 10, 20]
  expected = pods_worker.probe(directory, steps)
  found = probe_two(directory, steps, tmp_path)
  for step in steps:
    for key, rows in expected[step]["batch"].items():
      halves = [part[step]["batch"][key] for part in found]
      np.testing.assert_array_equal(np.concatenate(halves), rows, err_msg=key)
    for part in found:
      for key, value in expected[step]["values"].items():
        got = part[step]["values"][key]
        if key == "loss":
          np.testing.assert_allclose(got, value, rtol=1e-6)
        elif key.startswith("[1]"):  # parameters, restored
          np.testing.assert_array_equal(got, value, err_msg=key)
      grads = [
        np.concatenate([np.ravel(v) for k, v in values.items() if k.startswith("[0]")])
        for values in (part[step]["values"], expected[step]["values"])
      ]
      error = np.linalg.norm(grads[0] - grads[1]) / np.linalg.norm(grads[1])
      assert error < 1e-5, step
      assert_close(part[step]["evaluation"], expected[step]["evaluation"], 1e-6)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path):
  one, two = runs
  # From step 10 of the run of one process, in two; and the reverse.
  for source, name in ((one, "two"), (two, "one")):
    directory = tmp_path / name
    shutil.copytree(source, directory)
    shutil.rmtree(directory / "checkpoints" / "20")
    arguments = (*ARGUMENTS, "--config.total_steps=20", "--config.checkpoint_every=10")
    if name == "two":
      outputs = run(directory, *arguments)
      assert "going on from step 10 of 20" in outputs[0]
    else:
      assert train(directory, **smoke(total_steps=20)) == 0
    assert_close(
      values_of(directory, 11, "train/loss"), values_of(source, 11, "train/loss"), 1e-6
    )
    assert_close(
      values_of(directory, 11, "train/grad_norm"),
      values_of(source, 11, "train/grad_norm"),
      1e-5,
    )
    steps = [m["step"] for m in log.read_metrics(directory) if "train/loss" in m]
    assert steps == list(range(1, 21))


def wait_for(condition, pair, timeout=400):
  until = time.monotonic() + timeout
  while not condition():
    codes = [child.poll() for child in pair.children]
    assert codes == [None] * len(codes), (codes, pair.end(timeout=60))
    assert time.monotonic() < until, pair.end(timeout=1)
    time.sleep(0.01)


def reached(directory, step):
  return lambda: any(m["step"] >= step for m in log.read_metrics(directory))


def trainer(parent):
  """The process id of the child that trains, or None."""
  path = f"/proc/{parent.pid}/task/{parent.pid}/children"
  with open(path) as file:
    return next(map(int, file.read().split()), None)


LONG = ("--heartbeat=15", "--config.checkpoint_every=5")


@pytest.mark.slow
@pytest.mark.parametrize(
  "moment", ["start", "compilation", "step", "evaluation", "save"]
)
def test_sigterm_on_one_host_saves_the_same_step_on_all(moment, tmp_path):
  pair = Pair(tmp_path, *LONG, config="tests/pods_config.py:evaluated")
  says = lambda words: lambda: words in pair.children[0].stdout.readline()
  moments = {
    "start": lambda: trainer(pair.children[1]),
    "compilation": says("mesh: data"),  # before the evaluation and the step compile
    "step": reached(tmp_path, 4),
    "evaluation": says("step 6: evaluating"),
    "save": lambda: list((tmp_path / "checkpoints").glob("*tmp*")),
  }
  wait_for(moments[moment], pair)
  pair.children[1].send_signal(signal.SIGTERM)
  codes, outputs, errors = pair.end()
  assert codes == [75, 75], errors
  last = outputs[0].strip().splitlines()[-1]
  if "before the first step" in last:
    return
  step = checkpoint.Checkpoints(tmp_path).steps()[-1]
  assert f"stopped by SIGTERM, saved at step {step}" in last
  # Both have hashed their part of it.
  assert len(list((tmp_path / "hashes").glob(f"{step}.*.json"))) == 2
  assert log.read_metrics(tmp_path)[-1]["step"] == step


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_host_ends_the_others_within_a_minute(how, victim, tmp_path):
  pair = Pair(tmp_path, *LONG, config="tests/pods_config.py")
  wait_for(reached(tmp_path, 3), pair)
  began = time.monotonic()
  os.kill(trainer(pair.children[victim]), how)
  codes, _, errors = pair.end(timeout=60)
  assert time.monotonic() - began < 60
  assert codes == [75, 75]
  other = errors[1 - victim].strip().splitlines()[-1]
  assert other == f"clj: {processes.LOST}"
  own = errors[victim].strip().splitlines()[-1]
  assert "signal 9" in own if how == signal.SIGKILL else "no sign of life" in own


def test_watch_knows_a_stuck_step_from_a_long_evaluation():
  watch = processes.Watch(10, 0.0)
  assert watch.stuck(20) is None  # loading its modules
  for now in range(21, 101):  # compiling
    watch.note("alive", now)
    assert watch.stuck(now) is None
  for now in (101, 104, 107):
    watch.note("step", now)
  watch.note("busy", 107.5)
  for now in range(108, 1000):
    watch.note("alive", now)
    assert watch.stuck(now) is None
  watch.note("step", 1000)  # ends an evaluation: not a step of 893 s
  watch.note("step", 1004)
  watch.note("alive", 1023)
  assert watch.stuck(1023.9) is None  # 4 s is the longest step: five times that
  assert "longest step before: 4.0 s" in watch.stuck(1024.5)
  assert "no sign of life for 10 s" in watch.stuck(1034)
  watch.note("exit 75", 1034)
  assert watch.code == 75 and watch.stuck(1035) is None


@pytest.mark.parametrize(
  "error, lost",
  [
    (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
    (jax.errors.JaxRuntimeError("UNAVAILABLE: heartbeat timeout"), True),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
    (ValueError("RESOURCE_EXHAUSTED: No space left on device"), False),
  ],
)
def test_the_loss_of_another_process_is_told_from_an_error(error, lost, monkeypatch):
  monkeypatch.setattr(processes, "_in_runtime", lambda: True)
  assert processes.is_loss(error) == lost
  wrapped = checkpoint.CheckpointError("saving step 18 failed")
  wrapped.__cause__ = error  # as a save raises it
  assert processes.is_loss(wrapped) == lost
  monkeypatch.setattr(processes, "_in_runtime", lambda: False)
  assert not processes.is_loss(error)


CHILD = """
import os, sys, time
tell = lambda word: os.write(int(os.environ["CLJ_PARENT_PIPE"]), word)
print(os.getpid(), flush=True)
for word in sys.argv[1:]:
  tell(word.encode() + b"\\n")
while True:
  tell(b"alive\\n")
  time.sleep(0.1)
"""


def supervised(*words):
  """A parent whose child says `words` and then nothing but that it is alive."""
  code = "import sys; from clj.runs import processes\n"
  code += "sys.exit(processes.supervise([sys.executable, '-c', *sys.argv[1:]], 1))"
  return start(["-c", code, CHILD, *words], 0)


def test_a_process_that_is_alive_but_stuck_is_ended():
  parent = supervised("step", "step")
  out, error = parent.communicate(timeout=30)
  assert parent.returncode == 75
  assert error.strip().startswith("clj: a step did not end within 2 s (longest step ")
  assert len(error.strip().splitlines()) == 1
  assert gone(int(out))


def test_a_parent_that_is_killed_takes_its_child_along():
  parent = supervised()
  child = int(parent.stdout.readline())
  assert not gone(child)
  parent.kill()
  parent.communicate()  # the child held the pipes too
  until = time.monotonic() + 10
  while not gone(child):
    assert time.monotonic() < until
    time.sleep(0.01)


def gone(pid):
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0] == "Z"
  except FileNotFoundError:
    return True


SLURM = {
  "SLURM_JOB_ID": "17",
  "SLURM_STEP_NODELIST": "node[001-002]",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
  "environment, count",
  [
    ({}, 1),
    (SLURM, 4),
    ({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4"}, 1),  # a shell in an allocation
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, 1),
    ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_SKIP_MDS_QUERY": "1"}, 4),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, 6),
  ],
)
def test_clusters_are_found(environment, count):
  assert processes.find(None, None, None, environment) == processes.Run(count)


def test_a_cloud_tpu_slice_is_found_by_its_metadata():
  answers = {"worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2"}
  answers["tpu-env"] = "WORKER_ID: '0'\nMEGASCALE_NUM_SLICES: '2'\n"

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      body = answers.get(self.path.rpartition("/")[2])
      self.send_response(200 if body else 404)
      self.end_headers()
      self.wfile.write((body or "").encode())

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    assert processes.find(None, None, None, environment) == processes.Run(4)
    answers["worker-network-endpoints"] = "a:0:10.0.0.1"
    answers["tpu-env"] = ""
    assert processes.find(None, None, None, environment) == processes.Run(1)
    answers.clear()
    assert processes.find(None, None, None, environment) == processes.Run(1)
    server.shutdown()


@pytest.mark.parametrize(
  "flags, message",
  [
    (("a:1", 2, None), "--process_id missing"),
    ((None, 2, 0), "--coordinator missing"),
    (("host", 2, 0), "--coordinator=host is not HOST:PORT"),
    (("a:1", 2, 2), "--process_id=2 is not one of 0 to 1"),
  ],
)
def test_flags_that_do_not_fit_are_one_line(flags, message):
  with pytest.raises(ValueError, match=message):
    processes.find(*flags, {})
