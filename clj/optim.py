"""Optimisers: SGD, AdamW and LARS, with schedules, groups and masks by parameter name.

A parameter's name is its path, joined by "/": "encoder/stage1_0/bn1/scale". Which
parameters are decayed, adapted, frozen or treated on their own is said by regular
expressions that are searched in names; the empty one matches nothing.

Which methods exclude what (their official code): SimCLR, BYOL, Barlow Twins, VICReg and
MoCo v3 with LARS exclude biases and normalisation from decay and from adaptation, the
DINO family with AdamW from decay; MoCo v1/v2 and SwAV with SGD and MoCo v3 with AdamW
exclude nothing. So do the defaults here, but for the last: `no_decay=""`.

**Groups** are pairs of a regular expression and a dict. All that match a parameter
count, and what multiplies, multiplies:

  multiplier: of the learning rate; a number or a schedule.
  decay_multiplier: of the weight decay; a number or a schedule.
  learning_rate, weight_decay: in place of the run's own, before all multipliers; of
    several groups the first. A learning rate has the run's scaling and, as a number,
    its warm-up and cosine. `no_decay` holds here too.
  zero_until: a position before which the learning rate is 0 (DINOv2's last layer, the
    prototypes of SwAV). Gradients still move its moments.

With a "name" a group is an optimiser of its own, with the options of that function:
{"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}, and `zero_until`; the learning
rate has the run's warm-up and cosine, and no scaling. The first such group that matches
a parameter has it alone: no other group, `layer_decay` or clipping reaches it. The last
one is always `PROBE`.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clj import schedules
from clj.cli import UserError
from clj.schedules import Schedule

NORM_AND_BIAS = r"(^|/)(bias|scale|gamma|layer_scale\d*|log_scale)$"

# Parameters with a leading axis of layers (`scan` of `models.transformer`): what is
# said of a parameter is said of each slice.
STACKED = r"(^|/)blocks/"

# A layer; and, in names from its tower on, what lies before the first one.
LAYER = re.compile(r"(?P<stack>(?:.*?/)?)block(?P<index>s|\d+)/")
EMBEDDING = r"^(patch|token|mask|cls|registers|(cls_)?position|ln_pre)(/|$)"
PATCH = r"^patch(/|$)"

# The online probe must not depend on the recipe under test, nor change it: plain SGD of
# its own, neither decayed nor adapted nor in the norm that clips the gradient.
PROBE = (r"^probe/", {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9})

MULTIPLIERS = ("multiplier", "decay_multiplier")
GROUP_KEYS = (*MULTIPLIERS, "learning_rate", "weight_decay", "zero_until")
CLIP_BY = ("global", "parameter", "module")


def make(
  *,
  name: str,
  total_steps: int,
  batch_size: int,
  learning_rate: float | Mapping,
  scaling: str | None = None,
  warmup_steps: int = 0,
  warmup_fraction: float = 0.0,
  floor: float = 0.0,
  clip_norm: float | None = None,
  clip_by: str = "global",
  frozen: str = "",
  groups: Mapping[str, dict] | Sequence[tuple[str, dict]] = (),
  layer_decay: Mapping | None = None,
  **options,
) -> tuple[optax.GradientTransformation, dict[str, Schedule]]:
  """Builds the optimiser of a run.

  Args:
    name: "sgd", "adamw" or "lars"; `options` are those of the function of that name,
      and their `weight_decay` may be the description of a schedule (`clj.schedules`).
    total_steps: of the schedules, warm-up included.
    batch_size: global batch, for `scaling`.
    learning_rate: at the peak; or the description of a schedule, in place of warm-up
      and floor. Multiplied by `batch_size / 256` where `scaling` is "linear", by
      `sqrt(batch_size)` where it is "sqrt" (SimCLR: 0.3 and 0.075).
    warmup_steps: linear warm-up from 0, which is the learning rate of step 0; or
      `warmup_fraction` of `total_steps`. A half cosine follows.
    floor: where the cosine ends, as a share of the peak; 1 keeps the rate constant.
    clip_norm: largest norm of the gradient, of what `clip_by` says: see `clip`. Left
      out are parameters that are frozen or have an optimiser of their own.
    frozen: names of parameters that are never updated and have no optimiser state.
    groups: see the head of this file. A mapping will do; a ConfigDict sorts its keys.
    layer_decay: options of `layer_multipliers`, such as {"rate": 0.9}.

  Returns:
    `tx`, and the schedules to log: functions of the step by name.

  Raises:
    ValueError: an unknown or unfitting option; from `tx.init`, a pattern that no
      parameter answers to.
  """
  warmup = schedules.warmup_length(total_steps, warmup_steps, warmup_fraction)
  if isinstance(learning_rate, Mapping) and (warmup or floor):
    raise UserError(
      f"warm-up of {warmup} steps, floor={floor} beside the description of a "
      "learning_rate: say it in the description"
    )
  scale = _batch_scale(scaling, batch_size)
  rate = partial(_learning_rate, total_steps=total_steps, warmup=warmup, floor=floor)
  decay = options.pop("weight_decay", 0.0)
  run = Group(
    learning_rate=rate(learning_rate, scale),
    weight_decay=_number_or_schedule(decay, total_steps, "weight_decay"),
  )
  pairs = groups.items() if isinstance(groups, Mapping) else groups
  rules = [
    _group(pattern, dict(group), rate, scale, total_steps)
    for pattern, group in [*pairs, PROBE]
  ]
  main = partial(_main, name, options, run)
  main(())  # an option that does not fit is refused before there are parameters
  _check_clip(clip_norm, clip_by)
  if layer_decay is not None:
    layer_decay = partial(layer_multipliers, **_layer_decay_options(layer_decay))
  tx = _transformation(main, rules, frozen, clip_norm, clip_by, layer_decay)
  return tx, {
    "learning_rate": run.learning_rate,
    "weight_decay": schedules.product(schedules.constant(1.0), run.weight_decay),
  }


class Group(NamedTuple):
  """A group of a config, read."""

  pattern: str = ""
  multiplier: float = 1.0  # of the update
  # The rest changes what the optimiser works with; `factor` is of the learning rate.
  factor: Schedule | None = None
  learning_rate: Schedule | None = None
  weight_decay: float | Schedule | None = None
  decay_multiplier: float | Schedule = 1.0
  own: optax.GradientTransformation | None = None

  @property
  def is_plain(self):
    return self == Group(self.pattern, self.multiplier)


def _group(pattern, group, rate, scale, total_steps) -> Group:
  """rate: the learning rate of a config and its scaling -> schedule."""
  if not group or ("name" not in group and not set(group) <= set(GROUP_KEYS)):
    raise UserError(
      f"group {pattern!r} has {sorted(group)}: give some of {', '.join(GROUP_KEYS)}; "
      "or 'name', 'learning_rate' and options for an optimiser of its own"
    )
  factors = []
  if "zero_until" in group:
    begin = schedules.position(group.pop("zero_until"), total_steps, "zero_until")
    factors.append(schedules.zero_until(schedules.constant(1.0), begin))
  if "weight_decay" in group:
    decay = group.pop("weight_decay")
    group["weight_decay"] = _number_or_schedule(decay, total_steps, "weight_decay")
  if "name" in group:
    if "learning_rate" not in group:
      raise UserError(f"group {pattern!r} has a 'name': give its 'learning_rate' too")
    own = schedules.product(rate(group.pop("learning_rate")), *factors)
    return Group(pattern, own=_optimiser(group.pop("name"), own, group))
  read = lambda key: _number_or_schedule(group.get(key, 1.0), total_steps, key)
  multiplier = read("multiplier")
  if callable(multiplier):
    factors.append(multiplier)
    multiplier = 1.0
  own = group.get("learning_rate")
  return Group(
    pattern,
    multiplier,
    factor=schedules.product(*factors) if factors else None,
    learning_rate=None if own is None else rate(own, scale),
    weight_decay=group.get("weight_decay"),
    decay_multiplier=read("decay_multiplier"),
  )


def _main(name, options, run, groups) -> optax.GradientTransformation:
  """The run's optimiser, as it is for parameters that all of these groups match."""
  first = lambda key: next(
    value for g in (*groups, run) if (value := getattr(g, key)) is not None
  )
  factors = [g.factor for g in groups if g.factor is not None]
  rate = schedules.product(first("learning_rate"), *factors)
  decays = [g.decay_multiplier for g in groups]
  decay = schedules.product(first("weight_decay"), *decays)
  return _optimiser(name, rate, options | {"weight_decay": decay})


