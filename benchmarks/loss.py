"""Speed and memory of the losses, value and gradient, against what else one would run.

    python -m benchmarks.loss [--rows=8192] [--width=128] [--repeats=7] [--losses=a,b]

The alternatives of a loss run in turn, and medians are compared. "tiled" is clj's form,
"dense" autodiff through the matrix of logits, and "optax" optax's loss where it has one
(its NT-Xent takes rows^3 numbers of memory and is left out above 1,024 rows). "floor"
is the fastest way found, whole or tiled, to run the dense form's three products alone,
S = x y^T, S y and S^T x; "floor again" is that after a pass over S for the maxima of
its rows, since a form that does not keep S computes it twice. Prints one JSON line
each, then a table. It runs on a GPU as it is; `--dtype=bfloat16` changes the operands.
"""

import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from clj import losses

_ROWS = flags.DEFINE_integer("rows", 8192, "rows of the matrix of logits")
_WIDTH = flags.DEFINE_integer("width", 128, "width of the embeddings")
_REPEATS = flags.DEFINE_integer("repeats", 7, "runs of each; the median counts")
_LOSSES = flags.DEFINE_list("losses", [], "which losses; all by default")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "operands")
_DENSE = flags.DEFINE_bool("dense", True, "also run the forms of quadratic memory")

HIGHEST = jax.lax.Precision.HIGHEST


def _logits(x, y, scale):
  s = jnp.matmul(x, y.T, precision=HIGHEST, preferred_element_type=jnp.float32)
  return scale * s


def _cross_entropy(s, positive):
  rows = jnp.arange(s.shape[0])
  return jnp.mean(jax.nn.logsumexp(s, axis=1) - s[rows, positive])


