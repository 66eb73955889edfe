"""Captions to token ids of one fixed length, by a vocabulary that travels with the run.

    tokenizer = text.open_tokenizer("bpe_simple_vocab_16e6.txt.gz", length=77)
    ids, mask, truncated = tokenizer.encode(["a photo of a dog"])

A vocabulary is learned from the captions ("words", "bpe") or read from a file: CLIP's
`bpe_simple_vocab`, a `tokenizer.json` of Hugging Face, a SentencePiece model such as
SigLIP's. Whatever it was, `save` writes it whole, with clean-up, padding and
length, into the workdir, and evaluation takes it from there.
"""

import dataclasses
import functools
import gzip
import hashlib
import html
import json
import re
import string
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from etils import epath

from clj.cli import UserError

LEARNED = ("words", "bpe")
WHERE = "data.columns.text"  # the section of a config that its options are in
# The words of CLIP (Radford et al. 2021): contractions, letters, single digits, others.
_CLIP_WORDS = (
  r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # Oniguruma's syntax
)
_CLIP_MERGES = 49152 - 256 - 2
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_SIZES = {"words": 4096, "bpe": 8192}


def _spaces(text):
  return re.sub(r"\s+", " ", text).strip()


def _clip(text):
  if "&" in text or not (text.isascii() and text.isprintable()):  # else it stays
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return _spaces(text).lower()


def _canonical(text):
  text = text.replace("_", " ")
  return _spaces(text.translate(str.maketrans("", "", string.punctuation)).lower())


