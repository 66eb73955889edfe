"""CLIP, arXiv:2103.00020.

    python -m clj.main --config=configs/clip.py             # demo, about 3 minutes
    python -m clj.main --config=configs/clip.py:VARIANT [--config.key=value ...]

variant            data                    published zero-shot on ImageNet, hardware
demo               rendered compositions   two CPU cores
smoke              rendered compositions   two steps at test size
products           fashion_product_pairs   two CPU cores
rn50_cc12m         CC12M                   36.45 (open_clip)
vit_b32_laion400m  LAION-400M              62.96 (open_clip), 128 A100, 36 hours
vit_b16_datacomp   DataComp-1B             73.5 (DataComp)
vit_l14            LAION-400M              72.77 (open_clip), 400 A100, 127 hours
pairs              your own pairs          from scratch, on one accelerator
finetune           your own pairs          weights of open_clip or Hugging Face, WiSE-FT

`--show` prints a recipe whole. What we measured ourselves is in the README's table. The
keys of the method are explained in `demo`, those of data of one's own in `pairs`, those
that every recipe has in `clj/recipe.py`.
"""

from clj.recipe import choose, differ, only

CC12M, LAION_400M = 10_968_539, 400_000_000  # pairs
# Pixels as OpenAI's models expect them.
OPENAI = {
  "mean": (0.48145466, 0.4578275, 0.40821073),
  "std": (0.26862954, 0.26130258, 0.27577711),
}
# Norms, biases, the scale and everything else of one axis; as open_clip.
NO_DECAY = r"(^|/)(bias|scale|gamma|log_scale|cls)$"


def get_config(variant=None):
  return choose(
    variant,
    demo,
    smoke,
    products,
    rn50_cc12m,
    vit_b32_laion400m,
    vit_b16_datacomp,
    vit_l14,
    pairs,
    finetune,
  )


