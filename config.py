"""The flags of `train.py`: fields, presets, defaults of each dataset."""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from decoder import DecoderConfig
from encoder import EncoderConfig
from model import read_metadata
from readers import DATASETS
from util import distributed, files
from util.files import UserError

# What AdamW makes of a rate must be a float32. Weights are no numbers long before that.
MOST_RATE = 1e30


MOST_SAMPLES = 1000  # of one image, which bounds the memory it takes


@dataclass(frozen=True)
class TrainConfig:
    """How the weights change."""

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 32
    """Images a step, each with all its captions; several processes share them."""
    accumulate: int = 1
    """Parts that a process works through its share of a step in, to take less memory."""
    scst_epochs: int = 0
    """After these, passes that make sampled captions with a high CIDEr-D likelier (self-critical
    training), from the best model so far."""
    lr: float = 6e-4
    """Peak learning rate of the decoder."""
    scst_lr: float = 5e-5
    """The same in self-critical training (the CNN's is lowered in proportion)."""
    scst_samples: int = 5
    """Captions drawn of an image; each is compared with the mean of the others."""
    scst_bleu: float = 0.0
    """Weight of BLEU-4 beside CIDEr-D in what they are rewarded for."""
    cnn_lr: float = 1e-5
    """Peak learning rate of the CNN's last stages (--finetune-cnn)."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; it falls to 0 as a cosine after."""
    weight_decay: float = 0.01
    """AdamW's decay of weight matrices."""
    label_smoothing: float = 0.1
    """Share of the target spread over all words."""
    attention_penalty: float = 1.0
    """Weight of the penalty for parts of the image not looked at (attention-lstm)."""
    grad_clip: float = 1.0
    """Largest norm of the gradient (0: no limit)."""
    ema: float = 0.998
    """Decay of the average of weights that is evaluated and saved (0: no average); in
    self-critical training all weights since its beginning count alike."""
    patience: int = 5
    """Stop after this many epochs without a better validation CIDEr (0: never)."""
    seed: int = 0
    """Seed of weights, order, dropout and augmentation."""
    output: Path | None = None
    """Folder of the run (default: runs/DATASET, with a number if that is taken)."""
    init_from: Path | None = None
    """Begin with the weights, words and sizes of this model: a model file, or a run's folder."""
    resume: bool = False
    """Go on with the run in --output where it stopped, with its flags."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    amp: bool = True
    """Mixed precision (bfloat16) where the device is made for it: GPUs, CPUs with AVX512-BF16."""
    compile: bool = False
    """Compile the model first (torch.compile): a minute or more, then faster steps on a GPU."""

    def __post_init__(self) -> None:
        least = {"epochs": 0, "batch_size": 1, "accumulate": 1, "scst_epochs": 0,
                 "scst_samples": 2, "scst_bleu": 0, "grad_clip": 0, "weight_decay": 0,
                 "patience": 0}  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:  # false for NaN too
                raise UserError(f"{_flag(name)} {getattr(self, name)} must be at least {low}")
        for name in ("weight_decay", "scst_bleu", "attention_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"{_flag(name)} {getattr(self, name)} must be at least 0 and finite"
                )
        if self.scst_samples > MOST_SAMPLES:
            raise UserError(f"--scst-samples {self.scst_samples} must be at most {MOST_SAMPLES:,}")
        self._check_rates()
        if not self.epochs and not (self.scst_epochs and (self.init_from or self.resume)):
            raise UserError(
                "--epochs 0 leaves nothing to train; it is for --scst-epochs with --init-from"
            )
        for name in ("warmup", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"{_flag(name)} {getattr(self, name)} must be at least 0 and below 1"
                )

    def _check_rates(self) -> None:
        for name in ("lr", "cnn_lr", "scst_lr"):
            if not 0 < getattr(self, name) <= MOST_RATE:
                raise UserError(
                    f"{_flag(name)} {getattr(self, name)} must be above 0 and at most {MOST_RATE:g}"
                )
        if self.scst_epochs and self.cnn_lr * (self.scst_lr / self.lr) > MOST_RATE:
            raise UserError(
                f"--cnn-lr {self.cnn_lr} times --scst-lr {self.scst_lr} / --lr {self.lr} must be "
                f"at most {MOST_RATE:g}: it is the CNN's learning rate in self-critical training"
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# A slip of the keyboard shall not fill a disk with views, or start a process for each image.
MOST_VIEWS, MOST_WORKERS = 1000, 1024


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    dataset: Literal[tuple(DATASETS)] = "flickr8k"
    """What to learn from; shapes is drawn by the project itself, shards are tar files as
    features.py --shards writes them."""
    data_dir: str | None = None
    """Folder of the dataset's own files (default: data/DATASET); of shards, or their address."""
    split_seed: int = 0
    """Seed of the split where the dataset has none of its own."""
    train_fraction: float = 1.0
    """Share of the training images to use, for quick trials."""
    limit: int | None = None
    """Use only this many images of each split, for quick trials."""
    min_count: int = 4
    """Words that come less often in the training captions are unknown."""
    augment: bool = True
    """Where the CNN is trained: random crops, and mirroring of what has no left or right."""
    cache_dir: Path = Path("data/cache")
    """Where the features of a frozen CNN are kept."""
    views: int = 1
    """Views of each training image that the cache keeps: 1 the image alone, 2 mirrored too, more:
    random parts, every other one mirrored. Training sees one of them by chance each epoch. For
    Flickr8k the default is 2."""
    workers: int = 2
    """Processes that read images."""

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("min_count", 1), ("views", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        for name, most in (("views", MOST_VIEWS), ("workers", MOST_WORKERS)):
            if getattr(self, name) > most:
                raise UserError(f"--{name} {getattr(self, name)} must be at most {most:,}")
        if not 0 < self.train_fraction <= 1:
            raise UserError(f"--train-fraction {self.train_fraction} must be above 0 and at most 1")


# Known models as flags. What a preset says wins over the dataset's defaults, flags win over it.
# The classics see images as their papers do: one view of the backbone's own size.
CLASSIC = {"img_size": None, "views": 1}
PRESETS: dict[str, dict[str, Any]] = {
    "resnet-transformer": {},
    "show-and-tell": {
        **CLASSIC, "cnn_backbone": "inception_v3", "grid": 1, "decoder": "lstm", "d_model": 512,
        "fc_dim": 512, "n_decode": 1, "dropout": 0.3, "lr": 2e-3, "epochs": 15,
    },
    "cnn-rnn": {
        **CLASSIC, "dataset": "coco", "cnn_backbone": "resnet50", "grid": 1, "decoder": "lstm",
        "d_model": 256, "fc_dim": 512, "n_decode": 1, "dropout": 0.5,
    },
    "show-attend-tell": {
        **CLASSIC, "cnn_backbone": "resnet101", "decoder": "attention-lstm", "d_model": 512,
        "fc_dim": 512, "n_decode": 1, "dropout": 0.5,
    },
}  # fmt: skip
# What a dataset changes of the fields' defaults; flags and presets win over it.
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    # A finer grid, and mirrored images: few photographs, and a cache of 5 GB has room. COCO's would
    # take 93 GB.
    "flickr8k": {"img_size": 320, "views": 2},
    "shapes": {
        "cnn_backbone": "tiny",
        "cnn_weights": "none",
        "augment": False,
        "d_model": 64,
        "n_decode": 2,
        "n_head": 4,
        "fc_dim": 256,
        "dropout": 0.0,  # drawings are endless: nothing to overfit, and dropout blurs relations
        "epochs": 6,
        "batch_size": 16,
        "lr": 3e-3,
        "min_count": 1,
        "label_smoothing": 0.0,
        "workers": 0,
    },
}


