"""Tokenizers: learned, from files of every kind, saved, refused when they differ."""

import json
import sys

import numpy as np
import pytest

from clj.data import text

CAPTIONS = [
  "a small red star at the upper left",
  "A large  blue ring, at the lower right!",
  "it&#39;s a \u201cmedium-sized\u201d caf\u00e9 \u2013 really",
  "two red stars and a blue ring",
] * 3


def learn(kind, **options):
  arguments = {"length": 24, "captions": lambda: iter(CAPTIONS)} | options
  return text.open_tokenizer(kind, **arguments)


@pytest.mark.parametrize("kind", text.LEARNED)
def test_learned_from_captions(kind):
  tokenizer = learn(kind, vocab_size=400)
  ids, mask, truncated = tokenizer.encode([*CAPTIONS[:2], ""])
  assert ids.shape == mask.shape == (3, 24)
  assert (ids.dtype, mask.dtype) == (np.int32, bool)
  start, end = tokenizer.start[0], tokenizer.end[0]
  # The end has the greatest id; towers may look for it by that.
  assert end == tokenizer.vocab_size - 1 == ids.max()
  np.testing.assert_array_equal(ids[:, 0], start)
  np.testing.assert_array_equal(ids[~mask], 0)
  np.testing.assert_array_equal(ids[np.arange(3), mask.sum(1) - 1], end)
  assert mask[2].sum() == 2
  assert tokenizer.decode(ids[0]).strip() == CAPTIONS[0]
  assert truncated == 0
  assert learn(kind, vocab_size=400).fingerprint == tokenizer.fingerprint


def test_words_that_are_unknown_and_rare():
  tokenizer = learn("words", vocab_size=9)
  assert tokenizer.vocab_size == 9
  ids, mask, _ = tokenizer.encode(["a zebra"])
  assert ids[0, 2] == 1
  assert mask[0].sum() == 4
  with pytest.raises(ValueError, match="vocab_size is 100; .* 259 at least"):
    learn("bpe", vocab_size=100)


def test_bpe_spells_what_it_has_never_seen():
  tokenizer = learn("bpe", length=64)
  said = "zebras \u65e5\u672c \U0001f600 q"
  ids, _, _ = tokenizer.encode([said])
  assert tokenizer.decode(ids[0]).strip() == said


def test_a_long_caption_loses_words_but_not_its_end():
  tokenizer = learn("words", length=5)
  ids, mask, truncated = tokenizer.encode(["a red star", "a small red star", "a"])
  assert truncated == 1
  np.testing.assert_array_equal(mask.sum(1), [5, 5, 3])
  np.testing.assert_array_equal(ids[:2, 4], tokenizer.end[0])
  assert tokenizer.decode(ids[1]) == "a small red"
  with pytest.raises(ValueError, match="length is 2; start, end and one token need 3"):
    learn("words", length=2)


def test_clean_up():
  said = "  It&amp;#39;s\ta_Caf\u00c3\u00a9,\n \u201cHI\u201d "
  assert text.CLEAN["clip"](said) == 'it\'s a_caf\u00e9, "hi"'
  assert text.CLEAN["canonical"]("Hot_dogs, it's 3.5!  x") == "hot dogs its 35 x"
  assert text.CLEAN["lower"]("A  B") == "a  b"
  with pytest.raises(ValueError, match="clean is 'upper'; there are: none, low"):
    learn("words", clean="upper")


@pytest.mark.parametrize("said", ["plain ASCII!", "a&amp;b", "x &lt; y", "tab\there"])
def test_the_quick_way_past_ftfy_changes_nothing(said):
  import html

  import ftfy

  fixed = html.unescape(html.unescape(ftfy.fix_text(said)))
  assert text.CLEAN["clip"](said) == " ".join(fixed.split()).lower()


# Files.


def bert(path, specials=True):
  """A tokenizer.json with start and end of its own, truncation and padding."""
  from tokenizers import Tokenizer, models, pre_tokenizers, processors

  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "star", "Star"]
  vocabulary = {word: i for i, word in enumerate(words)}
  model = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
  model.pre_tokenizer = pre_tokenizers.Whitespace()
  if specials:
    model.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
  model.enable_truncation(3)
  model.enable_padding(length=20)
  model.save(str(path))
  return str(path)


def test_a_tokenizer_json(tmp_path):
  tokenizer = text.open_tokenizer(bert(tmp_path / "bert.json"), length=6)
  ids, mask, truncated = tokenizer.encode(["a red Star", "a red star a red star"])
  np.testing.assert_array_equal(ids, [[2, 4, 5, 7, 3, 0], [2, 4, 5, 6, 4, 3]])
  np.testing.assert_array_equal(mask, ids > 0)
  assert (truncated, tokenizer.vocab_size) == (1, 8)
  bare = bert(tmp_path / "bare.json", specials=False)
  tokenizer = text.open_tokenizer(bare, length=4, clean="lower", pad_id=1)
  np.testing.assert_array_equal(tokenizer.encode(["a Star"])[0], [[4, 6, 1, 1]])


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
  sentencepiece = pytest.importorskip("sentencepiece")
  path = tmp_path_factory.mktemp("model") / "c4.model"
  with open(path, "wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([*CAPTIONS, "hot dogs its star light"] * 20),
      model_writer=file,
      vocab_size=50,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      minloglevel=2,
    )
  return str(path)


