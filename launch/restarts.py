"""Stops a scheduler from starting a run again and again that gets nowhere.

    python -m launch.restarts --workdir=DIR --restart=N && python -m clj.main ...

N is the scheduler's count of restarts, 0 at the first start. Exits 1 once more than
`--limit` restarts (3) in a row brought no new checkpoint; the count is kept in
DIR/restarts.json.
"""

import argparse
import json
import sys

from etils import epath


def newest_step(workdir) -> int:
  """The step of the newest checkpoint in `workdir`, -1 without any."""
  checkpoints = epath.Path(workdir) / "checkpoints"
  if not checkpoints.exists():
    return -1
  steps = [int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()]
  return max(steps, default=-1)


def count(workdir, restart: int) -> tuple[int, int]:
  """Notes a start; returns (restarts in a row without progress, newest step)."""
  step, idle = newest_step(workdir), 0
  path = epath.Path(workdir) / "restarts.json"
  if restart > 0 and path.exists():
    before = json.loads(path.read_text())
    if step <= before["step"]:
      step, idle = before["step"], before["without_progress"] + 1
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({"step": step, "without_progress": idle}) + "\n")
  return idle, step


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--restart", type=int, required=True)
  parser.add_argument("--limit", type=int, default=3)
  args = parser.parse_args()
  try:
    idle, step = count(args.workdir, args.restart)
  except Exception as error:  # a bucket's client has errors of its own
    print(f"restarts: {args.workdir}: {error}", file=sys.stderr)
    return 1
  if idle > args.limit:
    print(
      f"restarts: {args.limit} restarts in a row brought no checkpoint after step "
      f"{step} of {args.workdir}; mend what stops it and submit it again",
      file=sys.stderr,
    )
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
