"""What a run trains, and on what: words, the model to start from, cached features, batches.

B images · S image positions · C backbone channels
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Config, flatten, parse_also
from corpora import Corpus, join_train
from dataset import CaptionDataset, describe_changes, digest_records, get_loader, stream_loader
from encoder import Encoder, build_encoder, get_backbone, image_transform, read_weights
from features import cached_features
from inference import SHIPPED
from model import CaptionModel, add_rows
from model_file import read_metadata
from readers import Record, data_folder, keep_readable
from trainer import Trainer
from util import distributed, program
from util.distributed import pick_device
from util.files import UserError
from util.scripts import is_unspaced
from vocabulary import Vocabulary, list_words

log = logging.getLogger(__name__)

# Flickr8k, MobileNetV2, random weights, ten epochs, CIDEr of 150 other images: 0.03 from 100 images
# (the caption "a man" for each), 0.27 from 300, 0.42 from 1,000. From 36, "in in the the the".
FEW_IMAGES = 1000

# --- the images


def warn_of_few_images(config: Config, count: int) -> None:
    """Log what helps where a decoder starts from random weights on `count` images, which are few.

    Not in a trial on a part of the data, nor for drawings, which are much simpler than photographs.
    """
    data = config.data
    trial = data.limit is not None or data.train_fraction < 1 or data.dataset == "shapes"
    if count < FEW_IMAGES and not config.train.init_from and not trial:
        log.warning(
            "%d training images are few for a model that starts from random weights: it may write "
            "the same words for every image. Better start from a trained model: --init-from %s",
            count, SHIPPED,
        )  # fmt: skip


def load_epoch(trainer: Trainer, config: Config, corpora: Sequence[Corpus]) -> Any:
    """Return the loader of this epoch's micro-batches, from where an interrupted epoch stopped."""
    model, data = trainer.model, config.data
    records, cache = join_train(corpora)
    augment = data.augment and model.encoder.trained != "none"
    transform = image_transform(model.img_size, train=augment)
    dataset = CaptionDataset(
        records, model.vocabulary, model.config.seq_len, transform, cache,
        views=data.views, flip=augment, seed=config.train.seed,
    )  # fmt: skip
    options = {
        "seed": config.train.seed,
        "epoch": trainer.epoch,
        "skip": trainer.batch,
        # Cached features are read faster than another process could hand them over.
        "workers": 0 if cache is not None else data.workers,
        "accumulate": config.train.accumulate,
        "rank": distributed.rank(),
        "world": distributed.world_size(),
    }
    if data.dataset == "shards":
        root = data_folder("shards", data.data_dir)
        return stream_loader(dataset, root, config.train.batch_size, **options)
    sizes = [len(corpus.records["train"]) for corpus in corpora]
    return get_loader(dataset, config.train.batch_size, shuffle=True, sizes=sizes, **options)


# --- the words


def choose_vocabulary(
    config: Config, records: Sequence[Record], init_model: CaptionModel | None
) -> tuple[Vocabulary, list[float]]:
    """Return the words of `init_model`, if any, and those that the training captions have.

    Only words that occur --min-count times are taken from the captions. The list has the share of
    each word that `init_model` lacks in all those that it lacks.
    """
    # Of the training captions only: a model must not know words from val or test.
    captions = (caption for record in records for caption in record.captions)
    if not init_model:
        vocabulary = Vocabulary.build(captions, config.data.min_count)
        if vocabulary.by_character:
            print_characters(records, vocabulary, config.decoder.seq_len)
        return vocabulary, []
    known, least = init_model.vocabulary, config.data.min_count
    captions = list(captions)
    if not known.by_character and is_unspaced(captions):
        known = Vocabulary(known.known, by_character=True)  # its words of other scripts stay
        print_characters(records, known, config.decoder.seq_len)
    counts = known.count_unknown(captions)
    new = {word: count for word, count in counts.items() if count >= least}
    rare = {word: count for word, count in counts.items() if count < least}
    if new:
        name = program.printable(config.train.init_from)
        print(f"new words, beside the {len(known.known)} of {name}: {list_words(new)}")
    if rare:
        log.warning(
            "words that stay unknown, because the model lacks them and they occur less than "
            "--min-count %d times: %s", least, list_words(rare),
        )  # fmt: skip
    total = sum(counts.values())
    vocabulary = Vocabulary([*known.known, *new], known.by_character)
    return vocabulary, [count / total for count in new.values()]


