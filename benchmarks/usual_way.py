"""Captioning as most repositories implement it, for comparison: correct, but slow.

B images · S image positions · C backbone channels · D model width · T words · V vocabulary
K beams · M captions in a batch

Everything here uses the weights of a decoder of this project and has the same losses and captions.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from decoder import AttentionLSTM, Transformer
from masks import NEVER
from vocabulary import END, PAD, START

PADDED_TO = 64  # words: many repositories pad all captions to a fixed length


class UsualTransformer(nn.Module):
    """torch's own TransformerDecoder over padded captions, the image repeated for each of them."""

    def __init__(self, ours: Transformer, dropout: float = 0.0):
        super().__init__()
        width, hidden = ours.embedding.embedding_dim, ours.blocks[0].mlp[0].out_features
        layer = nn.TransformerDecoderLayer(
            width, ours.heads, hidden, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, len(ours.blocks), nn.LayerNorm(width))
        self.project = nn.Linear(ours.project.in_features, width)
        self.norm_image = nn.LayerNorm(width)
        self.image_position = nn.Parameter(torch.zeros_like(ours.image_position))
        longest = max(PADDED_TO, len(ours.word_position))
        self.word_position = nn.Parameter(torch.zeros(longest, width))
        self.embedding = nn.Embedding(len(ours.embedding.weight), width)
        self.dropout = nn.Dropout(dropout)
        self.copy_weights(ours)

    @torch.no_grad()
    def copy_weights(self, ours: Transformer) -> None:
        """Copy the weights of a decoder of this project."""
        self.project.load_state_dict(ours.project.state_dict())
        self.norm_image.load_state_dict(ours.norm_image.state_dict())
        self.embedding.load_state_dict(ours.embedding.state_dict())
        self.decoder.norm.load_state_dict(ours.norm.state_dict())
        self.image_position.copy_(ours.image_position)
        self.word_position[: len(ours.word_position)] = ours.word_position
        for layer, block in zip(self.decoder.layers, ours.blocks, strict=True):
            for norm, own in zip(
                (layer.norm1, layer.norm2, layer.norm3),
                (block.norm_self, block.norm_cross, block.norm_mlp),
                strict=True,
            ):
                norm.load_state_dict(own.state_dict())
            self_attn, cross_attn = layer.self_attn, layer.multihead_attn
            # This project has no dropout on attention weights.
            self_attn.dropout = cross_attn.dropout = 0.0
            self_attn.in_proj_weight.copy_(block.qkv.weight)
            self_attn.in_proj_bias.copy_(block.qkv.bias)
            self_attn.out_proj.load_state_dict(block.self_out.state_dict())
            cross_attn.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
            cross_attn.in_proj_bias.copy_(torch.cat([block.query.bias, block.key_value.bias]))
            cross_attn.out_proj.load_state_dict(block.cross_out.state_dict())
            layer.linear1.load_state_dict(block.mlp[0].state_dict())
            layer.linear2.load_state_dict(block.mlp[3].state_dict())

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Return logits (M, T, V) of captions `tokens` (M, T), each with `features` (M, S, C)."""
        length = tokens.shape[1]
        memory = self.dropout(self.norm_image(self.project(features)) + self.image_position)
        words = self.dropout(self.embedding(tokens) + self.word_position[:length])
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        output = self.decoder(
            words, memory, tgt_mask=causal, tgt_key_padding_mask=tokens == PAD, tgt_is_causal=True
        )
        return F.linear(output, self.embedding.weight)

    def loss(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Return the mean loss per word in nats; padding is computed, but not counted."""
        logits = self(features, tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)


def pad(tokens: Tensor, length: int) -> Tensor:
    """Return `tokens` (M, T) padded to (M, length + 1)."""
    return F.pad(tokens, (0, length + 1 - tokens.shape[1]), value=PAD)


# ---- decoding --------------------------------------------------------------------------------


def greedy(model: UsualTransformer, features: Tensor, max_words: int) -> Tensor:
    """Return captions (B, T), with the prefix computed again for each word, all to max_words."""
    tokens = torch.full((len(features), 1), START, device=features.device)
    for position in range(max_words + 1):
        logits = model(features, tokens)[:, -1]
        logits[:, list(NEVER)] = -math.inf
        if position == 0:
            logits[:, END] = -math.inf
        if position == max_words:
            logits[:, :END] = logits[:, END + 1 :] = -math.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens[:, 1:]