def _owner(name, frozen, groups) -> tuple[str, tuple[Group, ...]]:
  """Who has a parameter: the label of an optimiser, and the groups that count."""
  if matches(frozen, name):
    return "frozen", ()
  found = tuple(g for g in groups if matches(g.pattern, name))
  for group in found:
    if group.own is not None:
      return f"group {group.pattern}", (group,)
  return " & ".join(["main", *(g.pattern for g in found if not g.is_plain)]), found


def _transformation(main, groups, frozen, clip_norm, clip_by, layer_decay):
  """Clips, gives each optimiser its parameters, and multiplies what they answer.

  main: groups -> the run's optimiser under them.
  layer_decay: tree of arrays -> tree of multipliers; or None.
  """
  owner = partial(_owner, frozen=frozen, groups=groups)
  in_main = lambda name: owner(name)[0].startswith("main")

  def partition(tree):
    transforms = {}
    for label, found in map(owner, jax.tree.leaves(names(tree))):
      if label == "frozen":
        transforms[label] = optax.set_to_zero()
      elif label not in transforms:
        transforms[label] = found[0].own if label.startswith("group") else main(found)
    labels = lambda tree: jax.tree.map(lambda n: owner(n)[0], names(tree))
    return optax.partition(transforms, labels)

  def multipliers(tree):
    every = names(tree)
    plain = jax.tree.map(lambda n: math.prod(g.multiplier for g in owner(n)[1]), every)
    if layer_decay is None:
      return plain
    both = lambda n, m, layer: m * layer if in_main(n) else m
    return jax.tree.map(both, every, plain, layer_decay(tree))

  def init(params):
    written = [frozen, *(g.pattern for g in groups if g.pattern != PROBE[0])]
    written += [clip_by] if clip_by not in CLIP_BY else []
    _check_patterns(written, jax.tree.leaves(names(params)))
    multipliers(params)  # refuses here what does not fit
    return partition(params).init(params)

  def update(grads, state, params):
    factors = multipliers(grads)
    if clip_norm is not None:
      grads = clip(grads, clip_norm, clip_by, in_main)
    updates, state = partition(grads).update(grads, state, params)
    multiply = lambda m, update: jnp.asarray(m, update.dtype) * update
    return jax.tree.map(multiply, factors, updates), state

  return optax.GradientTransformation(init, update)


