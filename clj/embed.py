"""Embeds a collection with a trained model; `clj.search` then finds in it.

    python -m clj.embed --workdir=runs/clip-demo --source=folder:/photos --out=index

What comes out is described in `clj.index.store`, how in `clj.index.build`. The same
command goes on after any kill.
"""

import os
import signal
import sys
from collections.abc import Sequence

from etils import epath

from clj import cli
from clj.cli import UserError
from clj.runs import processes


def main(argv: Sequence[str] | None = None) -> int:
  argv = sys.argv[1:] if argv is None else list(argv)
  try:
    arguments = _parse(argv)
    run = processes.find(
      arguments.coordinator, arguments.num_processes, arguments.process_id
    )
  except UserError as error:
    return cli.complain(error)
  cli.quiet_libraries()
  if run.count > 1 and not processes.is_child():
    command = [sys.executable, "-m", "clj.embed", *argv]
    return processes.supervise(command, arguments.heartbeat)
  try:
    cli.split_cpu(arguments.batch_size)
    if run.count > 1:
      processes.connect(run, arguments.heartbeat)
      signal.signal(signal.SIGTERM, _stop)  # each by itself: nothing has to be agreed
    code = _run(arguments)
  except Exception as error:
    if run.count > 1 and processes.is_loss(error):
      processes.leave_lost()
    code = cli.failed(error)
  return code if run.count == 1 else processes.leave(code)


def _parse(argv):
  parser = cli.parser(
    "clj.embed", "Embeds a collection with a trained model, for clj.search."
  )
  parser.add_argument(
    "--workdir", required=True, help="of the run, or imported weights"
  )
  parser.add_argument("--out", required=True, help="directory of the index")
  parser.add_argument(
    "--source",
    help="shapes, a TFDS name, folder:PATH, csv:PATH, parquet:PATH or webdataset:PATH;"
    " default: the data of the run",
  )
  parser.add_argument(
    "--split", help="default: train, or the test split of the run's own data"
  )
  parser.add_argument("--data_dir", help="of TFDS; default: TFDS_DATA_DIR")
  parser.add_argument("--image", help="field of the picture")
  parser.add_argument("--label", help="field of the class")
  parser.add_argument("--caption", help='field of the captions; "": none')
  parser.add_argument(
    "--what", help="image, text, both, or another column; default: the method's"
  )
  parser.add_argument("--format", default="parquet", help="parquet or npy")
  parser.add_argument("--batch_size", type=int, default=256)
  parser.add_argument(
    "--rows_per_shard", type=int, default=16384, help="records of a file"
  )
  parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
  parser.add_argument("--threads", type=int, help="that decode; default: one a core")
  cli.add_process_flags(parser)
  return parser.parse_args(argv)


def _stop(*_):
  """Ends this process at once: files are whole or not there."""
  processes.tell(f"exit {processes.AGAIN}")
  os._exit(processes.AGAIN)


def _run(arguments) -> int:
  from clj.index.build import build  # after the flags: JAX takes a second to load

  out = os.fspath(epath.Path(arguments.out).expanduser())
  options = (
    *("source", "split", "data_dir", "caption", "what", "format", "batch_size"),
    *("rows_per_shard", "step", "threads"),
  )
  info = build(
    arguments.workdir,
    out,
    fields={"image": arguments.image, "label": arguments.label},
    **{name: getattr(arguments, name) for name in options},
  )
  print(
    f"{out} is complete: {info['rows']} embeddings of width {info['dim']} in "
    f"{info['parts']} files, of {info['source']} {info['split']}; "
    f"{info['skipped']} corrupt records skipped"
  )
  for reason in info["reasons"]:
    print(f"  {reason}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
