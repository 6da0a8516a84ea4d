"""Every decoder in the table: steps against teacher forcing, and invariances.

B images · S image positions · C backbone channels · K beams · M captions in a batch · T words
"""

import math
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from decoder import DECODERS, DecoderConfig, build_decoder
from decoding import beam_search, greedy, sample
from losses import cross_entropy
from util.files import IDENTITY
from vocabulary import END, PAD, START

WORDS, CHANNELS, POSITIONS, LONGEST = 23, 12, 6, 9
SIZES = {"d_model": 32, "n_decode": 2, "n_head": 4, "fc_dim": 48, "seq_len": LONGEST}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def build(name: str, seed: int = 0, **changes) -> nn.Module:
    """Return a small decoder in eval mode whose captions differ from image to image."""
    torch.manual_seed(seed)
    config = DecoderConfig(decoder=name, **{**SIZES, **changes})
    decoder = build_decoder(config, vocabulary=WORDS, channels=CHANNELS, positions=POSITIONS)
    with torch.no_grad():  # larger weights, so that a wrong word changes the result
        for parameter in decoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        if decoder.tagger:
            decoder.tagger.names.random_(WORDS)
    return decoder.eval()


@pytest.fixture(params=DECODERS)
def name(request) -> str:
    return request.param


@pytest.fixture(params=[0, 3], ids=["", "tags"])
def decoder(name, request) -> nn.Module:
    return build(name, tags=request.param)


def features(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, POSITIONS, CHANNELS, generator=torch.Generator().manual_seed(seed))


def captions(lengths: tuple[int, ...], seed: int = 2) -> Tensor:
    """Return tokens (M, T) of captions with that many words each."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.tensor([START, *torch.randint(4, WORDS, (length,), generator=generator), END])
        for length in lengths
    ]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


# Seven captions of image 0, none of image 1, one of image 2, two of image 3.
LENGTHS = (3, 9, 1, 5, 5, 2, 8, 4, 7, 1)
OWNER = torch.tensor([0] * 7 + [2, 3, 3])
IMAGES = 4


def log_probs(decoder, memory, tokens, owner) -> Tensor:
    """Return teacher forcing's log-probabilities (M, T-1, V), zero at padding."""
    scores = decoder(memory, tokens, owner).logits.log_softmax(-1)
    return scores.masked_fill((tokens[:, 1:] == PAD)[..., None], 0)


# ---- two ways, one result --------------------------------------------------------------------


@torch.no_grad()
def test_steps_equal_teacher_forcing(decoder):
    """Three beams an image, each on another caption, word by word."""
    tokens = captions((LONGEST,) * 6)
    owner = torch.tensor([0, 0, 0, 1, 1, 1])
    memory = decoder.encode(features(2))
    expected = log_probs(decoder, memory, tokens, owner).view(2, 3, LONGEST + 1, WORDS)
    rows = tokens.view(2, 3, -1)
    state = decoder.start(memory)
    first, state = decoder.step(rows[:, :1, 0], state)
    torch.testing.assert_close(first.expand(-1, 3, -1), expected[:, :, 0], **CLOSE)
    state = state.reorder(torch.zeros(2, 3, dtype=torch.long))
    for position in range(1, LONGEST + 1):
        found, state = decoder.step(rows[:, :, position], state)
        torch.testing.assert_close(found, expected[:, :, position], **CLOSE)


@torch.no_grad()
def test_reordered_beams_keep_their_own_past(decoder):
    tokens = captions((4, 4, 4))
    memory = decoder.encode(features(1))
    expected = log_probs(decoder, memory, tokens, torch.zeros(3, dtype=torch.long))
    state = decoder.start(memory).reorder(torch.zeros(1, 3, dtype=torch.long))
    order = [0, 1, 2]
    for position in range(5):
        found, state = decoder.step(tokens[order, position][None], state)
        torch.testing.assert_close(found[0], expected[order, position], **CLOSE)
        turn = [2, 0, 1]
        order, state = [order[place] for place in turn], state.reorder(torch.tensor([turn]))


