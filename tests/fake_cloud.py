"""Plays gcloud, kubectl, sbatch, srun, scontrol and the machines behind them.

tests/launch_test.py puts them under those names into a folder that comes first in PATH.
Every call is written to $FAKE/calls.jsonl. What happens is in $FAKE/scenario.json:

  workers   hosts of a TPU
  creates   one entry a creation: the states that are seen one after the other, or
            {"fails": message, "exists": label or null} for one that is refused
  runs      one entry a start: for each process, what clj.main does, a list of
            "say TEXT", "checkpoint STEP", "preempt" (all hosts are gone), "kill" (the
            process, with -9), "wait" (until killed), "until_term" (waits for SIGTERM,
            exits 75), "until_followed" (somebody reads the log), "exit CODE"
  ssh_fails, install_fails, delete_fails   how many such calls fail
  preempted_at_scp                         how many copies find all hosts gone

Commands on a host are run for real, by bash, with a home of its own.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import sys
import time

FAKE = pathlib.Path(os.environ["FAKE"])
BUCKET = FAKE / "bucket"


@contextlib.contextmanager
def cloud():
  """The state that all calls share, locked."""
  with open(FAKE / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    path = FAKE / "cloud.json"
    state = json.loads(path.read_text()) if path.exists() else {}
    yield state
    partial = FAKE / "cloud.json.partial"
    partial.write_text(json.dumps(state))
    partial.replace(path)  # the test reads without the lock


def scenario(key, default=None):
  return json.loads((FAKE / "scenario.json").read_text()).get(key, default)


def used_up(state, key) -> bool:
  """Whether the failures of this kind have all happened; else one more has now."""
  state[key] = state.get(key, 0) + 1
  return state[key] > scenario(key, 0)


def local(path: str) -> pathlib.Path:
  return BUCKET / path.removeprefix("gs://")


def error(text: str, code: int = 1) -> int:
  print(f"ERROR: {text}", file=sys.stderr)
  return code


def option(args, name, default=None):
  found = [a.partition("=")[2] for a in args if a.startswith(f"--{name}=")]
  return found[-1] if found else default


def run(*args, **kwargs):
  import subprocess  # a third of the time that a call takes without it

  return subprocess.run(*args, **kwargs)


def kill_processes(pattern="*"):
  for path in (FAKE / "pids").glob(pattern):
    with contextlib.suppress(ProcessLookupError, ValueError):
      os.killpg(int(path.read_text()), signal.SIGKILL)
    path.unlink(missing_ok=True)


# --- gcloud ------------------------------------------------------------------------


def gcloud(args) -> int:
  if args[:2] == ["storage", "ls"]:
    found = local(args[2])
    if not found.is_dir():
      return error("One or more URLs matched no objects.")
    for child in sorted(found.iterdir()):
      print(f"{args[2].rstrip('/')}/{child.name}/")
    return 0
  assert args[:2] == ["compute", "tpus"], args
  kind, verb, name = args[2], args[3], args[4]
  assert option(args, "zone"), args
  if kind == "queued-resources":
    return {"create": create, "describe": describe, "delete": delete}[verb](name, args)
  return {"ssh": ssh, "scp": scp}[verb](args)


def create(name, args) -> int:
  labels = option(args, "labels")
  with cloud() as state:
    number = state["creations"] = state.get("creations", 0) + 1
    plan = scenario("creates", [["ACTIVE"]])
    plan = plan[min(number, len(plan)) - 1]
    here = state.setdefault("tpus", {})
    if name in here:
      return error(f"ALREADY_EXISTS: {name}")
    if isinstance(plan, dict):
      if "exists" in plan:
        here[name] = {"states": ["ACTIVE"], "label": plan["exists"] or labels}
      return error(plan["fails"])
    here[name] = {"states": plan, "label": labels}
  return 0


def describe(name, args) -> int:
  with cloud() as state:
    tpu = state.get("tpus", {}).get(name)
    if tpu is None:
      return error(f"NOT_FOUND: Resource {name} was not found")
    now = tpu["states"][0]
    tpu["states"] = tpu["states"][1:] or [now]
  print(f"{now}\t{tpu['label'].removeprefix('clj_run=')}")
  return 0


def delete(name, args) -> int:
  assert "--force" in args and "--quiet" in args, args
  with cloud() as state:
    if not used_up(state, "delete_fails"):
      return error("INTERNAL: try again")
    if name not in state.get("tpus", {}):
      return error(f"NOT_FOUND: Resource {name} was not found")
    del state["tpus"][name]
  kill_processes()
  for home in FAKE.glob("host-*"):
    home.rename(FAKE / f"gone-{time.monotonic_ns()}")
  return 0


def reachable(node) -> bool:
  with cloud() as state:
    tpus = state.get("tpus", {})
    tpu = tpus.get(node) or tpus.get(node.rpartition("-")[0])
    return tpu is not None and tpu["states"][0] == "ACTIVE"


def hosts(node, worker):
  every = range(scenario("workers", 1))
  for number in every if worker == "all" else [int(worker)]:
    home = FAKE / f"host-{node}-{number}"
    home.mkdir(exist_ok=True)
    yield number, home


def ssh(args) -> int:
  node, command = args[4], option(args, "command")
  if not reachable(node):
    return error(f"could not reach {node}", 255)
  with cloud() as state:
    if "tail -n +" in command and not used_up(state, "ssh_fails"):
      return error("connection lost", 255)
  worst = 0
  for number, home in hosts(node, option(args, "worker", "0")):
    env = os.environ | {
      "HOME": str(home),
      "PATH": f"{FAKE}/remote-bin:/usr/bin:/bin",
      "PROCESS": str(number),
    }
    script = command.replace("/tmp/clj-run", str(home / "clj-run"))
    code = run(["bash", "-c", script], cwd=home, env=env).returncode
    worst = max(worst, code)
  return worst


def preempt(state):
  for tpu in state["tpus"].values():
    tpu["states"] = ["SUSPENDING", "SUSPENDED"]


def scp(args) -> int:
  with cloud() as state:
    if not used_up(state, "preempted_at_scp"):
      preempt(state)
  source, (node, _, target) = args[4], args[5].partition(":")
  if not reachable(node):
    return error(f"could not reach {node}", 255)
  for _, home in hosts(node, option(args, "worker", "0")):
    (home / target).write_bytes(pathlib.Path(source).read_bytes())
  return 0


# --- on a host ---------------------------------------------------------------------


def python3(args) -> int:
  """The system's Python: installs uv, which makes environments."""
  if args[:2] == ["-m", "uv"] and args[2] == "venv":
    made = pathlib.Path(args[-1]) / "bin"
    made.mkdir(parents=True)
    (made / "python").symlink_to(FAKE / "remote-bin" / "python")
  if args[:3] == ["-m", "uv", "pip"]:
    assert pathlib.Path(option_after(args, "-r")).is_file()
    assert pathlib.Path(option_after(args, "--python")).exists()
    with cloud() as state:
      return 0 if used_up(state, "install_fails") else 1
  return 0


