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
  # "name", of clj/methods; its options are the arguments of `make` there. For any of
  # them "probe_classes" adds an online linear probe, "wise_ft" evaluates an average
  # with the weights of the start.
  "method": {},
  "model": {},  # "name", of clj/models; its options are arguments of the network
  "data": {
    # A TFDS name, "folder:/path", ...: `open_source` in clj/data/sources.py lists them.
    "source": "",
    "train_split": "train",
    "test_split": "test",
    "data_dir": "",  # of TFDS; "": TFDS_DATA_DIR, else TFDS's default
    "threads": 0,  # that decode; 0: one a core
    # What of a record becomes part of a batch, by key: {"image": {"kind": "image"}}.
    # Kinds are image, text, label, array and audio; "field" names what a column is made
    # of where the source calls it something else. Their other options ("memory_size",
    # "eval_crop"; "tokenizer", "length", "same_as"; "rate", ...) are the arguments of
    # the functions of these names in clj/data/columns.py, explained there.
    "columns": {},
    # What is made of it in each step, by key: {"image": {"name": "views", "size": 32}}.
    # A further set of crops has its own key and "of": "image"; masks of patches are
    # "block_mask" and "random_mask" with "like": "image". Options are the arguments of
    # `views` in clj/augment/views.py (jitter, blur, solarize, "boxes_of", ...) and in
    # clj/augment/masks.py; published ones are functions of clj/augment/policies.py.
    "augment": {},
    # Not here, but taken too, see clj/data/mixture.py: "mixture", several sources, each
    # {"source": ..., "weight": 1.0, "columns": {what differs}}; "balanced",
    # {"classes": 64, "each": 4}; "subset", a share of the training records of each
    # class, drawn by "subset_seed".
  },
  # The optimiser and its options, see clj/optim.py; schedules in clj/schedules.py.
  "optim": {},
  "mesh": {"data": -1, "fsdp": 1},  # sizes of the mesh's axes; -1: what remains
  # By label: the options of an evaluation of clj/evals, and "name" where the label is
  # not its name, "final_only", "data" for a data set of its own.
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