CLEAN = {
  "none": lambda text: text,
  "lower": str.lower,
  "clip": _clip,  # ftfy, HTML entities, white space, lower case
  "canonical": _canonical,  # SigLIP: lower case, no punctuation
}


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Captions -> ids.

  Attributes:
    kind: "words", "bpe", "clip", "json" or "sentencepiece".
    vocabulary: a `tokenizer.json`, or a SentencePiece model.
    length: L, of every row.
    clean: what is done to a caption first, a name of `CLEAN`.
    start, end: ids before and after the words of every caption; may be empty.
    pad_id: fills the rows up.
  """

  kind: str
  vocabulary: bytes
  length: int
  clean: str
  start: tuple[int, ...]
  end: tuple[int, ...]
  pad_id: int

  @functools.cached_property
  def _model(self):
    return _load(self.kind, self.vocabulary)

  @property
  def vocab_size(self) -> int:
    """Rows that an embedding of the ids needs."""
    if self.kind == "sentencepiece":
      return self._model.vocab_size()
    return max(self._model.get_vocab(with_added_tokens=True).values()) + 1

  def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns ids int32 [n, L], mask bool [n, L], number of captions cut.

    The mask is True at real tokens, start and end included. A caption that is too long
    loses its last words, never its end token.
    """
    cleaned = [CLEAN[self.clean](caption) for caption in captions]
    if self.kind == "sentencepiece":
      found = self._model.encode(cleaned) if cleaned else []
    else:
      encoded = self._model.encode_batch_fast(cleaned, add_special_tokens=False)
      found = [e.ids for e in encoded]
    room = self.length - len(self.start) - len(self.end)
    ids = np.full((len(found), self.length), self.pad_id, np.int32)
    mask = np.zeros((len(found), self.length), bool)
    for row, words in enumerate(found):
      whole = [*self.start, *words[:room], *self.end]
      ids[row, : len(whole)] = whole
      mask[row, : len(whole)] = True
    return ids, mask, sum(len(words) > room for words in found)

  def decode(self, ids: Iterable[int]) -> str:
    """The words of a row of ids, for people to read."""
    special = {*self.start, *self.end, self.pad_id}
    return self._model.decode([i for i in map(int, ids) if i not in special])

  @property
  def settings(self) -> dict:
    """All but the vocabulary, and its SHA-256; JSON-able."""
    return {
      "kind": self.kind,
      "length": self.length,
      "clean": self.clean,
      "start": list(self.start),
      "end": list(self.end),
      "pad_id": self.pad_id,
      "sha256": hashlib.sha256(self.vocabulary).hexdigest(),
    }

  @property
  def fingerprint(self) -> str:
    """The same for two tokenizers only if they give the same ids."""
    settings = json.dumps(self.settings, sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]

  def same_ids(self, other: "Tokenizer") -> bool:
    """Whether an id means the same in both; they may differ in length."""
    return self.settings | {"length": 0} == other.settings | {"length": 0}

  def save(self, directory) -> None:
    """Writes `settings.json` and the vocabulary."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = {
      _file(self.kind): self.vocabulary,
      "settings.json": (json.dumps(self.settings, indent=1) + "\n").encode(),
    }
    for name, data in files.items():  # settings last: they vouch for the vocabulary
      partial = directory / (name + ".partial")
      partial.write_bytes(data)
      partial.replace(directory / name)


def _checked(made: Tokenizer, where: str) -> Tokenizer:
  if made.clean not in CLEAN:
    raise UserError(f"{where}.clean is {made.clean!r}; there are: {', '.join(CLEAN)}")
  least = len(made.start) + len(made.end) + 1
  if not isinstance(made.length, int) or made.length < least:
    raise UserError(
      f"{where}.length is {made.length}; start, end and one token need {least}"
    )
  return made


def with_length(made: Tokenizer, length: int | None, where: str) -> Tokenizer:
  """The same tokenizer for rows of another length. None: of its own."""
  if length is None:
    return made
  return _checked(dataclasses.replace(made, length=length), where)


def _file(kind):
  return "tokenizer.model" if kind == "sentencepiece" else "tokenizer.json"


def directory(column: str) -> str:
  """Where a workdir keeps the tokenizer of a column of texts."""
  return "tokenizer" if column == "text" else f"tokenizer-{column}"


def load(directory) -> Tokenizer:
  """Opens what `Tokenizer.save` wrote.

  Raises:
    ValueError: there is none, or its vocabulary is not the one it was saved with.
  """
  directory = epath.Path(directory)
  if not (directory / "settings.json").exists():
    raise UserError(f"there is no tokenizer in {directory} (no settings.json)")
  settings = json.loads((directory / "settings.json").read_text())
  file = directory / _file(settings["kind"])
  vocabulary = file.read_bytes() if file.exists() else b""
  if hashlib.sha256(vocabulary).hexdigest() != settings.pop("sha256"):
    raise UserError(
      f"{file} is not the vocabulary that {directory} was written with: put it back"
    )
  settings |= {key: tuple(settings[key]) for key in ("start", "end")}
  return Tokenizer(vocabulary=vocabulary, **settings)


def open_tokenizer(
  tokenizer: str,
  *,
  length: int,
  captions: Callable[[], Iterable[str]] | None = None,
  vocab_size: int | None = None,
  clean: str | None = None,
  pad_id: int | None = None,
  where: str = WHERE,
) -> Tokenizer:
  """Learns a vocabulary or opens a file.

  Args:
    tokenizer: "words" or "bpe" (byte-level), learned from the captions; a file
      `bpe_simple_vocab*.txt.gz` of CLIP, `*.json` of Hugging Face's tokenizers, or
      `*.model` of SentencePiece; or a directory that `Tokenizer.save` wrote.
    length: L, ids of a caption, start and end included.
    captions: gives the captions that a vocabulary is learned from.
    vocab_size: ids of a learned vocabulary, at most; None: 4096 words, 8192 of BPE.
    clean: a name of `CLEAN`; None: "clip" for CLIP's file and for what is learned,
      "none" for `*.json` (which has rules of its own), "canonical" for SentencePiece.
    pad_id: None: 0 for CLIP and for what is learned, what a `*.json` says, the end
      token for SentencePiece (so did SigLIP; SigLIP 2 has 0).
    where: the section of the config that these options are of, for messages.

  Raises:
    ValueError: one line; no such file, or it is none of these.
  """
  if tokenizer in LEARNED:
    if captions is None:
      raise UserError(f"tokenizer {tokenizer!r} is learned: it needs captions")
    clean = clean or "clip"
    words = (CLEAN.get(clean, str)(caption) for caption in captions())
    ids = vocab_size or _SIZES[tokenizer]
    vocabulary, start, end = _learn(tokenizer, words, ids, where)
    made = Tokenizer(tokenizer, vocabulary, length, clean, start, end, pad_id or 0)
    return _checked(made, where)
  path = epath.Path(tokenizer).expanduser()
  if path.is_dir():
    given = {"length": length, "clean": clean, "pad_id": pad_id}
    given = {key: value for key, value in given.items() if value is not None}
    return _checked(dataclasses.replace(load(path), **given), where)
  if not path.exists():
    raise UserError(
      f"there is no tokenizer {tokenizer!r}; {where}.tokenizer is"
      f" {' or '.join(map(repr, LEARNED))} (learned from the captions), or a file:"
      " bpe_simple_vocab*.txt.gz, *.json or *.model"
    )
  data = path.read_bytes()
  if path.name.endswith(".model"):
    model = _load("sentencepiece", data, path)
    end = (model.eos_id(),) if model.eos_id() >= 0 else ()
    pads = [p for p in (pad_id, *end, model.pad_id(), 0) if p is not None and p >= 0]
    kind, start, clean, pad_id = "sentencepiece", (), clean or "canonical", pads[0]
  elif path.name.endswith((".txt", ".txt.gz")):
    data, start, end = _clip_vocabulary(data, path)
    kind, clean, pad_id = "clip", clean or "clip", pad_id or 0
  else:
    model = _load("json", data, path)
    start, end = _specials(model)
    kind, clean = "json", clean or "none"
    pad_id = _pad_of(model, path, where) if pad_id is None else pad_id
  return _checked(Tokenizer(kind, data, length, clean, start, end, pad_id), where)


def _same(saved, where, **wanted):
  for key, value in wanted.items():
    if value is not None and value != getattr(saved, key):
      raise UserError(
        f"{where}.{key} is {value!r}, but the tokenizer was saved with"
        f" {getattr(saved, key)!r}; its ids would mean something else"
      )
  return saved


def of_run(
  directory, section: dict, captions, *, started: bool, where: str = WHERE
) -> Tokenizer:
  """The tokenizer of a column in a run.

  A run that has `started` goes on with the vocabulary that it saved; a new one learns
  or opens it, and the first process saves it in `directory` (None: nowhere).

  section: the options of the column. captions: gives those that it is learned from.
  where: the section's name, for messages.
  """
  if missing := {"tokenizer", "length"} - section.keys():
    raise UserError(f"{where} needs {' and '.join(sorted(missing))}")
  if started:
    return check(load(directory), section, where)
  made = open_tokenizer(captions=captions, where=where, **_options(section))
  if directory is not None:
    import jax  # here: readers of data do not need it

    if jax.process_index() == 0:
      made.save(directory)
  return made


def _options(section):
  keys = ("tokenizer", "length", "vocab_size", "clean", "pad_id")
  return {key: section[key] for key in keys if key in section}


def describe(tokenizer: Tokenizer, truncated: float) -> str:
  """A line for the start of a run. truncated: share of the captions that are cut."""
  return (
    f"captions: {tokenizer.vocab_size} ids ({tokenizer.kind}), {tokenizer.length} a"
    f" caption, {truncated:.1%} of the captions are cut"
  )


def check(saved: Tokenizer, section: dict, where: str = WHERE) -> Tokenizer:
  """Refuses a saved tokenizer that is not the one that a column describes.

  Raises:
    ValueError: length, clean-up, padding or the vocabulary file differ.
  """
  options = {k: v for k, v in section.items() if k in ("length", "clean", "pad_id")}
  _same(saved, where, **options)
  name = section["tokenizer"]
  kinds = {
    ".model": "sentencepiece",
    ".txt": "clip",
    ".txt.gz": "clip",
    ".json": "json",
  }
  kind = next((k for end, k in kinds.items() if name.endswith(end)), None)
  kind = name if name in LEARNED else kind
  if kind not in (None, saved.kind):
    raise UserError(
      f"{where}.tokenizer is {name!r}, but the run was trained with another kind of"
      f" vocabulary, {saved.kind!r}"
    )
  if name not in LEARNED and epath.Path(name).expanduser().exists():
    now = open_tokenizer(**_options(section), where=where)
    if now.fingerprint != saved.fingerprint:
      raise UserError(
        f"the vocabulary in {name} is not the one that the run was trained with"
      )
  return saved


@functools.lru_cache(maxsize=4)
def _load(kind, data, path="the saved vocabulary"):
  if kind == "sentencepiece":
    try:
      import sentencepiece
    except ImportError:
      raise UserError(
        f"{path} is a SentencePiece model, which needs: pip install sentencepiece"
      ) from None
    try:
      return sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
      raise UserError(f"{path} is no SentencePiece model ({error})") from None
  import tokenizers

  try:
    model = tokenizers.Tokenizer.from_str(data.decode())
  except Exception as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"{path} is no tokenizer.json ({reason})") from None
  model.no_truncation()
  model.no_padding()
  return model


def _learn(kind, captions, vocab_size, where):
  from tokenizers import Tokenizer as Model
  from tokenizers import decoders, models, pre_tokenizers, trainers

  options = {"vocab_size": vocab_size - 2, "show_progress": False}
  if kind == "words":
    model = Model(models.WordLevel(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()  # words, and runs of punctuation
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>"], **options)
  else:
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 3:
      raise UserError(
        f"{where}.vocab_size is {vocab_size}; byte-level BPE has {len(alphabet) + 3}"
        " at least"
      )
    trainer = trainers.BpeTrainer(
      special_tokens=["<pad>"], initial_alphabet=sorted(alphabet), **options
    )
  model.train_from_iterator(captions, trainer)
  # Last, so that the end has the greatest id: towers may find it by that, as CLIP's do.
  model.add_special_tokens(["<start>", "<end>"])
  start, end = model.token_to_id("<start>"), model.token_to_id("<end>")
  return model.to_str().encode(), (start,), (end,)


def _clip_vocabulary(data, path):
  """CLIP's list of merges as a tokenizer.json."""
  from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
  from tokenizers import Tokenizer as Model

  try:
    lines = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    lines = lines.decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : _CLIP_MERGES + 1]]
    if len(merges) < _CLIP_MERGES or {len(pair) for pair in merges} != {2}:
      raise UserError(f"{len(merges)} merges, not {_CLIP_MERGES}")
  except (ValueError, OSError, EOFError, zlib.error) as error:
    raise UserError(f"{path} is not CLIP's bpe_simple_vocab ({error})") from None
  symbols = sorted(pre_tokenizers.ByteLevel.alphabet())  # by code point, as CLIP's
  symbols += [symbol + "</w>" for symbol in symbols]
  symbols += ["".join(pair) for pair in merges]
  vocabulary = {
    symbol: i for i, symbol in enumerate([*symbols, _CLIP_START, _CLIP_END])
  }
  model = Model(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
  words = pre_tokenizers.Split(Regex(_CLIP_WORDS), "removed", invert=True)
  bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  model.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
  model.decoder = decoders.Sequence(
    [decoders.ByteLevel(), decoders.Replace("</w>", " ")]
  )
  specials = [AddedToken(x, special=True) for x in (_CLIP_START, _CLIP_END)]
  model.add_special_tokens(specials)
  start, end = vocabulary[_CLIP_START], vocabulary[_CLIP_END]
  return model.to_str().encode(), (start,), (end,)


def _specials(model):
  """The ids that a tokenizer.json puts before and after the words of a text."""
  bare = model.encode("a", add_special_tokens=False).ids
  whole = model.encode("a").ids
  for at in range(len(whole) - len(bare) + 1):
    if whole[at : at + len(bare)] == bare:
      return tuple(whole[:at]), tuple(whole[at + len(bare) :])
  return (), ()


def _pad_of(model, path, where):
  said = json.loads(model.to_str())
  known = ("<pad>", "[PAD]", "<|pad|>", "<|endoftext|>", "</s>")
  found = (model.token_to_id(name) for name in known)
  if (padding := said.get("padding")) is not None:
    return padding["pad_id"]
  pad = next((i for i in found if i is not None), None)
  if pad is None:
    raise UserError(f"{path} names no padding token; set {where}.pad_id")
  return pad
