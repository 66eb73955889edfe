"""Retrieval between images and texts, both ways, on normalised embeddings.

The protocol of CLIP_benchmark and of the published tables: a query is answered where
any of its true matches is among the k most similar candidates (not which share of them
is). `ranking` has the measures of text retrieval and recommendation, which do count.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from clj.cli import UserError
from clj.evals.rows import check_rows, context_mesh, fetch, normalize, shard_rows

# As for kNN: queries at a time (over all devices), rows of the bank at a time.
QUERIES = 256
BLOCK = 1024


def retrieval(
  query,
  bank,
  query_ids,
  bank_ids,
  *,
  ks: tuple[int, ...] = (1, 5, 10),
  names: tuple[str, str] = ("image", "text"),
) -> dict[str, float]:
  """Recall at k and the median rank, from the one to the other and back.

  The candidates lie split over the mesh of the context (`jax.set_mesh`; one device
  without); each device compares at most 256 queries with its own at a time. The result
  is the same on any number of devices.

  Args:
    query, bank: images and texts, or any other two: `[N, d]` and `[M, d]`, NumPy or
      JAX, not normalised.
    query_ids, bank_ids: int `[N]` and `[M]`; two belong together where their ids are
      equal, so an image may have several texts and the other way round. Rows of id -1
      are left out.
    ks: how many candidates count as found.
    names: of the two.

  Returns:
    By "image_to_text/" and "text_to_image/": "recall@K", the share of the queries that
    have a match among the K most similar; "median_rank" of the best match, from 1; and
    "chance@K", the expected recall of a random order. Candidates as similar as the best
    match come before it half the time (so equal embeddings gain nothing).

  Raises:
    ValueError: shapes that do not fit, or no row with an id.
  """
  first, second = names
  check_rows(first, query, query_ids)
  check_rows(second, bank, bank_ids)
  if query.shape[1] != bank.shape[1]:
    raise UserError(
      f"embeddings of {first} {query.shape} and of {second} {bank.shape}: both must "
      "have one width"
    )
  if not ks or min(ks) < 1:
    raise UserError(f"ks={ks}: recall is at 1 or more candidates")
  found = {}
  for name, one, other in (
    (f"{first}_to_{second}", (query, query_ids), (bank, bank_ids)),
    (f"{second}_to_{first}", (bank, bank_ids), (query, query_ids)),
  ):
    ranks, matches, candidates = _search(one, other)
    if not len(ranks) or not candidates:
      raise UserError(f"{name}: {len(ranks)} queries and {candidates} candidates")
    for k in ks:
      found[f"{name}/recall@{k}"] = float(np.mean(ranks <= k))
      found[f"{name}/chance@{k}"] = float(np.mean(_chance(matches, candidates, k)))
    found[f"{name}/median_rank"] = float(np.median(ranks))
  return found


def match_captions(image_index, index, captions) -> tuple[np.ndarray, np.ndarray]:
  """Ids for `retrieval`, from the records that images and captions belong to.

  An image belongs to the captions of its record. Where each record has a single
  caption, records whose captions are equal belong together.

  Args:
    image_index: int `[N]`, the record of each image; -1 where there is none.
    index: int `[M]`, the record of each caption, or -1.
    captions: the M texts, "" where there is none; equal where all characters are. An
      array of token ids `[M, L]` is taken as well, but to it all unknown words are one.

  Returns int32 `[N]` and `[M]`. Captions whose image is missing have id -1, as have
  images without a caption.
  """
  if len(captions) != len(index):
    raise UserError(f"{len(captions)} captions of {len(index)} records: give one each")
  index = np.where(np.isin(index, image_index), index, -1)
  there = index >= 0
  ids = index
  if there.any() and np.bincount(index[there]).max() == 1:
    if isinstance(captions, np.ndarray) and captions.ndim == 2:
      captions = map(tuple, captions.tolist())
    number = {}
    same = [number.setdefault(caption, len(number)) for caption in captions]
    ids = np.where(there, same, -1)
  of_record = np.full(max(index.max(), image_index.max()) + 1, -1, np.int32)
  of_record[index[there]] = ids[there]
  image_ids = np.where(image_index >= 0, of_record[image_index], -1)
  return image_ids.astype(np.int32), ids.astype(np.int32)


def ranking(score, relevance, *, ks: tuple[int, ...] = (10,)) -> dict[str, np.ndarray]:
  """Measures of rankings with graded relevance, query by query, as trec_eval has them.

  Args:
    score: `[Q, D]`, NumPy, of every document for every query; the largest comes first,
      and of equal ones the later document (trec_eval: ids in descending order). -inf
      takes a document to the end.
    relevance: `[Q, D]` grades: above 0 is relevant, 0 or below (not judged) is not.
    ks: how many documents of each ranking count where a measure is "@K".

  Returns, each `[Q]` float64, 0 for queries without a relevant document (leave them out
  of the mean, or not, as the benchmark does):
    "recall@K": share of the relevant documents that are among the first K.
    "precision@K": share of the first K that are relevant.
    "ndcg@K": the sum of grade / log2(rank + 1) over the first K, as a share of that of
      the best order (linear in the grade, not 2^grade - 1).
    "map" and "map@K": the sum of the precision at the rank of each relevant document
      found (among the first K), divided by the number of relevant documents.
    "mrr" and "mrr@K": 1 / rank of the first relevant document (0 beyond K).

  Raises:
    ValueError: shapes that differ, scores that are not numbers, a k below 1.
  """
  score, relevance = np.asarray(score, np.float64), np.asarray(relevance)
  if score.ndim != 2 or score.shape != relevance.shape:
    raise UserError(
      f"scores {score.shape} and relevance {relevance.shape}: give [Q, D] twice"
    )
  if np.isnan(score).any():
    raise UserError(f"{np.isnan(score).sum()} scores are NaN: they have no order")
  if min(ks, default=1) < 1:
    raise UserError(f"ks={ks}: a ranking is cut at 1 or more documents")
  order = score.shape[1] - 1 - np.argsort(-score[:, ::-1], axis=1, kind="stable")
  gain = np.maximum(np.take_along_axis(relevance, order, axis=1), 0)
  hit, best = gain > 0, -np.sort(-gain, axis=1)
  rank = np.arange(1, score.shape[1] + 1)
  total = np.maximum(hit.sum(1), 1)
  precision = np.cumsum(hit, axis=1) / rank
  found = {
    "map": (precision * hit).sum(1) / total,
    "mrr": (hit / rank).max(1, initial=0),
  }
  for k in ks:
    top, discount = hit[:, :k], np.log2(rank[:k] + 1)
    ideal = (best[:, :k] / discount).sum(1)
    found[f"recall@{k}"] = top.sum(1) / total
    found[f"precision@{k}"] = top.sum(1) / k
    found[f"ndcg@{k}"] = (gain[:, :k] / discount).sum(1) / np.where(ideal, ideal, 1)
    found[f"map@{k}"] = (precision[:, :k] * top).sum(1) / total
    found[f"mrr@{k}"] = (top / rank[:k]).max(1, initial=0)
  return found


def _chance(matches: np.ndarray, candidates: int, k: int) -> np.ndarray:
  """That one of the matches is among k candidates drawn without replacement."""
  drawn = np.arange(min(k, candidates))
  others = np.maximum(candidates - matches[:, None] - drawn, 0)
  return 1 - np.prod(others / (candidates - drawn), axis=1)


def _search(query, bank):
  """Ranks and numbers of matches of the queries that have an id; candidates."""
  mesh = context_mesh()
  queries = max(1, QUERIES // mesh.size)
  ranks, matches, ids, candidates = jax.device_get(
    _ranks(mesh, queries)(
      shard_rows(query[0], mesh, queries),
      shard_rows(query[1], mesh, queries, -1),
      shard_rows(bank[0], mesh, 1),
      shard_rows(bank[1], mesh, 1, -1),
    )
  )
  valid = ids >= 0
  return ranks[valid], matches[valid], int(candidates)


@functools.lru_cache(maxsize=8)
def _ranks(mesh: Mesh, queries: int):
  """The jitted search; `queries` at a time from each device."""
  axes = mesh.axis_names

  def shard(query_md, query_id_m, bank_nd, bank_id_n):
    """All arrays are this device's rows."""
    pad = -len(bank_nd) % BLOCK
    bank_nd = jnp.pad(normalize(bank_nd), ((0, pad), (0, 0)))
    bank_id_n = jnp.pad(bank_id_n, (0, pad), constant_values=-1)
    blocks = bank_nd.reshape(-1, BLOCK, bank_nd.shape[1])
    real_n = bank_id_n >= 0

    def chunk(inputs):
      query_qd, id_q = inputs
      query_Qd = jax.lax.all_gather(normalize(query_qd), axes, tiled=True)
      id_Q = jax.lax.all_gather(id_q, axes, tiled=True)
      sim_bQn = jax.lax.map(
        lambda block: jnp.matmul(
          query_Qd, block.T, precision=jax.lax.Precision.HIGHEST
        ),
        blocks,
      )
      sim_Qn = jnp.moveaxis(sim_bQn, 0, 1).reshape(len(query_Qd), -1)
      match_Qn = (id_Q[:, None] == bank_id_n[None]) & real_n[None]
      other_Qn = ~match_Qn & real_n[None]
      best_Q = jax.lax.pmax(jnp.where(match_Qn, sim_Qn, -jnp.inf).max(1), axes)

      def count(mask_Qn):
        return jax.lax.psum(mask_Qn.sum(1, dtype=jnp.int32), axes)

      above_Q = count(other_Qn & (sim_Qn > best_Q[:, None]))
      equal_Q = count(other_Qn & (sim_Qn == best_Q[:, None]))
      return 1 + above_Q + equal_Q / 2, count(match_Qn), id_Q

    ranks, matches, ids = jax.lax.map(
      chunk,
      (
        query_md.reshape(-1, queries, query_md.shape[1]),
        query_id_m.reshape(-1, queries),
      ),
    )
    candidates = jax.lax.psum(real_n.sum(), axes)
    return ranks.reshape(-1), matches.reshape(-1), ids.reshape(-1), candidates

  rows, all_of_it = PartitionSpec(axes), PartitionSpec()
  return jax.jit(
    jax.shard_map(
      shard, mesh=mesh, in_specs=(rows,) * 4, out_specs=all_of_it, check_vma=False
    )
  )


