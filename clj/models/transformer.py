"""The pre-norm transformer that image and text towers share.

Layer norm, attention, and a perceptron of one hidden layer, each branch added to the
stream it reads (Vaswani et al., arXiv:1706.03762; Dosovitskiy et al.,
arXiv:2010.11929). Parameters, the statistics of layer norm and the softmax are float32;
`dtype` is that of everything else.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from clj import sharding
from clj.cli import UserError
from clj.models.attention import FORMS
from clj.models.dense import activate, layer_norm, linear, settle

ACTIVATIONS = {
  "gelu": partial(nn.gelu, approximate=False),
  "gelu_tanh": partial(nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


# What a layer keeps for the backward pass; without a policy, its input alone.
REMAT = {
  False: None,
  True: None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Init(NamedTuple):
  """Initialisers of the kernels; biases start at zero."""

  qkv: Callable
  out: Callable
  fc1: Callable
  fc2: Callable


def uniform(limit):
  return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(
    rng, shape, dtype, -limit, limit
  )


def normal(std):
  return lambda rng, shape, dtype=jnp.float32: (
    std * jax.random.normal(rng, shape, dtype)
  )


# Functions of width, hidden width and depth.
INITS = {
  # PyTorch's defaults (query, key and value are one matrix there): CLIP's image towers.
  "torch": lambda w, mlp, depth: Init(
    uniform((1.5 / w) ** 0.5), uniform(w**-0.5), uniform(w**-0.5), uniform(mlp**-0.5)
  ),
  # CLIP's text towers (arXiv:2103.00020, openai/CLIP `model.py`).
  "clip": lambda w, mlp, depth: Init(
    normal(w**-0.5),
    normal((2 * depth * w) ** -0.5),
    normal((2 * w) ** -0.5),
    normal((2 * depth * w) ** -0.5),
  ),
  # Glorot, every matrix on its own: SigLIP and the original ViT in JAX.
  "xavier": lambda w, mlp, depth: Init(
    uniform((3 / w) ** 0.5),
    uniform((3 / w) ** 0.5),
    uniform((6 / (w + mlp)) ** 0.5),
    uniform((6 / (w + mlp)) ** 0.5),
  ),
}


def keep_shape(module, name, init, *shape):
  """A parameter that has the shape of the first input, whatever later ones are."""
  if module.has_variable("params", name):
    return module.get_variable("params", name)
  return module.param(name, init, shape)


class Attention(nn.Module):
  """Multi-head attention: `[N, T, D]` looks at `[N, S, D]` -> `[N, T, outputs]`.

  form: a key of `attention.FORMS`; there is what `mask` and `causal` mean.
  """

  heads: int
  inits: Init
  dtype: str
  outputs: int | None = None  # D by default
  form: str = "plain"

  @nn.compact
  def __call__(self, x, context, mask=None, causal=False):
    width = x.shape[-1]
    if width % self.heads:
      raise UserError(f"width {width} does not divide into {self.heads} heads")

    def project(x, name):
      x = linear(width, self.dtype, kernel_init=self.inits.qkv, name=name)(x)
      return x.reshape(*x.shape[:2], self.heads, -1)

    q, k, v = project(x, "query"), project(context, "key"), project(context, "value")
    x = FORMS[self.form](q, k, v, mask, causal).reshape(*x.shape[:2], width)
    outputs = self.outputs or width
    return linear(outputs, self.dtype, kernel_init=self.inits.out, name="out")(x)


class MLP(nn.Module):
  hidden: int
  activation: str
  inits: Init
  dtype: str

  @nn.compact
  def __call__(self, x):
    dense = partial(linear, dtype=self.dtype)
    y = dense(self.hidden, kernel_init=self.inits.fc1, name="fc1")(x)
    y = activate(ACTIVATIONS[self.activation], y)
    return dense(x.shape[-1], kernel_init=self.inits.fc2, name="fc2")(y)


class Block(nn.Module):
  """One layer. `drop`: the chance that an example skips a branch while training."""

  heads: int
  hidden: int
  activation: str
  eps: float
  inits: Init
  layer_scale: float | None
  drop_path: bool
  attention: str
  causal: bool
  dtype: str

  @nn.compact
  def __call__(self, x, drop, mask, train):
    def add(x, y, name):
      if self.layer_scale is not None:
        init = nn.initializers.constant(self.layer_scale)
        gamma = self.param(name, init, (x.shape[-1],))
        y = y * gamma.astype(y.dtype)[None, None]
      if self.drop_path and train:
        rng = self.make_rng("dropout")
        keep = jax.random.bernoulli(rng, 1 - drop, (len(x), 1, 1))
        y = y * (keep / (1 - drop)).astype(y.dtype)
      return settle(x + y)

    norm = partial(layer_norm, self.eps, self.dtype)
    y = norm("ln1")(x)
    attention = Attention(
      self.heads, self.inits, self.dtype, form=self.attention, name="attention"
    )
    x = add(x, attention(y, y, mask, self.causal), "layer_scale1")
    mlp = MLP(self.hidden, self.activation, self.inits, self.dtype, name="mlp")
    x = add(x, mlp(norm("ln2")(x)), "layer_scale2")
    return x, None  # a carry and no outputs: what nn.scan asks for


class Encoder(nn.Module):
  """`depth` layers: `[N, T, D]` -> `[N, T, D]` of `dtype`.

  Called with `mask`, bool `[N, T]` or None for all: the tokens that may be looked at;
  and `causal`, whether tokens look only at earlier ones and themselves.

  hidden: width of the perceptrons, 4 D by default.
  activation: a key of `ACTIVATIONS`.
  kernel_init: a key of `INITS`.
  attention: "plain", or "flash" for sequences of several hundred tokens: a kernel, on
    TPUs and (16 bits only) GPUs; see `clj.models.attention`.
  layer_scale: a learned gain of every branch, which starts at this value (CaiT,
    arXiv:2103.17239); None for none.
  drop_path: stochastic depth (arXiv:1603.09382): from 0 in the first layer to this
    chance in the last.
  scan: one loop over layers instead of `depth` copies of their program, so that it
    compiles in the time of one layer. The parameters are one tree "blocks" with a
    leading layer axis, instead of "block0", "block1", ...
  remat: True keeps only the input of each layer for the backward pass and recomputes
    the rest there; "dots" keeps the products with weights too, and recomputes attention
    and what lies between. A scan should have one of them, since alone it keeps even
    what copies of the layer would recompute by themselves. Scratch memory of a gradient
    of ViT-B/16, 128 images in bfloat16, as compiled for one TPU v5e: copies 6.8 GiB, or
    1.1 with remat and 23 % more FLOPs; scan 21.6 GiB, or 1.4 with remat, 5.0 with
    "dots".
  """

  depth: int
  heads: int
  hidden: int | None = None
  activation: str = "gelu"
  eps: float = 1e-6
  kernel_init: str = "xavier"
  attention: str = "plain"
  layer_scale: float | None = None
  drop_path: float = 0.0
  scan: bool = False
  remat: bool | str = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, mask, train, causal=False):
    for value, known in (
      (self.activation, ACTIVATIONS),
      (self.kernel_init, INITS),
      (self.attention, FORMS),
    ):
      if value not in known:
        raise UserError(f"unknown {value!r}; there are {', '.join(known)}")
    width = x.shape[-1]
    hidden = self.hidden or 4 * width
    block = Block
    if self.remat not in REMAT:
      raise UserError(f"unknown remat {self.remat!r}; there are {[*REMAT]}")
    remat = self.remat
    if self.scan and sharding.is_split():
      # Each turn of the loop gathers its layer, and does so again in the backward pass:
      # what is computed from parameters alone is not kept.
      block = nn.map_variables(
        block, "params", sharding.whole_layer, init=self.is_initializing()
      )
      remat = remat or "dots"
    if remat:
      block = nn.remat(
        block,
        policy=REMAT[remat],
        prevent_cse=not self.scan,
        static_argnums=(4,),
      )
    if self.scan:
      block = nn.scan(
        block,
        length=self.depth,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
      )
    block = partial(
      block,
      heads=self.heads,
      hidden=hidden,
      activation=self.activation,
      eps=self.eps,
      inits=INITS[self.kernel_init](width, hidden, self.depth),
      layer_scale=self.layer_scale,
      drop_path=self.drop_path > 0,
      attention=self.attention,
      causal=causal,
      dtype=self.dtype,
    )
    x = x.astype(self.dtype)
    drop = jnp.linspace(0, self.drop_path, self.depth)
    if self.scan:
      return block(name="blocks")(x, drop, mask, train)[0]
    for i in range(self.depth):
      x, _ = block(name=f"block{i}")(x, drop[i], mask, train)
    return x
