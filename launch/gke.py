"""Trains on TPU slices of a GKE cluster that kubectl points at and that has JobSet.

    python -m launch.gke train --name=r50 --topology=v5e:4x4 --image=IMAGE --spot \\
      -- --config=configs/simclr.py:imagenet_r50 --workdir=gs://BUCKET/runs/r50

`train` submits launch/gke.yaml, follows it to its end and deletes it; Ctrl-C leaves it
alone, and the same command follows it again. `submit`, `logs`, `status` and `delete`
are its parts. --dry-run prints the exact commands and runs none. The cluster starts the
run again after a preemption by itself, whether somebody follows it or not.
"""

import argparse
import json
import math
import pathlib
import shlex
import string
import subprocess
import sys
import time
import zlib

ACCELERATORS = {
  "v3": "tpu-v3-slice",
  "v4": "tpu-v4-podslice",
  "v5e": "tpu-v5-lite-podslice",
  "v5p": "tpu-v5p-slice",
  "v6e": "tpu-v6e-slice",
}


class LaunchError(Exception):
  """One line for the user."""


def render(args) -> str:
  """launch/gke.yaml for these arguments."""
  generation, _, topology = args.topology.partition(":")
  if generation not in ACCELERATORS or not topology.replace("x", "").isdigit():
    raise LaunchError(
      f"--topology is {args.topology!r}; it must be GENERATION:AxB[xC], such as "
      f"v5e:4x4, with one of {', '.join(ACCELERATORS)}"
    )
  total = math.prod(map(int, topology.split("x")))
  chips = min(args.chips_per_host, total)
  if total % chips:
    raise LaunchError(f"{total} chips do not divide into hosts of {chips}")
  template = (pathlib.Path(__file__).parent / "gke.yaml").read_text()
  if not args.spot:
    lines = template.splitlines(keepends=True)
    template = "".join(line for line in lines if "# only with --spot" not in line)
  # JSON is YAML, quoted.
  return string.Template(template).substitute(
    name=args.name,
    label=label(args.workdir),
    slices=args.slices,
    hosts=total // chips,
    chips=chips,
    accelerator=ACCELERATORS[generation],
    topology=topology,
    image=json.dumps(args.image),
    workdir=json.dumps(args.workdir),
    args=json.dumps(escape(args.train_args)),
    max_restarts=args.max_restarts,
  )


def escape(words: list[str]) -> list[str]:
  """Kubernetes expands $(NAME) in arguments, unless it is written $$(NAME)."""
  return [word.replace("$(", "$$(") for word in words]


def label(workdir: str) -> str:
  """What marks a JobSet as the run of this workdir."""
  return str(zlib.crc32(workdir.encode()))


def kubectl(args, *command, check=True, **kwargs) -> subprocess.CompletedProcess:
  """The one door to kubectl."""
  line = ["kubectl", *(["--namespace", args.namespace] if args.namespace else [])]
  line += command
  if args.dry_run:
    text = shlex.join(line)
    if "input" in kwargs:
      text += f" <<'END'\n{kwargs['input']}END"
    print(text)
    return subprocess.CompletedProcess(line, 0, "", "")
  kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
  try:
    done = subprocess.run(line, text=True, **kwargs)
  except FileNotFoundError:
    raise LaunchError("kubectl is not installed") from None
  if check and done.returncode:
    raise LaunchError(f"{shlex.join(line)}: {(done.stderr or '').strip()}")
  return done


def look(args) -> dict | None:
  """The JobSet as it is, None where there is none."""
  for _ in range(5):
    done = kubectl(args, "get", "jobset", args.name, "--output=json", check=False)
    if done.returncode == 0:
      return json.loads(done.stdout) if done.stdout else {}
    if "NotFound" in done.stderr:
      return None
    time.sleep(args.poll)  # the API server of a cluster is sometimes away for a minute
  raise LaunchError(f"cannot see JobSet {args.name}: {done.stderr.strip()}")


def submit(args):
  """Creates the JobSet; one that is there already must be of the same workdir."""
  found = None if args.dry_run else look(args)
  if found is None:
    text = render(args)
    done = kubectl(args, "create", "--filename=-", input=text, check=False)
    if done.returncode == 0:
      print(f"{'# ' if args.dry_run else ''}gke: submitted {args.name}", flush=True)
      return
    found = look(args)  # another start may have been a moment faster
    if found is None:
      raise LaunchError(f"{args.name} could not be created: {done.stderr.strip()}")
  owner = found["metadata"].get("labels", {}).get("clj-run")
  if owner != label(args.workdir):
    raise LaunchError(
      f"a JobSet {args.name} exists and is not of this workdir; take another --name"
    )
  print(f"gke: {args.name} is there already; following it", flush=True)