def run(
  embedder,
  /,
  *,
  query: str = "image",
  bank: str = "text",
  query_rename: dict[str, str] | None = None,
  bank_rename: dict[str, str] | None = None,
  ks: tuple[int, ...] = (1, 5, 10),
) -> dict[str, float]:
  """The evaluation "retrieval": of one record's query and bank, each finds the other.

  query, bank: outputs in one space; where one is made of a column of texts, every text
    of a record is a row.
  query_rename, bank_rename: columns of the data set that stand for one that the method
    knows: pairs of texts are {"first": "text"} and {"second": "text"}.
  """
  sides = _sides(embedder, query, bank, query_rename, bank_rename)
  rows = [embedder.rows(split, (o,), rename, each) for split, o, rename, each in sides]
  (x, x_index), (y, y_index) = (
    (found[output], fetch(found["index"]))
    for found, (_, output, _, _) in zip(rows, sides)
  )
  said = [
    _texts_of_rows(embedder.source("test"), each, found)
    for found, (_, _, _, each) in zip(rows, sides)
  ]
  if said[1] is not None:
    x_ids, y_ids = match_captions(x_index, y_index, said[1])
  elif said[0] is not None:
    y_ids, x_ids = match_captions(y_index, x_index, said[0])
  else:
    x_ids, y_ids = x_index, y_index
  names = _names(query, bank, query_rename, bank_rename)
  return retrieval(x, y, x_ids, y_ids, ks=tuple(ks), names=names)


