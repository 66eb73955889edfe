"""Masks of patches, beside the views that they hide: exact counts in static shapes.

A mask is bool `[B, V, N]`, True where a patch is hidden, the N patches row by row. Its
draws depend on the key of the entry, the row and the view alone; with `counts` "batch"
the number of hidden patches also on the size of the global batch, never on the devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from clj.augment import views
from clj.cli import UserError

Array = jax.Array

TRIES = 10  # blocks in a row that do not fit, after which DINOv2 and iBOT give up
BLOCKS = 48  # blocks drawn for a mask in all; of 6,000 masks none took 32

# What the keys of an entry and of a view are folded with.
COUNTS, SHAPES, REST = range(3)


def block_mask(
  key: str,
  section: dict,
  /,
  *,
  like: str,
  patch: int,
  ratio: tuple[float, float] = (0.1, 0.5),
  share: float = 0.5,
  counts: str = "batch",
  smallest: int = 4,
  largest: int | None = None,
  aspect: tuple[float, float] = (0.3, 1 / 0.3),
  complete: bool = True,
  indices: bool = False,
) -> Callable:
  """The entry "block_mask": `(rng, batch) -> {key: bool [B, V, N]}`, rectangles.

  Blocks are added as long as patches are missing: of an area uniform between `smallest`
  and what is missing, and a log-uniform aspect; a block that adds nothing, or too much,
  is drawn again, ten times. What is then missing, 1 to 3 patches of 1 mask in 13, is
  made up of single patches, as in DINOv3 (arXiv 2508.10104), but not in DINOv2
  (arXiv 2304.07193) and iBOT (arXiv 2111.07832). Else the defaults are DINOv2's; iBOT
  has `counts="image"`, and `smallest=(side // 3) ** 2` for a grid of `side` x `side`.

  Args:
    like: key of the `views` entry that is masked: V views, N = (size / patch)^2.
    patch: side of a patch, pixels.
    ratio: range of the share of hidden patches, rounded down.
    share: of the views, how many are masked at all.
    counts: "batch": exactly int(B * V * share) views are masked, with ratios spread
      evenly over the range (one in each of as many intervals), so that the number of
      hidden patches hardly varies from batch to batch. "image": by draws of each view.
    smallest: patches of the smallest block.
    largest: patches that one block may add, None for any number.
    aspect: range of height over width.
    complete: whether the count is made exact; it is never above the wanted one.
    indices: whether `{key}_indices` and `{key}_weights` come too, see `hidden`.
  """
  shape, grid = _masked(key, section, like, patch)
  wanted = _wanted(key, ratio, share, counts, grid**2)
  if smallest < 1 or (largest is not None and largest < smallest):
    raise UserError(
      f"data.augment.{key} has blocks of {smallest} to {largest} patches; "
      "give whole numbers from 1, rising"
    )
  low, high = np.log(views.rising(f"data.augment.{key}.aspect", aspect))
  most = grid**2 if largest is None else largest

  def blocks(rng, target):
    uniforms = jax.random.uniform(jax.random.fold_in(rng, SHAPES), (BLOCKS, 4))
    return _blocks(uniforms, target, grid, smallest, most, (low, high))

  def augment(rng, batch):
    count = views.pictures(batch, like, section).shape[0]
    rng = views.entry_rng(rng, key)
    keys = views.view_keys(rng, count, shape.views)
    targets = wanted(rng, keys)
    mask = jax.vmap(jax.vmap(blocks))(keys, targets)
    if complete:
      rest = _draw(keys, REST, grid**2)
      mask = _first(jnp.where(mask, -1.0, rest), targets)
    return _named(key, mask, int(ratio[1] * grid**2), indices)

  return augment


def random_mask(
  key: str,
  section: dict,
  /,
  *,
  like: str,
  patch: int,
  ratio=0.75,
  share: float = 1.0,
  counts: str = "image",
  indices: bool = False,
) -> Callable:
  """The entry "random_mask": `(rng, batch) -> {key: bool [B, V, N]}`, single patches.

  Of each view int(ratio * N) patches are hidden, those with the least of N uniform
  numbers; as in MAE (arXiv 2111.06377) and iBOT's "rand".

  Args:
    ratio: of hidden patches: a number, or a range to draw from.
    like, patch, share, counts, indices: as for `block_mask`.
  """
  shape, grid = _masked(key, section, like, patch)
  ratio = (ratio, ratio) if np.ndim(ratio) == 0 else ratio
  wanted = _wanted(key, ratio, share, counts, grid**2)

  def augment(rng, batch):
    count = views.pictures(batch, like, section).shape[0]
    rng = views.entry_rng(rng, key)
    keys = views.view_keys(rng, count, shape.views)
    mask = _first(_draw(keys, REST, grid**2), wanted(rng, keys))
    return _named(key, mask, int(ratio[1] * grid**2), indices)

  return augment


def hidden(mask: Array, most: int) -> tuple[Array, Array]:
  """The hidden patches of each view, in a fixed number of places.

  Args:
    mask: bool `[..., N]`, with at most `most` True each.

  Returns:
    Indices int32 `[..., most]`, rising, then those of patches that are not hidden; and
    weights float32 `[..., most]`: one over the number of hidden patches of the view,
    whose sum is 1, and 0 for what is not hidden.
  """
  count = jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)
  order = jnp.argsort(~mask, axis=-1, stable=True)[..., :most].astype(jnp.int32)
  places = jnp.arange(most, dtype=jnp.int32)
  places = places.reshape((1,) * (mask.ndim - 1) + places.shape)
  weights = jnp.where(
    places < count, 1 / jnp.maximum(count, 1).astype(jnp.float32), 0.0
  )
  return order, weights


def _named(key: str, mask: Array, most: int, indices: bool) -> dict:
  if not indices:
    return {key: mask}
  order, weights = hidden(mask, most)
  return {key: mask, f"{key}_indices": order, f"{key}_weights": weights}


def _masked(key: str, section: dict, like: str, patch: int):
  """The views that a mask is for, and the patches along a side of them."""
  crops = views.crop_set(like, section)
  if not isinstance(patch, int) or patch < 1 or crops.size % patch:
    raise UserError(
      f"data.augment.{key}.patch is {patch!r}, which does not divide the size "
      f"{crops.size} of {like!r}"
    )
  return crops, crops.size // patch


# How many patches to hide.


def _wanted(key: str, ratio, share: float, counts: str, patches: int) -> Callable:
  """`(rng, keys [B, V]) -> int32 [B, V]`: how many patches each view hides."""
  where = f"data.augment.{key}"
  low, high = views.rising(f"{where}.ratio", ratio, 1, zero=True)
  if not 0 < share <= 1:
    raise UserError(f"{where}.share is {share}; give a number above 0, up to 1")
  if counts not in ("batch", "image"):
    raise UserError(f"{where}.counts is {counts!r}; use 'batch' or 'image'")

  def by_image(rng, keys):
    uniforms = _draw(keys, COUNTS, 2)
    targets = _between(uniforms[..., 1], low * patches, high * patches)
    return jnp.where(uniforms[..., 0] < share, targets, 0)

  def by_batch(rng, keys):
    count, views = keys.shape
    masked = int(count * views * share)
    if not masked:
      raise UserError(
        f"{where}.share is {share}: none of {count} x {views} views; use a larger "
        "share or batch, or counts='image'"
      )
    positions = jnp.arange(count)[:, None] * views + jnp.arange(views)[None, :]
    slots = shuffled(jax.random.fold_in(rng, COUNTS), positions, count * views)
    edges = np.linspace(low, high, masked + 1) * patches
    slot = jnp.minimum(slots, masked - 1)
    lows, highs = (jnp.asarray(x, jnp.float32)[slot] for x in (edges[:-1], edges[1:]))
    targets = _between(_draw(keys, COUNTS, 2)[..., 1], lows, highs)
    # Rounding in float32 must not leave the interval.
    floor = jnp.asarray(edges.astype(int), jnp.int32)
    targets = jnp.clip(targets, floor[slot], floor[slot + 1])
    return jnp.where(slots < masked, targets, 0)

  return by_batch if counts == "batch" else by_image


def _between(uniforms: Array, low, high) -> Array:
  return jnp.floor(low + uniforms * (high - low)).astype(jnp.int32)


def _draw(keys: Array, place: int, count: int) -> Array:
  """Uniform numbers `[B, V, count]` of keys `[B, V]`."""
  draw = lambda key: jax.random.uniform(jax.random.fold_in(key, place), (count,))
  return jax.vmap(jax.vmap(draw))(keys)


def shuffled(rng: Array, positions: Array, size: int) -> Array:
  """Where each position goes in a random permutation of `size` positions.

  Each by itself, with no array of them all: on several devices nothing is sent, nothing
  is sorted. By swap-or-not (Hoang, Morris, Rogaway 2012): in each round a position and
  its mirror image about a random point swap places, or do not.

  Args:
    positions: int32, from 0 to `size` - 1.
  """
  rounds = 6 * max(size.bit_length(), 1)

  def swap(positions, rng):
    mirrored = jax.random.randint(rng, (), 0, size) - positions
    mirrored = jnp.where(mirrored < 0, mirrored + size, mirrored)
    pair = jnp.maximum(positions, mirrored)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, pair.ravel())
    swaps = jax.vmap(jax.random.bernoulli)(keys).reshape(pair.shape)
    return jnp.where(swaps, mirrored, positions), None

  return jax.lax.scan(swap, positions, jax.random.split(rng, rounds))[0]


# Which patches.


def _first(scores: Array, count: Array) -> Array:
  """True for the `count` `[...]` least of the scores `[..., N]`, ties by position."""
  ranks = jnp.argsort(jnp.argsort(scores, axis=-1, stable=True), axis=-1, stable=True)
  return ranks < count[..., None]


def _blocks(uniforms: Array, target, side: int, smallest, largest, aspect) -> Array:
  """A mask `[side * side]` of rectangles, with at most `target` True.

  Args:
    uniforms: `[n, 4]`: area, aspect, row and column of n blocks.
    aspect: range of the logarithm of height over width.
  """
  rows, columns = np.arange(side)[:, None], np.arange(side)[None, :]

  def add(state, uniform):
    mask, count, failures = state
    limit = jnp.minimum(target - count, largest)
    area = smallest + uniform[0] * (limit - smallest)
    root = jnp.exp((aspect[0] + uniform[1] * (aspect[1] - aspect[0])) / 2)
    height = jnp.round(jnp.sqrt(area) * root).astype(jnp.int32)
    width = jnp.round(jnp.sqrt(area) / root).astype(jnp.int32)
    top = jnp.floor(uniform[2] * (side - height + 1)).astype(jnp.int32)
    left = jnp.floor(uniform[3] * (side - width + 1)).astype(jnp.int32)
    block = (rows >= top) & (rows < top + height)
    block = block & (columns >= left) & (columns < left + width)
    new = jnp.sum(block & ~mask, dtype=jnp.int32)
    fits = (height < side) & (width < side) & (new > 0) & (new <= limit)
    fits = fits & (failures < TRIES)
    mask = mask | (block & fits)
    failures = jnp.where(fits, 0, failures + 1)
    return (mask, count + jnp.where(fits, new, 0), failures), None

  zero = jnp.zeros((), jnp.int32)
  state = (jnp.zeros((side, side), bool), zero, zero)
  (mask, _, _), _ = jax.lax.scan(add, state, uniforms)
  return mask.reshape(side * side)