def option_after(args, name):
  return args[args.index(name) + 1]


def python(args) -> int:
  """The environment's Python: clj.main is played, launch.restarts is real."""
  if args[:2] == ["-m", "launch.restarts"]:
    args = [a.replace("gs://", f"{BUCKET}/") for a in args]
    return run([os.environ["REAL_PYTHON"], *args]).returncode
  assert args[:2] == ["-m", "clj.main"], args
  process = int(os.environ.get("PROCESS", "0"))
  with cloud() as state:
    starts = state.setdefault("starts", {})
    number = starts[str(process)] = starts.get(str(process), 0) + 1
    state.setdefault("clj", []).append([process, args[2:]])
  (FAKE / "pids").mkdir(exist_ok=True)
  if os.getpgid(0) == os.getsid(0):
    (FAKE / "pids" / f"{process}-{number}").write_text(str(os.getpgid(0)))
  plans = scenario("runs")
  plan = plans[min(number, len(plans)) - 1]
  for action in plan[min(process, len(plan) - 1)]:
    verb, _, what = action.partition(" ")
    if verb == "say":
      print(what, flush=True)
    elif verb == "checkpoint":
      directory = local(option(args, "workdir")) / "checkpoints" / what
      directory.mkdir(parents=True, exist_ok=True)
    elif verb == "preempt":
      with cloud() as state:
        preempt(state)
      kill_processes()
    elif verb == "until_followed":
      while "tail -n +" not in (FAKE / "calls.jsonl").read_text():
        time.sleep(0.02)
      time.sleep(0.5)
    elif verb == "kill":
      os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "until_term":
      signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
      (FAKE / f"waiting-{process}").touch()
      time.sleep(60)
    elif verb == "wait":
      (FAKE / f"waiting-{process}").touch()
      time.sleep(60)
    elif verb == "exit":
      return int(what)
  return 0