def end(jobset: dict) -> tuple[str, str]:
  """("Completed" | "Failed" | "", message) of a JobSet."""
  for condition in jobset.get("status", {}).get("conditions", []):
    if condition["type"] in ("Completed", "Failed") and condition["status"] == "True":
      return condition["type"], condition.get("message", "")
  return "", ""


def first_pod(args) -> str:
  """The pod of the first process, "" while there is none."""
  selector = ",".join(
    (
      f"jobset.sigs.k8s.io/jobset-name={args.name}",
      "jobset.sigs.k8s.io/job-index=0",
      "batch.kubernetes.io/job-completion-index=0",
    )
  )
  done = kubectl(args, "get", "pods", f"--selector={selector}", "--output=name")
  return done.stdout.split()[-1] if done.stdout.split() else ""


def logs(args, shown: str = "") -> str:
  """Follows the log of the first process, if its pod is `shown` from now on only.

  Returns the name of the pod.
  """
  pod = first_pod(args)
  if not pod and not args.dry_run:
    return shown
  pod = pod or f"pod/{args.name}-slice-0-0-xxxxx"
  tail = ["--tail=0"] if pod == shown else []
  done = kubectl(args, "logs", "--follow", *tail, pod, check=False, stdout=None)
  return pod if done.returncode == 0 else shown  # 1: still starting


def follow(args) -> int:
  shown, restarts = "", 0
  while True:
    shown = logs(args, shown)
    jobset = look(args)
    if args.dry_run:
      return 0
    if jobset is None:
      raise LaunchError(f"JobSet {args.name} was deleted by somebody else")
    if jobset.get("status", {}).get("restarts", 0) > restarts:
      restarts = jobset["status"]["restarts"]
      print(f"gke: {args.name} is started again, for the {restarts}. time", flush=True)
    kind, message = end(jobset)
    if kind:
      print(f"gke: {args.name}: {kind}. {message}", flush=True)
      return 0 if kind == "Completed" else 1
    time.sleep(args.poll)


def delete(args):
  kubectl(args, "delete", "jobset", args.name, "--ignore-not-found", "--wait=true")
  print(f"{'# ' if args.dry_run else ''}gke: {args.name} is deleted", flush=True)


def train(args) -> int:
  submit(args)
  code = follow(args)
  if args.keep:
    print(f"gke: {args.name} is kept; delete it before the name is used again")
  else:
    delete(args)
  return code


def status(args):
  jobset = look(args)
  if jobset is None:
    print(f"gke: there is no JobSet {args.name}")
  elif jobset:
    kind, message = end(jobset)
    restarts = jobset.get("status", {}).get("restarts", 0)
    print(f"gke: {args.name}: {kind or 'going on'}, {restarts} restarts. {message}")


def parse(argv: list[str]) -> argparse.Namespace:
  cut = argv.index("--") if "--" in argv else len(argv)
  parser = argparse.ArgumentParser(
    prog="launch.gke", description=__doc__.splitlines()[0], allow_abbrev=False
  )
  parser.add_argument(
    "command", choices=("train", "submit", "logs", "status", "delete")
  )
  parser.add_argument("--name", required=True)
  parser.add_argument("--topology", help="of a slice, as clj.plan takes it: v5e:4x4")
  parser.add_argument("--image", help="built from launch/Dockerfile")
  parser.add_argument("--chips-per-host", type=int, default=4)
  parser.add_argument("--slices", type=int, default=1)
  parser.add_argument("--spot", action="store_true")
  parser.add_argument("--namespace")
  parser.add_argument(
    "--max-restarts",
    type=int,
    default=3,
    help="restarts in a row that brought no new checkpoint",
  )
  parser.add_argument("--poll", type=float, default=20, help="seconds")
  parser.add_argument("--keep", action="store_true", help="do not delete at the end")
  parser.add_argument("--dry-run", action="store_true")
  args = parser.parse_args(argv[:cut])
  args.train_args = argv[cut + 1 :]
  flags = [a.partition("=")[2] for a in args.train_args if a.startswith("--workdir=")]
  args.workdir = flags[-1] if flags else ""
  if args.command in ("train", "submit"):
    if not args.topology or not args.image:
      raise LaunchError("give --topology= and --image=")
    if not args.workdir.startswith("gs://"):
      raise LaunchError("give -- --workdir=gs://BUCKET/DIR: a pod's own disk is lost")
  return args


def main(argv: list[str]) -> int:
  args = None
  try:
    args = parse(argv)
    commands = {f.__name__: f for f in (train, submit, logs, status, delete)}
    code = commands[args.command](args)
    return code if isinstance(code, int) else 0
  except LaunchError as error:
    print(f"gke: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(
      f"\ngke: {args.name} was left as it is; the same command goes on, and "
      f"python -m launch.gke delete --name={args.name} ends it",
      file=sys.stderr,
    )
    return 130


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