def _dense_nt_xent(z1, z2, scale):
  z = losses.l2_normalize(jnp.concatenate([z1, z2]))
  n = len(z)
  s = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, _logits(z, z, scale))
  return _cross_entropy(s, (jnp.arange(n) + n // 2) % n)


def _dense_info_nce(x, y, scale):
  return _cross_entropy(_logits(x, y, scale), jnp.arange(len(x)))


def _dense_clip(x, y, scale):
  x, y = losses.l2_normalize(x), losses.l2_normalize(y)
  s, i = _logits(x, y, scale), jnp.arange(len(x))
  return (_cross_entropy(s, i) + _cross_entropy(s.T, i)) / 2


def _dense_siglip(x, y, scale):
  x, y = losses.l2_normalize(x), losses.l2_normalize(y)
  sign = 2 * jnp.eye(len(x)) - 1
  return -jnp.sum(jax.nn.log_sigmoid(sign * (_logits(x, y, scale) - 10))) / len(x)


def _dense_supcon(z, label, scale):
  z = losses.l2_normalize(z)
  s, own = _logits(z, z, scale), jnp.eye(len(z), dtype=bool)
  same = (label[:, None] == label[None, :]) & ~own
  lse = jax.nn.logsumexp(jnp.where(own, -jnp.inf, s), axis=1)
  mean = jnp.sum(jnp.where(same, s, 0), axis=1) / jnp.maximum(jnp.sum(same, axis=1), 1)
  return jnp.mean(lse - mean)


def _optax_nt_xent(z1, z2, scale):
  import optax

  label = jnp.tile(jnp.arange(len(z1)), 2)
  return optax.losses.ntxent(jnp.concatenate([z1, z2]), label, 1 / scale)


_product = functools.partial(
  jax.lax.dot_general, preferred_element_type=jnp.float32, precision=HIGHEST
)
_ROWS_BY_ROWS, _BY_COLUMNS, _TRANSPOSED = (
  (((1,), (1,)), ((), ())),
  (((1,), (0,)), ((), ())),
  (((0,), (0,)), ((), ())),
)


def _floor(again, tile, x, y):
  """The products of one loss on a grid of tiles; tile None: each product at once."""
  n = len(x)
  tile_n, tile_m = (n, n) if tile is None else tile
  cut = lambda a, i, size: jax.lax.dynamic_slice_in_dim(a, i * size, size)

  def put(a, i, value):
    return jax.lax.dynamic_update_slice_in_dim(a, value, i * value.shape[0], 0)

  def maxima(top, ij):
    rows, columns = cut(x, ij[0], tile_n), cut(y, ij[1], tile_m)
    s = _product(rows, columns, _ROWS_BY_ROWS)
    old = cut(top, ij[0], tile_n)
    return put(top, ij[0], jnp.maximum(old, jnp.max(s, axis=1))), None

  def products(carry, ij):
    dx, dy = carry
    rows, columns = cut(x, ij[0], tile_n), cut(y, ij[1], tile_m)
    s = _product(rows, columns, _ROWS_BY_ROWS).astype(x.dtype)
    new = cut(dx, ij[0], tile_n) + _product(s, columns, _BY_COLUMNS)
    dx = put(dx, ij[0], new)
    new = cut(dy, ij[1], tile_m) + _product(s, rows, _TRANSPOSED)
    return (dx, put(dy, ij[1], new)), None

  grid = [(i, j) for i in range(n // tile_n) for j in range(n // tile_m)]
  table = np.array(grid, np.int32)
  steps = table[:, 0], table[:, 1]
  zeros = jnp.zeros(x.shape, jnp.float32)
  top = jnp.full((n,), -jnp.inf)
  top = jax.lax.scan(maxima, top, steps)[0] if again else top
  return top, jax.lax.scan(products, (zeros, zeros), steps)[0]


def _floors(again):
  tiles = {"whole": None, "512 x 512": (512, 512), "512 x 1024": (512, 1024)}
  tiles |= {"256 x 1024": (256, 1024), "1024 x 1024": (1024, 1024)}
  return {name: functools.partial(_floor, again, t) for name, t in tiles.items()}


def _cases(n, d, dtype):
  """Loss -> (inputs, alternatives); every alternative takes the inputs."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  x, y, z, scale = draw(n, d), draw(n, d), draw(n, d), jnp.float32(10)
  half, label = n // 2, jnp.asarray(rng.integers(0, n // 8, n))
  unit = losses.l2_normalize
  queue, scores = unit(draw(n, d)), unit(draw(n, d))
  ids, codes = jnp.arange(n), jax.nn.softmax(draw(n, d).astype(jnp.float32))
  pair = (x, y, scale)
  views = (x[:half], x[half:], scale)
  tiled = lambda f, args, **others: (args, {"tiled": f, **others})
  return {
    "nt_xent": tiled(
      lambda a, b, s: losses.nt_xent(a, b, 1 / s),
      views,
      dense=_dense_nt_xent,
      optax=_optax_nt_xent,
    ),
    "clip": tiled(
      lambda a, b, s: losses.clip(unit(a), unit(b), s), pair, dense=_dense_clip
    ),
    "info_nce": tiled(
      lambda a, b, s: losses.info_nce(a, b, 1 / s),
      (unit(x), unit(y), scale),
      dense=_dense_info_nce,
    ),
    "siglip": tiled(
      lambda a, b, s: losses.siglip(unit(a), unit(b), s, -10.0),
      pair,
      dense=_dense_siglip,
    ),
    "moco": tiled(
      lambda a, b, s: losses.moco(a, b, queue, 1 / s),
      pair,
      dense=lambda a, b, s: _cross_entropy(
        jnp.concatenate(
          [s * jnp.sum(unit(a) * unit(b), axis=1)[:, None], _logits(unit(a), queue, s)],
          axis=1,
        ),
        jnp.zeros((n,), jnp.int32),
      ),
    ),
    "moco_v3": tiled(
      lambda a, b, s: losses.moco_v3(a, b, b, a, 1 / s),
      pair,
      dense=lambda a, b, s: 2 / s * 2 * _dense_clip(a, b, s),
    ),
    "simcse": tiled(
      lambda a, b, s: losses.simcse(a, b, 1 / s),
      pair,
      dense=lambda a, b, s: _dense_info_nce(unit(a), unit(b), s),
    ),
    "dense_retrieval": tiled(
      lambda a, b, s: losses.dense_retrieval(a, b, temperature=1 / s),
      pair,
      dense=_dense_info_nce,
    ),
    "sampled_softmax": tiled(
      lambda a, b, s: losses.sampled_softmax(a, b, 1 / s, ids=ids),
      pair,
      dense=_dense_info_nce,
    ),
    "supcon": tiled(
      lambda a, s: losses.supcon(unit(a), label, 1 / s),
      (x, scale),
      dense=lambda a, s: _dense_supcon(a, label, s),
    ),
    "sgl": tiled(
      lambda a, b, s: losses.sgl(a, b, ids, 1 / s),
      pair,
      dense=lambda a, b, s: n * _dense_info_nce(unit(a), unit(b), s),
    ),
    "clip_distill": tiled(
      lambda a, b, s: losses.clip_distill(a, b, scores, queue, s, 10.0),
      (unit(x), unit(y), scale),
    ),
    "audioclip": tiled(losses.audioclip, (x, y, z)),
    "barlow_twins": tiled(losses.barlow_twins, (x, y)),
    "vicreg": tiled(losses.vicreg, (x, y)),
    "koleo": tiled(losses.koleo, (x,)),
    "byol": tiled(lambda a, b: jnp.mean(losses.byol(a, b)), (x, y)),
    "bpr": tiled(losses.bpr, (x, y, z)),
    "triplet": tiled(
      lambda a, b, c: jnp.mean(losses.triplet(a, b, c, 1.0)),
      (x, y, z),
      optax=lambda a, b, c: jnp.mean(_optax_triplet(a, b, c)),
    ),
    "swav": tiled(
      lambda a: losses.swav(jnp.stack([a, a]), jnp.stack([codes, codes])), (x,)
    ),
    "sinkhorn": tiled(lambda a: jnp.sum(losses.sinkhorn(a)), (scores,)),
  }


def _optax_triplet(a, b, c):
  import optax

  return optax.losses.triplet_margin_loss(a, b, c)


def _compile(f, args):
  compiled = jax.jit(f).lower(*args).compile()
  jax.block_until_ready(compiled(*args))
  return compiled


def measure(forms, repeats):
  """name -> (median seconds, bytes of temporaries), run in turn."""
  compiled = {name: (_compile(f, args), args) for name, (f, args) in forms.items()}
  times = {name: [] for name in forms}
  for _ in range(repeats):
    for name, (f, args) in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(f(*args))
      times[name].append(time.perf_counter() - start)
  return {
    name: (statistics.median(times[name]), f.memory_analysis().temp_size_in_bytes)
    for name, (f, _) in compiled.items()
  }


def main(argv):
  del argv
  n, d = _ROWS.value, _WIDTH.value
  cases = _cases(n, d, jnp.dtype(_DTYPE.value))
  names = _LOSSES.value or list(cases)
  if unknown := [name for name in names if name not in cases]:
    raise app.UsageError(f"no loss {unknown[0]!r} here; there are {', '.join(cases)}")
  table = []
  for name in names:
    args, alternatives = cases[name]
    forms = {
      form: jax.value_and_grad(f, tuple(range(len(args))))
      for form, f in alternatives.items()
      if form == "tiled" or _DENSE.value
    }
    if name == "nt_xent" and n > 1024:
      forms.pop("optax", None)
    forms = {form: (f, args) for form, f in forms.items()}
    if name in ("nt_xent", "clip", "info_nce", "siglip"):
      x = args[0] if name != "nt_xent" else jnp.concatenate(args[:2])
      pair = (x, x if name == "nt_xent" else args[1])
      for label, again in ("floor", False), ("floor again", True):
        for tile, f in _floors(again).items():
          if tile == "whole" and not _DENSE.value:
            continue
          if n % 1024 == 0 or tile == "whole":
            forms[f"{label}: {tile}"] = f, pair
    results = measure(forms, _REPEATS.value)
    for label in "floor", "floor again":
      tried = {k: v for k, v in results.items() if k.startswith(label + ":")}
      if tried:
        results[label] = min(tried.values())
      results = {k: v for k, v in results.items() if k not in tried}
    seconds = results["tiled"][0]
    for form, (median, temporaries) in results.items():
      record = {
        "loss": name,
        "form": form,
        "rows": n,
        "width": d,
        "dtype": _DTYPE.value,
        "seconds": round(median, 4),
        "temporaries_mb": round(temporaries / 1e6, 1),
        "tiled_over_this": round(seconds / median, 3),
      }
      print(json.dumps(record), flush=True)
      table.append(record)
  columns = ("loss", "form", "seconds", "temporaries_mb", "tiled_over_this")
  print("\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
  for record in table:
    print("| " + " | ".join(str(record[c]) for c in columns) + " |")


if __name__ == "__main__":
  app.run(main)