METHODS = {
    "greedy": lambda decoder, memory: greedy(decoder, memory, max_words=LONGEST),
    "sample": lambda decoder, memory: sample(
        decoder, memory, max_words=LONGEST, n=3, generator=torch.Generator().manual_seed(0)
    ),
    "beam": lambda decoder, memory: beam_search(
        decoder, memory, max_words=LONGEST, beam_size=4, n=3, length_penalty=0.7
    ),
    "unrepeated": lambda decoder, memory: beam_search(
        decoder, memory, max_words=LONGEST, beam_size=3, no_repeat_ngram=2
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_log_prob_of_a_decoded_caption_equals_teacher_forcing(decoder, method):
    memory = decoder.encode(features(5))
    decoded = method(decoder, memory)
    count, n, _ = decoded.tokens.shape
    tokens = nn.functional.pad(decoded.tokens.flatten(0, 1), (1, 0), value=START)
    scores = log_probs(decoder, memory, tokens, torch.arange(count).repeat_interleave(n))
    expected = scores.gather(-1, tokens[:, 1:, None]).sum((1, 2)).view(count, n)
    torch.testing.assert_close(decoded.log_prob, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("method", [METHODS["greedy"], METHODS["beam"]], ids=["greedy", "beam"])
def test_captions_of_an_image_do_not_depend_on_the_batch(decoder, method):
    inputs = features(5)
    together = method(decoder, decoder.encode(inputs))
    for row in range(5):
        alone = method(decoder, decoder.encode(inputs[row : row + 1]))
        length = alone.tokens.shape[-1]
        assert torch.equal(alone.tokens[0], together.tokens[row, :, :length])
        assert not together.tokens[row, :, length:].any()
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[row], **CLOSE)


@torch.no_grad()
def test_the_score_of_a_caption_does_not_depend_on_the_batch(decoder):
    """An image with none, one, two or seven captions; captions of one word and of nine."""
    tokens, memory = captions(LENGTHS), decoder.encode(features(IMAGES))
    together = log_probs(decoder, memory, tokens, OWNER)
    for row, owner in enumerate(OWNER.tolist()):
        own = tokens[row : row + 1, : LENGTHS[row] + 2]
        alone = log_probs(decoder, memory[owner : owner + 1], own, torch.tensor([0]))
        torch.testing.assert_close(together[row : row + 1, : own.shape[1] - 1], alone, **CLOSE)


# ---- invariances --------------------------------------------------------------------------------


@torch.no_grad()
def test_the_order_of_captions_does_not_matter(decoder):
    tokens, memory = captions(LENGTHS), decoder.encode(features(IMAGES))
    expected = log_probs(decoder, memory, tokens, OWNER)
    order = torch.randperm(len(OWNER), generator=torch.Generator().manual_seed(5))
    assert OWNER[order].diff().min() < 0  # unsorted
    shuffled = log_probs(decoder, memory, tokens[order], OWNER[order])
    torch.testing.assert_close(shuffled, expected[order], **CLOSE)


def gradients(decoder, inputs, tokens, owner) -> dict[str, Tensor]:
    decoder.zero_grad()
    loss = cross_entropy(decoder(decoder.encode(inputs), tokens, owner).logits, tokens, 0.1)
    (loss.objective / loss.words).backward()
    return {
        key: each.grad.clone() for key, each in decoder.named_parameters() if each.requires_grad
    }


@pytest.mark.parametrize("more", (1, 30))
def test_padding_never_changes_the_loss_or_a_gradient(decoder, more):
    """Padding may even be longer than the longest caption."""
    tokens, inputs = captions(LENGTHS), features(IMAGES)
    expected = gradients(decoder, inputs, tokens, OWNER)
    padded = nn.functional.pad(tokens, (0, more), value=PAD)
    for key, found in gradients(decoder, inputs, padded, OWNER).items():
        torch.testing.assert_close(found, expected[key], msg=lambda text, key=key: f"{key}: {text}")


@torch.no_grad()
def test_logits_are_zero_at_padding_and_have_the_documented_shape(decoder):
    tokens = captions(LENGTHS)
    output = decoder(decoder.encode(features(IMAGES)), tokens, OWNER)
    assert output.logits.shape == (len(LENGTHS), tokens.shape[1] - 1, WORDS)
    assert not output.logits[tokens[:, 1:] == PAD].any()
    assert output.logits[tokens[:, 1:] != PAD].any(-1).all()
    if output.attention is not None:
        assert output.attention.shape == (len(LENGTHS), tokens.shape[1] - 1, POSITIONS)


@torch.no_grad()
def test_a_word_does_not_depend_on_later_words(decoder):
    tokens, memory = captions((6,)), decoder.encode(features(1))
    owner = torch.tensor([0])
    changed = tokens.clone()
    changed[0, 4] = (tokens[0, 4] + 1) % WORDS if tokens[0, 4] < WORDS - 1 else 4
    before, after = (decoder(memory, each, owner).logits for each in (tokens, changed))
    torch.testing.assert_close(before[:, :4], after[:, :4], **CLOSE)
    assert not torch.allclose(before[:, 4], after[:, 4], atol=1e-3)


@torch.no_grad()
def test_every_image_position_and_every_earlier_word_matters(decoder):
    tokens, inputs = captions((6,)), features(1)
    owner = torch.tensor([0])
    before = decoder(decoder.encode(inputs), tokens, owner).logits
    for position in range(POSITIONS):
        changed = inputs.clone()
        changed[0, position] += 1
        after = decoder(decoder.encode(changed), tokens, owner).logits
        assert not torch.allclose(before, after, atol=1e-5)
    changed = tokens.clone()
    changed[0, 1] = 4 if tokens[0, 1] != 4 else 5
    after = decoder(decoder.encode(inputs), changed, owner).logits
    assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-5)


@torch.no_grad()
def test_a_batch_of_images_without_captions_gives_empty_logits(decoder):
    tokens = torch.zeros(0, 5, dtype=torch.long)
    output = decoder(decoder.encode(features(2)), tokens, tokens[:, 0])
    assert output.logits.shape == (0, 4, WORDS)


@torch.no_grad()
def test_the_image_is_not_copied_for_its_beams(decoder):
    state = decoder.start(decoder.encode(features(2)))
    image = state.image
    state = state.reorder(torch.zeros(2, 5, dtype=torch.long))
    for _ in range(3):
        scores, state = decoder.step(torch.full((2, 5), 4), state)
        assert scores.shape == (2, 5, WORDS)
        assert all(tensor.shape[:2] == (2, 5) for tensor in state.beam)
    for before, after in zip(image, state.image, strict=True):
        assert after.data_ptr() == before.data_ptr() and len(after) == 2
        # Attention to an image takes up to three times as long where its parts lie scattered.
        assert after.is_contiguous()


@torch.no_grad()
def test_steps_return_log_probabilities(decoder):
    scores, _ = decoder.step(torch.full((3, 1), START), decoder.start(decoder.encode(features(3))))
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(3, 1))


