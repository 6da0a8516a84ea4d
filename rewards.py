"""How good sampled captions are, as the scorer sees them: what self-critical training maximises.

B images · n captions an image · T words
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import metrics
from compact import Places
from dataset import Vocabulary
from decoding import END
from records import Record
from tokenizer import tokenize

OVER = "<end>"  # the end of a caption as a word of its own: no tokeniser gives that


class Rewards:
    """CIDEr-D of captions against those of their images, plus `bleu_weight` times BLEU-4.

    Words are the scorer's own. How rare an n-gram is, is counted over these records (the train
    split). The end of a caption is a word of it, in references too, so that one which breaks off
    ("a man with a") gains nothing by it.
    """

    def __init__(self, records: Sequence[Record], vocabulary: Vocabulary, bleu_weight: float = 0.0):
        self.vocabulary, self.bleu_weight = vocabulary, bleu_weight
        self.records = records
        self.places = Places(record.image_id for record in records)
        self.cider = metrics.CiderD([reference_words(record) for record in records])

    def __call__(self, image_ids: Sequence[str], tokens: Tensor) -> Tensor:
        """Return the rewards (B, n), float32, of `tokens` (B, n, T) as decoding returns them."""
        images, samples, _ = tokens.shape
        candidates = [self.spoken(caption) for caption in tokens.flatten(0, 1).tolist()]
        rows = [self.places.find(image_id) for image_id in image_ids]
        places = [row for row in rows for _ in range(samples)]
        rewards = self.cider.scores(candidates, places)
        if self.bleu_weight:
            references = {row: reference_words(self.records[row]) for row in rows}
            bleu = [
                metrics.bleu([references[place]], [candidate])[-1]
                for place, candidate in zip(places, candidates, strict=True)
            ]
            rewards += self.bleu_weight * torch.tensor(bleu).numpy()
        return torch.from_numpy(rewards).float().view(images, samples)

    def spoken(self, tokens: Sequence[int]) -> list[str]:
        """Return the scorer's words of a caption; its end is one where it has one."""
        words = tokenize(self.vocabulary.decode(tokens))
        return [*words, OVER] if END in tokens else words


def reference_words(record: Record) -> list[list[str]]:
    """Return the scorer's words of an image's captions, each with its end."""
    return [[*tokenize(caption), OVER] for caption in record.captions]


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return for each of `rewards` (B, n) the mean of its image's n - 1 others."""
    return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
