"""The language side: everything learnable that turns an image's features into words.

B images · S image positions · C backbone channels · D model width · T words · V vocabulary
H heads · E = D/H · L layers · K beams (in memory: tags)
M captions in a batch · N words in a batch

Each decoder in `DECODERS` has four methods: `encode` (features to memory, once per image),
`forward` (all words of given captions at once: teacher forcing), `start` and `step` (one word at a
time, for decoding). A caption (T tokens) has T - 1 targets: position t predicts token t + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from decoding import State
from tags import CLASSES, Tagger
from util.files import IDENTITY, UserError
from util.layers import (
    Dropout,
    Grid,
    Linear,
    PackedWords,
    compute_attention,
    compute_scores,
    join_heads,
    linear,
    split_heads,
    to_device,
)
from vocabulary import PAD

# Neither size is limited by the weights that a model file holds, so a damaged or hostile file
# could ask for any amount of memory. Checked in training too: what was trained must load again.
MAX_SIZES = {"n_decode": 128, "seq_len": 1000}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the language side."""

    # As text, because the table is at the end of the file.
    decoder: "Literal[tuple(DECODERS)]" = field(default="transformer", metadata=IDENTITY)
    """Network that writes the caption."""
    d_model: int = field(default=256, metadata=IDENTITY)
    """Model width D."""
    n_decode: int = field(default=3, metadata=IDENTITY)
    """Decoder layers L."""
    n_head: int = field(default=8, metadata=IDENTITY)
    """Attention heads H; must divide the width."""
    fc_dim: int = field(default=1024, metadata=IDENTITY)
    """Width of the feed-forward layers; of the LSTM, the hidden size."""
    dropout: float = 0.2
    """Fraction of activations dropped in training."""
    seq_len: int = field(default=30, metadata=IDENTITY)
    """Longest caption in words; longer ones are truncated."""
    tags: int = field(default=0, metadata=IDENTITY)
    """Let the decoder read the names of this many ImageNet classes, those that the CNN finds most
    probable, beside the image (0: none)."""
    tie_weights: bool = field(default=True, metadata=IDENTITY)
    """Share one matrix between word embedding and output layer (arXiv 1608.05859)."""

    def validate(self) -> None:
        """Raise UserError if a value is out of range or of the wrong type."""
        if type(self.tie_weights) is not bool:
            raise UserError(f"--tie-weights {self.tie_weights!r} must be true or false")
        for name in ("d_model", "n_decode", "n_head", "fc_dim", "seq_len"):
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if type(value) is not int:
                raise UserError(f"{flag} {value!r} must be a whole number")
            if value < 1:
                raise UserError(f"{flag} {value} must be >= 1")
            if value > MAX_SIZES.get(name, value):
                raise UserError(f"{flag} {value} must be at most {MAX_SIZES[name]:,}")
        if type(self.tags) is not int or not 0 <= self.tags <= CLASSES:
            raise UserError(f"--tags {self.tags!r} must be a whole number from 0 to {CLASSES:,}")
        if self.d_model % self.n_head:
            raise UserError(f"--d-model {self.d_model} is not divisible by --n-head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout} must be at least 0 and below 1")


class DecoderOutput(NamedTuple):
    """Result of teacher forcing.

    `logits` (M, T-1, V), zero at padding. `attention` (M, T-1, S): how much of its attention each
    target paid to each image position, zero at padding; None if not computed. It sums to 1, to less
    where tags have the rest.
    """

    logits: Tensor
    attention: Tensor | None = None


