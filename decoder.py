"""The language side: everything learnable that turns an image's features into words.

B images · S image positions · C backbone channels · D model width · T words · V vocabulary
H heads · E = D/H · L layers · K beams · M captions in a batch · N words in a batch

Each decoder in `DECODERS` offers the same four: `remember` (features → memory, once an image),
`forward` (teacher forcing), `start` and `step` (one word at a time, state handed along).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from decoding import State
from util.files import UserError
from util.layers import (
    Dropout,
    Layout,
    attend,
    join_heads,
    scaled_dot_products,
    split_heads,
    to_device,
)
from vocabulary import PAD

# Far above what anybody trains: a file that asks for more is damaged, or means harm.
LARGEST = {"d_model": 16384, "n_decode": 128, "n_head": 1024, "fc_dim": 65536, "seq_len": 1000}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the language side."""

    decoder: "Literal[tuple(DECODERS)]" = "transformer"  # as text: the table is at the file's end
    """What writes the caption."""
    d_model: int = 256
    """Model width D."""
    n_decode: int = 3
    """Decoder layers L."""
    n_head: int = 8
    """Attention heads H; they must divide the width."""
    fc_dim: int = 1024
    """Width of the feed-forward layers."""
    dropout: float = 0.2
    """Share of activations dropped in training."""
    seq_len: int = 30
    """Longest caption in words; longer ones are cut."""
    tie_weights: bool = True
    """The output layer is the word embedding itself (arXiv 1608.05859): fewer weights."""

    def __post_init__(self) -> None:
        if type(self.tie_weights) is not bool:
            raise UserError(f"--tie-weights {self.tie_weights!r} must be true or false")
        for name, largest in LARGEST.items():
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if type(value) is not int:
                raise UserError(f"{flag} {value!r} must be a whole number")
            if value < 1:
                raise UserError(f"{flag} {value} must be >= 1")
            if value > largest:
                raise UserError(f"{flag} {value} must be at most {largest:,}")
        if self.d_model % self.n_head:
            raise UserError(f"--d-model {self.d_model} is not divisible by --n-head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout} must be at least 0 and below 1")


class DecoderOutput(NamedTuple):
    """Teacher forcing's result: `logits` (M, T-1, V), zero where the target is padding; position
    t predicts token t + 1. `attention` (M, T-1, S) or None."""

    logits: Tensor
    attention: Tensor | None = None


