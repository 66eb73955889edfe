"""Optimisers: SGD, AdamW and LARS, with schedules and masks by parameter name.

A parameter's name is its path, joined by "/": "encoder/stage1_0/bn1/scale". Which
parameters are decayed, adapted, frozen or treated on their own is said by regular
expressions that are searched in names; the empty one matches nothing.

Which methods exclude what (their official code): SimCLR, BYOL, Barlow Twins, VICReg and
MoCo v3 with LARS exclude biases and normalisation from decay and from adaptation, the
DINO family with AdamW from decay; MoCo v1/v2 and SwAV with SGD and MoCo v3 with AdamW
exclude nothing. So do the defaults here, but for the last: `no_decay=""`.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[Any], jax.Array]

NORM_AND_BIAS = r"(^|/)(bias|scale|gamma|log_scale)$"

# The online probe must not depend on the recipe under test, nor change it: plain SGD of
# its own, neither decayed nor adapted nor in the norm that clips the gradient.
PROBE = (r"^probe/", {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9})


def make(
  *,
  name: str,
  total_steps: int,
  batch_size: int,
  learning_rate: float,
  scaling: str | None = None,
  warmup_steps: int = 0,
  warmup_fraction: float = 0.0,
  floor: float = 0.0,
  clip_norm: float | None = None,
  frozen: str = "",
  groups: Mapping[str, dict] | Sequence[tuple[str, dict]] = (),
  **options,
) -> tuple[optax.GradientTransformation, dict[str, Schedule]]:
  """Builds the optimiser of a run.

  Args:
    name: "sgd", "adamw" or "lars"; `options` are those of the function of that name.
    total_steps: of the schedule, warm-up included.
    batch_size: global batch, for `scaling`.
    learning_rate: at the peak; multiplied by `batch_size / 256` where `scaling` is
      "linear", by `sqrt(batch_size)` where it is "sqrt" (SimCLR: 0.3 and 0.075).
    warmup_steps: linear warm-up from 0, which is the learning rate of step 0; or
      `warmup_fraction` of `total_steps`. A half cosine follows.
    floor: where the cosine ends, as a share of the peak; 1 keeps the rate constant.
    clip_norm: largest global norm of the gradient, over all parameters that are neither
      frozen nor in a group with an optimiser of its own.
    frozen: names of parameters that are never updated and have no optimiser state.
    groups: pairs of a regular expression and a dict, of which the first that matches
      counts: either `{"multiplier": m}` on the learning rate, or an optimiser of its
      own, `{"name": ..., "learning_rate": peak, ...}`, with the same warm-up and
      cosine, no batch scaling, and the options of that optimiser. (A mapping will do
      too; a ConfigDict sorts its keys.) The last group is always `PROBE`.

  Returns:
    `tx`, and the schedules to log: functions of the step by name.

  Raises:
    ValueError: an unknown or unfitting option; from `tx.init`, a group or `frozen`
      that no parameter answers to.
  """
  if scaling not in (None, "linear", "sqrt"):
    raise ValueError(f"scaling={scaling!r}: use 'linear', 'sqrt' or None")
  if warmup_steps and warmup_fraction:
    raise ValueError(
      f"warmup_steps={warmup_steps} and warmup_fraction={warmup_fraction}: give one"
    )
  warmup_steps = warmup_steps or round(warmup_fraction * total_steps)
  if not 0 <= warmup_steps <= total_steps:
    raise ValueError(
      f"warm-up of {warmup_steps} steps in total_steps={total_steps}: shorten it"
    )
  scale = {None: 1.0, "linear": batch_size / 256, "sqrt": batch_size**0.5}[scaling]

  def schedule(peak: float) -> Schedule:
    return warmup_cosine(peak, total_steps, warmup_steps, floor)

  pairs = [(pattern, dict(group)) for pattern, group in dict(groups).items()]
  multipliers = []
  transforms = {"frozen": optax.set_to_zero()}
  rules = [(frozen, "frozen")] if frozen else []
  for pattern, group in [*pairs, PROBE]:
    if set(group) == {"multiplier"}:
      multipliers.append((pattern, group["multiplier"]))
      rules.append((pattern, "main"))
    elif {"name", "learning_rate"} <= set(group):
      own = {k: v for k, v in group.items() if k not in ("name", "learning_rate")}
      peak = schedule(group["learning_rate"])
      label = f"group {pattern}"
      transforms.setdefault(label, _optimiser(group["name"], peak, own))
      rules.append((pattern, label))
    else:
      raise ValueError(
        f"group {pattern!r} has {sorted(group)}: give 'multiplier' alone, or 'name', "
        "'learning_rate' and options"
      )

  main = [_optimiser(name, schedule(scale * learning_rate), options)]
  if clip_norm is not None:
    main.insert(0, optax.clip_by_global_norm(clip_norm))
  if multipliers:
    main.append(_multiply(multipliers))
  transforms["main"] = optax.chain(*main)

  def labels(params):
    every = names(params)
    flat = jax.tree.leaves(every)
    for pattern, _ in rules:
      if pattern != PROBE[0] and not any(matches(pattern, n) for n in flat):
        raise ValueError(
          f"no parameter's name matches {pattern!r}; names are {', '.join(flat[:3])}..."
        )
    return jax.tree.map(
      lambda n: next((label for p, label in rules if matches(p, n)), "main"), every
    )

  weight_decay = float(options.get("weight_decay", 0.0))
  schedules = {
    "learning_rate": schedule(scale * learning_rate),
    "weight_decay": lambda step: jnp.full(jnp.shape(step), weight_decay),
  }
  return optax.partition(transforms, labels), schedules


def warmup_cosine(
  peak: float, total_steps: int, warmup_steps: int = 0, floor: float = 0.0
) -> Schedule:
  """Linear from 0 to `peak`, then half a cosine to `floor * peak`, then constant."""

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    warm = step / max(warmup_steps, 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    cosine = floor + (1 - floor) * cosine
    return peak * jnp.where(step < warmup_steps, warm, cosine)

  return schedule


def sgd(
  learning_rate: float | Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 0.0,
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
  weight_decay: float = 0.0,
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
  weight_decay: float = 0.0,
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
  either norm is 0 and for names that match `no_adaptation`. With `nesterov` the last v
  of each form is `m v + ` what was just added to it.
  """
  if form not in ("inside", "outside", "popular"):
    raise ValueError(f"form={form!r}: use 'inside', 'outside' or 'popular'")
  decayed, adapted = _except(no_decay), _except(no_adaptation)

  def init(params):
    return LarsState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def update(grads, state, params):
    lr = learning_rate(state.count) if callable(learning_rate) else learning_rate

    def trust(param, x, adapt):
      if not adapt:
        return 1.0
      param_norm, norm = jnp.linalg.norm(param), jnp.linalg.norm(x)
      usable = (param_norm > 0) & (norm > 0)
      ratio = trust_coefficient * param_norm / jnp.where(norm > 0, norm, 1.0)
      return jnp.where(usable, ratio, 1.0)

    def leaf(grad, v, param, decay, adapt):
      grad = grad + weight_decay * param if decay else grad
      if form == "popular":
        v = momentum * v + grad
        step = momentum * v + grad if nesterov else v
        return -lr * trust(param, step, adapt) * step, v
      added = trust(param, grad, adapt) * grad
      if form == "inside":
        added = lr * added
      v = momentum * v + added
      step = momentum * v + added if nesterov else v
      return -step if form == "inside" else -lr * step, v

    structure = jax.tree.structure(grads)
    trees = (grads, state.momentum, params, decayed(params), adapted(params))
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
  return bool(pattern) and re.search(pattern, name) is not None


def _except(pattern: str) -> Callable:
  """A mask: True for every parameter that the pattern does not match."""
  return lambda params: jax.tree.map(lambda n: not matches(pattern, n), names(params))


def _multiply(multipliers: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
  """Updates times the number of the first pattern that matches, else 1."""

  def leaf(name, update):
    factor = next((m for p, m in multipliers if matches(p, name)), 1.0)
    return factor * update

  return optax.stateless(
    lambda updates, params: jax.tree.map(leaf, names(updates), updates)
  )


OPTIMISERS = {"sgd": sgd, "adamw": adamw, "lars": lars}


def _optimiser(name: str, learning_rate, options: dict) -> optax.GradientTransformation:
  if name not in OPTIMISERS:
    raise ValueError(f"optimiser {name!r}: use one of {', '.join(OPTIMISERS)}")
  known = list(inspect.signature(OPTIMISERS[name]).parameters)[1:]
  unknown = sorted(set(options) - set(known))
  if unknown:
    raise ValueError(f"{name} has no option {unknown[0]!r}; it has {', '.join(known)}")
  return OPTIMISERS[name](learning_rate, **options)