# ---- learning --------------------------------------------------------------------------------


def test_a_small_decoder_memorises_four_captions(name):
    decoder = build(name, d_model=32, n_decode=1, dropout=0.1).train()
    inputs, tokens, owner = features(4), captions((3, 9, 5, 6)), torch.arange(4)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for step in range(400):
        torch.manual_seed(step)
        loss = cross_entropy(decoder(decoder.encode(inputs), tokens, owner).logits, tokens)
        optimizer.zero_grad()
        (loss.objective / loss.words).backward()
        optimizer.step()
        if loss.nll / loss.words < 0.02:
            break
    decoder.eval()
    with torch.no_grad():
        memory = decoder.encode(inputs)
        for decoded in (
            greedy(decoder, memory, max_words=LONGEST),
            beam_search(decoder, memory, max_words=LONGEST, beam_size=3, length_penalty=0.7),
        ):
            assert torch.equal(decoded.tokens[:, 0], tokens[:, 1:])
            assert (decoded.log_prob > math.log(0.3)).all()


def test_every_parameter_gets_a_gradient(decoder):
    for key, slope in gradients(decoder, features(IMAGES), captions(LENGTHS), OWNER).items():
        assert slope.isfinite().all() and slope.any(), key


def test_dropout_is_on_in_training_and_off_in_eval_mode(name):
    decoder = build(name, dropout=0.5)
    tokens, inputs = captions(LENGTHS), features(IMAGES)

    def scores():
        return decoder(decoder.encode(inputs), tokens, OWNER).logits

    with torch.no_grad():
        assert torch.equal(scores(), scores())
        decoder.train()
        assert not torch.allclose(scores(), scores(), atol=1e-3)
        without = build(name, dropout=0.0).train()
        without.load_state_dict(decoder.state_dict())
        training = without(without.encode(inputs), tokens, OWNER).logits
        torch.testing.assert_close(training, decoder.eval() and scores())


