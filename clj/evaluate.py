"""Evaluates a checkpoint of a run.

    python -m clj.evaluate --workdir=DIR [--evals=knn,linear_probe] [--step=N]

What there is to ask for is in `clj.evals`.
"""

import sys
from collections.abc import Sequence

from clj import cli


def main(argv: Sequence[str] | None = None) -> int:
  parser = cli.parser("clj.evaluate", "Evaluates a checkpoint of a run.")
  parser.add_argument("--workdir", required=True, help="of the run")
  parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
  parser.add_argument("--evals", help="such as knn,linear_probe; default: the config's")

  def action():
    arguments = parser.parse_args(argv)
    cli.quiet_libraries()
    from clj.evals.load import evaluate_alone  # after the flags: JAX takes a second

    print(evaluate_alone(arguments.workdir, arguments.step, arguments.evals))
    return 0

  return cli.guarded(action)


if __name__ == "__main__":
  sys.exit(main())
