"""How good sampled captions are, as the scorer sees them: what self-critical training maximises.

B images · n captions an image · T words
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import metrics
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
        self.place = {record.image_id: number for number, record in enumerate(records)}
        self.references = [
            [[*tokenize(caption), OVER] for caption in record.captions] for record in records
        ]
        self.cider = metrics.CiderD(self.references)

    def __call__(self, image_ids: Sequence[str], tokens: Tensor) -> Tensor:
        """Return the rewards (B, n), float32, of `tokens` (B, n, T) as decoding returns them."""
        images, samples, _ = tokens.shape
        candidates = [self.spoken(caption) for caption in tokens.flatten(0, 1).tolist()]
        places = [self.place[image_id] for image_id in image_ids for _ in range(samples)]
        rewards = self.cider.scores(candidates, places)
        if self.bleu_weight:
            rewards += (
                self.bleu_weight
                * torch.tensor(
                    [
                        metrics.bleu([self.references[place]], [candidate])[-1]
                        for place, candidate in zip(places, candidates, strict=True)
                    ]
                ).numpy()
            )
        return torch.from_numpy(rewards).float().view(images, samples)

    def spoken(self, tokens: Sequence[int]) -> list[str]:
        """Return the scorer's words of a caption; its end is one where it has one."""
        words = tokenize(self.vocabulary.decode(tokens))
        return [*words, OVER] if END in tokens else words


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return for each of `rewards` (B, n) the mean of its image's n - 1 others."""
    return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
