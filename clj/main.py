"""Trains one config: python -m clj.main --config=configs/NAME.py[:VARIANT]

Run it again to go on where it stopped. Exit codes: 0 complete, 1 something that you
must mend (one line says what), 75 stopped on request or by the loss of another process:
start the same command again.

On Cloud TPU, on GKE and under Slurm the processes of a run find each other. Elsewhere
start one on each host with --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import pprint
import sys
import traceback

from clj import cli
from clj.runs import processes


def main(argv=None) -> int:
  processes.listen()
  argv = sys.argv[1:] if argv is None else list(argv)
  debug = "--debug" in argv
  try:
    arguments, config, filename = parse(argv)
    directory = arguments.workdir or cli.default_workdir(filename)
    if arguments.show:
      pprint.pprint(config, sort_dicts=False)
      return 0
    run = processes.find(
      arguments.coordinator, arguments.num_processes, arguments.process_id
    )
  except Exception as error:
    return cli.failed(error, debug)
  if run.count > 1 and not processes.is_child():
    command = [sys.executable, "-m", "clj.main", *argv]
    return processes.supervise(command, arguments.heartbeat)
  cli.quiet_libraries()
  cli.split_cpu(max(1, config["batch_size"] // run.count))
  try:
    if run.count > 1:
      processes.connect(run, arguments.heartbeat)
    code = train(directory, config)
  except Exception as error:
    if processes.is_loss(error):
      if debug:
        traceback.print_exception(error)
      processes.leave_lost()
    code = cli.failed(error, debug)
  return code if run.count == 1 else processes.leave(code)


def parse(argv):
  """Flags, the config and the name of its file; raises UserError."""
  parser = cli.parser("clj.main", f"{__doc__}\n{cli.CONFIG_HELP}.")
  parser.add_argument("--workdir", help="of the run; default: runs/NAME-VARIANT")
  parser.add_argument("--show", action="store_true", help="print the recipe, and end")
  parser.add_argument("--debug", action="store_true", help="tracebacks of all errors")
  cli.add_process_flags(parser)
  arguments, rest = parser.parse_known_args(argv)
  return arguments, *cli.read_config(rest)


def train(directory: str, config: dict) -> int:
  from clj.train import train  # after the flags: JAX takes a second to load

  return train(directory, **config)


if __name__ == "__main__":
  sys.exit(main())