def demo():
  """Rendered shapes and what they are called; about three minutes on two CPU cores.

  Eight colours by nine shapes are 72 classes; nine of them are never seen in training,
  and the test pictures show those alone.
  """
  return {
    "batch_size": 128,
    "total_steps": 900,
    "log_every": 20,
    "checkpoint_every": 200,
    "method": {
      "name": "clip",
      "width": 64,  # of the joint space
      "image_head": "linear",  # "linear", "affine" or "none"
      "text_head": "linear",
      "loss": "softmax",  # or "sigmoid"
      "init_scale": 1 / 0.07,
      "max_scale": 100.0,
      "mask_duplicates": True,  # equal captions are no negatives of each other
      "locked": "",  # names of parameters that stay, "^image/" for LiT
      "micro_batch": 0,  # pairs encoded at a time; 0: all
      "probe_classes": 0,  # classes of an online linear probe; 0: none
    },
    "model": {
      "image": {"name": "resnet_small", "widths": (24, 48, 96)},
      # Without a layer of attention a caption is the mean of its words, and a
      # composition that was never seen is as good as any; with one, what was seen is
      # learned by heart.
      "text": {"name": "text_small", "vocab": 64, "depth": 0},
    },
    "data": {
      "source": "shapes/compositions",
      "columns": {
        # eval_crop: share of the shorter side kept in evaluation; 0: squashed
        "image": {"kind": "image", "eval_crop": 1.0},
        # A vocabulary that is learned from the captions ("words", "bpe"), or a file.
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
          "size": 32,  # side, pixels
          "views": 1,
          "crop_scale": (0.9, 1.0),  # share of the picture's area
          "crop_ratio": (3 / 4, 4 / 3),  # width over height
          # No flip: the captions say left and right.
          "flip": 0.0,
          "grayscale": 0.0,
        },
      },
    },
    "optim": {
      "name": "adamw",
      "learning_rate": 4e-3,
      "warmup_fraction": 0.05,
      "b2": 0.98,
      "weight_decay": 0.1,
      # A learning rate of its own for a tower: (("^text/", {"multiplier": 0.5}),)
      "groups": (),
    },
    "evals": {
      "zeroshot": {"templates": ("a {}", "{}")},
      "retrieval": {},
      # Compositions that were seen in training, in other pictures.
      "zeroshot_seen": {
        "name": "zeroshot",
        "templates": ("a {}", "{}"),
        "data": {"source": "shapes/compositions", "test_split": "seen"},
      },
      # The image tower alone, on the nine shapes in any colour.
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
      "method": {"width": 16},
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


def products():
  """4,000 photographs of products and their titles, from scratch, on two CPU cores.

    TFDS_DATA_DIR=/path/to/tfds python -m clj.main --config=configs/clip.py:products

  3,065 of the titles are different. The test has 1,000 pairs; the most frequent of
  its kinds of article is 17.7 % of them.
  """
  return differ(
    demo(),
    {
      "batch_size": 256,
      "total_steps": 1500,
      "eval_every": 500,
      "checkpoint_every": 250,
      "method": {"max_scale": 30.0},
      "model": {
        "image": {"widths": (48, 96, 192), "stem": "patch4"},
        # With a layer of attention titles are learned by heart: 18 and 25 points of
        # R@10 after 150 steps, where the mean of the words has 43 and 48. Words are
        # hidden at random, so that a class's name alone is no stranger.
        "text": {"vocab": 1024, "token_dropout": 0.3},
      },
      "data": {
        "source": "fashion_product_pairs",
        "columns": {
          # memory_size: decoded once, to squares of this side
          "image": {"eval_crop": 0.875, "memory_size": 72},
          "text": {"vocab_size": 1024},
          "label": {"field": "article_type"},
        },
        "augment": {
          "image": {
            "size": 64,
            "crop_scale": (0.35, 1.0),
            "flip": 0.5,
            # Titles name colours: little hue.
            "jitter": {
              "strength": 1.0,
              "probability": 0.8,
              "amounts": (0.3, 0.3, 0.2, 0.02),
            },
          },
        },
      },
      "optim": {"learning_rate": 2e-3, "weight_decay": 0.5},
      "evals": only(
        # Prompts as the titles are; "{}" alone leaves out whom it is for, its colour.
        zeroshot={
          "templates": (
            "{}",
            "Men {}",
            "Women {}",
            "Men Casual Black {}",
            "Men Solid Blue {}",
            "Women Black {}",
            "Women Printed Pink {}",
            "Unisex White {}",
          )
        },
        retrieval={},
        linear_probe={"final_only": True},
        diagnostics={},
      ),
    },
  )


def vit_b32_laion400m():
  """ViT-B/32, 32 epochs of LAION-400M at batch 32,768: 62.96.

  The paper's optimiser (section 2.5, table 18 to 20), with open_clip's crops. It took
  128 A100 (40 GB) 36 hours there.
  """
  return differ(
    demo(),
    {
      "batch_size": 32_768,
      "total_steps": 32 * LAION_400M // 32_768,
      "log_every": 50,
      "eval_every": LAION_400M // 32_768,
      "checkpoint_every": 1000,
      # On few devices a `micro_batch` of 4096, say: the same gradient, a third slower.
      "method": {"width": 512, "mask_duplicates": False},
      "model": {
        "image": {
          "name": "clip_vit_b32",
          "dtype": "bfloat16",
          "scan": True,
          **OPENAI,
        },
        "text": {
          "name": "clip_vit_b32",
          "vocab": 49408,
          "dtype": "bfloat16",
          "scan": True,
        },
      },
      "data": {
        "source": "laion400m",  # as `python -m clj.data.ingest` prepares the tars
        "train_split": "train[:-5000]",
        "test_split": "train[-5000:]",
        "columns": {
          "text": {"tokenizer": "bpe_simple_vocab_16e6.txt.gz", "length": 77},
        },
        "augment": {"image": {"size": 224}},
      },
      "optim": only(
        name="adamw",
        learning_rate=5e-4,
        warmup_steps=2000,
        b1=0.9,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.2,
        no_decay=NO_DECAY,
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


def rn50_cc12m():
  """A ResNet-50 on the 11 million pairs of CC12M that could be fetched: 36.45.

  open_clip's figure, of which it gives no more than the model; the rest is the set-up
  of its README for one machine with eight GPUs. 30 epochs.
  """
  return differ(
    vit_b32_laion400m(),
    {
      "batch_size": 1024,
      "total_steps": 30 * CC12M // 1024,
      "log_every": 100,
      "eval_every": 2 * CC12M // 1024,
      # Attention pooling ends in the joint space.
      "method": {"width": 1024, "image_head": "none"},
      "model": {
        "image": {"name": "clip_rn50", "dtype": "bfloat16", **OPENAI},
        "text": {"name": "clip_rn50", "vocab": 49408, "dtype": "bfloat16"},
      },
      "data": {"source": "cc12m"},
      "optim": {
        "learning_rate": 1e-3,
        "warmup_steps": 10_000,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.1,
      },
    },
  )


def vit_b16_datacomp():
  """ViT-B/16, 12.8 billion pairs seen of DataComp-1B at batch 90,112: 73.5.

  Gadre et al., 2023, arXiv:2304.14108, the settings of its "xlarge" scale.
  """
  tower = {
    "name": "clip_vit_b16",
    "activation": "gelu",
    "dtype": "bfloat16",
    "scan": True,
    "remat": True,
  }
  return differ(
    vit_b32_laion400m(),
    {
      "batch_size": 90_112,
      "total_steps": 12_800_000_000 // 90_112,
      "eval_every": 5000,
      "model": {"image": tower | OPENAI, "text": tower | {"vocab": 49408}},
      "data": {"source": "datacomp_1b"},
      "optim": {"learning_rate": 1e-3, "warmup_steps": 10_000, "b2": 0.95},
    },
  )


def vit_l14():
  """ViT-L/14, 32 epochs of LAION-400M at batch 38,400: 72.77.

  It took 400 A100 (40 GB) 127 hours with open_clip, with recomputed activations. The
  learning rate is the paper's for this size (table 20).
  """
  tower = {
    "name": "clip_vit_l14",
    "activation": "gelu",
    "dtype": "bfloat16",
    "scan": True,
    "remat": True,
  }
  return differ(
    vit_b32_laion400m(),
    {
      "batch_size": 38_400,
      "total_steps": 32 * LAION_400M // 38_400,
      "eval_every": LAION_400M // 38_400,
      "method": {"width": 768},
      "model": {"image": tower | OPENAI, "text": tower | {"vocab": 49408}},
      "optim": {"learning_rate": 4e-4},
    },
  )


def pairs():
  """Your own pairs of pictures and captions, from scratch, at a batch of one device.

    python -m clj.main --config=configs/clip.py:pairs --config.data.source=SOURCE

  SOURCE: folder:/path with NAME.txt beside NAME.jpg, csv:/path/table.csv,
  parquet:/path/*.parquet, webdataset:/path/*.tar, hf://datasets/OWNER/NAME/*.parquet,
  or a TFDS name. The vocabulary is learned from the captions. Classes, where there
  are any, make zero-shot classification possible: add `evals.zeroshot`.
  """
  return differ(
    vit_b32_laion400m(),
    {
      "batch_size": 512,
      "total_steps": 20_000,
      "log_every": 20,
      "eval_every": 2000,
      "method": {"mask_duplicates": True},
      "model": {
        "image": {"name": "resnet50", "dtype": "bfloat16"},
        "text": {
          "name": "clip_vit_b32",
          "vocab": 16_384,
          "depth": 6,
          "dtype": "bfloat16",
        },
      },
      "data": {
        "source": "",  # needed
        "train_split": "train[:95%]",  # or "train" and "test"
        "test_split": "train[95%:]",
        "columns": {
          "image": {"field": "image", "eval_crop": 0.875},
          "text": {
            "field": "caption",
            "tokenizer": "bpe",
            "vocab_size": 16_384,
            "length": 48,
          },
        },
        "augment": {"image": {"crop_scale": (0.5, 1.0)}},
      },
      "optim": {"learning_rate": 1e-3, "warmup_steps": 1000},
      "evals": only(retrieval={}, diagnostics={}),
    },
  )


def finetune():
  """Weights of open_clip or Hugging Face on your own pairs, averaged as in WiSE-FT.

    python -m clj.main --config=configs/clip.py:finetune
      --config.init_from=/path/to/weights.safetensors --config.data.source=YOUR_SET

  For a ViT-B/32 of OpenAI's or LAION's; another model is another `model` and `width`.
  `init_rename` takes the weights twice: to train, and to stay as they were. Recall is
  printed "before" (as the weights came), after with the average of both ("retrieval",
  arXiv:2109.01903), and with the trained weights alone ("retrieval_trained"). Where
  the data have classes, add `evals.zeroshot`, and another with the query
  "trained_image" and the bank "trained_text".
  """
  return differ(
    vit_b32_laion400m(),
    {
      "batch_size": 512,
      "total_steps": 2000,
      "log_every": 20,
      "eval_every": 500,
      "checkpoint_every": 500,
      "init_from": "",  # needed: a .safetensors file, or a workdir
      "init_rename": (
        (r"^(params/)?((?!extra/).*)", (r"params/\2", r"extra/start/\2")),
      ),
      "method": {
        "init_scale": 100.0,
        "mask_duplicates": True,
        "wise_ft": 0.5,  # share of the trained weights; the paper's advice if unsure
      },
      "model": {
        "image": only(name="clip_vit_b32", dtype="bfloat16", **OPENAI),
        "text": only(name="clip_vit_b32", vocab=49408, dtype="bfloat16"),
      },
      "data": {
        "source": "",  # needed: see `pairs`
        "train_split": "train[:95%]",  # or "train" and "test"
        "test_split": "train[95%:]",
      },
      "optim": only(
        name="adamw",
        learning_rate=1e-5,
        warmup_fraction=0.1,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.1,
        no_decay=NO_DECAY,
        groups=(),  # such as (("^image/", {"multiplier": 0.1}),)
      ),
      "evals": only(
        retrieval={},
        retrieval_trained={
          "name": "retrieval",
          "query": "trained_image",
          "bank": "trained_text",
        },
      ),
    },
  )
