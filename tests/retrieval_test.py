"""Zero-shot classification and retrieval against slow twins, on 1 and 8 devices."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from clj.evals import zeroshot
from clj.evals.retrieval import match_captions, ranking, retrieval


def mesh(data, fsdp=1):
  devices = jax.devices()[: data * fsdp]
  axis_types = (AxisType.Auto, AxisType.Auto)
  return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types, devices=devices)


MESHES = ((1, 1), (8, 1), (2, 4))


def unit(x):
  return x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)


def pairs(images, texts, noise=1.5, seed=0, fill=7):
  """Images, several texts for some of them, and rows that belong to nothing."""
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(images, 12))
  text_ids = np.concatenate(
    [np.arange(images), rng.integers(0, images, texts - images)]
  )
  text = image[text_ids] + noise * rng.normal(size=(texts, 12))
  image_ids = np.arange(images)
  for ids in (image_ids, text_ids):
    ids[rng.permutation(len(ids))[:fill]] = -1
  as_int = lambda ids: ids.astype(np.int32)
  return (
    image.astype(np.float32),
    text.astype(np.float32),
    *map(as_int, (image_ids, text_ids)),
  )


def slow_ranks(query, bank, query_ids, bank_ids):
  query, bank = query[query_ids >= 0], bank[bank_ids >= 0]
  query_ids, bank_ids = query_ids[query_ids >= 0], bank_ids[bank_ids >= 0]
  ranks, matches = [], []
  for row, i in zip(unit(query) @ unit(bank).T, query_ids, strict=True):
    match = bank_ids == i
    matches.append(match.sum())
    order = np.argsort(-row, kind="stable")
    found = np.flatnonzero(match[order])
    ranks.append(1 + found[0] if len(found) else len(bank) + 1)
  return np.array(ranks), np.array(matches), len(bank)


@pytest.mark.parametrize("shape", MESHES)
def test_retrieval_is_its_slow_twin_on_any_mesh(shape):
  image, text, image_ids, text_ids = pairs(501, 1103)
  with jax.set_mesh(mesh(*shape)):
    found = retrieval(image, text, image_ids, text_ids, ks=(1, 5, 10))
  for name, arguments in (
    ("image_to_text", (image, text, image_ids, text_ids)),
    ("text_to_image", (text, image, text_ids, image_ids)),
  ):
    ranks, _, _ = slow_ranks(*arguments)
    assert found[f"{name}/median_rank"] == np.median(ranks)
    for k in (1, 5, 10):
      assert found[f"{name}/recall@{k}"] == pytest.approx((ranks <= k).mean(), abs=1e-6)
    assert 0.05 < found[f"{name}/recall@1"] < found[f"{name}/recall@10"] < 0.95


def test_chance_is_the_share_over_all_orders():
  """Seven candidates, of which a query has 1, 2 or no match: all 5,040 orders."""
  image = np.eye(3, 8, dtype=np.float32)
  text = np.eye(7, 8, dtype=np.float32)
  image_ids, text_ids = np.array([0, 1, 5]), np.array([0, 1, 1, 2, 2, 3, 4])
  found = retrieval(image, text, image_ids, text_ids, ks=(1, 3))
  for k in (1, 3):
    hits = [
      [(text_ids[list(order[:k])] == i).any() for i in image_ids]
      for order in itertools.permutations(range(7))
    ]
    assert found[f"image_to_text/chance@{k}"] == pytest.approx(np.mean(hits), abs=1e-6)


def test_equal_embeddings_gain_nothing():
  ones, ids = np.ones((40, 4), np.float32), np.arange(40)
  found = retrieval(ones, ones, ids, ids)
  assert found["image_to_text/recall@10"] == 0
  assert found["text_to_image/median_rank"] == 1 + 39 / 2
  # Equal captions are matches, not rivals.
  found = retrieval(ones, ones, ids // 20, ids // 20)
  assert found["image_to_text/recall@1"] == 0


def test_retrieval_refuses_what_does_not_fit():
  x, ids = np.ones((4, 3), np.float32), np.arange(4)
  with pytest.raises(ValueError, match="must have one width"):
    retrieval(x, x[:, :2], ids, ids)
  with pytest.raises(ValueError, match="image_to_text: 0 queries"):
    retrieval(x, x, ids * 0 - 1, ids)


@pytest.mark.parametrize("shape", MESHES)
def test_zeroshot_is_its_slow_twin_on_any_mesh(shape):
  rng = np.random.default_rng(1)
  classes = rng.normal(size=(9, 6)).astype(np.float32)
  labels = rng.choice(9, 603, p=np.arange(1, 10) / 45).astype(np.int32)
  image = (classes[labels] + 2 * rng.normal(size=(603, 6))).astype(np.float32)
  labels[::10] = -1
  with jax.set_mesh(mesh(*shape)):
    found = zeroshot.zeroshot(image, labels, classes)
  order = np.argsort(-unit(image) @ unit(classes).T, axis=1, kind="stable")
  right = (order == labels[:, None])[labels >= 0]
  assert 0.2 < right[:, 0].mean() < 0.8
  assert found["top1"] == pytest.approx(right[:, 0].mean(), abs=1e-6)
  assert found["top5"] == pytest.approx(right[:, :5].sum(1).mean(), abs=1e-6)
  counts = np.bincount(labels[labels >= 0])
  assert found["most_frequent"] == pytest.approx(counts.max() / counts.sum(), abs=1e-6)
  assert found["chance"] == 1 / 9
  with pytest.raises(ValueError, match="label beyond the 5 classes"):
    zeroshot.zeroshot(image, labels, classes[:5])


def test_classifier_averages_normalised_prompts():
  said = []

  def embed_text(texts):
    said.extend(texts)
    rng = np.random.default_rng(len(said))
    return 10 * rng.normal(size=(len(texts), 4))

  names, templates = ("red star", "dots"), ("a {}.", "{} or {}", "the {}")
  classifier = zeroshot.make_classifier(embed_text, names, templates)
  assert said == [t.replace("{}", n) for t in templates for n in names]
  assert said[2] == "red star or red star"
  parts = unit(np.random.default_rng(6).normal(size=(6, 4))).reshape(3, 2, 4)
  np.testing.assert_allclose(classifier, unit(parts.sum(0) / 3), atol=1e-6)


def test_names_and_templates_are_read_from_files(tmp_path):
  (tmp_path / "names").write_text("tench\n\ngreat white shark\n")
  (tmp_path / "templates").write_text("a photo of a {}.\nmany {}.\n")
  (tmp_path / "wrong").write_text("a photo\n")
  wordnet = ("n01440764", "n01484850")
  read = lambda names, file="": zeroshot.read_class_names(
    names, file and str(tmp_path / file), "imagenet2012"
  )
  assert read(wordnet, "names") == ("tench", "great white shark")
  assert read(("hot_dog", "n01440764")) == ("hot dog", "n01440764")
  with pytest.raises(ValueError, match=r"WordNet ids \(n01440764.*classnames") as error:
    read(wordnet)
  assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match="has 2 names, but imagenet2012 3 classes"):
    read((*wordnet, "n01491361"), "names")
  with pytest.raises(ValueError, match="no such file"):
    read(wordnet, "nothing")
  templates = zeroshot.read_templates(str(tmp_path / "templates"))
  assert templates == ("a photo of a {}.", "many {}.")
  assert zeroshot.read_templates("") == zeroshot.TEMPLATES
  assert zeroshot.read_templates(["{}"]) == ("{}",)
  with pytest.raises(ValueError, match="'a photo': a template has {}"):
    zeroshot.read_templates(str(tmp_path / "wrong"))


CAPTIONS = ["a dog", "a cat", "a dog", "a bird", "a fish", ""]


@pytest.mark.parametrize(
  "captions",
  [CAPTIONS, np.array([[1, 2], [3, 4], [1, 2], [5, 6], [7, 8], [0, 0]])],
  ids=["texts", "ids"],
)
def test_captions_belong_to_their_record_or_to_all_with_the_same_words(captions):
  image_index = np.array([2, 0, 1, -1, 3])
  # One caption a record: equal ones are one. Record 9 has no image; a row is filler.
  index = np.array([0, 1, 2, 3, 9, -1])
  images, texts = match_captions(image_index, index, captions)
  assert texts[0] == texts[2] != texts[1] and texts[3] not in texts[:3]
  np.testing.assert_array_equal(texts[4:], [-1, -1])
  np.testing.assert_array_equal(images, [texts[2], texts[0], texts[1], -1, texts[3]])
  assert images.dtype == texts.dtype == np.int32
  # Several: each belongs to its record alone, whatever its words.
  index = np.array([0, 0, 1, 2, 9, -1])
  images, texts = match_captions(image_index, index, captions)
  np.testing.assert_array_equal(texts, [0, 0, 1, 2, -1, -1])
  np.testing.assert_array_equal(images, [2, 0, 1, -1, -1])
  with pytest.raises(ValueError, match="6 captions of 5 records"):
    match_captions(image_index, index[:5], captions)


def test_captions_that_differ_in_a_word_are_not_the_same():
  """What counts are the words, not what a tokenizer knows of them."""
  index = np.arange(3)
  images, texts = match_captions(index, index, ["a xylophone", "a zebra", "a zebra "])
  assert len(set(texts.tolist())) == 3
  np.testing.assert_array_equal(images, texts)


def test_ranking_of_two_queries():
  """Worked by hand; the third query has no relevant document."""
  score = np.array([[0.9, 0.1, 0.5, 0.7], [1, 1, 0, 2], [0.4, 0.3, 0.2, 0.1]])
  relevance = np.array([[0, 1, 3, -1], [2, 0, 1, 0], [0, -1, 0, 0]])
  found = ranking(score, relevance, ks=(1, 3))
  # The orders are 0, 3, 2, 1 and, of equal ones the later first, 3, 1, 0, 2.
  log3, log2 = np.log2(3), 1.0
  expected = {
    "mrr": [1 / 3, 1 / 3, 0],
    "mrr@1": [0, 0, 0],
    "mrr@3": [1 / 3, 1 / 3, 0],
    "map": [(1 / 3 + 2 / 4) / 2, (1 / 3 + 2 / 4) / 2, 0],
    "map@1": [0, 0, 0],
    "map@3": [1 / 6, 1 / 6, 0],
    "recall@1": [0, 0, 0],
    "recall@3": [1 / 2, 1 / 2, 0],
    "precision@1": [0, 0, 0],
    "precision@3": [1 / 3, 1 / 3, 0],
    "ndcg@1": [0, 0, 0],
    "ndcg@3": [
      3 / np.log2(4) / (3 / log2 + 1 / log3),
      2 / np.log2(4) / (2 / log2 + 1 / log3),
      0,
    ],
  }
  assert set(found) == set(expected)
  for name, values in expected.items():
    np.testing.assert_allclose(found[name], values, atol=1e-12, err_msg=name)
  # More than there are: precision counts the missing ones as misses.
  beyond = ranking(score, relevance, ks=(8,))
  np.testing.assert_allclose(beyond["recall@8"], [1, 1, 0])
  np.testing.assert_allclose(beyond["precision@8"], [2 / 8, 2 / 8, 0])
  perfect = ranking(relevance, relevance, ks=(4,))
  np.testing.assert_allclose(perfect["ndcg@4"], [1, 1, 0])
  np.testing.assert_allclose(perfect["map"], [1, 1, 0])


def test_ranking_refuses_what_has_no_order():
  x = np.ones((2, 3))
  with pytest.raises(ValueError, match=r"give \[Q, D\] twice"):
    ranking(x, x[:, :2])
  with pytest.raises(ValueError, match="1 scores are NaN"):
    ranking(np.where(np.eye(2, 3) * [[1], [0]], np.nan, x), x)
  with pytest.raises(ValueError, match="cut at 1 or more"):
    ranking(x, x, ks=(0, 1))
