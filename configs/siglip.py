"""SigLIP, arXiv:2303.15343: the method `clip` with the sigmoid loss.

    python -m clj.main --config=configs/siglip.py             # demo, about 3 minutes
    python -m clj.main --config=configs/siglip.py:VARIANT [--config.key=value ...]

variant       data                    published zero-shot on ImageNet, hardware
demo          rendered compositions   two CPU cores
smoke         rendered compositions   two steps at test size
vit_b16       DataComp-1B             76.0 on WebLI (not public); 16 TPUv4, 3 days
so400m        DataComp-1B             83.1 on WebLI, at 384 pixels

`--show` prints a recipe whole. What we measured ourselves is in the README's table; the
keys are explained in `demo` of `configs/clip.py`.
"""

from clj.recipe import choose, differ, only

# Pixels in [-1, 1].
PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def get_config(variant=None):
  return choose(variant, demo, smoke, vit_b16, so400m)


def demo():
  """Rendered shapes and what they are called; about three minutes on two CPU cores.

  The test pictures show nine compositions of shape and colour that training does not.
  """
  return {
    "batch_size": 128,
    "total_steps": 900,
    "log_every": 20,
    "checkpoint_every": 200,
    "method": {
      "name": "clip",
      "width": 64,
      "image_head": "linear",
      "text_head": "affine",
      "loss": "sigmoid",
      "init_scale": 10.0,
      "max_scale": None,
      # About log(1 / 127), so that the 127 negatives of each pair do not drown it at
      # first; the paper's -10 is for a batch of 32,768.
      "init_bias": -5.0,
      "mask_duplicates": True,
      "locked": "",
      "micro_batch": 0,
      "probe_classes": 0,
    },
    "model": {
      "image": {"name": "resnet_small", "widths": (24, 48, 96)},
      "text": {"name": "text_small", "vocab": 64, "depth": 0},  # see clip.py
    },
    "data": {
      "source": "shapes/compositions",
      "columns": {
        "image": {"kind": "image", "eval_crop": 1.0},
        "text": {
          "kind": "text",
          "field": "caption",
          "tokenizer": "words",
          "length": 16,
        },
        "label": {"kind": "label"},
      },
      "augment": {
        "image": {
          "name": "views",
          "size": 32,
          "views": 1,
          "crop_scale": (0.9, 1.0),
          "crop_ratio": (3 / 4, 4 / 3),
          "flip": 0.0,
          "grayscale": 0.0,
        },
      },
    },
    "optim": {
      "name": "adamw",
      "learning_rate": 4e-3,
      "warmup_fraction": 0.05,
      "b2": 0.95,
      "weight_decay": 0.1,
    },
    "evals": {
      "zeroshot": {"templates": ("a {}", "{}")},
      "retrieval": {},
      "zeroshot_seen": {
        "name": "zeroshot",
        "templates": ("a {}", "{}"),
        "data": {"source": "shapes/compositions", "test_split": "seen"},
      },
      "linear_probe": {"final_only": True, "data": {"source": "shapes"}},
      "diagnostics": {},
    },
  }


def smoke():
  """The real path at test size: two steps on a few rendered shapes."""
  return differ(
    demo(),
    {
      "batch_size": 16,
      "total_steps": 2,
      "log_every": 1,
      "checkpoint_every": 0,
      "method": {
        "width": 16,
        "image_head": "none",
        "init_bias": -2.7,
        "micro_batch": 8,
      },
      "model": {
        "image": {"name": "vit_test", "pool": "map"},
        "text": {"name": "text_test", "vocab": 64, "pool": "last"},
      },
      "data": {
        "train_split": "train[:512]",
        "test_split": "test[:256]",
        "columns": {"image": {"eval_crop": 0.0}},
      },
      "optim": only(name="adamw", learning_rate=1e-3, warmup_fraction=0.05),
      "evals": only(
        zeroshot={"templates": ("a {}",)},
        retrieval={},
        knn={
          "k": 20,
          "data": {
            "source": "shapes",
            "train_split": "train[:512]",
            "test_split": "test[:256]",
          },
        },
      ),
    },
  )


def vit_b16():
  """ViT-B/16 at 224 pixels and batch 32,768, as on WebLI, but on an open set.

  Section 4 of the paper and big_vision's SigLIP: no class token and no image head,
  attention pooling, 64 SentencePiece tokens in lower case and without punctuation,
  learning rate 1e-3, weight decay 1e-4, b2 0.95. Theirs is Adafactor (in big_vision's
  form), ours AdamW. WebLI gives 76.0 after 40 billion pairs, here as many are seen.
  """
  tower = {"name": "siglip_b16", "dtype": "bfloat16", "scan": True}
  return differ(
    demo(),
    {
      "batch_size": 32_768,
      "total_steps": 40_000_000_000 // 32_768,
      "log_every": 50,
      "eval_every": 10_000,
      "checkpoint_every": 1000,
      "method": {
        "width": 768,
        "image_head": "none",
        "init_bias": -10.0,
        "mask_duplicates": False,
      },
      "model": {"image": tower | PIXELS, "text": tower | {"vocab": 32_000}},
      "data": {
        "source": "datacomp_1b",
        "train_split": "train[:-5000]",
        "test_split": "train[-5000:]",
        "columns": {
          "image": {"eval_crop": 0.0},  # squashed
          # T5's English vocabulary, gs://t5-data/vocabs/cc_en.32000/sentencepiece.model
          "text": {"tokenizer": "sentencepiece.model", "length": 64},
        },
        "augment": {"image": {"size": 224}},
      },
      "optim": only(
        name="adamw",
        learning_rate=1e-3,
        warmup_steps=10_000,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=1e-4,
        clip_norm=1.0,
      ),
      "evals": only(
        # On ImageNet, whose readable names you have to bring: the data set has ids.
        zeroshot={
          "classnames": "imagenet_classnames.txt",
          "data": {"source": "imagenet2012", "test_split": "validation"},
        },
        retrieval={},
      ),
    },
  )


def so400m():
  """The shape-optimised tower of 400 million parameters (SO400M/14) at 224 pixels.

  As `vit_b16`, with 16 tokens of text, a text tower of the same shape, and parameters
  that are split over "fsdp". The published model saw 40 billion pairs of WebLI.
  """
  tower = {
    "name": "siglip_so400m14",
    "dtype": "bfloat16",
    "scan": True,
    "remat": True,
  }
  return differ(
    vit_b16(),
    {
      "method": {"width": 1152},
      "model": {
        # "flash" at 384 pixels: half the memory traffic
        "image": tower | {"attention": "plain"} | PIXELS,
        "text": tower | {"vocab": 32_000},
      },
      "data": {"columns": {"text": {"length": 16}}},
      "mesh": {"data": -1, "fsdp": 4},
    },
  )