def test_no_weight_is_stored_twice(decoder):
    places = [tensor.untyped_storage().data_ptr() for tensor in decoder.state_dict().values()]
    assert len(set(places)) == len(places)
    keys = [key for key, each in decoder.state_dict().items() if each.shape == (WORDS, 32)]
    assert len(keys) == 1  # the embedding is the output layer too, by default


def test_the_output_layer_of_a_transformer_is_its_embedding():
    decoder = build("transformer")
    hidden = torch.randn(2, 32)
    expected = decoder.norm(hidden) @ decoder.embedding.weight.T
    torch.testing.assert_close(decoder.compute_logits(hidden), expected)


@torch.no_grad()
def test_an_untied_output_layer_is_a_weight_of_its_own(name):
    decoder, tokens = build(name, tie_weights=False), captions(LENGTHS)
    assert decoder.state_dict().keys() - build(name).state_dict().keys() == {"untied"}
    memory, bias = decoder.encode(features(IMAGES)), getattr(decoder, "bias", torch.zeros(()))
    bias = bias * (tokens[:, 1:] != PAD)[..., None]

    def logits() -> Tensor:
        return decoder(memory, tokens, OWNER).logits - bias

    before = logits()
    decoder.untied *= 2
    torch.testing.assert_close(logits(), 2 * before)  # it is used for nothing else


def test_an_image_without_captions_gets_no_gradient(decoder):
    inputs = features(IMAGES).requires_grad_()
    tokens = captions(LENGTHS)
    loss = cross_entropy(decoder(decoder.encode(inputs), tokens, OWNER).logits, tokens)
    (slope,) = torch.autograd.grad(loss.objective, inputs)
    assert [bool(each.any()) for each in slope] == [True, False, True, True]


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ("d_model", "n_decode", "n_head", "fc_dim", "seq_len"))
@pytest.mark.parametrize("value", (0, -1))
def test_a_size_below_one_is_named(flag, value):
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} {value} must be >= 1"):
        DecoderConfig(**{flag: value}).validate()


def test_a_switch_is_true_or_false():
    with pytest.raises(ValueError, match="--tie-weights 1 must be true or false"):
        DecoderConfig(tie_weights=1).validate()


@pytest.mark.parametrize(("flag", "most"), [("n_decode", 128), ("seq_len", 1000)])
def test_a_size_that_would_take_any_amount_of_memory_is_named(flag, most):
    DecoderConfig(**{flag: most}).validate()
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} {most + 1} must be at most"):
        DecoderConfig(**{flag: most + 1}).validate()


