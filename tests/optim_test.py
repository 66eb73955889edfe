"""Optimisers against the official ones, their schedules, and masks by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clj import optim

PARAMETERS = ("w1", "b1", "w2", "gamma", "w0")
SLOTS = {"simclr": ("momentum", 1), "optax": ("trace", -1)}

LARS = {
  "simclr": {"form": "inside"},
  "simclr_nesterov": {"form": "inside", "nesterov": True},
  "simclr_popular": {"form": "popular"},
  "simclr_varlr": {"form": "inside"},
  "optax": {"form": "inside"},
  "optax_nesterov": {"form": "inside", "nesterov": True},
  "optax_nomask": {"form": "inside", "no_decay": "", "no_adaptation": ""},
  "optax_varlr": {"form": "inside"},
  "barlow": {"form": "outside"},
  "barlow_nofilter": {"form": "outside", "no_decay": "", "no_adaptation": ""},
  "barlow_varlr": {"form": "outside"},
  "byol": {"form": "outside"},
  "mocov3": {"form": "outside"},
  "vicreg": {"form": "outside"},
}


def lars_steps(golden, options):
  """Parameters and momentum after each of the steps that the file has gradients for."""
  excluded = r"(^|/)(b1|gamma)$"
  options = {"no_decay": excluded, "no_adaptation": excluded, **options}
  rates = jnp.asarray(golden["lr_per_step"])
  tx = optim.lars(
    lambda step: rates[step],
    momentum=float(golden["momentum"]),
    weight_decay=float(golden["weight_decay"]),
    trust_coefficient=float(golden["eta"]),
    **options,
  )
  params = {n: jnp.asarray(golden[f"param_{n}"]) for n in PARAMETERS}
  state = tx.init(params)
  for step in range(1, len(rates) + 1):
    grads = {n: jnp.asarray(golden[f"gradient_step{step}_{n}"]) for n in PARAMETERS}
    updates, state = tx.update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    yield step, params, state.momentum


@pytest.mark.parametrize("name", LARS)
def test_lars_is_the_official_one(name, golden_file):
  golden = np.load(golden_file(f"lars_{name}.npz"))
  slot, sign = SLOTS.get(name.split("_")[0], ("mu", 1))
  for step, params, momentum in lars_steps(golden, LARS[name]):
    for n in PARAMETERS:
      expected = golden[f"param_after{step}_{n}"]
      np.testing.assert_allclose(params[n], expected, atol=2e-6, rtol=2e-6)
      expected = sign * golden[f"{slot}_after{step}_{n}"]
      np.testing.assert_allclose(momentum[n], expected, atol=2e-6, rtol=2e-6)


COSINE = {"name": "cosine", "start": 0.5, "end": 0.05, "warmup_steps": 1}

PARAMS = {
  "encoder": {
    "conv": {"kernel": jnp.ones((3, 4))},
    "bn": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
  },
  "projector": {"dense_0": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}},
  "probe": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
}


def build(name, **options):
  defaults = {"total_steps": 10, "batch_size": 256, "learning_rate": 0.5}
  return optim.make(name=name, **{**defaults, **options})


def moved(tx, grads):
  """Names of the parameters that one update with these gradients moves."""
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  pairs = zip(
    jax.tree.leaves(optim.names(PARAMS)), jax.tree.leaves(updates), strict=True
  )
  return [name for name, update in pairs if np.any(update)]


@pytest.mark.parametrize(
  ("name", "decayed"),
  [
    ("sgd", ["encoder/bn/bias", "encoder/bn/scale", "encoder/conv/kernel",
             "projector/dense_0/bias", "projector/dense_0/kernel"]),
    ("adamw", ["encoder/conv/kernel", "projector/dense_0/kernel"]),
    ("lars", ["encoder/conv/kernel", "projector/dense_0/kernel"]),
  ],
)  # fmt: skip
def test_what_is_decayed(name, decayed):
  """Only decay moves a parameter whose gradient is 0; the probe never is."""
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  assert moved(build(name, weight_decay=0.1)[0], zeros) == decayed
  if name != "sgd":
    everything = build(name, weight_decay=0.1, no_decay="")[0]
    assert len(moved(everything, zeros)) == 5


def test_what_lars_adapts():
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  tx, _ = build("lars", learning_rate=1.0)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  steps = [float(-u.ravel()[0]) for u in jax.tree.leaves(updates)]
  # In the order of the names: encoder bias, scale, kernel; probe; projector.
  np.testing.assert_allclose(steps, [1, 1, 1e-3, 0.1, 0.1, 1, 1e-3], rtol=1e-5)


@pytest.mark.parametrize("name", optim.OPTIMISERS)
def test_frozen_parameters_have_no_state_and_groups_their_own_rates(name):
  tx, _ = build(
    name, frozen="^encoder/", groups=[("dense_0/kernel", {"multiplier": 0.25})]
  )
  state = jax.jit(tx.init)(PARAMS)
  leaves = jax.tree.leaves_with_path(state)
  assert all("encoder" not in jax.tree_util.keystr(path) for path, _ in leaves)
  assert not any(leaf.weak_type for _, leaf in leaves)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  updates, after = tx.update(grads, state, PARAMS)
  shapes = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(after)]
  assert shapes == [(x.shape, x.dtype, x.weak_type) for _, x in leaves]
  assert not any(np.any(u) for u in jax.tree.leaves(updates["encoder"]))
  plain, _ = build(name)
  whole, _ = plain.update(grads, plain.init(PARAMS), PARAMS)
  quarter = 0.25 * whole["projector"]["dense_0"]["kernel"]
  np.testing.assert_allclose(updates["projector"]["dense_0"]["kernel"], quarter)
  np.testing.assert_allclose(updates["probe"]["bias"], -0.1, rtol=1e-6)


def test_the_probe_is_not_in_the_clipped_norm():
  tx, _ = build("sgd", clip_norm=1.0, momentum=0.0)
  grads = jax.tree.map(jnp.zeros_like, PARAMS)
  grads["projector"]["dense_0"]["bias"] = jnp.array([3.0, 4.0])
  grads["probe"]["kernel"] = jnp.full((4, 2), 1e6)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  found = updates["projector"]["dense_0"]["bias"]
  np.testing.assert_allclose(found, [-0.3, -0.4], rtol=1e-6)


def test_schedule_and_scaling():
  _, schedules = build(
    "sgd", total_steps=12, warmup_steps=2, floor=0.1, weight_decay=0.3
  )
  rate = [float(schedules["learning_rate"](step)) for step in (0, 1, 2, 7, 12, 20)]
  np.testing.assert_allclose(rate, [0, 0.25, 0.5, 0.275, 0.05, 0.05], rtol=1e-6)
  assert float(schedules["weight_decay"](5)) == pytest.approx(0.3)
  for scaling, base, expected in (("linear", 0.3, 4.8), ("sqrt", 0.075, 4.8)):
    _, schedules = build("lars", batch_size=4096, learning_rate=base, scaling=scaling)
    assert float(schedules["learning_rate"](0)) == pytest.approx(expected)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"name": "adam"}, "optimiser 'adam': use one of sgd, adamw, lars"),
    ({"name": "adamw", "nesterov": True}, "adamw has no option 'nesterov'"),
    ({"name": "lars", "form": "both"}, "form='both'"),
    ({"name": "sgd", "scaling": "cubic"}, "scaling='cubic'"),
    ({"name": "sgd", "warmup_steps": 11}, "11 steps in total_steps=10"),
    ({"name": "sgd", "frozen": "^encodr/"}, "matches '\\^encodr/'"),
    ({"name": "sgd", "groups": [("bias", {"rate": 1})]}, "group 'bias'"),
    ({"name": "sgd", "groups": [("bias", {"name": "sgd"})]}, "'learning_rate' too"),
    ({"name": "sgd", "groups": [("bais", {"multiplier": 1})]}, "matches 'bais'"),
    ({"name": "sgd", "groups": [("(", {"multiplier": 1})]}, "no regular expression"),
    ({"name": "sgd", "groups": [("bias", {"zero_until": 2.0})]}, "zero_until=2.0"),
    ({"name": "sgd", "clip_by": "module"}, "without clip_norm"),
    ({"name": "sgd", "clip_norm": 1.0, "clip_by": "modul"}, "matches 'modul'"),
    ({"name": "sgd", "clip_norm": 0.0}, "clip_norm=0.0"),
    ({"name": "sgd", "layer_decay": {"rat": 0.9}}, "give 'rate'; its options are rate"),
    ({"name": "sgd", "layer_decay": {"rate": 1.1}}, "rate=1.1"),
    ({"name": "sgd", "layer_decay": {"rate": 0.9}}, "finds no layers"),
    ({"name": "sgd", "learning_rate": "1"}, "learning_rate='1': give a number"),
    ({"name": "sgd", "learning_rate": COSINE, "floor": 0.1}, "say it in the desc"),
    ({"name": "sgd", "weight_decay": {"name": "cos"}}, "schedule 'cos': use one of"),
  ],
)
def test_errors_name_the_value(options, message):
  with pytest.raises(ValueError, match=message):
    build(**options)[0].init(PARAMS)


L = 3


def tower():
  """Parameters as a vision transformer of three layers and a head have them."""
  rng = np.random.default_rng(0)
  array = lambda *shape: rng.normal(size=shape).astype(np.float32)
  block = lambda: {
    "ln1": {"scale": array(4), "bias": array(4)},
    "mlp": {"fc1": {"kernel": array(4, 6), "bias": array(6)}},
    "layer_scale1": array(4),
  }
  return {
    "backbone": {
      "patch": {"kernel": array(5, 4), "bias": array(4)},
      "cls": array(4),
      "cls_position": array(4),
      "position": array(2, 2, 4),
      "mask": array(4),
      "registers": array(2, 4),
      "encoder": {f"block{i}": block() for i in range(L)},
      "ln_post": {"scale": array(4), "bias": array(4)},
    },
    "head": {"mlp": {"kernel": array(4, 4)}, "last": {"kernel": array(4, 3)}},
    "probe": {"kernel": array(4, 2), "bias": array(2)},
  }


def scanned(tree):
  """The same with its layers in one tree, stacked."""
  backbone = dict(tree["backbone"])
  blocks = [backbone["encoder"][f"block{i}"] for i in range(L)]
  backbone["encoder"] = {"blocks": jax.tree.map(lambda *x: np.stack(x), *blocks)}
  return tree | {"backbone": backbone}


def by_name(tree):
  return dict(
    zip(jax.tree.leaves(optim.names(tree)), jax.tree.leaves(tree), strict=True)
  )


def run(tx, params, steps=4, scale=1.0):
  """The parameters after each of some steps, with gradients from a seed."""
  state, rng, update = tx.init(params), np.random.default_rng(1), jax.jit(tx.update)
  for _ in range(steps):
    grads = jax.tree.map(lambda x: scale * rng.normal(size=x.shape), tower())
    grads = jax.tree.map(np.float32, grads)
    if "blocks" in params["backbone"]["encoder"]:
      grads = scanned(grads)
    updates, state = update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    yield params, grads, state


def twin(name, params, gradients, rates, decays, **options):
  """Float64: parameters by name after all steps; rates and decays of (name, step)."""
  excluded = optim.NORM_AND_BIAS if name != "sgd" else ""
  form = options.get("form", "inside")
  w = {n: np.float64(p) for n, p in params.items()}
  m, v = ({n: np.zeros_like(p) for n, p in w.items()} for _ in range(2))
  for t, grads in enumerate(gradients):
    for n in w:
      g, lr = np.float64(grads[n]), rates(n, t)
      out = optim.matches(excluded, n)
      decay = 0.0 if out else decays(n, t)
      if name == "adamw":
        m[n] = 0.9 * m[n] + 0.1 * g
        v[n] = 0.999 * v[n] + 0.001 * g * g
        hat = m[n] / (1 - 0.9 ** (t + 1)), v[n] / (1 - 0.999 ** (t + 1))
        w[n] -= lr * (hat[0] / (np.sqrt(hat[1]) + 1e-8) + decay * w[n])
        continue
      g = g + decay * w[n]
      norm = np.linalg.norm
      trust = 1e-3 * norm(w[n]) / norm(g) if name == "lars" and not out else 1.0
      inside = name == "lars" and form == "inside"
      m[n] = 0.9 * m[n] + (lr if inside else 1.0) * trust * g
      w[n] -= m[n] if inside else lr * m[n]
  return w


def decay_cosine(t):
  return 0.4 + (0.04 - 0.4) * 0.5 * (1 + np.cos(np.pi * t / 10))


def rate_cosine(t):
  """`COSINE` times 2, which is the linear scaling of a batch of 512."""
  if t < 1:
    return 0.0
  return 2 * (0.05 + 0.45 * 0.5 * (1 + np.cos(np.pi * (t - 1) / 9)))


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("sgd", {}),
    ("adamw", {}),
    ("lars", {"form": "inside"}),
    ("lars", {"form": "outside"}),
  ],
)
def test_all_groups_that_match_multiply(name, options):
  groups = [
    ("^backbone/", {"multiplier": 0.5, "decay_multiplier": 0.1}),
    ("kernel$", {"multiplier": 0.2}),
    ("kernel$", {"multiplier": 1.5, "decay_multiplier": 2}),
    ("^head/last/", {"zero_until": 0.2}),
    ("/cls$", {"learning_rate": 0.03, "weight_decay": 0.7}),
    ("/position$", {"multiplier": {"name": "linear", "start": 1.0, "end": 0.0}}),
    ("registers", {"decay_multiplier": 0.0}),
  ]
  tx, schedules = optim.make(
    name=name, total_steps=10, batch_size=512, scaling="linear", groups=groups,
    learning_rate=COSINE, weight_decay={"name": "cosine", "start": 0.04, "end": 0.4},
    **options,
  )  # fmt: skip

  def rates(n, t):
    rate = rate_cosine(t)
    if n.endswith("/cls"):
      rate = 0.06 * 0.5 * (1 + np.cos(np.pi * t / 10))
    rate *= 0.5 if n.startswith("backbone/") else 1.0
    rate *= 0.3 if n.endswith("kernel") else 1.0
    rate *= 1 - t / 10 if n.endswith("/position") else 1.0
    return 0.0 if n.startswith("head/last/") and t < 2 else rate

  def decays(n, t):
    decay = 0.7 if n.endswith("/cls") else decay_cosine(t)
    decay *= 0.1 if n.startswith("backbone/") else 1.0
    decay *= 2 if n.endswith("kernel") else 1.0
    return 0.0 if n.endswith("registers") else decay

  params = tower()
  history = list(run(tx, params, steps=6))
  gradients = [by_name(grads) for _, grads, _ in history]
  expected = twin(name, by_name(params), gradients, rates, decays, **options)
  atol = 5e-5 if name == "adamw" else 2e-6  # 1 - 0.999^t has lost digits in float32
  for n, found in by_name(history[-1][0]).items():
    if not n.startswith("probe/"):
      np.testing.assert_allclose(found, expected[n], rtol=1e-5, atol=atol, err_msg=n)
  # DINOv2's freeze: not a bit moves while the rate is 0, decay included.
  last = [np.asarray(p["head"]["last"]["kernel"]) for p, _, _ in history]
  np.testing.assert_array_equal(last[1], params["head"]["last"]["kernel"])
  assert np.any(last[2] != last[1])
  for t in range(11):
    assert float(schedules["learning_rate"](t)) == pytest.approx(rate_cosine(t))
    assert float(schedules["weight_decay"](t)) == pytest.approx(decay_cosine(t))


def test_the_first_optimiser_of_its_own_has_a_parameter_alone():
  groups = [
    (".", {"multiplier": 100.0, "decay_multiplier": 7.0}),
    ("head/last", {"name": "sgd", "learning_rate": 0.5, "momentum": 0.0}),
    ("head/", {"name": "sgd", "learning_rate": 0.25, "momentum": 0.0}),
  ]
  tx, _ = build("adamw", weight_decay=0.1, clip_norm=1e-3, groups=groups)
  params = tower()
  after, grads, _ = next(run(tx, params))
  moved = jax.tree.map(lambda p, q, g: (p - q) / g, params, after, grads)
  for rate, found in (
    (0.5, moved["head"]["last"]),
    (0.25, moved["head"]["mlp"]),
    (0.1, moved["probe"]),
  ):
    for x in jax.tree.leaves(found):
      np.testing.assert_allclose(x, rate, rtol=1e-3)


CLJ_NAMES = {
  "cls_token": "cls",
  "pos_embed": "position",
  "register_tokens": "registers",
  "mask_token": "mask",
  "patch_embed.proj": "patch",
  "norm": "ln_post",
}


def clj_name(name):
  """A name of DINOv2, BEiT or timm as one of ours; the leaf does not matter."""
  parts = name.split(".")
  if parts[0] == "blocks":
    index = [part for part in parts[1:3] if part.isdigit()][-1]  # in its chunk or not
    return f"backbone/encoder/block{index}/" + "/".join(parts[2:])
  module = ".".join(parts[:2]) if parts[0] == "patch_embed" else parts[0]
  return f"backbone/{CLJ_NAMES.get(module, module)}/{parts[-1]}"


@pytest.mark.parametrize(
  ("names", "expected"),
  [
    ("dinov2_names", "dinov2_lr_multiplier"),
    ("dinov2_names_chunked", "dinov2_lr_multiplier_chunked"),
    ("beit_names", "beit_lr_multiplier"),
    ("timm_vit_names", "timm_vit_lr_multiplier"),
  ],
)
def test_layer_decay_is_the_official_one(names, expected, golden_file):
  golden = np.load(golden_file("layer_decay.npz"))
  depth, rate = int(golden["depth"]), float(golden["layerwise_decay"])
  flat = {clj_name(n): np.zeros(2) for n in golden[names]}
  assert len(flat) == len(golden[names])
  # BEiT's file has a few of its blocks only.
  flat |= {f"backbone/encoder/block{i}/x": np.zeros(2) for i in range(depth)}
  tree = {}
  for n, x in flat.items():
    at = tree
    for part in n.split("/")[:-1]:
      at = at.setdefault(part, {})
    at[n.split("/")[-1]] = x
  patch = golden["patch_embed_lr_mult"] if "dinov2" in names else 1.0
  found = optim.layer_multipliers(tree, rate=rate, patch_multiplier=float(patch))
  found = by_name(found)
  for n, multiplier in zip(golden[names], golden[expected], strict=True):
    if "timm" in names and n.startswith("norm."):
      assert (found[clj_name(n)], multiplier) == (1.0, rate)  # as its docstring says
    else:
      assert found[clj_name(n)] == pytest.approx(multiplier, rel=1e-12), n


def test_layer_decay_of_several_towers():
  tree = {"student": tower(), "text": {"encoder": {"block0": {"k": np.ones(1)}}}}
  tree["text"] |= {"token": np.ones(1), "position": np.ones(1)}
  found = by_name(optim.layer_multipliers(tree, rate=0.5, where="^(student|text)/"))
  assert found["student/backbone/encoder/block0/layer_scale1"] == 0.5**3
  assert found["student/backbone/position"] == 0.5**4
  assert found["student/head/last/kernel"] == 1
  assert (found["text/token"], found["text/encoder/block0/k"]) == (0.25, 0.5)
  found = by_name(optim.layer_multipliers(tree, rate=0.5, where="^student/"))
  assert (found["text/token"], found["student/backbone/cls"]) == (1, 0.5**4)


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_scanned_layers_are_trained_as_separate_ones(name):
  """Decay by layer, trust ratios and clipping reach into a stack."""
  options = {"form": "popular"} if name == "lars" else {}
  options |= {"layer_decay": {"rate": 0.6, "patch_multiplier": 0.2}}
  options |= {"weight_decay": 0.1, "clip_norm": 1.5, "clip_by": "parameter"}
  options |= {"groups": [("fc1", {"multiplier": 0.5}), ("ln1", {"zero_until": 1})]}
  tx, _ = build(name, **options)
  params = tower()
  for (one, _, _), (other, _, _) in zip(
    run(tx, params), run(tx, scanned(params)), strict=True
  ):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      by_name(scanned(one)),
      by_name(other),
    )
  start = by_name(scanned(params))
  assert all(np.any(x != start[n]) for n, x in by_name(other).items())


def test_the_trust_ratio_of_each_layer_of_a_stack():
  tx, _ = build("lars", learning_rate=1.0, momentum=0.0)
  params = scanned(tower())
  after, grads, _ = next(run(tx, params))
  of = lambda tree: np.asarray(
    tree["backbone"]["encoder"]["blocks"]["mlp"]["fc1"]["kernel"], np.float64
  )
  for before, later, grad in zip(of(params), of(after), of(grads), strict=True):
    ratio = 1e-3 * np.linalg.norm(before) / np.linalg.norm(grad)
    np.testing.assert_allclose(before - later, ratio * grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
  ("by", "module"),
  [
    ("global", lambda n: ""),
    ("parameter", lambda n: n),
    ("module", lambda n: n.split("/")[0]),
    ("encoder/block.", lambda n: n.split("/")[2] if "encoder/" in n else "rest"),
  ],
)
def test_whose_gradient_is_clipped(by, module):
  """Frozen parameters and those of other optimisers are in no norm."""
  largest = 4.0 if by == "parameter" else 5.5  # some are larger, some are not
  tx, _ = build(
    "sgd", learning_rate=1.0, momentum=0.0, clip_norm=largest, clip_by=by,
    frozen="^backbone/position$",
    groups=[("/mask$", {"name": "sgd", "learning_rate": 1.0, "momentum": 0.0})],
  )  # fmt: skip
  params = jax.tree.map(np.zeros_like, tower())
  after, grads, _ = next(run(tx, params))
  grads, after = by_name(grads), by_name(after)
  alone = {"backbone/position", "backbone/mask", "probe/kernel", "probe/bias"}
  squares = {}
  for n, g in grads.items():
    if n not in alone:
      squares[module(n)] = squares.get(module(n), 0.0) + np.sum(np.float64(g) ** 2)
  factors = {k: min(1.0, largest / np.sqrt(s)) for k, s in squares.items()}
  assert min(factors.values()) < 1 and (by == "global") == (max(factors.values()) < 1)
  for n, g in grads.items():
    if n not in alone:
      np.testing.assert_allclose(after[n], -factors[module(n)] * g, rtol=1e-5)
  np.testing.assert_array_equal(after["backbone/mask"], -grads["backbone/mask"])
  assert not np.any(after["backbone/position"])


@pytest.mark.parametrize("name", optim.OPTIMISERS)
@pytest.mark.parametrize("by", ["global", "parameter", "module"])
def test_frozen_is_frozen_whatever_else_is_said(name, by):
  """No update, decay, momentum or state; and nobody's norm feels its gradient."""
  options = {
    "weight_decay": {"name": "cosine", "start": 0.1, "end": 0.4},
    "clip_norm": 0.1,
    "clip_by": by,
    "layer_decay": {"rate": 0.9},
    "groups": [
      (".", {"multiplier": 3.0, "weight_decay": 0.3}),
      ("block1", {"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.1}),
      ("^head/", {"zero_until": 1}),
    ],
  }
  tx, _ = build(name, frozen="^backbone/encoder/|^head/last/", **options)
  params = tower()
  state = tx.init(params)
  kept = {jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(state)}
  assert not any("'encoder'" in p or "'last'" in p for p in kept)
  grads = jax.tree.map(np.ones_like, params)
  loud = jax.tree.map(np.ones_like, params)
  loud["head"]["last"]["kernel"] += 1e6
  loud["backbone"]["encoder"] = jax.tree.map(
    lambda x: x + 1e6, loud["backbone"]["encoder"]
  )
  for _ in range(3):
    updates, after = tx.update(grads, state, params)
    same, _ = tx.update(loud, state, params)
    jax.tree.map(np.testing.assert_array_equal, updates, same)
    assert not any(map(np.any, jax.tree.leaves(updates["backbone"]["encoder"])))
    assert not np.any(updates["head"]["last"]["kernel"])
    state, params = after, jax.tree.map(jnp.add, params, updates)
  assert np.any(updates["backbone"]["cls"]) and np.any(updates["head"]["mlp"]["kernel"])