# --- kubectl: a JobSet controller that runs one attempt at each look ---------------


def kubectl(args) -> int:
  verb = args[0]
  if verb == "create":
    sys.path.append(os.environ["YAML"])
    import yaml

    body = yaml.safe_load(sys.stdin.read())
    name = body["metadata"]["name"]
    with cloud() as state:
      plan = (scenario("creates") or [None])[0]
      if isinstance(plan, dict):
        if "exists" in plan:
          label = plan["exists"] or body["metadata"]["labels"]["clj-run"]
          body["metadata"]["labels"]["clj-run"] = label
          state.setdefault("jobsets", {})[name] = body
        return error(plan["fails"])
      state.setdefault("jobsets", {})[name] = body
    return 0
  if verb == "delete":
    with cloud() as state:
      if state.get("jobsets", {}).pop(args[2], None) is None:
        assert "--ignore-not-found" in args
    return 0
  if args[:2] == ["get", "jobset"]:
    with cloud() as state:
      body = state.get("jobsets", {}).get(args[2])
      if body is None:
        return error(f'jobsets.jobset.x-k8s.io "{args[2]}" NotFound')
      print(json.dumps(body))
    attempt(args[2], body)
    return 0
  if args[:2] == ["get", "pods"]:
    with cloud() as state:
      for name, body in state.get("jobsets", {}).items():
        assert f"jobset.sigs.k8s.io/jobset-name={name}," in option(args, "selector")
        print(f"pod/{name}-slice-0-0-{body.get('status', {}).get('restarts', 0)}")
    return 0
  assert args[0] == "logs", args
  log = FAKE / f"{args[-1].replace('/', '-')}.log"
  if not log.exists():
    return error("container is waiting to start")
  if "--tail=0" not in args:
    print(log.read_text(), end="")
  return 0


def attempt(name, body):
  """Runs all pods of a JobSet once and applies its failure policies."""
  status = body.setdefault("status", {"restarts": 0, "conditions": []})
  if status["conditions"]:
    return
  job = body["spec"]["replicatedJobs"][0]["template"]["spec"]
  container = job["template"]["spec"]["containers"][0]
  slices = body["spec"]["replicatedJobs"][0]["replicas"]
  assert job["backoffLimit"] == 0 and job["completions"] == job["parallelism"]
  reasons = []
  for piece in range(slices):
    for index in range(job["completions"]):
      fields = {"restart-attempt": str(status["restarts"]), "job-index": str(piece)}
      env = {"JOB_COMPLETION_INDEX": str(index)}
      for entry in container["env"]:
        path = entry["valueFrom"]["fieldRef"]["fieldPath"]
        key = path.removeprefix("metadata.annotations['jobset.sigs.k8s.io/")
        env[entry["name"]] = fields[key.removesuffix("']")]
      env["PROCESS"] = str(piece * job["completions"] + index)
      env["PATH"] = f"{FAKE}/remote-bin:/usr/bin:/bin"
      words = [w.replace("$$(", "$(") for w in container["args"]]
      done = run(
        ["bash", "-c", 'exec "$@" 2>&1', "", *container["command"], *words],
        env=os.environ | env,
        capture_output=True,
        text=True,
        start_new_session=True,
      )
      if piece == index == 0:
        log = FAKE / f"pod-{name}-slice-0-0-{status['restarts']}.log"
        log.write_text(done.stdout)
      code = done.returncode if done.returncode >= 0 else 128 - done.returncode
      disrupted = env["PROCESS"] in scenario("disrupted", [])
      if code and (reason := job_failure(job, code, disrupted)):
        reasons.append(reason)
  action = jobset_action(body["spec"]["failurePolicy"], reasons)
  if action == "RestartJobSetAndIgnoreMaxRestarts":
    status["restarts"] += 1
  elif action:
    assert body["spec"]["failurePolicy"]["maxRestarts"] == 0
    status["conditions"] = [
      {"type": "Failed", "status": "True", "message": f"{action}: {reasons[0]}"}
    ]
  else:
    done = {"type": "Completed", "status": "True", "message": "jobset completed"}
    status["conditions"] = [done]
  with cloud() as state:
    if name in state.get("jobsets", {}):
      state["jobsets"][name] = body


