"""Recipes of `configs/`: a base written out, and variants as what differs from it."""

import copy
from collections.abc import Callable

from ml_collections import ConfigDict

from clj.cli import UserError

# What every recipe has, with what it is where the recipe does not say.
RUN = {
  "seed": 0,
  "batch_size": 256,  # the global batch
  "total_steps": 1000,
  "log_every": 50,
  "eval_every": 0,  # 0: before and after training only
  "checkpoint_every": 1000,  # 0: at the end only
  # A workdir, WORKDIR/checkpoints/STEP, a .safetensors file, or a config, which is then
  # trained first; and ordered pairs (regex, replacement) on the names found there.
  "init_from": "",
  "init_rename": (),
  "profile": "",  # "10:15" traces these steps for TensorBoard
  "method": {},
  "model": {},
  "data": {
    "source": "",
    "train_split": "train",
    "test_split": "test",
    "data_dir": "",  # of TFDS; "": TFDS_DATA_DIR, else TFDS's default
    "threads": 0,  # that decode; 0: one a core
    "columns": {},
    "augment": {},
  },
  "optim": {},
  "mesh": {"data": -1, "fsdp": 1},  # sizes of the mesh's axes; -1: what remains
  "evals": {},
}


class only(dict):  # noqa: N801
  """A dict that takes the place of the base's, instead of changing some of its keys."""


def differ(base: dict, changes: dict) -> dict:
  """The recipe `base` with `changes`, key by key in nested dicts.

  A dict whose "name" or "kind" is another one than in `base` replaces it whole: its
  other keys would be those of another network, optimiser or column. So does one that is
  `only(...)`.
  """
  result = copy.deepcopy(base)
  for key, value in changes.items():
    old = result.get(key)
    if isinstance(value, dict):
      kept = old if isinstance(old, dict) and not _is_other(old, value) else {}
      result[key] = differ(kept, value)
    else:
      result[key] = copy.deepcopy(value)
  return result


def _is_other(old: dict, new: dict) -> bool:
  other = any(key in new and new[key] != old.get(key) for key in ("name", "kind"))
  return other or isinstance(new, only)


def choose(variant: str | None, *recipes: Callable[[], dict]) -> ConfigDict:
  """The recipe called `variant` (None: the first), whole and locked."""
  by_name = {recipe.__name__: recipe for recipe in recipes}
  name = variant or recipes[0].__name__
  if name not in by_name:
    raise UserError(f"no variant {name!r}; there are: {', '.join(by_name)}")
  return ConfigDict(differ(RUN, by_name[name]())).lock()