def clip(grads, max_norm: float, by: str = "global", counts=lambda name: True):
  """Gradients, scaled down to the norm `max_norm` where theirs is larger.

  by: whose norm it is.
    "global": that of all parameters together.
    "parameter": of each on its own (DINO); in a scanned stack of each layer's.
    "module": of all that have the first part of their name in common, "backbone/"
      (DINOv2: backbone and heads).
    Anything else is a regular expression: what it finds in a name, such as
      "^student/[^/]+", names the module; names in which it finds nothing are one more.
  counts: name of a parameter -> whether it is clipped, and in the norm.
  """
  flat, structure = jax.tree.flatten(grads)
  every = jax.tree.leaves(names(grads))
  modules = {}
  for i, name in enumerate(every):
    if counts(name):
      modules.setdefault(_module(name, by), []).append(i)
  for members in modules.values():
    if by == "parameter":
      norm = _norm(every[members[0]], flat[members[0]])
    else:
      norm = optax.tree.norm([flat[i] for i in members])
    for i in members:
      scaled = (flat[i] / norm.astype(flat[i].dtype)) * max_norm
      flat[i] = jnp.where(norm < max_norm, flat[i], scaled)
  return jax.tree.unflatten(structure, flat)


def _module(name, by):
  if by in CLIP_BY:
    return {"global": "", "parameter": name, "module": name.split("/")[0]}[by]
  found = re.search(by, name)
  return found.group() if found else ""


def _norm(name, x):
  """The norm of an array; in a scanned stack of each layer's, to broadcast."""
  if not matches(STACKED, name):
    return jnp.linalg.norm(x)
  return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim)), keepdims=True))