def job_failure(job, code, disrupted) -> str:
  """Why a pod's exit fails its Job: the first rule of podFailurePolicy that holds."""
  for rule in job["podFailurePolicy"]["rules"]:
    if "onPodConditions" in rule:
      holds = disrupted
    else:
      codes = rule["onExitCodes"]
      assert codes["values"] == sorted(codes["values"])
      holds = (code in codes["values"]) == (codes["operator"] == "In")
    if holds:
      return {"FailJob": "PodFailurePolicy", "Count": "BackoffLimitExceeded"}[
        rule["action"]
      ]
  return "BackoffLimitExceeded"


def jobset_action(policy, reasons) -> str:
  if not reasons:
    return ""
  for rule in policy["rules"]:
    if set(reasons) & set(rule["onJobFailureReasons"]):
      return rule["action"]
  return "RestartJobSet"


# --- Slurm -------------------------------------------------------------------------


def sbatch(args) -> int:
  """Runs the job at once, as often as it is put back into the queue."""
  import subprocess

  script = next(i for i, a in enumerate(args) if not a.startswith("--"))
  text = pathlib.Path(args[script]).read_text()
  directives = [
    line.removeprefix("#SBATCH ")
    for line in text.splitlines()
    if line.startswith("#SBATCH ")
  ]
  options = directives + args[:script]
  assert "--requeue" in options and "--open-mode=append" in options
  log = open(FAKE / "slurm.log", "a")  # noqa: SIM115
  for restart in range(scenario("patience", 10)):
    env = {
      "SLURM_JOB_ID": "17",
      "SLURM_SUBMIT_DIR": os.getcwd(),
      "SLURM_NTASKS": option(args[:script], "ntasks-per-node", "2"),
      "SLURM_CPUS_PER_TASK": option(options, "cpus-per-task"),
    }
    if restart:
      env["SLURM_RESTART_COUNT"] = str(restart)
    with cloud() as state:
      state["requeued"] = False
    spooled = FAKE / "slurm_script"  # Slurm runs a copy
    spooled.write_text(text)
    job = subprocess.Popen(
      ["bash", str(spooled), *args[script + 1 :]],
      env=os.environ | env,
      stdout=log,
      stderr=log,
      start_new_session=True,
    )
    (FAKE / "job").write_text(str(job.pid))
    code = job.wait()
    with cloud() as state:
      if not state["requeued"]:
        (FAKE / "job_code").write_text(str(code))
        break
  print("Submitted batch job 17")
  return 0


def srun(args) -> int:
  """Runs the tasks and returns the highest of their exit codes."""
  import subprocess

  start = next(i for i, a in enumerate(args) if not a.startswith("--"))
  options = args[:start]
  assert "--kill-on-bad-exit=0" in options and option(options, "wait") == "180"
  tasks = [
    subprocess.Popen(
      args[start:],
      env=os.environ | {"SLURM_PROCID": str(rank), "PROCESS": str(rank)},
      start_new_session=True,
    )
    for rank in range(int(os.environ["SLURM_NTASKS"]))
  ]
  # Also what Slurm does at --signal's time: SIGTERM to the process group of each task.
  if scenario("time_limit"):
    while len(list(FAKE.glob("waiting-*"))) < len(tasks):
      time.sleep(0.02)
    for path in FAKE.glob("waiting-*"):
      path.unlink()
    for task in tasks:
      os.killpg(task.pid, signal.SIGTERM)
  codes = [task.wait() for task in tasks]
  with cloud() as state:
    if scenario("node_lost", 0) > state.get("node_lost", 0):
      # Slurm itself puts the job back and kills what is left of it.
      state["node_lost"] = state.get("node_lost", 0) + 1
      state["requeued"] = True
      os.killpg(int((FAKE / "job").read_text()), signal.SIGKILL)
  return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(args) -> int:
  if args == ["show", "job", "17"]:
    print(
      f"JobId=17 JobName=clj\n   JobState={scenario('job_state', 'RUNNING')} Reason="
    )
    return 0
  assert args == ["requeue", "17"], args
  with cloud() as state:
    state["requeued"] = True
  return 0


def main() -> int:
  program, args = sys.argv[1], sys.argv[2:]
  if program not in ("python", "python3"):
    line = (json.dumps([program, *args]) + "\n").encode()
    with open(FAKE / "calls.jsonl", "ab", buffering=0) as calls:
      calls.write(line)
  return globals()[program](args)


if __name__ == "__main__":
  sys.exit(main())