class Block(nn.Module):
    """Pre-norm transformer layer: causal self-attention, attention to the image, feed-forward."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        width, self.heads = config.d_model, config.n_head
        # Norm before each sublayer, not after it: trains stably at any depth (arXiv 2002.04745).
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.qkv = Linear(width, 3 * width)
        self.self_out = Linear(width, width)
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.cross_out = Linear(width, width)
        self.mlp = nn.Sequential(
            Linear(width, config.fc_dim),
            nn.GELU(),
            Dropout(config.dropout),
            Linear(config.fc_dim, width),
        )
        self.dropout = Dropout(config.dropout)

    def project_kv(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image's keys and values, each (B, H, S, E), from memory (B, S, D)."""
        key, value = self.key_value(memory).chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(
        self,
        x: Tensor,
        packed: PackedWords,
        image_kv: tuple[Tensor, Tensor],
        attention_maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the layer's output (N, D) for packed words `x` (N, D).

        `image_kv` is the result of `project_kv`. To `attention_maps`, if given, the attention of
        each word over the image is appended, (N, S), averaged over the heads.
        """
        qkv = packed.by_caption.unpack(self.qkv(self.norm_self(x)))  # (M, T, 3D)
        query, key, value = (split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))
        # Padding is at the end of a row, so the causal mask alone hides it from every word.
        self_attn_out = join_heads(compute_attention(query, key, value, causal=True))
        x = x + self.dropout(self.self_out(packed.by_caption.pack(self_attn_out)))

        # One row per image with the words of all its captions: keys and values are not copied.
        query = packed.by_image.unpack(self.query(self.norm_cross(x)))  # (B, W, D)
        query = split_heads(query, self.heads)
        if attention_maps is not None:  # fused attention does not return its weights
            weights = compute_scores(query, image_kv[0]).softmax(-1).mean(1)  # (B, W, S)
            attention_maps.append(packed.by_image.pack(weights))
        cross_attn_out = join_heads(compute_attention(query, *image_kv))
        x = x + self.dropout(self.cross_out(packed.by_image.pack(cross_attn_out)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))

    def step(
        self, x: Tensor, image_kv: tuple[Tensor, Tensor], past_kv: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the layer's output (B, K, D) for one new word per beam `x` (B, K, D), and the
        keys and values of all words so far, each (B, K, H, t+1, E). No dropout: inference only.
        """
        batch, beams, width = x.shape
        qkv = self.qkv(self.norm_self(x)).view(batch, beams, 3, self.heads, 1, width // self.heads)
        query, key, value = qkv.unbind(2)  # (B, K, H, 1, E)
        key, value = torch.cat([past_kv[0], key], -2), torch.cat([past_kv[1], value], -2)
        # Beams become rows: torch's fused attention, the fastest for one word, wants four axes.
        parts = (part.flatten(0, 1) for part in (query, key, value))
        self_attn_out = F.scaled_dot_product_attention(*parts)
        x = x + self.self_out(self_attn_out.view(x.shape))

        # Here the beams are the queries of one image, which share its keys and values.
        query = self.query(self.norm_cross(x)).view(batch, beams, self.heads, width // self.heads)
        cross_attn_out = F.scaled_dot_product_attention(query.transpose(1, 2), *image_kv)
        cross_attn_out = cross_attn_out.transpose(1, 2).reshape(batch, beams, width)
        x = x + self.cross_out(cross_attn_out)
        return x + self.mlp(self.norm_mlp(x)), (key, value)


class Decoder(nn.Module):
    """Base class: projection of the image, word embedding, output weight, checks of the input."""

    def __init__(self, config: DecoderConfig, vocabulary: int, channels: int, positions: int):
        """For V = `vocabulary` words and images of S = `positions` with C = `channels` each."""
        super().__init__()
        self.longest, self.positions = config.seq_len, positions
        self.project = Linear(channels, config.d_model)
        self.embedding = nn.Embedding(vocabulary, config.d_model)
        # The output layer multiplies by the same matrix: with variance 1/D its logits start near
        # unit variance.
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.untied = None if config.tie_weights else nn.Parameter(self.embedding.weight.clone())
        self.dropout = Dropout(config.dropout)
        self.tagger = Tagger(config.tags, channels, config.d_model) if config.tags else None

    def add_tags(self, memory: Tensor, features: Tensor) -> Tensor:
        """Return memory (B, S + K, D): after the image positions the K tags, if there are any."""
        if self.tagger is None:
            return memory
        return torch.cat([memory, self.tagger(features, self.embedding).to(memory.dtype)], 1)

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output layer (V, D): the word embedding itself unless `untied`."""
        return self.embedding.weight if self.untied is None else self.untied

    def check_features(self, features: Tensor) -> None:
        """Raise UserError if `features` (B, S, C) have another S or C than the decoder."""
        expected = self.positions, self.project.in_features
        if features.shape[1:] != expected:
            raise UserError(
                f"features have (positions, channels) {tuple(features.shape[1:])}, but the decoder "
                f"was built for {expected}; use the image size and CNN it was trained with"
            )

    def mask_targets(self, tokens: Tensor) -> Tensor:
        """Return (M, T-1), True where the target in `tokens` (M, T) is a word or the end token.

        Raises UserError if a caption has more than `seq_len` words.
        """
        target_mask = tokens[:, 1:] != PAD
        if target_mask[:, self.longest + 1 :].any():
            raise UserError(
                f"a caption is longer than the decoder's {self.longest} words (--seq-len)"
            )
        return target_mask


class Transformer(Decoder):
    """Pre-norm transformer decoder (arXiv 1706.03762) with learned positions."""

    def __init__(self, config: DecoderConfig, vocabulary: int, channels: int, positions: int):
        super().__init__(config, vocabulary, channels, positions)
        width, self.heads = config.d_model, config.n_head
        self.norm_image = nn.LayerNorm(width)
        # Large beside the words' 0.02, because attention must be able to tell image positions
        # apart from the first step on, while their content is still untrained.
        self.image_position = nn.Parameter(torch.empty(positions, width).normal_(std=0.5))
        self.word_position = nn.Parameter(torch.empty(config.seq_len + 1, width).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_decode))
        self.norm = nn.LayerNorm(width)

    def encode(self, features: Tensor) -> Tensor:
        """Return memory (B, S + K, D), the projected image and tags, for features (B, S, C)."""
        self.check_features(features)
        memory = self.norm_image(self.project(features)) + self.image_position
        return self.dropout(self.add_tags(memory, features))

    def embed(self, tokens: Tensor, position: Tensor | int) -> Tensor:
        """Return the first layer's input (..., D) for `tokens` (...) at `position` in the caption.

        `position` has the shape of `tokens`, or is one number for all of them.
        """
        # Not multiplied by sqrt(D) as in arXiv 1706.03762: with a tied output layer the untrained
        # model would then predict the word it has just read.
        if not isinstance(position, Tensor):  # in an ONNX export the number is symbolic
            return self.dropout(self.embedding(tokens) + self.word_position.select(0, position))
        # Not word_position[position]: several CPU threads sum up the gradient of that in a random
        # order, and two runs would differ.
        place = self.word_position.index_select(0, position)
        return self.dropout(self.embedding(tokens) + place)

    def compute_logits(self, x: Tensor) -> Tensor:
        """Return logits (..., V) of the last layer's output (..., D)."""
        return linear(self.norm(x), self.output_weight)

    def forward(
        self, memory: Tensor, tokens: Tensor, owner: Tensor, attention: bool = False
    ) -> DecoderOutput:
        """Return logits (M, T-1, V) for `tokens` (M, T) by teacher forcing.

        `memory` (B, S, D); `owner` (M,) is the index of each caption's image, in any order.
        `tokens` and `owner` may stay on the CPU while `memory` is on a GPU: no step then waits for
        the GPU. Only real words are computed, never padding. With `attention`, the output also has
        the attention maps, averaged over layers and heads.
        """
        target_mask = self.mask_targets(tokens)
        packed = PackedWords(target_mask, owner, len(memory), memory.device)
        inputs = to_device(tokens[:, :-1][target_mask], memory.device)  # (N,)
        x = self.embed(inputs, packed.position)  # (N, D)
        maps: list[Tensor] | None = [] if attention else None
        for block in self.blocks:
            x = block(x, packed, block.project_kv(memory), maps)
        logits = packed.by_caption.unpack(self.compute_logits(x))
        if maps is None:
            return DecoderOutput(logits)
        attention_map = torch.stack(maps).mean(0)[:, : self.positions]
        return DecoderOutput(logits, packed.by_caption.unpack(attention_map))

    def start(self, memory: Tensor) -> State:
        """Return the state before the first word, for memory (B, S, D).

        `state.image`: each layer's keys and values of the image, computed once, never per word.
        `state.beam`: each layer's keys and values of the words so far, none yet.
        """
        # Copied into one piece each: read for every word, the two halves of one tensor, head by
        # head, take up to three times as long.
        pairs = (block.project_kv(memory) for block in self.blocks)
        image = tuple(tensor.contiguous() for pair in pairs for tensor in pair)
        batch, _, _, size = image[0].shape
        empty = memory.new_zeros(batch, 1, self.heads, 0, size)
        return State(image, (empty,) * (2 * len(self.blocks)))

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Return log-probabilities (B, K, V) after `token` (B, K), and the next state."""
        x = self.embed(token, state.beam[0].shape[-2])
        beam: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            pair = slice(2 * number, 2 * number + 2)
            x, past_kv = block.step(x, state.image[pair], state.beam[pair])
            beam += past_kv
        return self.compute_logits(x).log_softmax(-1), State(state.image, tuple(beam))


class LSTM(Decoder):
    """Show and Tell (arXiv 1411.4555): the LSTM reads the pooled image first, then the words.

    Words and image have width D, the LSTM has `fc_dim` units and a linear layer back to D before
    the output layer.
    """

    def __init__(self, config: DecoderConfig, vocabulary: int, channels: int, positions: int):
        super().__init__(config, vocabulary, channels, positions)
        between = config.dropout if config.n_decode > 1 else 0.0
        sizes = config.d_model, config.fc_dim, config.n_decode
        self.norm_image = nn.LayerNorm(config.d_model)
        self.lstm = nn.LSTM(*sizes, batch_first=True, dropout=between)
        self.output = Linear(config.fc_dim, config.d_model)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def encode(self, features: Tensor) -> Tensor:
        """Return memory (B, 1, D) for features (B, S, C): their mean, linear, norm and ReLU.

        Plus the mean of the tags, where there are any.
        """
        self.check_features(features)
        memory = self.norm_image(self.project(features.mean(1, keepdim=True))).relu()
        if self.tagger is not None:
            memory = memory + self.tagger(features, self.embedding).mean(1, keepdim=True)
        return self.dropout(memory)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the LSTM's input (..., D) for `tokens` (...)."""
        # The embedding has variance 1/D; scaled up, words are as large as the normalised image.
        return self.dropout(self.embedding(tokens) * self.embedding.embedding_dim**0.5)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of the LSTM's output (..., fc_dim)."""
        return linear(self.output(self.dropout(hidden)), self.output_weight, self.bias)

    def forward(
        self, memory: Tensor, tokens: Tensor, owner: Tensor, attention: bool = False
    ) -> DecoderOutput:
        """Return logits (M, T-1, V) for `tokens` (M, T) by teacher forcing; no attention.

        `memory` (B, 1, D) is read once per image; the image's captions, named by `owner` (M,),
        continue from that state. The LSTM does not run over padding.
        """
        target_mask = self.mask_targets(tokens)
        if not len(tokens):
            return DecoderOutput(memory.new_zeros(*target_mask.shape, len(self.bias)))
        # Longest first. torch would sort by itself, but on the GPU, and would wait for the result.
        lengths, order = target_mask.sum(1).sort(descending=True, stable=True)
        tokens, owner, target_mask = tokens[order, :-1], owner[order], target_mask[order]
        packed = PackedWords(target_mask, owner, len(memory), memory.device)
        _, state = self.lstm(memory)
        state = tuple(part.index_select(1, to_device(owner, memory.device)) for part in state)
        x = self.embed(to_device(tokens, memory.device))
        x = pack_padded_sequence(x, lengths.cpu(), batch_first=True)
        hidden, _ = pad_packed_sequence(
            self.lstm(x, state)[0], batch_first=True, total_length=target_mask.shape[1]
        )
        logits = self.compute_logits(packed.by_caption.pack(hidden))
        original_order = to_device(order.argsort(), memory.device)
        return DecoderOutput(packed.by_caption.unpack(logits)[original_order])

    def start(self, memory: Tensor) -> State:
        """Return the state after the image: h and c, each (B, 1, L, fc_dim), in `state.beam`."""
        _, state = self.lstm(memory)
        return State((), tuple(part.transpose(0, 1)[:, None] for part in state))

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Return log-probabilities (B, K, V) after `token` (B, K), and the next state."""
        x = self.embed(token).flatten(0, 1)[:, None]  # (B*K, 1, D)
        before = tuple(part.flatten(0, 1).transpose(0, 1).contiguous() for part in state.beam)
        hidden, after = self.lstm(x, before)
        beam = tuple(part.transpose(0, 1).unflatten(0, token.shape) for part in after)
        logits = self.compute_logits(hidden.view(*token.shape, -1))
        return logits.log_softmax(-1), State((), beam)


class AttentionLSTM(Decoder):
    """Show, Attend and Tell (arXiv 1502.03044): the LSTM attends to the image before each word.

    Additive soft attention (arXiv 1409.0473) gives a context vector, which is gated (section
    4.2.1). Word, hidden state and context predict the next word together (equation 7).
    """

    def __init__(self, config: DecoderConfig, vocabulary: int, channels: int, positions: int):
        super().__init__(config, vocabulary, channels, positions)
        width, hidden, self.layers = config.d_model, config.fc_dim, config.n_decode
        self.norm_image = nn.LayerNorm(width)
        self.key, self.query = Linear(width, width), Linear(hidden, width)
        self.score = Linear(width, 1)
        self.gate = Linear(hidden, width)
        self.first = Linear(width, 2 * hidden * self.layers)
        self.cells = nn.ModuleList(
            nn.LSTMCell(hidden if layer else 2 * width, hidden) for layer in range(self.layers)
        )
        self.hidden_out, self.seen_out = Linear(hidden, width), Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def encode(self, features: Tensor) -> Tensor:
        """Return memory (B, S + K, D), the projected image and tags, for features (B, S, C)."""
        self.check_features(features)
        return self.dropout(self.add_tags(self.norm_image(self.project(features)), features))

    def initial_state(self, memory: Tensor) -> tuple[Tensor, ...]:
        """Return h and c of each layer in turn, each (B, fc_dim), from the mean of the memory."""
        return self.first(memory.mean(1)).tanh().chunk(2 * self.layers, dim=-1)

    def attend(self, memory: Tensor, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the context (B, K, D) and the attention (B, K, S) for `hidden` (B, K, fc_dim).

        `keys` (B, S, D) is the image's part of the scores, computed once per image.
        """
        mixed = (keys[:, None] + self.query(hidden)[:, :, None]).tanh_()  # (B, K, S, D)
        attention = self.score(mixed)[..., 0].softmax(-1)
        return self.gate(hidden).sigmoid() * (attention @ memory), attention

    def read_word(
        self, x: Tensor, state: tuple[Tensor, ...], memory: Tensor, keys: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return the state after one more word `x` (B, K, D), the context and the attention.

        `state` has h and c of each layer in turn, each (B, K, fc_dim).
        """
        context, attention = self.attend(memory, keys, state[-2])
        words = x * x.shape[-1] ** 0.5  # as large as the normalised image, see LSTM.embed
        x, after = torch.cat([words, context], -1).flatten(0, 1), []
        for layer, cell in enumerate(self.cells):
            before = (part.flatten(0, 1) for part in state[2 * layer : 2 * layer + 2])
            x, c = cell(self.dropout(x) if layer else x, tuple(before))
            after += [x, c]
        return tuple(part.unflatten(0, words.shape[:2]) for part in after), context, attention

    def compute_logits(self, x: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Return logits (..., V) from the last word (..., D), h (..., fc_dim), context (..., D)."""
        x = x + self.hidden_out(self.dropout(hidden)) + self.seen_out(context)
        return linear(self.dropout(x.tanh()), self.output_weight, self.bias)

    def forward(
        self, memory: Tensor, tokens: Tensor, owner: Tensor, attention: bool = False
    ) -> DecoderOutput:
        """Return logits (M, T-1, V) and attention (M, T-1, S) by teacher forcing.

        `memory` (B, S, D), `tokens` (M, T), `owner` (M,) the index of each caption's image.
        """
        target_mask = self.mask_targets(tokens)
        if not len(tokens):
            return DecoderOutput(memory.new_zeros(*target_mask.shape, len(self.bias)))
        # Longest first: the captions that are still running are then always the first rows, and
        # no step works on padding.
        lengths, order = target_mask.sum(1).sort(descending=True, stable=True)
        steps = torch.arange(target_mask.shape[1], device=lengths.device)
        running = (lengths[:, None] > steps).sum(0)  # (T-1,): captions that have a word there
        words = self.dropout(self.embedding(to_device(tokens[order, :-1], memory.device)))
        owner = to_device(owner[order], memory.device)
        keys = self.key(memory).index_select(0, owner)
        image = memory.index_select(0, owner)
        state = tuple(part.index_select(0, owner)[:, None] for part in self.initial_state(memory))
        outputs = []  # of each step: hidden, context and attention of the captions that run
        for position, count in enumerate(running.tolist()):
            if not count:
                break
            x, before = words[:count, position, None], tuple(part[:count] for part in state)
            state, *output = self.read_word(x, before, image[:count], keys[:count])
            outputs.append((state[-2], *output))
        hidden, context, weights = (torch.cat(parts)[:, 0] for parts in zip(*outputs, strict=True))
        # One step after another, these are the N words of the grid (T-1, M), row by row.
        columns = target_mask[order].T
        places = to_device(columns.flatten().nonzero()[:, 0], memory.device)
        grid = Grid(*columns.shape, places)
        logits = self.compute_logits(grid.pack(words.transpose(0, 1)), hidden, context)
        original_order = to_device(order.argsort(), memory.device)
        return DecoderOutput(
            grid.unpack(logits).transpose(0, 1)[original_order],
            grid.unpack(weights[:, : self.positions]).transpose(0, 1)[original_order],
        )

    def start(self, memory: Tensor) -> State:
        """Return the state before the first word: memory and its keys; h and c per beam."""
        beam = tuple(part[:, None] for part in self.initial_state(memory))
        return State((memory, self.key(memory)), beam)

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Return log-probabilities (B, K, V) after `token` (B, K), and the next state."""
        x = self.dropout(self.embedding(token))
        beam, context, _ = self.read_word(x, state.beam, *state.image)
        log_probs = self.compute_logits(x, beam[-2], context).log_softmax(-1)
        return log_probs, State(state.image, beam)


DECODERS: dict[str, Callable[..., Decoder]] = {
    "transformer": Transformer,
    "lstm": LSTM,
    "attention-lstm": AttentionLSTM,
}


def build_decoder(
    config: DecoderConfig, *, vocabulary: int, channels: int, positions: int
) -> Decoder:
    """Return the decoder named in `config`, for V words and images of S positions of C channels."""
    if config.decoder not in DECODERS:
        known = ", ".join(DECODERS)
        raise UserError(f"decoder {config.decoder!r} is not known; choose from {known}")
    return DECODERS[config.decoder](config, vocabulary, channels, positions)
