"""What would make a step fit: changes of the config, tried by compiling with them."""

import copy

from clj.planning import step
from clj.planning.chips import Topology


def changes(config: dict, devices: int):
  """(what to add to the command, changed config): what saves memory, best first."""
  for section in ("method", "model"):
    for path, value in _keys(config[section]):
      chunk = config["batch_size"] // 8
      if path[-1] == "micro_batch" and not value and chunk and chunk % devices == 0:
        yield _changed(config, (section, *path), chunk)
      if path[-1] == "remat" and value is not True:
        yield _changed(config, (section, *path), True)
  if config["mesh"]["fsdp"] == 1:
    yield _changed(config, ("mesh", "fsdp"), devices)


def _keys(tree, path=()):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _keys(value, (*path, key))
    else:
      yield (*path, key), value


def _changed(config, path, value):
  config = copy.deepcopy(config)
  inner = config
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = value
  return f"--config.{'.'.join(path)}={value}", config


def make_fit(config: dict, topology: Topology, tell) -> list[tuple[str, dict]]:
  """Compiles with what saves memory until the step fits: [(flags, plan)], in order."""
  tried = []
  together, everything = [], config
  for flag, changed in changes(config, len(topology.devices)):
    tell(f"trying {flag}")
    tried.append((flag, step.plan(changed, topology)))
    if tried[-1][1]["fits"]:
      return tried
    together.append(flag)
  if len(together) > 1:
    for flag in together:
      path, value = flag.removeprefix("--config.").split("=")
      value = True if value == "True" else int(value)
      everything = _changed(everything, path.split("."), value)[1]
    tell(f"trying {' '.join(together)}")
    tried.append((" ".join(together), step.plan(everything, topology)))
    if tried[-1][1]["fits"]:
      return tried
  rows = config["batch_size"] // 2
  while rows >= len(topology.devices) and rows % len(topology.devices) == 0:
    flag, changed = _changed(config, ("batch_size",), rows)
    tell(f"trying {flag}")
    tried.append((flag, step.plan(changed, topology)))
    if tried[-1][1]["fits"]:
      break
    rows //= 2
  return tried