def print_characters(records: Sequence[Record], vocabulary: Vocabulary, seq_len: int) -> None:
    """Print that captions are split by character, and how many --seq-len truncates."""
    captions = [caption for record in records for caption in record.captions]
    example = next(each for each in captions if is_unspaced([each]))
    lengths = [len(vocabulary.split(each)) for each in captions]
    cut = sum(length > seq_len for length in lengths)
    advice = f"; --seq-len {seq_len} truncates {cut:,} of {len(captions):,}" if cut else ""
    print(
        "captions in a script without spaces are split by character, such as "
        f"{program.printable(example[:40])}{advice}"
    )


def read_vocabulary(
    config: Config, records: Sequence[Record], folder: Path, state: dict[str, Any]
) -> Vocabulary:
    """Return the words of the run that `state` is of.

    They must not come from the captions again, which may have changed: the weights are by word id.
    Only where they are stored nowhere they do; UserError where those are more or fewer.
    """
    if "vocabulary" in state:
        return Vocabulary.from_file(state["vocabulary"], state)
    best = folder / "best.safetensors"  # of an older version, whose state lacks them
    if best.is_file():
        metadata = read_metadata(best)
        return Vocabulary.from_file(metadata["vocabulary"], metadata)
    captions = (caption for record in records for caption in record.captions)
    vocabulary = Vocabulary.build(captions, config.data.min_count, by_character=False)
    rows = state["weights"].get("decoder.embedding.weight")
    if rows is not None and len(rows) != len(vocabulary):
        raise UserError(
            f"the captions have {len(vocabulary)} words now, but the run in {folder} began with "
            f"{len(rows)}; put back the captions of that time, or start a new run"
        )
    return vocabulary


def digest_corpora(corpora: Sequence[Corpus]) -> dict[str, Tensor]:
    """Return `dataset.digest_records` of each split of each dataset."""
    return {
        corpus.label(split): digest_records(records)
        for corpus in corpora
        for split, records in corpus.records.items()
    }


def warn_of_changes(
    trainer: Trainer, before: dict[str, Any] | None, records: Sequence[Record], config: Config
) -> None:
    """Log in one line what of the data is not as it was when the run was saved.

    `before`: the digests of each split then, None in a state of an older version. `records`: those
    trained on now.
    """
    changes, none = [], digest_records([])
    for split in dict.fromkeys([*before, *trainer.data]) if before is not None else ():
        now = trainer.data.get(split, none)
        if change := describe_changes(before.get(split, none), now):
            changes.append(f"{split} {change}")
    captions = (caption for record in records for caption in record.captions)
    counts = trainer.model.vocabulary.count_unknown(captions)
    new = {word: count for word, count in counts.items() if count >= config.data.min_count}
    if new:
        changes.append(f"new words, which only a run with --init-from learns: {list_words(new)}")
    if changes:
        log.warning(
            "the data has changed since this run was saved (%s); it goes on with its own %d words",
            "; ".join(changes), len(trainer.model.vocabulary.known),
        )  # fmt: skip


# --- the model


def build(
    config: Config,
    corpora: Sequence[Corpus],
    init_model: CaptionModel | None,
    resumed: Vocabulary | None,
) -> CaptionModel:
    """Return the model on its device; give `corpora` their caches and leave out unreadable images.

    Features are cached where the CNN is frozen; images of shards are streamed. `init_model` is that
    of --init-from, `resumed` the vocabulary of a resumed run, whose weights are loaded later.
    """
    device = pick_device(config.train.device)
    torch.manual_seed(config.train.seed)
    encoder = make_encoder(config, init_model).to(device)
    vocabulary, shares = resumed, []
    if not resumed:
        vocabulary, shares = choose_vocabulary(config, join_train(corpora)[0], init_model)
    for corpus in corpora:
        cache_features(config, corpus, encoder, device)
    # The decoder starts from the same weights, however many numbers the encoder has drawn.
    torch.manual_seed(config.train.seed)
    model = CaptionModel(encoder, config.decoder, vocabulary, config.encoder.img_size)
    if init_model and not resumed:
        model.load_state_dict(add_rows(init_model.state_dict(), model.state_dict(), shares))
    if tagger := model.decoder.tagger:
        if not init_model and not resumed:
            source, state = read_weights(encoder.name, config.encoder.cnn_weights)
            tagger.set_classifier(state, get_backbone(encoder.name).classifier, source)
        if not resumed:
            tagger.set_names(vocabulary)
    # The optimiser is built later, over parameters that are on their device already.
    return model.to(device)


