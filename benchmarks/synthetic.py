"""Synthetic data for benchmarks: captions as long as real ones, features, and JPEG files.

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
SCENES = 100  # kinds of images, each with words of its own
PER_IMAGE = 5
MEAN_LENGTH, SPREAD = 10.8, 3.0  # words per caption, as in Flickr8k
POSITIONS, CHANNELS = 49, 2048  # ResNet-50 at 224 pixels


def captions(
    images: int, seed: int = 0, mean_length: float = MEAN_LENGTH, words: int = WORDS
) -> list[list[str]]:
    """Return five captions per image: the sentence of its scene, truncated, some words replaced."""
    scenes = [make_scene(number, words) for number in range(SCENES)]
    rng = random.Random(seed)
    return [
        [make_caption(scenes[image % SCENES], rng, mean_length) for _ in range(PER_IMAGE)]
        for image in range(images)
    ]


def make_scene(number: int, words: int) -> list[str]:
    """Return the sentence of a scene: half of its words are the scene's own."""
    rng = random.Random(1000 + number)
    own = [f"w{rng.randrange(100, words)}" for _ in range(12)]
    return [rng.choice(own) if rng.random() < 0.5 else draw_word(rng) for _ in range(80)]


def draw_word(rng: random.Random) -> str:
    """Return one of a hundred common words, of which few are frequent and many rare."""
    return f"w{int(100 ** rng.random()) - 1}"


def make_caption(scene: list[str], rng: random.Random, mean_length: float) -> str:
    """Return a caption of about `mean_length` words, seven of ten of them the scene's."""
    length = min(len(scene), max(3, round(rng.gauss(mean_length, SPREAD))))
    return " ".join(word if rng.random() < 0.7 else draw_word(rng) for word in scene[:length])


def vocabulary(words: int = WORDS) -> Vocabulary:
    """Return the vocabulary of all synthetic words."""
    return Vocabulary([f"w{number}" for number in range(words)])


def features(images: int, positions: int = POSITIONS, channels: int = CHANNELS) -> Tensor:
    """Return float16 features (B, S, C) that depend on the scene of each image, with noise."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.rand(SCENES, 1, channels, generator=generator)
    noise = torch.rand(images, positions, channels, generator=generator)
    return (scenes[torch.arange(images) % SCENES] + 0.5 * noise).half()


def batch(images: int = 32, seed: int = 0, words: Vocabulary | None = None) -> Batch:
    """Return a batch of images with five captions each, as the loader returns it."""
    words = words or vocabulary()
    inputs = features(images)
    items = [
        (f"{number}", inputs[number], [words.encode(line, 30) for line in lines])
        for number, lines in enumerate(captions(images, seed))
    ]
    return collate_fn(items)


def trained_decoder(
    config: DecoderConfig,
    steps: int = 60,
    channels: int = CHANNELS,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Return a decoder on `device`, trained until its captions have about the right length."""
    words = vocabulary()
    torch.manual_seed(0)
    positions = 1 if config.decoder == "lstm" else POSITIONS
    decoder = build_decoder(config, vocabulary=len(words), channels=channels, positions=positions)
    decoder.to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    for step in range(steps):
        one = batch(32, seed=step, words=words)
        inputs = one.inputs.to(device).float()[..., :channels]
        inputs = inputs.mean(1, keepdim=True) if positions == 1 else inputs
        logits = decoder(decoder.encode(inputs), one.tokens, one.owner).logits
        loss = cross_entropy(logits, one.tokens)
        optimizer.zero_grad()
        (loss.objective / loss.words).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
    return decoder.eval()


def write_jpegs(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> list[Path]:
    """Write JPEGs of the size and detail of Flickr8k's images; return their paths."""
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