def test_all_fields_but_dropout_make_another_model():
    kept = {each.name for each in fields(DecoderConfig) if each.metadata == IDENTITY}
    assert {each.name for each in fields(DecoderConfig)} - kept == {"dropout"}


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(ValueError, match="--d-model 30 is not divisible by --n-head 4"):
        DecoderConfig(d_model=30, n_head=4).validate()


@pytest.mark.parametrize("dropout", (-0.1, 1.0, math.nan))
def test_a_dropout_out_of_range_is_named(dropout):
    with pytest.raises(ValueError, match=f"--dropout {dropout} must be"):
        DecoderConfig(dropout=dropout).validate()


def test_an_unknown_decoder_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"decoder 'gpt' is not known; choose from .*transformer"):
        build("gpt")


def test_the_flag_offers_all_decoders_in_the_table():
    assert get_args(get_type_hints(DecoderConfig)["decoder"]) == tuple(DECODERS)


def test_features_of_another_size_or_cnn_are_refused(decoder):
    for shape in ((2, POSITIONS + 1, CHANNELS), (2, 1, CHANNELS), (2, POSITIONS, CHANNELS + 1)):
        with pytest.raises(ValueError, match=r"features have .* but the decoder was built for"):
            decoder.encode(torch.zeros(shape))


def test_a_caption_may_be_as_long_as_the_decoder_allows_and_no_longer(decoder):
    memory, owner = decoder.encode(features(1)), torch.tensor([0])
    assert decoder(memory, captions((LONGEST,)), owner).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"longer than the decoder's {LONGEST} words"):
        decoder(memory, captions((LONGEST + 1,)), owner)


@pytest.mark.parametrize("kind", ["transformer", "lstm", "attention-lstm"])
def test_gradients_are_the_same_each_time_on_several_threads(kind):
    """Threads that add up one gradient in a random order would make runs differ."""
    torch.manual_seed(0)
    config = DecoderConfig(decoder=kind, d_model=64, n_head=2, n_decode=1, fc_dim=64, dropout=0.0)
    decoder = build_decoder(config, vocabulary=50, channels=32, positions=9)
    tokens, owner = torch.randint(4, 50, (160, 20)), torch.arange(32).repeat_interleave(5)
    features, found, threads = torch.randn(32, 9, 32), [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(4):
            decoder.zero_grad()
            decoder(decoder.encode(features), tokens, owner).logits.square().mean().backward()
            found.append([weights.grad.clone() for weights in decoder.parameters()])
    finally:
        torch.set_num_threads(threads)
    for again in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], again, strict=True))


# ---- attention maps ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transformer", "attention-lstm"])
@torch.no_grad()
def test_attention_sums_to_one_and_does_not_change_the_logits(kind):
    decoder, tokens = build(kind), captions(LENGTHS)
    memory = decoder.encode(features(IMAGES))
    output = decoder(memory, tokens, OWNER, attention=True)
    torch.testing.assert_close(output.logits, decoder(memory, tokens, OWNER).logits)
    real = (tokens[:, 1:] != PAD).float()
    torch.testing.assert_close(output.attention.sum(-1), real)
    assert output.attention.shape == (len(LENGTHS), tokens.shape[1] - 1, POSITIONS)


@pytest.mark.parametrize("kind", ["transformer", "attention-lstm"])
@torch.no_grad()
def test_attention_follows_permuted_image_positions(kind):
    decoder, tokens = build(kind), captions(LENGTHS)
    memory, order = decoder.encode(features(IMAGES)), torch.tensor([3, 1, 5, 0, 2, 4])
    before = decoder(memory, tokens, OWNER, attention=True).attention
    after = decoder(memory[:, order], tokens, OWNER, attention=True).attention
    torch.testing.assert_close(after, before[..., order], **CLOSE)
    assert (before.amax(-1) - before.amin(-1))[tokens[:, 1:] != PAD].min() > 1e-3