def cache_features(config: Config, corpus: Corpus, encoder: Encoder, device: torch.device) -> None:
    """Give a dataset the features of its splits, and leave out images that can't be read."""
    for split, every in corpus.records.items():
        if split == "train" and corpus.kind == "shards":
            continue
        if encoder.trained != "none":
            corpus.records[split] = keep_readable(every)
            continue
        # For val and test the same features as evaluate.py: one view, in full precision.
        train = split == "train"
        cache = cached_features(
            every, encoder, config.encoder.img_size, config.data.cache_dir,
            f"{corpus.kind}-{split}", device=device, workers=config.data.workers,
            amp=config.train.amp and train, views=config.data.views if train else 1,
            rank=distributed.rank(), world=distributed.world_size(),
        )  # fmt: skip
        corpus.caches[split] = cache
        corpus.records[split] = [record for record in every if record.image_id in cache]


def make_encoder(config: Config, init_model: CaptionModel | None) -> Encoder:
    """Return the encoder that the flags name, with the weights of `init_model` if there is one."""
    flags = config.encoder
    if init_model and init_model.encoder.name != flags.cnn_backbone:
        raise UserError(  # of --init-from that is known: then it is the best one of a resumed run
            f"the best.safetensors of the run has the CNN {init_model.encoder.name}, not "
            f"{flags.cnn_backbone}: it is of another run; put its own back, or start a new run"
        )
    if not init_model:
        return build_encoder(
            flags.cnn_backbone, flags.cnn_weights, finetune=flags.finetune_cnn, grid=flags.grid
        )
    trained = "last" if flags.finetune_cnn else "all" if flags.cnn_weights == "none" else "none"
    encoder = Encoder(flags.cnn_backbone, trained, flags.grid)
    encoder.load_state_dict(init_model.encoder.state_dict())
    return encoder.to(memory_format=torch.channels_last)


def check_not_begun(folder: Path) -> None:
    """Raise UserError where a run without a state has a model, which a new start would replace.

    The model of the first epoch may be there: a run can be killed before its state is saved.
    """
    if not (folder / "best.safetensors").exists():
        return
    scores = read_metadata(folder).get("scores")
    if not isinstance(scores, dict) or scores.get("epoch") not in (0, 1):
        raise UserError(
            f"{folder} has a best.safetensors but no last.pt, so the run can't go on; start "
            f"another from its best weights: --init-from {folder}"
        )


def init_checkpoint(config: Config, folder: Path, *, resumed: bool) -> Path | None:
    """Return the model file or folder to start from, None without --init-from.

    A resumed run takes its own best model, which has the same CNN: that of --init-from may have
    been deleted or replaced.
    """
    own = folder / "best.safetensors"
    return own if config.train.init_from and resumed and own.is_file() else config.train.init_from


def training_info(config: Config, source: Path | None) -> dict[str, Any]:
    """Return the flags for the model file: how it was trained, without paths of this machine.

    `source` is the result of `init_checkpoint`: how that model was trained stands for its path.
    """
    flags = flatten(config)
    own = ("data_dir", "allow_commands", "cache_dir", "output", "resume")
    for name in (*own, "device", "workers", "threads"):
        del flags[name]
    also = [parse_also(each) for each in config.data.also]
    flags["also"] = [f"{kind}:{Path(folder).name}" for kind, folder in also]
    if source:
        info = read_metadata(source).get("training")
        flags["init_from"] = info if source == config.train.init_from else info["init_from"]
    return {**flags, "cnn_weights": Path(flags["cnn_weights"]).name}