def layer_multipliers(
  params,
  *,
  rate: float,
  patch_multiplier: float = 1.0,
  embedding: str = EMBEDDING,
  where: str = "",
):
  """Layer-wise decay of the learning rate (BEiT, arXiv:2106.08254), by name.

  In a tower of L layers, layer i of 0, ..., L - 1 gets `rate^(L - i)`, what lies before
  the layers `rate^(L + 1)`, and all else 1: what lies behind, as the last norm, and
  what is in no tower. So do DINOv2 and BEiT; timm's last norm goes with the last layer,
  which is a group here: ("/ln_post/", {"multiplier": rate}).

  Args:
    params: tree of arrays. Layers are "block0", "block1", ..., or slices of "blocks".
    rate: 1 for no decay; 0.9 in DINOv2, 0.98 in DINOv3's 7B.
    patch_multiplier: of the patches' linear map, besides (DINOv2, DINOv3: 0.2).
    embedding: what lies before the layers, searched in names from the tower on: "patch"
      of "backbone/patch/kernel", where "backbone/encoder/block0/..." is a layer.
    where: the only parameters that this is about; all by default.

  Returns:
    The same tree, of numbers and, for "blocks", arrays `[L, 1, ...]`.

  Raises:
    ValueError: a rate outside (0, 1]; no layer found.
  """
  if not 0 < rate <= 1:
    raise UserError(f"layer_decay.rate={rate}: give a number in (0, 1]")
  every = names(params)
  depths = _depths(every, params, where)

  def multiplier(name, x):
    if where and not matches(where, name):
      return 1.0
    if found := LAYER.match(name):
      depth = depths[found["stack"]]
      if found["index"] != "s":
        return rate ** (depth - int(found["index"]))
      return (rate ** (depth - np.arange(depth))).reshape(-1, *[1] * (x.ndim - 1))
    for stack, depth in depths.items():
      tower = "".join(f"{part}/" for part in stack.split("/")[:-2])
      rest = name.removeprefix(tower)
      if name.startswith(tower) and matches(embedding, rest):
        return rate ** (depth + 1) * (patch_multiplier if matches(PATCH, rest) else 1.0)
    return 1.0

  return jax.tree.map(multiplier, every, params)


def _depths(every, params, where):
  """Numbers of layers, by what stands before "block0" or "blocks" in their names."""
  depths = {}
  every = jax.tree.leaves(every)
  for name, x in zip(every, jax.tree.leaves(params), strict=True):
    found = LAYER.match(name)
    if found and (not where or matches(where, name)):
      depth = x.shape[0] if found["index"] == "s" else int(found["index"]) + 1
      depths[found["stack"]] = max(depth, depths.get(found["stack"], 0))
  if not depths:
    raise UserError(
      f"layer_decay with where={where!r} finds no layers, 'blocks/' or 'block0/' in "
      f"their names; names are {', '.join(every[:3])}..."
    )
  return depths


def warmup_cosine(
  peak: float, total_steps: int, warmup_steps: int = 0, floor: float = 0.0
) -> Schedule:
  """Linear from 0 to `peak`, then half a cosine to `floor * peak`, then constant."""
  shape = schedules.cosine(1.0, floor, total_steps - warmup_steps)
  if warmup_steps:
    shape = schedules.warmup(shape, warmup_steps, 0.0, 1.0)
  return schedules.product(peak, shape)


def sgd(
  learning_rate: float | Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float | Schedule = 0.0,
  no_decay: str = "",
) -> optax.GradientTransformation:
  """SGD with momentum; the decay is added to the gradient, as in PyTorch."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=_except(no_decay)),
    optax.trace(momentum, nesterov) if momentum else optax.identity(),
    optax.scale_by_learning_rate(learning_rate),
  )


def adamw(
  learning_rate: float | Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float | Schedule = 0.0,
  no_decay: str = NORM_AND_BIAS,
) -> optax.GradientTransformation:
  """Adam with decoupled weight decay (arXiv 1711.05101), times the learning rate."""
  return optax.chain(
    optax.scale_by_adam(b1, b2, eps),
    optax.add_decayed_weights(weight_decay, mask=_except(no_decay)),
    optax.scale_by_learning_rate(learning_rate),
  )


class LarsState(NamedTuple):
  """`momentum` in the form's own units: of a step, of a gradient."""

  count: jax.Array
  momentum: Any


