"""Augmentations on the accelerator: one entry of `data.augment` an output key.

    "augment": {
      "image": {"name": "views", "size": 224, "views": 2, "crop_scale": (0.32, 1.0)},
      "crops": {"name": "views", "of": "image", "size": 96, "views": 8, ...},
      "gram": {"name": "views", "of": "image", "size": 512, "boxes_of": "image"},
      "mask": {"name": "block_mask", "like": "image", "patch": 16},
    }

Each entry is made from the raw batch, hence in no order; what has no entry passes
through. `name` is a key of `ENTRIES`, the rest of an entry are that function's keyword
arguments. Draws depend on the key of the entry, the row of the global batch and the
view alone: the same views come out of any number of devices, and an entry more changes
nothing in the others.
"""

import inspect
from collections.abc import Callable

import jax

from clj.augment import masks
from clj.augment import views as view_sets
from clj.augment.views import float_image
from clj.cli import UserError, check_keywords
from clj.data.images import CropSet

# `(key, section, **options) -> (rng, batch) -> {key: array}`.
ENTRIES = {
  "views": view_sets.views,
  "block_mask": masks.block_mask,
  "random_mask": masks.random_mask,
}


def make(section: dict) -> Callable:
  """Builds `augment(rng, batch) -> batch` from the section `data.augment`.

  Pictures go in as uint8 `[B, H, W, 3]` (whole, cut here) or `[B, V, s, s, 3]` (cut by
  the host) and come out as float32 `[B, V, s, s, 3]` in [0, 1].

  Raises:
    UserError: an entry or option that does not exist, or does not fit; when called, an
      entry that does not fit the batch.
  """
  check(section)
  entries = [
    ENTRIES[entry["name"]](key, section, **_options(entry))
    for key, entry in section.items()
  ]

  def augment(rng: jax.Array, batch: dict) -> dict:
    made = [entry(rng, batch) for entry in entries]
    return {**batch, **{key: value for found in made for key, value in found.items()}}

  return augment


def host_crops(section: dict, column: str) -> tuple[CropSet, ...]:
  """What the host cuts of each streamed picture: the `views` entries of a column.

  The entry that has the column's own name comes first, those that take the boxes of
  another come last. Empty where no entry is of that column.
  """
  check(section)
  keys = [
    key
    for key, entry in section.items()
    if entry["name"] == "views" and view_sets.source(key, section) == column
  ]
  found = [view_sets.crop_set(key, section) for key in keys]
  return tuple(sorted(found, key=lambda x: (x.key != column, bool(x.boxes_of))))


def to_float(batch: dict) -> dict:
  """Every picture from uint8 to float32 in [0, 1], for evaluation."""
  pictures = {
    key: float_image(value)
    for key, value in batch.items()
    if value.dtype == "uint8" and value.ndim >= 4
  }
  return {**batch, **pictures}


def check(section: dict):
  """Refuses names and options that do not exist, in one line."""
  for key, entry in section.items():
    where = f"data.augment.{key}"
    if not isinstance(entry, dict):
      raise UserError(
        f"{where} is {entry!r}: each key that comes out has an entry, such as "
        '{"image": {"name": "views", "size": 32}}'
      )
    if entry.get("name") not in ENTRIES:
      raise UserError(
        f"{where} has the name {entry.get('name')!r}; there are: {', '.join(ENTRIES)}"
      )
    function = ENTRIES[entry["name"]]
    check_keywords(function, _options(entry), where)
    for name, parameter in inspect.signature(function).parameters.items():
      required = parameter.kind == parameter.KEYWORD_ONLY
      if required and parameter.default is parameter.empty and name not in entry:
        raise UserError(f"{where} needs a {name!r}")


def _options(entry: dict) -> dict:
  return {name: value for name, value in entry.items() if name != "name"}