class Block(nn.Module):
    """A pre-norm decoder layer: words look at earlier words, then at the image, then think."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        width, self.heads = config.d_model, config.n_head
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.fc_dim),
            nn.GELU(),
            Dropout(config.dropout),
            nn.Linear(config.fc_dim, width),
        )
        self.dropout = Dropout(config.dropout)

    def look(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image's keys and values, each (B, H, S, E), of memory (B, S, D)."""
        key, value = self.key_value(memory).chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        image: tuple[Tensor, Tensor],
        looks: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the next layer's packed words (N, D); `image` are its keys and values.

        `looks`, where given, gets how each word spreads its attention over the image, (N, S).
        """
        qkv = layout.spread(self.qkv(self.norm_self(x)), layout.by_caption)  # (M, T, 3D)
        query, key, value = (split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))
        # Padding comes last in a row, so the causal mask hides it from every word.
        heard = attend(query, key, value, causal=True)
        heard = layout.pack(join_heads(heard), layout.by_caption)
        x = x + self.dropout(self.self_out(heard))

        query = layout.spread(self.query(self.norm_cross(x)), layout.by_image)  # (B, W, D)
        query = split_heads(query, self.heads)
        if looks is not None:
            where = (
                scaled_dot_products(query, image[0]).softmax(-1).mean(1)
            )  # (B, H, W, S) -> (B, W, S)
            looks.append(layout.pack(where, layout.by_image))
        seen = attend(query, *image)
        x = x + self.dropout(self.cross_out(layout.pack(join_heads(seen), layout.by_image)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))

    def step(
        self, x: Tensor, image: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the next layer's word (B, K, D), and keys and values (B, K, H, t+1, E)."""
        batch, beams, width = x.shape
        qkv = self.qkv(self.norm_self(x)).view(batch, beams, 3, self.heads, 1, width // self.heads)
        query, key, value = qkv.unbind(2)  # (B, K, H, 1, E)
        key, value = torch.cat([past[0], key], -2), torch.cat([past[1], value], -2)
        # Beams are rows here: torch's fused attention, the fastest for one word, takes four axes.
        parts = (part.flatten(0, 1) for part in (query, key, value))
        heard = F.scaled_dot_product_attention(*parts)
        x = x + self.self_out(heard.view(x.shape))

        query = self.query(self.norm_cross(x)).view(batch, beams, self.heads, width // self.heads)
        seen = F.scaled_dot_product_attention(query.transpose(1, 2), *image)  # (B, H, K, E)
        x = x + self.cross_out(seen.transpose(1, 2).reshape(batch, beams, width))
        return x + self.mlp(self.norm_mlp(x)), (key, value)


class Decoder(nn.Module):
    """What all decoders share: the image's projection, the words' vectors, their checks."""

    def __init__(self, config: DecoderConfig, vocabulary: int, channels: int, positions: int):
        """`vocabulary` V words; the image has `positions` S of `channels` C."""
        super().__init__()
        self.longest, self.positions = config.seq_len, positions
        self.project = nn.Linear(channels, config.d_model)
        self.embedding = nn.Embedding(vocabulary, config.d_model)
        # Where the output layer is the embedding too, N(0, 1/D) suits both.
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.untied = None if config.tie_weights else nn.Parameter(self.embedding.weight.clone())
        self.dropout = Dropout(config.dropout)

    @property
    def output_weight(self) -> Tensor:
        """The output layer's weight (V, D): the embedding itself unless `untied`."""
        return self.embedding.weight if self.untied is None else self.untied

    def check(self, features: Tensor) -> None:
        """Raise ValueError where `features` (B, S, C) are not what this was built for."""
        expected = self.positions, self.project.in_features
        if features.shape[1:] != expected:
            raise UserError(
                f"features have (positions, channels) {tuple(features.shape[1:])}, but the decoder "
                f"was built for {expected}; use the image size and CNN it was trained with"
            )

    def words(self, tokens: Tensor) -> Tensor:
        """Return (M, T-1), True where the target in `tokens` (M, T) is a word or the end.

        Raises ValueError on captions of more than `--seq-len` words.
        """
        real = tokens[:, 1:] != PAD
        if real.shape[1] > self.longest + 1 and real[:, self.longest + 1 :].any():
            raise UserError(
                f"a caption is longer than the decoder's {self.longest} words (--seq-len)"
            )
        return real


class Transformer(Decoder):
    """A pre-norm transformer decoder."""

    def __init__(self, config: DecoderConfig, vocabulary: int, channels: int, positions: int):
        super().__init__(config, vocabulary, channels, positions)
        width, self.heads = config.d_model, config.n_head
        self.norm_image = nn.LayerNorm(width)
        # Large beside the words' 0.02: where a thing is must be plain before what it is is known.
        self.image_position = nn.Parameter(0.5 * torch.randn(positions, width))
        self.word_position = nn.Parameter(0.02 * torch.randn(config.seq_len + 1, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_decode))
        self.norm = nn.LayerNorm(width)

    def encode(self, features: Tensor) -> Tensor:
        """Return memory (B, S, D) of features (B, S, C): the image projected once."""
        self.check(features)
        return self.dropout(self.norm_image(self.project(features)) + self.image_position)

    def embed(self, tokens: Tensor, position: Tensor | int) -> Tensor:
        """Return the first layer's words (…, D) of `tokens` (…) at their places in the caption."""
        # Not scaled by the root of D: the tied output would begin by repeating the word read.
        if not isinstance(position, Tensor):  # int, or in an export an int still unknown
            return self.dropout(self.embedding(tokens) + self.word_position.select(0, position))
        # index_select here and below: the gradient of word_position[position] is added up by the
        # CPU's threads in an order by chance, so that no run would be like another.
        place = self.word_position.index_select(0, position)
        return self.dropout(self.embedding(tokens) + place)

    def logits(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, V)"""
        return F.linear(self.norm(x), self.output_weight)

    def forward(
        self, memory: Tensor, tokens: Tensor, owner: Tensor, attention: bool = False
    ) -> DecoderOutput:
        """Return logits (M, T-1, V) of `tokens` (M, T) by teacher forcing.

        `memory` (B, S, D); `owner` (M,) the image of each caption, in any order. Tokens and owner
        may be on the CPU while memory is on a GPU, which then is never waited for. Only words are
        worked on: logits at padding are zero. With `attention`, also where each word looks: the
        mean over layers and heads. Raises ValueError on captions that are too long.
        """
        real = self.words(tokens)
        layout = Layout(real, owner, len(memory), memory.device)
        x = self.embed(to_device(tokens[:, :-1][real], memory.device), layout.position)
        looks: list[Tensor] | None = [] if attention else None
        for block in self.blocks:
            x = block(x, layout, block.look(memory), looks)
        logits = layout.spread(self.logits(x), layout.by_caption)
        if looks is None:
            return DecoderOutput(logits)
        return DecoderOutput(logits, layout.spread(torch.stack(looks).mean(0), layout.by_caption))

    def start(self, memory: Tensor) -> State:
        """Return the state before the first word: memory (B, S, D) as keys and values."""
        image = tuple(tensor for block in self.blocks for tensor in block.look(memory))
        batch, _, _, size = image[0].shape
        empty = memory.new_zeros(batch, 1, self.heads, 0, size)
        return State(image, (empty,) * (2 * len(self.blocks)))

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Return log-probabilities (B, K, V) after `token` (B, K), and the next state.

        Keys and values of the image are shared by its beams; those of the words grow by one.
        """
        x = self.embed(token, state.beam[0].shape[-2])
        beam: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            pair = slice(2 * number, 2 * number + 2)
            x, past = block.step(x, state.image[pair], state.beam[pair])
            beam += past
        return self.logits(x).log_softmax(-1), State(state.image, tuple(beam))


class LSTM(Decoder):
    """Show and Tell (arXiv 1411.4555): the pooled image is the first thing the LSTM reads.

    Words and image are D wide, the LSTM is `fc_dim` wide, with a linear layer back to D before the
    output layer.
    """

    def __init__(self, config: DecoderConfig, vocabulary: int, channels: int, positions: int):
        super().__init__(config, vocabulary, channels, positions)
        between = config.dropout if config.n_decode > 1 else 0.0
        sizes = config.d_model, config.fc_dim, config.n_decode
        self.norm_image = nn.LayerNorm(config.d_model)
        self.lstm = nn.LSTM(*sizes, batch_first=True, dropout=between)
        self.output = nn.Linear(config.fc_dim, config.d_model)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def encode(self, features: Tensor) -> Tensor:
        """Return memory (B, 1, D) of features (B, S, C): their mean through linear and ReLU."""
        self.check(features)
        return self.dropout(self.norm_image(self.project(features.mean(1, keepdim=True))).relu())

    def read(self, tokens: Tensor) -> Tensor:
        """Return the words (…, D) of `tokens` (…) as the LSTM reads them, of the image's size."""
        return self.dropout(self.embedding(tokens) * self.embedding.embedding_dim**0.5)

    def logits(self, x: Tensor) -> Tensor:
        """(…, fc_dim) -> (…, V)"""
        return F.linear(self.output(self.dropout(x)), self.output_weight, self.bias)

    def forward(
        self, memory: Tensor, tokens: Tensor, owner: Tensor, attention: bool = False
    ) -> DecoderOutput:
        """Return logits (M, T-1, V) of `tokens` (M, T) by teacher forcing.

        `memory` (B, 1, D) is read once an image; its captions, `owner` (M,), go on from there.
        Sequences are packed: the LSTM does not run over padding.
        """
        real = self.words(tokens)
        if not len(tokens):
            return DecoderOutput(memory.new_zeros(*real.shape, len(self.bias)))
        # The longest first: torch would sort by itself, and wait for the GPU to have sorted.
        lengths, order = real.sum(1).sort(descending=True, stable=True)
        tokens, owner, real = tokens[order, :-1], owner[order], real[order]
        layout = Layout(real, owner, len(memory), memory.device)
        _, state = self.lstm(memory)
        state = tuple(part.index_select(1, to_device(owner, memory.device)) for part in state)
        words = self.read(to_device(tokens, memory.device))
        words = pack_padded_sequence(words, lengths.cpu(), batch_first=True)
        heard, _ = pad_packed_sequence(
            self.lstm(words, state)[0], batch_first=True, total_length=real.shape[1]
        )
        logits = self.logits(layout.pack(heard, layout.by_caption))
        back = to_device(order.argsort(), memory.device)
        return DecoderOutput(layout.spread(logits, layout.by_caption)[back])

    def start(self, memory: Tensor) -> State:
        """Return the state after the image, before the first word: h and c (B, 1, L, fc_dim)."""
        _, state = self.lstm(memory)
        return State((), tuple(part.transpose(0, 1)[:, None] for part in state))

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Return log-probabilities (B, K, V) after `token` (B, K), and the next state."""
        words = self.read(token).flatten(0, 1)[:, None]  # (B*K, 1, D)
        before = tuple(part.flatten(0, 1).transpose(0, 1).contiguous() for part in state.beam)
        heard, after = self.lstm(words, before)
        beam = tuple(part.transpose(0, 1).unflatten(0, token.shape) for part in after)
        return self.logits(heard.view(*token.shape, -1)).log_softmax(-1), State((), beam)


class AttentionLSTM(Decoder):
    """Show, Attend and Tell (arXiv 1502.03044): at each word the LSTM looks at the image anew.

    Soft attention by a small network over image positions, its result gated; the LSTM begins from
    the mean of the image; word, LSTM and what was seen make the next word together.
    """

    def __init__(self, config: DecoderConfig, vocabulary: int, channels: int, positions: int):
        super().__init__(config, vocabulary, channels, positions)
        width, hidden, self.layers = config.d_model, config.fc_dim, config.n_decode
        self.norm_image = nn.LayerNorm(width)
        self.key, self.query = nn.Linear(width, width), nn.Linear(hidden, width)
        self.score = nn.Linear(width, 1)
        self.gate = nn.Linear(hidden, width)
        self.first = nn.Linear(width, 2 * hidden * self.layers)
        self.cells = nn.ModuleList(
            nn.LSTMCell(hidden if layer else 2 * width, hidden) for layer in range(self.layers)
        )
        self.hidden_out, self.seen_out = nn.Linear(hidden, width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def encode(self, features: Tensor) -> Tensor:
        """Return memory (B, S, D) of features (B, S, C): the image projected once."""
        self.check(features)
        return self.dropout(self.norm_image(self.project(features)))

    def logits(self, words: Tensor, hidden: Tensor, seen: Tensor) -> Tensor:
        """Return logits (…, V) of the word read (…, D), the LSTM (…, fc_dim) and the image."""
        x = words + self.hidden_out(self.dropout(hidden)) + self.seen_out(seen)
        return F.linear(self.dropout(x.tanh()), self.output_weight, self.bias)

    def begin(self, memory: Tensor) -> tuple[Tensor, ...]:
        """Return h and c of each layer in turn, each (B, fc_dim), from the image's mean."""
        return self.first(memory.mean(1)).tanh().chunk(2 * self.layers, dim=-1)

    def look(self, memory: Tensor, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is seen (B, K, D) and the attention (B, K, S), for `hidden` (B, K, fc_dim).

        `keys` (B, S, D) is the image's part of the score, the same at every word.
        """
        mixed = (keys[:, None] + self.query(hidden)[:, :, None]).tanh_()  # (B, K, S, D)
        attention = self.score(mixed)[..., 0].softmax(-1)
        return self.gate(hidden).sigmoid() * (attention @ memory), attention

    def advance(
        self, words: Tensor, state: tuple[Tensor, ...], memory: Tensor, keys: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return the state after `words` (B, K, D), what was seen and the attention.

        `state` holds h and c of each layer in turn, each (B, K, fc_dim).
        """
        seen, attention = self.look(memory, keys, state[-2])
        words = words * words.shape[-1] ** 0.5  # of the image's size, as the LSTM reads them
        x, after = torch.cat([words, seen], -1).flatten(0, 1), []
        for layer, cell in enumerate(self.cells):
            before = (part.flatten(0, 1) for part in state[2 * layer : 2 * layer + 2])
            x, c = cell(self.dropout(x) if layer else x, tuple(before))
            after += [x, c]
        return tuple(part.unflatten(0, words.shape[:2]) for part in after), seen, attention

    def forward(
        self, memory: Tensor, tokens: Tensor, owner: Tensor, attention: bool = False
    ) -> DecoderOutput:
        """Return logits (M, T-1, V) and attention (M, T-1, S) by teacher forcing.

        `memory` (B, S, D), `tokens` (M, T), `owner` (M,). Captions run longest first, and each
        leaves when it ends, so that no step works on padding.
        """
        real = self.words(tokens)
        if not len(tokens):
            return DecoderOutput(memory.new_zeros(*real.shape, len(self.bias)))
        lengths, order = real.sum(1).sort(descending=True, stable=True)
        growing = (lengths[:, None] > torch.arange(real.shape[1], device=lengths.device)).sum(0)
        words = self.dropout(self.embedding(to_device(tokens[order, :-1], memory.device)))
        owner = to_device(owner[order], memory.device)
        keys = self.key(memory).index_select(0, owner)
        image = memory.index_select(0, owner)
        state = tuple(part.index_select(0, owner)[:, None] for part in self.begin(memory))
        hidden, seen, attention = [], [], []
        for position, count in enumerate(growing.tolist()):
            if not count:
                break
            state, saw, where = self.advance(
                words[:count, position, None],
                tuple(part[:count] for part in state),
                image[:count],
                keys[:count],
            )
            for kept, new in ((hidden, state[-2]), (seen, saw), (attention, where)):
                kept.append(new[:, 0])
        # The steps one after another are the words of `words` column by column.
        columns = real[order].T
        places = to_device(columns.flatten().nonzero()[:, 0], memory.device)
        grid = (columns.shape, places)
        spoken = self.logits(
            Layout.pack(words.transpose(0, 1), grid), torch.cat(hidden), torch.cat(seen)
        )
        back = to_device(order.argsort(), memory.device)
        return DecoderOutput(
            Layout.spread(spoken, grid).transpose(0, 1)[back],
            Layout.spread(torch.cat(attention), grid).transpose(0, 1)[back],
        )

    def start(self, memory: Tensor) -> State:
        """Return the state before the first word: the image projected once, h and c of its mean."""
        return State((memory, self.key(memory)), tuple(x[:, None] for x in self.begin(memory)))

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Return log-probabilities (B, K, V) after `token` (B, K), and the next state."""
        words = self.dropout(self.embedding(token))
        beam, seen, attention = self.advance(words, state.beam, *state.image)
        log_probs = self.logits(words, beam[-2], seen).log_softmax(-1)
        return log_probs, State(state.image, beam, attention)


DECODERS: dict[str, Callable[..., Decoder]] = {
    "transformer": Transformer,
    "lstm": LSTM,
    "attention-lstm": AttentionLSTM,
}


def build_decoder(
    config: DecoderConfig, *, vocabulary: int, channels: int, positions: int
) -> Decoder:
    """Return the decoder `config` names, for V words and images of S positions of C channels."""
    if config.decoder not in DECODERS:
        known = ", ".join(DECODERS)
        raise UserError(f"decoder {config.decoder!r} is not known; choose from {known}")
    return DECODERS[config.decoder](config, vocabulary, channels, positions)