# What makes a model another one: --resume refuses to change it.
IDENTITY = (
    "preset", "dataset", "min_count", "split_seed", "train_fraction", "limit", "cnn_backbone",
    "img_size", "grid", "finetune_cnn", "decoder", "d_model", "n_decode", "n_head", "fc_dim",
    "seq_len", "tie_weights",
)  # fmt: skip


@dataclass(frozen=True)
class PresetConfig:
    """A known model."""

    preset: Literal[tuple(PRESETS)] = "resnet-transformer"
    """Sets the flags of a model: resnet-transformer (this project's own: ResNet-50, transformer),
    show-and-tell (arXiv 1411.4555: Inception-v3, LSTM), cnn-rnn (as image-captioning courses
    teach it: frozen ResNet-50, LSTM, on COCO), show-attend-tell (arXiv 1502.03044: ResNet-101,
    LSTM with attention)."""


@dataclass(frozen=True)
class Config:
    """All flags: one field is one flag and one entry of config.json."""

    preset: PresetConfig = field(default_factory=PresetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def flat(config: Config) -> dict[str, Any]:
    """Return the flags by name, paths as text."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for part in asdict(config).values()
        for name, value in part.items()
    }


def updated(config: Config, changes: dict[str, Any]) -> Config:
    """Return `config` with the flags in `changes`; unknown names are ignored (older runs)."""
    parts = {}
    for part in fields(config):
        old = getattr(config, part.name)
        known = {item.name: item.type for item in fields(old)}
        new = {name: changes[name] for name in known if name in changes}
        for name, value in new.items():
            if "Path" in str(known[name]) and value is not None:
                new[name] = Path(value)
        parts[part.name] = replace(old, **new)
    return Config(**parts)


def configure(argv: list[str] | None) -> Config:
    """Return the flags given, over a resumed run's, the preset's, the dataset's and defaults."""

    def read(default: Config) -> Config:
        described = "Train an image captioner; --dataset shapes needs no download."
        return files.parse(Config, argv, program="train.py", description=described, default=default)

    preset = PRESETS[read(Config()).preset.preset]
    given = as_restarted(read(updated(Config(), preset)))
    changes = DATASET_DEFAULTS.get(given.data.dataset, {}) | preset
    begun = read_sizes(given.train.init_from) if given.train.init_from else {}
    changes |= begun
    stored: dict[str, Any] = {}
    if given.train.resume:
        stored = read_run(given.train.output or Path("runs") / given.data.dataset)
        changes = stored
    config = as_restarted(read(updated(Config(), changes)))
    config.decoder.validate()
    for name in begun.keys() - {"dropout"}:
        if (now := flat(config)[name]) != begun[name]:
            raise UserError(
                f"--{name.replace('_', '-')} {now} differs from the {begun[name]} of "
                f"{config.train.init_from}; --init-from keeps a model's sizes"
            )
    for name in IDENTITY if stored else ():
        # A run begun before there was such a flag has its default.
        now, then = flat(config)[name], stored.get(name, flat(Config())[name])
        if now != then:
            raise UserError(
                f"--{name.replace('_', '-')} {now} differs from the run's {then}; a resumed run "
                "keeps it, start a new one with another --output"
            )
    config.encoder.validate()
    return config


def as_restarted(config: Config) -> Config:
    """Return the flags, with --resume where torchrun has started the run's processes anew.

    Raises ValueError where they would not find their run again.
    """
    output = config.train.output
    if distributed.may_restart() and not output:
        raise UserError("--max-restarts needs --output: a run that is restarted must be found")
    if distributed.restarted() and (output / "config.json").exists():
        return replace(config, train=replace(config.train, resume=True))
    return config


def read_sizes(checkpoint: Path) -> dict[str, Any]:
    """Return the flags that the model of a checkpoint was built with: its CNN and its decoder."""
    known = {item.name for part in (EncoderConfig, DecoderConfig) for item in fields(part)}
    return {
        name: value for name, value in read_metadata(checkpoint)["model"].items() if name in known
    }


def read_run(folder: Path) -> dict[str, Any]:
    """Return the flags of the run in `folder`; raises FileNotFoundError where there is none."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no run to resume in {folder}: name its folder with --output, or begin one without "
            "--resume"
        )
    stored = files.read_json(folder / "config.json")
    if not isinstance(stored, dict):
        raise UserError(f"{folder / 'config.json'} does not hold the flags of a run")
    return {**stored, "output": str(folder), "resume": True}