def takes(
  embedder,
  /,
  *,
  query="image",
  bank="text",
  query_rename=None,
  bank_rename=None,
  **options,
):
  del options
  return _sides(embedder, query, bank, query_rename, bank_rename)


def _sides(embedder, query, bank, query_rename, bank_rename):
  """What `embedder.rows` is asked for: (split, output, rename, each) of the two."""
  sides = []
  for output, rename in ((query, query_rename), (bank, bank_rename)):
    (name, column), *others = embedder.columns(output, rename).items()
    each = name if column.tokenizer is not None and not others else None
    sides.append(("test", output, rename, each))
  return sides


def _texts_of_rows(split, each, rows):
  """The text of each row, "" where it only fills up; None where they are no texts."""
  if each is None:
    return None
  texts, _ = split.texts(each)
  return [texts[i] if i < len(texts) else "" for i in fetch(rows["place"]).tolist()]


def _names(query, bank, query_rename=None, bank_rename=None):
  """Of the columns if they are renamed, else of the outputs, without a common prefix
  such as "trained_".
  """
  if query_rename or bank_rename:
    return next(iter(query_rename or [query])), next(iter(bank_rename or [bank]))
  common = os.path.commonprefix([query, bank])
  common = common[: common.rfind("_") + 1]
  return query.removeprefix(common), bank.removeprefix(common)


def _at(ks):
  return 10 if 10 in ks else max(ks)


def best(*, ks=(1, 5, 10), **options):
  first, second = _named_by(**options)
  return f"{second}_to_{first}/recall@{_at(ks)}", 1


def before(*, ks=(1, 5, 10), **options):
  first, second = _named_by(**options)
  pairs = f"{first}_to_{second}", f"{second}_to_{first}"
  return {f"{pair}/recall@{_at(ks)}": pair + "/{}@" + str(_at(ks)) for pair in pairs}


def _named_by(*, query="image", bank="text", query_rename=None, bank_rename=None):
  return _names(query, bank, query_rename, bank_rename)
