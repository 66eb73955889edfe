"""Starting from other weights: a workdir, a checkpoint of it, or a safetensors file; or
from a config, which is then trained first (`clj.train.train` does that).

Leaves are matched by name, "params/encoder/conv/kernel", "extra/teacher/...": the name
in the source is rewritten by the first of the ordered rules (regex, replacement) that
matches it, else kept. A replacement may be a tuple of several: the leaf is copied to
each. Every leaf is accounted for.

A safetensors file in a layout that `clj.interop` knows is read by its table: its leaves
have our names. Layers may be one leaf for all ("blocks") or one for each ("block0",
...), there and here. Tables of positions are resized.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from clj import interop, sharding
from clj.cli import UserError, load_recipe
from clj.data import text
from clj.models.vit import resize_positions
from clj.runs import workdir
from clj.runs.checkpoint import CheckpointError, Checkpoints


def config_of(path: str) -> dict | None:
  """The config that `init_from` may name, such as "configs/lit.py:tower"; else None."""
  return load_recipe(path) if re.fullmatch(r".+\.py(:\w+)?", path) else None


def init_from(params, extra, path, rename=(), columns=None):
  """Replaces leaves of `params` and `extra` by those found in `path`.

  path: a workdir (its newest intact checkpoint), WORKDIR/checkpoints/STEP, or a
    safetensors file or a directory with one: tensors named like leaves, with or without
    "params/", or in a layout that `clj.interop` knows.
  columns: `Data.saved` of what the weights shall be trained on.
  Returns (params, extra, report). Leaves keep the sharding and dtype that they have;
  one of another shape is refused and stays fresh. Raises UserError if nothing fits, or
  where a table of tokens was learned with other ids.
  """
  found, told = _read(path)
  target = {"params": params, "extra": extra}
  names = [sharding.name(p) for p, _ in jax.tree_util.tree_leaves_with_path(target)]
  leaves, structure = jax.tree.flatten(target)
  fresh = dict(zip(names, leaves))
  found, unused = _by_layers(found, rename, fresh)
  taken, refused, resized = {}, [], []
  for source_name, goal, value in found:
    want = fresh[goal]
    if goal in taken:
      refused.append(f"{goal}: {source_name} comes second to another array")
      continue
    if value.shape != want.shape and _is_position(goal, value.shape, want.shape):
      resized.append(f"{goal}: {value.shape} there, {want.shape} here")
      value = _resize(value, want.shape)
    if value.shape != want.shape:
      refused.append(f"{goal}: {value.shape} there, {want.shape} here")
    else:
      taken[goal] = _placed(value, want)
  if not taken:
    raise UserError(
      f"init_from {path}: none of its {len(found) + len(unused)} arrays fits, such as "
      f"{min([f[0] for f in found] + unused, default='none')!r}; the names here are "
      f"like {names[0]!r}: set init_rename"
    )
  shapes = {line.partition(":")[0] for line in refused}
  kept = [name for name in names if name not in taken and name not in shapes]
  merged = jax.tree.unflatten(structure, [taken.get(n, fresh[n]) for n in names])
  report = "\n".join(
    [f"init_from {path}: {len(taken)} of {len(names)} arrays taken"]
    + told
    + _section("kept fresh", kept)
    + _section("resized", resized)
    + _section("refused", refused)
    + _section("not used", unused)
  )
  _check_columns(path, columns or {}, taken)
  return merged["params"], merged["extra"], report


def _check_columns(path, columns: dict, taken: dict):
  """Refuses a table of tokens whose ids mean something else in the data."""
  root = epath.Path(path)
  root = root.parent.parent if root.parent.name == "checkpoints" else root
  if not any(name.endswith("/token") for name in taken):
    return
  if interop.files.is_weights(root) or not (root / "config.json").exists():
    return
  for name, saved in columns.items():
    vocabulary = root / text.directory(name)
    if not (vocabulary / "settings.json").exists():
      continue
    there = text.load(vocabulary).settings
    if {**there, "length": 0} != {**saved, "length": 0}:
      raise UserError(
        f"init_from {path}: its tokens are those of another vocabulary; set "
        f"data.columns.{name}.tokenizer={vocabulary}, or leave them out by init_rename"
      )


class Layers:
  """Arrays of equal layers, one after the other, as one array: stacked when read."""

  def __init__(self, layers):
    self.layers = layers
    self.shape = (len(layers), *layers[0].shape)

  def __getitem__(self, index):
    first, *rest = index
    return np.stack([np.asarray(x)[tuple(rest)] for x in self.layers[first]])


def _by_layers(found: dict, rename, fresh: dict):
  """Pairs what was found with leaves here: (source name, leaf, value), ...; unused."""
  pairs, stacks, unused = [], {}, []
  for name, value in found.items():
    used = False
    for goal in _renamed(name, rename):
      layer = re.search(r"/block(\d+)/", goal)
      together = re.sub(r"/block\d+/", "/blocks/", goal)
      if goal in fresh:
        pairs.append((name, goal, value))
      elif layer and together in fresh:
        stacks.setdefault(together, {})[int(layer[1])] = (name, value)
      elif "/blocks/" in goal and goal.replace("/blocks/", "/block0/") in fresh:
        each = (goal.replace("/blocks/", f"/block{i}/") for i in range(value.shape[0]))
        pairs += [(name, g, value[i]) for i, g in enumerate(each) if g in fresh]
      else:
        continue
      used = True
    if not used:
      unused.append(name)
  for goal, layers in stacks.items():
    if sorted(layers) == list(range(fresh[goal].shape[0])):
      ordered = [layers[i] for i in range(len(layers))]
      values = [value for _, value in ordered]
      on_device = all(isinstance(value, jax.Array) for value in values)
      pairs.append((ordered[0][0], goal, (jnp.stack if on_device else Layers)(values)))
    else:
      unused += [name for name, _ in layers.values()]
  return pairs, unused


def _placed(value, want):
  if isinstance(value, jax.Array):
    # A copy: two leaves may come from one array, and both are donated.
    return jax.device_put(jnp.array(value, want.dtype), want.sharding)
  # A part at a time, and a copy: the file's memory is not ours to give to the device.
  part = lambda index: np.array(value[index], want.dtype, order="C")
  return jax.make_array_from_callback(want.shape, want.sharding, part)


def _is_position(name: str, there, here) -> bool:
  grid = len(there) == len(here) == 3 and there[2] == here[2]
  line = len(there) == len(here) == 2 and there[1] == here[1]
  return name.endswith("/position") and (grid or line)


def _resize(table, shape):
  """Positions of images `[h, w, D]` (bicubic) or of texts `[L, D]` (linear)."""
  table = jnp.asarray(np.asarray(table, np.float32))
  if len(shape) == 3:
    return np.asarray(resize_positions(table, *shape[:2]))
  return np.asarray(jax.image.resize(table, shape, "linear", antialias=False))


def _section(title: str, names: list[str]) -> list[str]:
  return [f"  {title} ({len(names)}):", *(f"    {n}" for n in names)] if names else []


def _renamed(name: str, rename) -> list[str]:
  for pattern, replacement in rename:
    try:
      found = re.search(pattern, name)
    except re.error as error:
      raise UserError(f"init_rename: {pattern!r} is no regex: {error}") from None
    if found:
      several = [replacement] if isinstance(replacement, str) else replacement
      return [re.sub(pattern, r, name) for r in several]
  return [name, f"params/{name}"]


def _read(path) -> tuple[dict, list[str]]:
  """Every array in `path` by name, and lines on them for the report.

  Those of a checkpoint are sharded as they come, those of a file are views of it.
  """
  path = epath.Path(path)
  if interop.files.is_weights(path):
    weights = interop.read(path)
    if weights is None:  # its tensors are named like our leaves, or renamed
      return interop.files.open_tensors(path), []
    return weights.leaves | weights.unknown, [interop.told(weights)]
  if path.parent.name == "checkpoints" and path.name.isdigit():
    checkpoints, step = Checkpoints(path.parent.parent), int(path.name)
  else:
    workdir.check_is_run(path)
    checkpoints = Checkpoints(path)
    intact = [s for s in checkpoints.steps() if checkpoints.fault(s) is None]
    if not intact:
      raise CheckpointError(f"init_from {path}: it has no intact checkpoint")
    step = intact[-1]
  mesh = jax.sharding.get_mesh()
  tree = checkpoints.restore_tree(
    step,
    lambda _, leaf: jax.sharding.NamedSharding(
      mesh, sharding.spec(leaf, "", mesh.shape["fsdp"])
    ),
    parts=("params", "extra"),
  )
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {sharding.name(path): value for path, value in leaves}, []
