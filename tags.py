"""Tags: names of the ImageNet classes that the CNN finds most probable, for the decoder to read.

B images · S image positions · C backbone channels · D model width · K tags · W words of a name

A CNN with ImageNet weights can name zebras, pizzas and sofas that few captions mention. Its most
probable classes become K more positions of the memory, embedded as the words of their names are
(semantic attention, arXiv 1603.03925).
"""

from typing import Any

import torch
from torch import Tensor, nn

from backbones import list_classes
from util.files import UserError
from util.layers import Dropout
from vocabulary import PAD, Vocabulary, split_words

CLASSES = 1000
MAX_WORDS = 4  # of a class's name
HIDDEN = 0.3  # share of the tags that training hides, so that the decoder also looks at the image


class Tagger(nn.Module):
    """The K most probable classes of an image as memory positions."""

    def __init__(self, count: int, channels: int, width: int):
        """For K = `count` tags, of images with C = `channels`, as vectors of D = `width`."""
        super().__init__()
        self.count = count
        # The CNN's own classifier of the mean of its features, which is never trained.
        self.classifier = nn.Linear(channels, CLASSES).requires_grad_(False)
        self.register_buffer("names", torch.full((CLASSES, MAX_WORDS), PAD))
        # What the names lack: the captions may have none of their words.
        self.classes = nn.Embedding(CLASSES, width)
        nn.init.zeros_(self.classes.weight)
        self.norm = nn.LayerNorm(width)
        self.hide = Dropout(HIDDEN)
        self.position = nn.Parameter(torch.empty(count, width).normal_(std=0.5))

    def forward(self, features: Tensor, embedding: nn.Embedding) -> Tensor:
        """Return the tags (B, K, D) of features (B, S, C), that of the most probable class first.

        `embedding` is that of the decoder's words.
        """
        chosen = self.classifier(features.mean(1)).topk(self.count, dim=-1).indices  # (B, K)
        names = self.names[chosen]  # (B, K, W)
        present = (names != PAD)[..., None]
        words = (embedding(names) * present).sum(-2) / present.sum(-2).clamp(min=1)
        # The words' embedding has variance 1/D.
        tags = self.norm(words * words.shape[-1] ** 0.5 + self.classes(chosen))
        return tags * self.hide(torch.ones_like(tags[..., :1])) + self.position

    def set_names(self, vocabulary: Vocabulary) -> None:
        """Name the classes by those words of their names that the vocabulary has."""
        self.names.fill_(PAD)
        for row, name in enumerate(list_classes()):
            known = [vocabulary.ids[word] for word in split_words(name) if word in vocabulary.ids]
            for column, word in enumerate(known[:MAX_WORDS]):
                self.names[row, column] = word

    def set_classifier(self, state: dict[str, Tensor], layer: str, source: str) -> None:
        """Take the classifier from the state dict of a CNN, whose `layer` it is.

        Raises UserError where the state dict, that of `source`, lacks it.
        """
        for name, own in self.classifier.named_parameters():
            found = state.get(f"{layer}.{name}")
            if found is None or found.shape != own.shape or not found.isfinite().all():
                raise UserError(
                    f"{source} has no classifier of ImageNet's {CLASSES} classes ({layer}.{name}), "
                    "which --tags needs; give --cnn-weights that have one, or leave --tags out"
                )
            own.data.copy_(found)

    def check(self, vocabulary: Vocabulary, source: Any) -> None:
        """Raise UserError where a model file, `source`, names classes by words that it lacks."""
        if self.names.min() < 0 or self.names.max() >= len(vocabulary):
            raise UserError(f"{source} is damaged: a tag's name has words that it does not know")