def lars(
  learning_rate: float | Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  trust_coefficient: float = 0.001,
  weight_decay: float | Schedule = 0.0,
  form: str = "inside",
  no_decay: str = NORM_AND_BIAS,
  no_adaptation: str = NORM_AND_BIAS,
) -> optax.GradientTransformation:
  """LARS (arXiv 1708.03888) in the three forms in use; g is gradient plus decay.

  inside: v = m v + lr trust g, w -= v. SimCLR, and optax (whose slot is -v).
  outside: v = m v + trust g, w -= lr v. BYOL, Barlow Twins, VICReg, MoCo v3. The same
    as "inside" while the learning rate is constant.
  popular: v = m v + g, w -= lr trust v, with the trust ratio of v. The option of that
    name in SimCLR's code.

  The trust ratio is `trust_coefficient * |w| / |x|`, x being g or v; it is 1 where
  either norm is 0 and for names that match `no_adaptation`; in a scanned stack each
  layer has its own. With `nesterov` the last v of each form is `m v + ` what was just
  added to it.
  """
  if form not in ("inside", "outside", "popular"):
    raise UserError(f"form={form!r}: use 'inside', 'outside' or 'popular'")

  def init(params):
    return LarsState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def update(grads, state, params):
    at = lambda value: value(state.count) if callable(value) else value
    lr, decay = at(learning_rate), at(weight_decay)

    def trust(name, param, x):
      if matches(no_adaptation, name):
        return 1.0
      param_norm, norm = _norm(name, param), _norm(name, x)
      usable = (param_norm > 0) & (norm > 0)
      ratio = trust_coefficient * param_norm / jnp.where(norm > 0, norm, 1.0)
      return jnp.where(usable, ratio, 1.0)

    def leaf(name, grad, v, param):
      grad = grad if matches(no_decay, name) else grad + decay * param
      if form == "popular":
        v = momentum * v + grad
        step = momentum * v + grad if nesterov else v
        return -lr * trust(name, param, step) * step, v
      added = trust(name, param, grad) * grad
      if form == "inside":
        added = lr * added
      v = momentum * v + added
      step = momentum * v + added if nesterov else v
      return -step if form == "inside" else -lr * step, v

    structure = jax.tree.structure(grads)
    trees = (names(params), grads, state.momentum, params)
    both = [leaf(*leaves) for leaves in zip(*map(jax.tree.leaves, trees), strict=True)]
    updates = jax.tree.unflatten(structure, [update for update, _ in both])
    v = jax.tree.unflatten(structure, [v for _, v in both])
    return updates, LarsState(optax.safe_increment(state.count), v)

  return optax.GradientTransformation(init, update)


def names(params) -> Any:
  """The same tree with the name of each parameter in its place."""
  return jax.tree.map_with_path(
    lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
  )


def matches(pattern: str, name: str) -> bool:
  """Whether the pattern is found in the name; the empty pattern never is."""
  try:
    return bool(pattern) and re.search(pattern, name) is not None
  except re.error as error:
    raise UserError(f"{pattern!r} is no regular expression: {error}") from None


def _except(pattern: str) -> Callable:
  """A mask: True for every parameter that the pattern does not match."""
  return lambda params: jax.tree.map(lambda n: not matches(pattern, n), names(params))


OPTIMISERS = {"sgd": sgd, "adamw": adamw, "lars": lars}


def _optimiser(name: str, learning_rate, options: dict) -> optax.GradientTransformation:
  if name not in OPTIMISERS:
    raise UserError(f"optimiser {name!r}: use one of {', '.join(OPTIMISERS)}")
  known = list(inspect.signature(OPTIMISERS[name]).parameters)[1:]
  unknown = sorted(set(options) - set(known))
  if unknown:
    raise UserError(f"{name} has no option {unknown[0]!r}; it has {', '.join(known)}")
  return OPTIMISERS[name](learning_rate, **options)


def _batch_scale(scaling, batch_size):
  if scaling not in (None, "linear", "sqrt"):
    raise UserError(f"scaling={scaling!r}: use 'linear', 'sqrt' or None")
  return {None: 1.0, "linear": batch_size / 256, "sqrt": batch_size**0.5}[scaling]


def _learning_rate(of, scale=1.0, *, total_steps, warmup, floor) -> Schedule:
  """A number has the run's warm-up and cosine, a description says all itself."""
  if isinstance(of, Mapping):
    return schedules.product(scale, schedules.make(of, total_steps))
  peak = scale * schedules.number(of, "learning_rate")
  return warmup_cosine(peak, total_steps, warmup, floor)


def _number_or_schedule(value, total_steps, what) -> float | Schedule:
  if isinstance(value, Mapping):
    return schedules.make(value, total_steps)
  return schedules.number(value, what)


def _check_clip(clip_norm, clip_by):
  if clip_norm is None and clip_by != "global":
    raise UserError(f"clip_by={clip_by!r} without clip_norm: give that too")
  if clip_norm is not None and not clip_norm > 0:
    raise UserError(f"clip_norm={clip_norm}: give a number above 0, or None")


def _layer_decay_options(given):
  known = list(inspect.signature(layer_multipliers).parameters)[1:]
  if "rate" not in given or not set(given) <= set(known):
    raise UserError(
      f"layer_decay={dict(given)}: give 'rate'; its options are {', '.join(known)}"
    )
  return dict(given)


def _check_patterns(patterns, every):
  for pattern in patterns:
    if pattern and not any(matches(pattern, n) for n in every):
      raise UserError(
        f"no parameter's name matches {pattern!r}; names are {', '.join(every[:3])}..."
      )
