"""LiT, arXiv:2111.07991: the method `clip` with `locked="^image/"`.

    python -m clj.main --config=configs/lit.py             # demo, about 3 minutes
    python -m clj.main --config=configs/lit.py:VARIANT [--config.key=value ...]

variant    data                   published zero-shot on ImageNet, hardware
demo       rendered compositions  two CPU cores; trains `tower` first
tower      rendered compositions  the demo's image tower, by SimCLR, without any text
smoke      rendered compositions  two steps at test size
coco       COCO captions          20.7 (big_vision)
b16_cc12m  CC12M                  73.9 with YFCC100M too (big_vision), 60,000 steps

"Locked-image tuning": an image tower that is trained already keeps its weights, and a
text tower learns to say what it sees. `--show` prints a recipe whole. What we measured
ourselves is in the README's table; the keys are explained in `demo` of
`configs/clip.py`.
"""

from clj.recipe import choose, differ, only


def get_config(variant=None):
  return choose(variant, demo, tower, smoke, coco, b16_cc12m)


def demo():
  """A text tower for the image tower of `tower`, which the same command trains first.

  The test pictures show nine compositions of shape and colour that training does not.
  """
  return {
    "batch_size": 128,
    "total_steps": 500,
    "log_every": 20,
    "checkpoint_every": 200,
    "init_from": "configs/lit.py:tower",  # a config is trained first, in WORKDIR/first
    # SimCLR's names; its head is left behind.
    "init_rename": ((r"^(params|extra)/encoder/(.*)", r"\1/image/\2"),),
    "method": {
      "name": "clip",
      "width": 64,
      "image_head": "linear",  # trained; "none" at full size, see the paper's 5.1
      "text_head": "linear",
      "loss": "softmax",
      "init_scale": 10.0,
      "max_scale": 100.0,
      "mask_duplicates": True,
      "locked": "^image/",
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
      "learning_rate": 3e-3,
      "warmup_fraction": 0.05,
      "b2": 0.98,
      "weight_decay": 0.01,
      "clip_norm": 1.0,
    },
    "evals": {
      "zeroshot": {"templates": ("a {}", "{}")},
      "retrieval": {},
      "zeroshot_seen": {
        "name": "zeroshot",
        "templates": ("a {}", "{}"),
        "data": {"source": "shapes/compositions", "test_split": "seen"},
      },
    },
  }


def tower():
  """The image tower of `demo`: SimCLR, with so little jitter that colours matter."""
  return differ(
    demo(),
    {
      "total_steps": 400,
      "init_from": "",
      "init_rename": (),
      "method": {
        "name": "simclr",
        "temperature": 0.1,
        "projector": {
          "widths": (128, 64),
          "norm": False,
          "bias": True,
          "last_norm": False,
          "last_bias": True,
          "std": None,
        },
        "probe_classes": 0,
      },
      "model": only(name="resnet_small", widths=(24, 48, 96)),
      "data": {
        "test_split": "seen",
        "columns": only(
          image={"kind": "image", "eval_crop": 1.0}, label={"kind": "label"}
        ),
        "augment": {
          "image": {
            "views": 2,
            "crop_scale": (0.6, 1.0),
            "flip": 0.5,
            "jitter": {"strength": 0.15},
          },
        },
      },
      "optim": {"name": "sgd", "learning_rate": 0.3, "warmup_fraction": 0.05},
      "evals": only(knn={"k": 20, "temperature": 0.07}),
    },
  )


def smoke():
  """The real path at test size: two steps on a few rendered shapes."""
  return differ(
    demo(),
    {
      "batch_size": 16,
      "total_steps": 2,
      "log_every": 1,
      "checkpoint_every": 0,
      "init_from": "",
      "init_rename": (),
      "method": {"width": 16, "image_head": "none"},
      "model": {
        "image": {"name": "resnet_test", "dtype": "float32"},
        "text": {"name": "text_test", "vocab": 64},
      },
      "data": {"train_split": "train[:512]", "test_split": "test[:256]"},
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


def coco():
  """The set-up that big_vision publishes for a check: COCO alone, 5,000 steps at 4096.

  It has a BERT for a text tower, ours is CLIP's from scratch; its image tower is
  AugReg's ViT-B/16, ours any ViT-B/16 that `init_from` brings, such as CLIP's:

    --config.init_from=/path/to/weights.safetensors

  of which `init_rename` takes the image tower alone. Theirs: 20.7 on ImageNet.
  """
  return differ(
    demo(),
    {
      "batch_size": 4096,
      "total_steps": 5000,
      "log_every": 50,
      "eval_every": 500,
      "checkpoint_every": 1000,
      "init_from": "",  # needed
      "init_rename": ((r"^(params/)?(text|text_head|image_head|log_scale)\b.*", "-"),),
      "method": {
        "width": 768,
        "image_head": "none",
        "text_head": "affine",
        "max_scale": None,
        "mask_duplicates": False,
      },
      "model": {
        "image": {
          "name": "clip_vit_b16",
          "dtype": "bfloat16",
          "mean": (0.48145466, 0.4578275, 0.40821073),
          "std": (0.26862954, 0.26130258, 0.27577711),
        },
        "text": {"name": "clip_vit_l14", "vocab": 49408, "dtype": "bfloat16"},
      },
      "data": {
        "source": "coco",  # as `python -m clj.data.ingest` prepares it
        "test_split": "validation",
        "columns": {
          "image": {"eval_crop": 0.0},
          "text": {"tokenizer": "bpe_simple_vocab_16e6.txt.gz", "length": 16},
        },
        "augment": {"image": {"size": 224, "flip": 0.5}},
      },
      "optim": only(
        name="adamw",
        learning_rate=1e-3,
        warmup_fraction=0.03,
        weight_decay=0.01,
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


def b16_cc12m():
  """A ViT-B/16 and the public pairs of CC12M at batch 16,384 (section 5 of the paper).

  The paper's public models add YFCC100M's captions and have a BERT; 60,000 steps and no
  image head were their best. Their tower is AugReg's, ours what `init_from` brings.
  """
  return differ(
    coco(),
    {
      "batch_size": 16_384,
      "total_steps": 60_000,
      "eval_every": 5000,
      "data": {
        "source": "cc12m",
        "train_split": "train[:-5000]",
        "test_split": "train[-5000:]",
      },
      "optim": only(
        name="adamw",
        learning_rate=1e-3,
        warmup_steps=10_000,
        weight_decay=1e-4,
        clip_norm=1.0,
      ),
    },
  )
