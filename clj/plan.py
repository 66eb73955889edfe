"""What a run will need and how fast it can be, before a TPU is paid for.

    python -m clj.plan --config=configs/simclr.py:imagenet_r50 --topology=v5e:8x8
      [--config.key=value ...] [--json] [--sweep]

The real train step of the config is compiled for every device of the topology, from
shapes alone; no TPU is needed, only its compiler (pip install libtpu). What one device
holds, computes, moves in its memory and sends is then read off the compiled program
(`clj.planning.hlo`) and set against the published peaks of the hardware: in all, and
for each part of the step (augmentation, towers, loss, optimiser, and the rest), which
shows what holds the others up. The times are bounds, not forecasts: nothing runs at its
peak.

--topology: GENERATION:SHAPE in chips, such as v5e:16x16, v4:4x4x4, or 8xv5e:16x16 for
  eight slices; several, with commas, give a table; "local" is the GPUs or the CPU here.
--sweep: from 8 to 2,048 chips of the generation at the batch per device that the config
  has on --topology (weak scaling).
"""

import json
import os
import sys

from clj import cli
from clj.cli import UserError
from clj.planning.chips import Topology, quiet_compiler, sizes

# What imports JAX is imported where it is needed: after `prepare`.


def main(argv=None) -> int:
  argv = sys.argv[1:] if argv is None else list(argv)
  try:
    return _main(argv)
  except Exception as error:
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(error, jax.errors.JaxRuntimeError):
      error = UserError(cli.one_line(error))
    return cli.failed(error, "--debug" in argv)


def _main(argv) -> int:
  parser = cli.parser("clj.plan", f"{__doc__}\n{cli.CONFIG_HELP}.")
  parser.add_argument("--topology", default="local", help="for what; see above")
  parser.add_argument("--json", action="store_true", help="one JSON object a line")
  parser.add_argument("--sweep", action="store_true", help="weak scaling, 8 to 2,048")
  parser.add_argument("--debug", action="store_true", help="tracebacks of all errors")
  arguments, rest = parser.parse_known_args(argv)
  config, name = cli.read_config(rest)
  prepare(arguments.topology, config["batch_size"])
  from clj.planning import fit, report, step

  tell = lambda line: print(line, file=sys.stderr, flush=True)
  names = arguments.topology.split(",")
  if arguments.sweep:
    first = Topology(names[0])
    rows = config["batch_size"] // len(first.devices)
    names = sizes(first)
  plans = []
  for each in names:
    topology = Topology(each)
    if arguments.sweep:  # as many examples in all as the recipe has
      examples = config["total_steps"] * config["batch_size"]
      config["batch_size"] = rows * len(topology.devices)
      config["total_steps"] = max(1, examples // config["batch_size"])
    tell(f"compiling for {each}, {len(topology.devices)} devices")
    found = step.plan(config, topology)
    plans.append(found)
    if arguments.json:
      print(json.dumps({"config": name} | found), flush=True)
    elif len(names) == 1:
      print(report.describe(found, name), flush=True)
    if not found["fits"] and len(names) == 1:
      for flag, tried in fit.make_fit(config, topology, tell):
        if arguments.json:
          print(json.dumps({"config": name, "change": flag} | tried), flush=True)
          continue
        verdict = "fits" if tried["fits"] else "does not fit"
        needs = report.size(tried["needs"]) if tried["needs"] else "?"
        print(f"with {flag}: {verdict}, {needs}", flush=True)
  if len(names) > 1 and not arguments.json:
    print(report.table(plans))
  return 0


def prepare(topology: str, batch_size: int):
  """Sets the environment that JAX reads when it is imported."""
  cli.quiet_libraries()
  if topology == "local":
    cli.split_cpu(batch_size)
    return
  os.environ["JAX_PLATFORMS"] = "cpu"  # what is compiled for is not here
  quiet_compiler()


if __name__ == "__main__":
  sys.exit(main())
