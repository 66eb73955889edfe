"""Starting from other weights: a workdir, a checkpoint of it, or a safetensors file.

Leaves are matched by name, "params/encoder/conv/kernel", "extra/teacher/...": the name
in the source is rewritten by the first of the ordered rules (regex, replacement) that
matches it, else kept. A replacement may be a tuple of several: the leaf is copied to
each. Every leaf is accounted for.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from etils import epath

from clj import sharding, workdir
from clj.checkpoint import CheckpointError, Checkpoints


def init_from(state, path, rename=()):
  """Replaces leaves of `state.params` and `state.extra` by those found in `path`.

  path: a workdir (its newest intact checkpoint), WORKDIR/checkpoints/STEP, or a
    safetensors file whose tensors are named like leaves, with or without "params/".
  Returns (state, report). Leaves keep the sharding and dtype they have in `state`; one
  of another shape is refused and stays fresh. Raises ValueError if nothing fits.
  """
  found = _read(path)
  target = {"params": state.params, "extra": state.extra}
  names = [sharding.name(p) for p, _ in jax.tree_util.tree_leaves_with_path(target)]
  leaves, structure = jax.tree.flatten(target)
  fresh = dict(zip(names, leaves))
  taken, refused, unused = {}, [], []
  for source_name, value in found.items():
    goals = [g for g in _renamed(source_name, rename) if g in fresh]
    if not goals:
      unused.append(source_name)
    for goal in goals:
      want = fresh[goal]
      if goal in taken:
        refused.append(f"{goal}: {source_name} comes second to another array")
      elif tuple(value.shape) != want.shape:
        refused.append(f"{goal}: {tuple(value.shape)} there, {want.shape} here")
      else:
        taken[goal] = jax.device_put(jnp.array(value, want.dtype), want.sharding)
  if not taken:
    raise ValueError(
      f"init_from {path}: none of its {len(found)} arrays fits, such as "
      f"{min(found, default='none')!r}; the names here are like {names[0]!r}: "
      "set init_rename"
    )
  shapes = {line.partition(":")[0] for line in refused}
  kept = [name for name in names if name not in taken and name not in shapes]
  merged = jax.tree.unflatten(structure, [taken.get(n, fresh[n]) for n in names])
  report = "\n".join(
    [f"init_from {path}: {len(taken)} of {len(names)} arrays taken"]
    + _section("kept fresh", kept)
    + _section("refused", refused)
    + _section("not used", unused)
  )
  return dataclasses.replace(state, **merged), report


def _section(title: str, names: list[str]) -> list[str]:
  return [f"  {title} ({len(names)}):", *(f"    {n}" for n in names)] if names else []


def _renamed(name: str, rename) -> list[str]:
  for pattern, replacement in rename:
    try:
      found = re.search(pattern, name)
    except re.error as error:
      raise ValueError(f"init_rename: {pattern!r} is no regex: {error}") from None
    if found:
      several = [replacement] if isinstance(replacement, str) else replacement
      return [re.sub(pattern, r, name) for r in several]
  return [name, f"params/{name}"]


def _read(path) -> dict:
  """Every array in `path` by name; those of a checkpoint are sharded as they come."""
  path = epath.Path(path)
  if path.suffix == ".safetensors":
    if not path.exists():
      raise ValueError(f"init_from {path}: no such file")
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
      return load(path.read_bytes())
    except SafetensorError as error:
      raise ValueError(f"init_from {path}: no safetensors file: {error}") from None
  if path.parent.name == "checkpoints" and path.name.isdigit():
    checkpoints, step = Checkpoints(path.parent.parent), int(path.name)
  else:
    workdir.read_config(path)  # says in one line if this is no workdir
    checkpoints = Checkpoints(path)
    intact = [s for s in checkpoints.steps() if checkpoints.fault(s) is None]
    if not intact:
      raise CheckpointError(f"init_from {path}: it has no intact checkpoint")
    step = intact[-1]
  mesh = jax.sharding.get_mesh()
  tree = checkpoints.restore_tree(
    step,
    lambda leaf: jax.sharding.NamedSharding(
      mesh, sharding.spec(leaf, "", mesh.shape["fsdp"])
    ),
  )
  leaves = jax.tree_util.tree_leaves_with_path(
    {"params": tree["params"], "extra": tree["extra"]}
  )
  return {sharding.name(path): value for path, value in leaves}
