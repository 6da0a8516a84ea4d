"""The flags of `train.py`: a field is a flag, a line of `--help` and an entry of config.json.

A value comes from the first of these that has one: the command line, the run that `--resume`
continues, the model that `--init-from` names, the preset, the dataset's defaults, the field itself.
A resumed run keeps its fields marked IDENTITY, and does not read `--init-from` again. The fields of
the encoder and the decoder are in their modules.
"""

import argparse
import math
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from decoder import DecoderConfig
from encoder import BACKBONES, EncoderConfig
from losses import OBJECTIVES
from model_file import read_metadata
from readers import DATASETS, Columns, check_columns
from util import distributed, files, program
from util.checkpoints import is_run_config
from util.files import IDENTITY, UserError
from util.tars import check_allowed, is_command
from util.threads import MAX_THREADS, MAX_WORKERS, default_workers

# Known models. The classics take images of the backbone's own size (img_size None), in one view.
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

DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    # A finer grid of positions, and mirrored images: Flickr8k has few images, and a cache of 5 GB
    # is no burden. COCO's would take 93 GB.
    "flickr8k": {"img_size": 320, "views": 2},
    # No dropout: the drawings do not repeat, so there is nothing to overfit, and dropout hides
    # the relative positions of objects.
    "shapes": {
        "cnn_backbone": "tiny", "cnn_weights": "none", "augment": False, "d_model": 64,
        "n_decode": 2, "n_head": 4, "fc_dim": 256, "dropout": 0.0, "epochs": 6, "batch_size": 16,
        "lr": 3e-3, "min_count": 1, "label_smoothing": 0.0, "workers": 0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class PresetConfig:
    """A known model."""

    preset: Literal[tuple(PRESETS)] = field(default="resnet-transformer", metadata=IDENTITY)
    """Sets the flags of a model: resnet-transformer (this project's own: ResNet-50, transformer),
    show-and-tell (arXiv 1411.4555: Inception-v3, LSTM), cnn-rnn (as image-captioning courses
    teach it: frozen ResNet-50, LSTM, on COCO), show-attend-tell (arXiv 1502.03044: ResNet-101,
    LSTM with attention)."""


@dataclass(frozen=True)
class DataConfig:
    """The images and captions to train on."""

    dataset: Literal[tuple(DATASETS)] = field(default="flickr8k", metadata=IDENTITY)
    """The kind of dataset; shapes is drawn by the project itself, csv is any table of captions,
    shards are tar files as features.py --shards writes them."""
    data_dir: str | None = None
    """Folder of the dataset's own files; of shards, also their address."""
    allow_commands: bool = False
    """Let --data-dir pipe:COMMAND run its command. A resumed run needs both flags again: the
    command in a config.json may be a stranger's."""
    also: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """KIND:DIR, another dataset to train on in the same run, as in --also coco:data/coco; may be
    given several times. The batches mix all datasets, each is validated alone, and the best epoch
    is that of the highest mean CIDEr."""
    image_column: str | None = None
    """Column of a table (--dataset csv) that has the images' names, where it is not found."""
    caption_column: str | None = None
    """Column of a table that has the captions; caption also means caption_0, caption_1 …"""
    strict: bool = False
    """Refuse images that lack their last bytes, in place of reading them as far as they go."""
    split_seed: int = field(default=0, metadata=IDENTITY)
    """Seed of the split where the dataset has none of its own."""
    train_fraction: float = field(default=1.0, metadata=IDENTITY)
    """Share of the training images to use, for quick trials."""
    limit: int | None = field(default=None, metadata=IDENTITY)
    """Use only this many images of each split, for quick trials."""
    min_count: int = field(default=4, metadata=IDENTITY)
    """Words that occur less often in the training captions are unknown (all that --init-from has
    are kept)."""
    augment: bool = True
    """Where the CNN is trained: random crops, and mirrored images unless a caption says left or
    right."""
    cache_dir: Path = Path("data/cache")
    """Folder of the features of a frozen CNN."""
    views: int = 1
    """Views of each training image in the cache: 1 the image alone, 2 the mirrored image too, more:
    random crops, every other one mirrored. Each epoch uses one of them, chosen at random."""
    workers: int = field(default_factory=default_workers)
    """Processes that read images."""

    @property
    def columns(self) -> Columns:
        """The columns of tables that the flags name."""
        return Columns(self.image_column, self.caption_column)


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    epochs: int = 10
    """Passes over the training images."""
    objective: Literal[tuple(OBJECTIVES)] = "cross-entropy"
    """What these epochs minimise."""
    batch_size: int = 32
    """Images in a step, each with all its captions; several processes share them."""
    accumulate: int = 1
    """Micro-batches that a process divides its share of a step into, to take less memory."""
    scst_epochs: int = 0
    """Epochs of self-critical training after these, from the best model so far: it makes sampled
    captions with a high CIDEr-D more probable."""
    lr: float = 6e-4
    """Peak learning rate of the decoder, and of a CNN trained from scratch."""
    scst_lr: float = 5e-5
    """The same in self-critical training (the CNN's is lowered in proportion)."""
    scst_samples: int = 5
    """Captions sampled for each image; each is compared with the mean of the others."""
    scst_bleu: float = 0.0
    """Weight of BLEU-4 beside CIDEr-D in the reward."""
    cnn_lr: float = 1e-5
    """Peak learning rate of the CNN's last stages (--finetune-cnn)."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; then it falls to 0 along a cosine."""
    weight_decay: float = 0.01
    """AdamW's decay of weight matrices."""
    label_smoothing: float = 0.1
    """Share of the target's probability spread over all words."""
    attention_penalty: float = 1.0
    """Weight of the penalty for image positions without attention (attention-lstm)."""
    grad_clip: float = 1.0
    """Largest norm of the gradient (0: no limit)."""
    ema: float = 0.998
    """Decay of the average of weights that is evaluated and saved (0: no average); in
    self-critical training it is the mean of all weights since its start."""
    patience: int = 5
    """Stop after this many epochs without a better validation CIDEr (0: never); epoch 0 is not
    counted."""
    seed: int = 0
    """Seed of weights, order, dropout and augmentation."""
    output: Path | None = None
    """Folder of the run; if none is given, runs/DATASET, with a number if that is taken."""
    init_from: Path | None = None
    """Start from the weights, words and sizes of this model: a model file, or a run's folder.
    Words of the captions that it lacks are added (see --min-count), its scores are epoch 0."""
    resume: bool = False
    """Continue the run in --output (or runs/DATASET) where it stopped, with its flags."""
    device: str = "auto"
    """auto, cpu, cuda (or gpu), cuda:1, mps."""
    threads: int | None = None
    """CPU threads to compute with (default: one for each CPU that this process may use)."""
    amp: bool = True
    """Mixed precision (bfloat16) where the device is made for it: GPUs, CPUs with AVX512-BF16."""
    tensorboard: bool = False
    """Also write the figures and samples of each epoch for TensorBoard (tensorboard --logdir
    runs); needs the package tensorboard."""
    compile: bool = False
    """Compile the model first (torch.compile): a minute or more, then faster steps on a GPU."""


@dataclass(frozen=True)
class Config:
    """All flags."""

    preset: PresetConfig = field(default_factory=PresetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def flatten(config: Config) -> dict[str, Any]:
    """Return the flags by name, paths as text: the content of config.json."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for group in asdict(config).values()
        for name, value in group.items()
    }


def unflatten(values: dict[str, Any]) -> Config:
    """Return the configuration with these flags; other names are ignored (of other versions)."""
    groups = {}
    for group in fields(Config):
        types = get_type_hints(group.type)
        known = {name: values[name] for name in types if name in values}
        for name, value in known.items():
            if types[name] in (Path, Path | None) and value is not None:
                known[name] = Path(value)
            elif get_origin(types[name]) is tuple:
                known[name] = tuple(value)
        groups[group.name] = group.type(**known)
    return Config(**groups)


def configure(argv: list[str] | None) -> Config:
    """Return the configuration of a command line; raises UserError where it makes no sense."""
    chosen = read_selectors(argv)
    stored = read_run(chosen) if chosen.resume else {}
    model = read_sizes(Path(chosen.init_from)) if chosen.init_from and not stored else {}
    # Given again, as for folders that have moved, --also replaces the run's own.
    own = {"also": ()} if chosen.also else {}
    defaults = unflatten(default_values(chosen) | model | stored | own)
    config = program.parse(
        Config, argv, program="train.py", default=defaults,
        description="Train an image captioner; --dataset shapes needs no download. The defaults "
        "shown are those of the chosen preset and dataset.",
    )  # fmt: skip
    check_same(config, unflatten(default_values(chosen) | stored) if stored else None, model)
    if chosen.restarted:
        config = unflatten(flatten(config) | {"resume": True})
    validate(config)
    return config


def read_selectors(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags that decide what the defaults of the others are; nothing is checked yet."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "dataset", "data-dir", "also", "cnn-backbone", "output", "init-from"):
        names = dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"])
        parser.add_argument(*names, nargs="?")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False)
    chosen, _ = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if distributed.may_restart() and not chosen.output:
        raise UserError("--max-restarts needs --output: a run that is restarted must be found")
    # torchrun has started this process in place of one that died: its run goes on.
    chosen.restarted = distributed.restarted() and Path(chosen.output, "config.json").exists()
    chosen.resume = chosen.resume or chosen.restarted
    return chosen


def default_values(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return every flag's value before those of a run, a model and the command line."""
    values = flatten(Config())
    preset = PRESETS.get(chosen.preset or values["preset"], {})
    dataset = chosen.dataset or preset.get("dataset", values["dataset"])
    values |= DATASET_DEFAULTS.get(dataset, {}) | preset
    values |= {"dataset": dataset, "data_dir": str(Path("data") / dataset)}
    backbone = chosen.cnn_backbone or values["cnn_backbone"]
    if values["img_size"] is None and backbone in BACKBONES:
        values["img_size"] = BACKBONES[backbone].img_size
    return values


def read_run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of the run to go on with; raises FileNotFoundError where there is none."""
    folder = Path(chosen.output or Path("runs") / default_values(chosen)["dataset"])
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no run to resume in {folder}: name its folder with --output, or start one without "
            "--resume"
        )
    stored = files.read_json(folder / "config.json")
    if not is_run_config(stored):
        raise UserError(f"{folder / 'config.json'} does not hold the flags of a run")
    check_types(stored, folder / "config.json")
    # Runs of older versions have no size where the backbone's own is meant.
    if stored.get("img_size") is None and stored.get("cnn_backbone") in BACKBONES:
        stored["img_size"] = BACKBONES[stored["cnn_backbone"]].img_size
    if stored.get("data_dir") is None:
        stored["data_dir"] = str(Path("data") / str(stored.get("dataset")))
    if is_command(stored["data_dir"]) and not chosen.data_dir:
        raise UserError(
            f"the data of the run in {folder} come from a command, {stored['data_dir']!r}, which "
            "may be a stranger's; if it is yours, give it again: --data-dir and --allow-commands"
        )
    return {**stored, "allow_commands": False, "output": str(folder), "resume": True}


def check_types(values: dict[str, Any], path: Path) -> None:
    """Raise UserError for a flag in the file at `path` whose value is of another type."""
    for group in fields(Config):
        for name, kind in get_type_hints(group.type).items():
            if name in values and not fits(values[name], kind):
                raise UserError(
                    f"{path} has {values[name]!r:.60} for {flag(name)}, which does not take that: "
                    "it is damaged, or another program's"
                )


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value of a JSON file may be that of a field with the type hint `kind`."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:  # tuple[X, ...]
        return isinstance(value, (list, tuple)) and all(fits(v, get_args(kind)[0]) for v in value)
    if options := get_args(kind):  # X | None
        return any(fits(value, each) for each in options)
    if kind in (str, Path):  # --help prints it
        return isinstance(value, str) and not re.search(r"[\x00-\x1f\x7f-\x9f]", value)
    return type(value) in ((int, float) if kind is float else (kind,))


def read_sizes(checkpoint: Path) -> dict[str, Any]:
    """Return the flags that the model of a checkpoint was built with: its CNN and its decoder."""
    known = {each.name for group in (EncoderConfig, DecoderConfig) for each in fields(group)}
    model = read_metadata(checkpoint).get("model")
    if not isinstance(model, dict):
        raise UserError(f"{checkpoint} does not describe a model; name another --init-from")
    sizes = {name: value for name, value in model.items() if name in known}
    check_types(sizes, checkpoint)
    return sizes


def check_same(config: Config, run: Config | None, model: dict[str, Any]) -> None:
    """Raise UserError where a flag would make a resumed run, or `--init-from`, another model."""
    now = flatten(config)
    for name in model.keys() - {"dropout"}:
        if now[name] != model[name]:
            raise UserError(
                f"{flag(name)} {now[name]} differs from the {model[name]} of "
                f"{config.train.init_from}; --init-from keeps a model's sizes"
            )
    if run is None:
        return
    then = flatten(run)
    identity = [each.name for group in fields(Config) for each in fields(group.type)
                if each.metadata.get("identity")]  # fmt: skip
    for name in identity:
        if now[name] != then[name]:
            raise UserError(
                f"{flag(name)} {now[name]} differs from the run's {then[name]}; a resumed run "
                "keeps it, start a new one with another --output"
            )
    kinds = [[parse_also(each)[0] for each in flags["also"]] for flags in (now, then)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"--also names {', '.join(kinds[0])}, but the run has {', '.join(kinds[1]) or 'none'}; "
            "a resumed run keeps its datasets, start a new one with another --output"
        )


def parse_also(text: str) -> tuple[str, str]:
    """Return the kind and the folder that `--also KIND:DIR` names."""
    kind, colon, folder = text.partition(":")
    kinds = [name for name in DATASETS if name != "shards"]
    if kind not in kinds or not folder:
        reason = "shards are streamed, and only alone" if kind == "shards" and colon else "no such"
        raise UserError(
            f"--also {text} must be KIND:DIR, as in --also coco:data/coco ({reason}); the kinds "
            f"are {', '.join(kinds)}"
        )
    return kind, folder


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# The lowest value of each whole number; the ranges of the others.
AT_LEAST = {
    "limit": 1, "min_count": 1, "views": 1, "workers": 0, "threads": 1, "epochs": 0,
    "batch_size": 1, "accumulate": 1, "scst_epochs": 0, "scst_samples": 2, "patience": 0,
}  # fmt: skip
AT_LEAST_0 = ("scst_bleu", "grad_clip", "weight_decay", "attention_penalty")
SHARES = ("warmup", "label_smoothing", "ema")
HIGHEST_LR = 1000.0  # training diverges long before; AdamW fails where lr is no float32


def validate(config: Config) -> None:
    """Raise UserError for the first flag that is out of range, or that does not fit another."""
    values = flatten(config)

    def check(name: str, valid: bool, rule: str) -> None:
        if not valid:
            raise UserError(f"{flag(name)} {values[name]} must be {rule}")

    for name, value in values.items():
        # A larger whole number is a typing error, which torch would answer in its own words.
        if type(value) is int and not name.endswith("seed"):
            check(name, value < 2**31, "below 2^31")
    for name, least in AT_LEAST.items():
        check(name, values[name] is None or values[name] >= least, f"at least {least}")
    check("workers", values["workers"] <= MAX_WORKERS, f"at most {MAX_WORKERS:,}")
    check("seed", -(2**63) <= values["seed"] < 2**63, "a number of 64 bits")
    check("threads", (values["threads"] or 1) <= MAX_THREADS, f"at most {MAX_THREADS:,}")
    for name in AT_LEAST_0:
        finite = name == "grad_clip" or values[name] < math.inf
        check(name, values[name] >= 0 and finite, "at least 0 and finite")
    for name in SHARES:
        check(name, 0 <= values[name] < 1, "at least 0 and below 1")
    for name in ("lr", "cnn_lr", "scst_lr"):
        check(name, 0 < values[name] <= HIGHEST_LR, f"above 0 and at most {HIGHEST_LR:g}")
    check("train_fraction", 0 < values["train_fraction"] <= 1, "above 0 and at most 1")
    folder = config.train.output
    if folder and files.identify(folder) == files.identify(config.data.data_dir or ""):
        raise UserError(f"--output {folder} is the folder of the dataset; name another folder")
    check_allowed(config.data.data_dir, config.data.allow_commands)
    kinds = [config.data.dataset, *(parse_also(each)[0] for each in config.data.also)]
    check_columns(config.data.columns, kinds)
    if config.data.also and config.data.dataset == "shards":
        raise UserError("--also does not go with --dataset shards, which are streamed alone")
    train = config.train
    if train.scst_epochs and train.cnn_lr * train.scst_lr / train.lr > HIGHEST_LR:
        raise UserError(
            f"--cnn-lr {train.cnn_lr} times --scst-lr {train.scst_lr} / --lr {train.lr} must be at "
            f"most {HIGHEST_LR:g}: it is the CNN's learning rate in self-critical training"
        )
    if not train.epochs and not (train.scst_epochs and (train.init_from or train.resume)):
        raise UserError(
            "--epochs 0 leaves nothing to train; it is for --scst-epochs with --init-from"
        )
    if train.tensorboard and not find_spec("tensorboard"):
        raise UserError(
            "--tensorboard needs the package tensorboard: pip install tensorboard, or leave it out"
        )
    config.encoder.validate()
    config.decoder.validate()
    row = BACKBONES[config.encoder.cnn_backbone]
    names_classes = row.classifier and config.encoder.cnn_weights != "none"
    if config.decoder.tags and not names_classes and not train.init_from:
        named = ", ".join(name for name, each in BACKBONES.items() if each.classifier)
        raise UserError(
            f"--tags {config.decoder.tags} needs a CNN that names ImageNet's classes, with weights "
            f"(--cnn-weights); choose --cnn-backbone from {named}"
        )
