"""Text transformers: CLIP's (arXiv:2103.00020), causal, and SigLIP's
(arXiv:2303.15343), bidirectional.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from clj.cli import UserError
from clj.models.dense import layer_norm
from clj.models.transformer import Encoder, keep_shape, normal

POOLS = ("highest", "end", "last", "mean")


class Text(nn.Module):
  """`text` int32 `[N, L]`, `text_mask` bool `[N, L]` -> features `[N, width]` float32.

  encoder: the layers.
  width: of the tokens.
  vocab: number of token ids. A larger id gives NaN, never another token's embedding.
  pool: the token that the features are taken from, after the last layer norm: "highest"
    is the first one with the highest id, the end token in CLIP's vocabulary; "end" the
    last one of `text_mask`; "last" the last one of all L (SigLIP). "mean" averages
    over `text_mask`.
  causal: whether tokens see only earlier ones and themselves.
  mask_padding: whether padding is hidden from attention. SigLIP does not hide it; in a
    causal model the end token comes before it anyway.
  token_dropout: probability with which a token is hidden in training, the first and the
    last of a text never (random masking, as in CLIPA, arXiv:2305.07017).
  token_std, position_std: of the initial embeddings; None for width^(-1/2).

  The number of positions is the L of the text given to `init`; shorter texts use the
  first ones, longer ones are a ValueError.
  """

  encoder: Encoder
  width: int
  vocab: int
  pool: str = "end"
  causal: bool = False
  mask_padding: bool = True
  token_dropout: float = 0.0
  token_std: float | None = 0.02
  position_std: float | None = 0.01

  @nn.compact
  def __call__(self, text, text_mask, *, train):
    if self.pool not in POOLS:
      raise UserError(f"unknown pool {self.pool!r}; there are {', '.join(POOLS)}")
    if self.token_dropout and not self.mask_padding:
      raise UserError("token_dropout hides tokens as padding: it needs mask_padding")
    dtype, length = self.encoder.dtype, text.shape[1]
    if train and self.token_dropout:
      text_mask = drop_tokens(self.make_rng("dropout"), text_mask, self.token_dropout)
    token_std, position_std = (
      self.width**-0.5 if std is None else std
      for std in (self.token_std, self.position_std)
    )
    table = self.param("token", normal(token_std), (self.vocab, self.width))
    x = jnp.take(table, text, axis=0, mode="fill", fill_value=jnp.nan).astype(dtype)
    shape = (length, self.width)
    position = keep_shape(self, "position", normal(position_std), *shape)
    if length > len(position):
      raise UserError(
        f"texts of {length} tokens, but the model has {len(position)} positions"
      )
    x = x + position[:length].astype(dtype)[None]

    mask = text_mask if self.mask_padding else None
    x = self.encoder(x, mask, train, self.causal)
    x = layer_norm(self.encoder.eps, dtype, "ln_post")(x).astype(jnp.float32)
    return (x * pool_weights(text, text_mask, self.pool)[..., None]).sum(1)


def drop_tokens(rng, text_mask, share):
  """`text_mask` without a random share of the tokens between the first and the last."""
  position = jnp.arange(text_mask.shape[1])[None]
  inner = (position > 0) & (position < text_mask.sum(1, keepdims=True) - 1)
  return text_mask & ~(inner & jax.random.bernoulli(rng, share, text_mask.shape))


def pool_weights(text, text_mask, pool):
  """What each token counts for in the features: `[N, L]`, float32.

  Products and a sum: exact for one token, and local to each example's device, unlike
  an indexed read.
  """
  length = text.shape[1]
  if pool == "mean":
    weights = text_mask.astype(jnp.float32)
    return weights / jnp.maximum(weights.sum(1, keepdims=True), 1.0)
  if pool == "highest":
    index = text.argmax(1)
  elif pool == "end":
    index = length - 1 - text_mask[:, ::-1].argmax(1)
  else:
    index = jnp.full(len(text), length - 1)
  return nn.one_hot(index, length)
