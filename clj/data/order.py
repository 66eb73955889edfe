"""Which record comes when: one bijection for every path, and the random bits beside it.

Position p of the endless training stream belongs to epoch `p // size`, and every epoch
is a permutation of the records keyed by (seed, epoch). The permutation is a Feistel
network over the smallest power of two that holds `size`, walked until it lands inside
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): computed per
position, never an array, so that 400 million records cost nothing, a restart needs the
step number alone, and every host computes its own rows without asking another.
"""

import numpy as np

_ROUNDS = 8  # Even, so that the two parts end where they began.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(*words) -> np.ndarray:
  """Hashes integer arrays that broadcast together to uniform uint64.

  Each word goes through the finaliser of SplitMix64 (Steele, Lea and Flood 2014). A
  negative word counts modulo 2**64.
  """
  h = np.zeros((), np.uint64)
  with np.errstate(over="ignore"):
    for word in words:
      if isinstance(word, int):
        word &= 0xFFFFFFFFFFFFFFFF
      h = (h ^ np.asarray(word).astype(np.uint64)) + _GOLDEN
      h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      h ^= h >> np.uint64(31)
  return h


def uniform(*words) -> np.ndarray:
  """Hashes integer arrays to float64 in [0, 1)."""
  return (mix(*words) >> np.uint64(11)) * 2.0**-53


def order(seed: int, position, size: int) -> np.ndarray:
  """Returns the record that stands at `position` of the stream.

  Args:
    seed: any integer.
    position: integer or integer array, 0 or more; computed in 64 bits.
    size: number of records, 1 or more.

  Returns:
    int64 in [0, size), in the shape of `position`: over the positions of one epoch,
    each record exactly once.
  """
  epoch, offset = np.divmod(np.asarray(position, np.int64), np.int64(size))
  # At least 6 bits: rounds over fewer are too few to make every permutation as likely.
  bits = max(6, (size - 1).bit_length())
  epochs, which = np.unique(epoch, return_inverse=True)
  keys = mix(seed, epochs[:, None], np.arange(_ROUNDS))
  # Almost always all positions lie in one epoch: its keys then stay scalars.
  keys = keys[0] if len(epochs) == 1 else keys[which.reshape(-1)].T
  x = offset.reshape(-1).astype(np.uint64)
  x = _permute(x, keys, bits)
  outside = np.flatnonzero(x >= size)
  while len(outside):
    walking = keys if keys.ndim == 1 else keys[:, outside]
    x[outside] = _permute(x[outside], walking, bits)
    outside = outside[x[outside] >= size]
  return x.astype(np.int64).reshape(offset.shape)


def _permute(x, keys, bits):
  """A bijection of [0, 2**bits): Feistel rounds on two parts that may differ by a bit.

  Each round adds a hash of one part to the other and exchanges them, so that an odd
  number of bits needs no larger domain.
  """
  low = np.uint64(bits // 2)
  left, right = x >> low, x & ((np.uint64(1) << low) - np.uint64(1))
  width, other = 64 - (bits - bits // 2), 64 - bits // 2
  for key in keys:
    h = right ^ key
    h *= np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(32)
    h *= np.uint64(0x94D049BB133111EB)
    h >>= np.uint64(width)
    left ^= h
    left, right, width, other = right, left, other, width
  return left << low | right