def test_a_sentencepiece_model(sentencepiece_model):
  import sentencepiece

  tokenizer = text.open_tokenizer(sentencepiece_model, length=16)
  reference = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_model)
  many = "two red stars and a blue ring " * 5
  said = ["A red star!", many]
  ids, mask, truncated = tokenizer.encode(said)
  words = reference.encode(["a red star", many.strip()])
  short = [*words[0], 1]
  # SigLIP pads with the end token, keeps it when it cuts, and has none at the start.
  np.testing.assert_array_equal(ids[0], short + [1] * (16 - len(short)))
  np.testing.assert_array_equal(ids[1], [*words[1][:15], 1])
  np.testing.assert_array_equal(mask.sum(1), [len(short), 16])
  assert truncated == 1
  assert tokenizer.vocab_size == 50
  siglip2 = text.open_tokenizer(sentencepiece_model, length=16, pad_id=0)
  assert siglip2.encode(["a"])[0][0, -1] == 0
  assert siglip2.fingerprint != tokenizer.fingerprint


def test_without_sentencepiece(sentencepiece_model, monkeypatch):
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  text._load.cache_clear()
  with pytest.raises(ValueError, match="needs: pip install sentencepiece"):
    text.open_tokenizer(sentencepiece_model, length=16)


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("x.json", "is no tokenizer.json"),
    ("x.txt", "is not CLIP's bpe_simple_vocab"),
    ("x.txt.gz", "is not CLIP's bpe_simple_vocab"),
    ("x.model", "is no SentencePiece model"),
    ("absent.json", "there is no tokenizer .*'words' or 'bpe'"),
  ],
)
def test_files_that_are_something_else(tmp_path, name, said):
  if not name.startswith("absent"):
    (tmp_path / name).write_bytes(b"\x1f\x8bnot" if "gz" in name else b"{}")
  if name.endswith(".model"):
    pytest.importorskip("sentencepiece")
  with pytest.raises(ValueError, match=said) as error:
    text.open_tokenizer(str(tmp_path / name), length=8)
  assert "\n" not in str(error.value)


# In a workdir.


@pytest.mark.parametrize("kind", ["words", "bpe", "json", "sentencepiece"])
def test_saved_and_loaded(tmp_path, kind, request):
  if kind == "sentencepiece":
    kind = request.getfixturevalue("sentencepiece_model")
  elif kind == "json":
    kind = bert(tmp_path / "bert.json")
  made = learn(kind)
  made.save(tmp_path / "tokenizer")
  loaded = text.load(tmp_path / "tokenizer")
  assert loaded.settings == made.settings
  for a, b in zip(loaded.encode(CAPTIONS), made.encode(CAPTIONS)):
    np.testing.assert_array_equal(a, b)
  again = text.open_tokenizer(str(tmp_path / "tokenizer"), length=24)
  assert again.fingerprint == made.fingerprint


def test_a_vocabulary_that_was_changed_is_refused(tmp_path):
  learn("words").save(tmp_path)
  file = tmp_path / "tokenizer.json"
  saved = json.loads(file.read_text())
  vocabulary = saved["model"]["vocab"]
  vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
  file.write_text(json.dumps(saved))
  with pytest.raises(ValueError, match="is not the vocabulary that .* written with"):
    text.load(tmp_path)
  file.unlink()
  with pytest.raises(ValueError, match="is not the vocabulary"):
    text.load(tmp_path)
  with pytest.raises(ValueError, match="there is no tokenizer in"):
    text.load(tmp_path / "elsewhere")


def test_another_tokenizer_than_the_runs_is_refused(tmp_path):
  section = {"field": "caption", "tokenizer": "words", "length": 12}
  kept = tmp_path / "tokenizer"
  made = text.of_run(kept, section, lambda: iter(CAPTIONS), started=False)
  # Going on, the captions are not asked for.
  assert text.of_run(kept, section, None, started=True).settings == made.settings
  changes = {"length": 16, "clean": "lower", "pad_id": 3}
  for key, value in changes.items():
    with pytest.raises(ValueError, match=f"data.columns.text.{key} is {value!r}"):
      text.check(made, section | {key: value})
  with pytest.raises(ValueError, match="another kind of vocabulary, 'words'"):
    text.check(made, section | {"tokenizer": "bpe"})
  file = bert(tmp_path / "bert.json")
  section |= {"tokenizer": file}
  made = text.of_run(kept, section, None, started=False)
  text.check(made, section)
  bert(file, specials=False)
  with pytest.raises(ValueError, match="is not the one that the run was trained with"):
    text.check(made, section)
  (tmp_path / "bert.json").unlink()  # another machine: what was saved does
  assert text.check(made, section) is made
