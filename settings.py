"""The flags of `train.py`: what is given, over what a run, a preset or a dataset says."""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import distributed
import files
from dataset import DataConfig
from decoder import DecoderConfig
from encoder import EncoderConfig
from model import checkpoint_file, read_checkpoint
from presets import DATASET_DEFAULTS, PRESETS
from trainer import TrainConfig

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
    for name in begun.keys() - {"dropout"}:
        if (now := flat(config)[name]) != begun[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} {now} differs from the {begun[name]} of "
                f"{config.train.init_from}; --init-from keeps a model's sizes"
            )
    for name in IDENTITY if stored else ():
        # A run begun before there was such a flag has its default.
        now, then = flat(config)[name], stored.get(name, flat(Config())[name])
        if now != then:
            raise ValueError(
                f"--{name.replace('_', '-')} {now} differs from the run's {then}; a resumed run "
                "keeps it, start a new one with another --output"
            )
    return config


def as_restarted(config: Config) -> Config:
    """Return the flags, with --resume where torchrun has started the run's processes anew.

    Raises ValueError where they would not find their run again.
    """
    output = config.train.output
    if distributed.may_restart() and not output:
        raise ValueError("--max-restarts needs --output: a run that is restarted must be found")
    if distributed.restarted() and (output / "config.json").exists():
        return replace(config, train=replace(config.train, resume=True))
    return config


def read_sizes(checkpoint: Path) -> dict[str, Any]:
    """Return the flags that the model of a checkpoint was built with: its CNN and its decoder."""
    about, _ = read_checkpoint(checkpoint_file(checkpoint))
    known = {item.name for part in (EncoderConfig, DecoderConfig) for item in fields(part)}
    return {name: value for name, value in about["model"].items() if name in known}


def read_run(folder: Path) -> dict[str, Any]:
    """Return the flags of the run in `folder`; raises FileNotFoundError where there is none."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no run to resume in {folder}: name its folder with --output, or begin one without "
            "--resume"
        )
    stored = files.read_json(folder / "config.json")
    if not isinstance(stored, dict):
        raise ValueError(f"{folder / 'config.json'} does not hold the flags of a run")
    return {**stored, "output": str(folder), "resume": True}