def beam_search(
    predict: Callable[[Tensor], Tensor], beam_size: int, max_words: int, penalty: float
) -> list[int]:
    """Return the best caption of one image, with lists and loops.

    `predict` returns the log-probabilities (K, V) of the next word for prefixes (K, T).
    """
    prefixes, totals = [[START]], [0.0]
    ended: list[tuple[float, list[int]]] = []
    for position in range(max_words + 1):
        log_probs = predict(torch.tensor(prefixes)).clone()
        log_probs[:, list(NEVER)] = -math.inf
        if position == 0:
            log_probs[:, END] = -math.inf
        if position == max_words:
            log_probs[:, :END] = log_probs[:, END + 1 :] = -math.inf
        total = torch.tensor(totals)[:, None] + log_probs
        best, where = total.flatten().topk(2 * beam_size)
        growing: list[tuple[float, list[int]]] = []
        for score, place in zip(best.tolist(), where.tolist(), strict=True):
            parent, word = divmod(place, total.shape[1])
            caption = [*prefixes[parent], word]
            if word == END:
                ended.append((score / (position + 1) ** penalty, caption[1:]))
            elif score > -math.inf:
                growing.append((score, caption))
        ended = sorted(ended, key=lambda one: -one[0])[:beam_size]
        if position == max_words or not growing:
            break
        growing = growing[:beam_size]
        leader = growing[0][0]
        longest = max(leader / (max_words + 1) ** penalty, leader / (position + 2) ** penalty)
        complete = len(ended) == beam_size and leader / (position + 1) ** penalty <= ended[-1][0]
        if complete or (ended and longest <= ended[0][0]):
            break
        totals, prefixes = [one[0] for one in growing], [one[1] for one in growing]
    return ended[0][1]


def transformer_beam(model: UsualTransformer, features: Tensor, **search: float) -> list[int]:
    """Return the caption of one image (S, C), with the prefix computed again for each word."""

    def predict(prefixes: Tensor) -> Tensor:
        repeated = features.expand(len(prefixes), -1, -1)
        return model(repeated, prefixes.to(features.device))[:, -1].log_softmax(-1).cpu()

    return beam_search(predict, **search)


def attention_beam(ours: AttentionLSTM, features: Tensor, **search: float) -> list[int]:
    """Return the caption of one image (S, C), which is projected again for each beam and word."""
    states: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def predict(prefixes: Tensor) -> Tensor:
        memory = ours.encode(features.expand(len(prefixes), -1, -1))
        keys = ours.key(memory)
        parents = [tuple(prefix[:-1]) for prefix in prefixes.tolist()]
        if parents[0] == ():
            before = ours.initial_state(memory)
        else:
            pairs = zip(*(states[parent] for parent in parents), strict=True)
            before = tuple(torch.stack(parts) for parts in pairs)
        words = ours.embedding(prefixes[:, -1].to(features.device))
        after, context, _ = ours.read_word(
            words[:, None], tuple(part[:, None] for part in before), memory, keys
        )
        for row, prefix in enumerate(prefixes.tolist()):
            states[tuple(prefix)] = tuple(part[row, 0] for part in after)
        return ours.compute_logits(words, after[-2][:, 0], context[:, 0]).log_softmax(-1).cpu()

    return beam_search(predict, **search)


# ---- features --------------------------------------------------------------------------------


class ImageFiles(Dataset):
    """Image files, resized and normalised with torchvision's transforms."""

    def __init__(self, paths: Sequence[Path]):
        from torchvision import transforms

        self.paths = paths
        self.transform = transforms.Compose([
            transforms.Resize((224, 224)),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


@torch.no_grad()
def extract(cnn: nn.Module, paths: Sequence[Path], batch_size: int = 32) -> Tensor:
    """Return features (B, S, C) of torchvision's CNN as it is, with one process reading files."""
    loader = DataLoader(ImageFiles(paths), batch_size, num_workers=1)
    maps = [cnn.eval()(images.to(next(cnn.parameters()).device)) for images in loader]
    return torch.cat(maps).flatten(2).transpose(1, 2).cpu()
