"""Data for benchmarks, made up: captions and features as numerous and as long as real ones.

B images · S image positions · C backbone channels · M captions in a batch · T words
"""

import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from dataset import Batch, collate_fn
from decoder import Decoder, DecoderConfig, build_decoder
from losses import cross_entropy
from vocabulary import Vocabulary

WORDS = 2_900  # Flickr8k's at min count 4
SCENES = 100  # kinds of images; each has words of its own
PER_IMAGE = 5
MEAN_LENGTH, SPREAD = 10.8, 3.0  # words a caption, as in Flickr8k
POSITIONS, CHANNELS = 49, 2048  # ResNet-50 at 224 pixels


def captions(
    images: int, seed: int = 0, mean_length: float = MEAN_LENGTH, words: int = WORDS
) -> list[list[str]]:
    """Return five captions for each image: its scene's sentence, cut and changed here and there."""
    scenes = [_scene(number, words) for number in range(SCENES)]
    rng = random.Random(seed)
    return [
        [_said(scenes[image % SCENES], rng, mean_length) for _ in range(PER_IMAGE)]
        for image in range(images)
    ]


def _scene(number: int, words: int) -> list[str]:
    rng = random.Random(1000 + number)
    own = [f"w{rng.randrange(100, words)}" for _ in range(12)]
    return [rng.choice(own) if rng.random() < 0.5 else _common(rng) for _ in range(80)]


def _common(rng: random.Random) -> str:
    return f"w{int(100 ** rng.random()) - 1}"  # few words are said often, many seldom


def _said(scene: list[str], rng: random.Random, mean_length: float) -> str:
    length = min(len(scene), max(3, round(rng.gauss(mean_length, SPREAD))))
    said = [word if rng.random() < 0.7 else _common(rng) for word in scene[:length]]
    return " ".join(said)


def vocabulary(words: int = WORDS) -> Vocabulary:
    """Return all the words there are."""
    return Vocabulary([f"w{number}" for number in range(words)])


def features(images: int, positions: int = POSITIONS, channels: int = CHANNELS) -> Tensor:
    """Return float16 features (B, S, C) that tell the images' scenes."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.rand(SCENES, 1, channels, generator=generator)
    noise = torch.rand(images, positions, channels, generator=generator)
    return (scenes[torch.arange(images) % SCENES] + 0.5 * noise).half()


def batch(images: int = 32, seed: int = 0, words: Vocabulary | None = None) -> Batch:
    """Return a batch of images with five captions each, as the loader makes it."""
    words = words or vocabulary()
    seen = features(images)
    said = captions(images, seed)
    items = [
        (f"{number}", seen[number], [words.encode(line, 30) for line in lines])
        for number, lines in enumerate(said)
    ]
    return collate_fn(items)


def trained_decoder(config: DecoderConfig, steps: int = 60, channels: int = CHANNELS) -> Decoder:
    """Return a decoder that has learned to write captions of about the right length."""
    words = vocabulary()
    torch.manual_seed(0)
    positions = 1 if config.decoder == "lstm" else POSITIONS
    decoder = build_decoder(config, vocabulary=len(words), channels=channels, positions=positions)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    for step in range(steps):
        one = batch(32, seed=step, words=words)
        inputs = one.inputs.float()[..., :channels]
        inputs = inputs.mean(1, keepdim=True) if positions == 1 else inputs
        logits = decoder(decoder.encode(inputs), one.tokens, one.owner).logits
        loss = cross_entropy(logits, one.tokens)
        optimizer.zero_grad()
        (loss.objective / loss.words).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
    return decoder.eval()


def photographs(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> list[Path]:
    """Write JPEGs of a photograph's size and detail; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    paths = []
    for number in range(count):
        rough = Image.frombytes("RGB", (24, 18), rng.randbytes(24 * 18 * 3))
        grain = Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))
        smooth = rough.resize(size, Image.Resampling.BICUBIC)
        paths.append(folder / f"{number:05}.jpg")
        Image.blend(smooth, grain, 0.12).save(paths[-1], quality=90)
    return paths
