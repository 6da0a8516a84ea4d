"""On a GPU, which is only pretended here: everything is on one device, and nothing waits for it
but what has to.
"""

import contextlib
from pathlib import Path

import pytest
import torch
from helpers.pretend_gpu import pretend_gpu
from helpers.tiny import BATCH, take_step, tiny_trainer

import losses
from decoder import DECODERS, DecoderConfig, build_decoder
from decoding import METHODS, DecodingConfig, decode
from encoder import Encoder, prepare_encoder
from evaluate import SplitBatch, batch_loss
from losses import Reward
from readers import Record
from trainer import Trainer

RECORDS = [Record("one", Path("one.png"), ("a b",)), Record("two", Path("two.png"), ("b",))]


@pytest.fixture
def trained_without_gradients(monkeypatch):
    monkeypatch.setattr(Trainer, "autocast", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)


def test_the_pretended_gpu_refuses_and_waits_as_a_real_one():
    with pretend_gpu() as gpu:
        one = torch.ones(2, device="cuda")
        assert (one + one).device.type == "cuda" and gpu.waits == []
        with pytest.raises(RuntimeError, match="tensors on the GPU and the CPU"):
            one + torch.ones(2)
        assert (one.nonzero().shape, one.tolist(), float(one.sum())) == ((2, 1), [1, 1], 2)
        assert one[one > 0].shape == (2,) and len(gpu.waits) == 4


def test_images_are_encoded_on_the_gpu():
    torch.manual_seed(0)
    encoder, pixels = Encoder("tiny").eval(), torch.rand(2, 3, 64, 64)
    expected = prepare_encoder(encoder, "cpu")(pixels)
    with pretend_gpu() as gpu, torch.no_grad():
        found = prepare_encoder(encoder, "cuda")(pixels)
        assert found.device.type == "cuda" and gpu.waits == []
        torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("method", METHODS)
def test_decoding_waits_once_for_each_word(method, decoder):
    """To learn which captions are complete; a second time only for an image that leaves."""
    words = 20
    config = DecodingConfig(method, beam_size=3, min_words=words)
    sizes = DecoderConfig(decoder, d_model=8, n_head=2, n_decode=1, fc_dim=8, seq_len=words)
    torch.manual_seed(0)
    model = build_decoder(sizes, vocabulary=12, channels=4, positions=4).eval()
    features = torch.rand(3, 4, 4)
    with torch.no_grad():
        expected = decode(model, model.encode(features), config, longest=words)
        with pretend_gpu() as gpu:
            memory = model.to("cuda").encode(features.to("cuda"))
            found = decode(model, memory, config, longest=words)
            assert found.tokens.device.type == "cuda"
            assert words < len(gpu.waits) <= words + 4
            assert found.tokens.tolist() == expected.tokens.tolist()


def test_a_training_step_waits_for_nothing(trained_without_gradients):
    with pretend_gpu() as gpu:
        trainer = tiny_trainer("transformer", "cuda", grad_clip=1.0)
        assert trainer.device.type == "cuda"
        gpu.waits.clear()
        take_step(trainer, BATCH)
        assert gpu.waits == []


def test_a_self_critical_step_waits_for_its_samples_alone(trained_without_gradients, monkeypatch):
    sample, waits = losses.sample, []

    def count(*args, **how):
        found = sample(*args, **how)
        waits.append(len(gpu.waits))
        return found

    monkeypatch.setattr(losses, "sample", count)
    with pretend_gpu() as gpu:
        trainer = tiny_trainer("transformer", "cuda", grad_clip=1.0)
        trainer.reward = Reward(RECORDS, trainer.model.vocabulary)
        trainer.start_stage(critical=True)
        take_step(trainer, BATCH)
        samples_are_copied = losses_are_checked = 1
        assert len(gpu.waits) - waits[0] == samples_are_copied + losses_are_checked


def test_the_loss_of_validation_waits_once_for_each_batch():
    with pretend_gpu() as gpu:
        model = tiny_trainer("transformer", "cuda").model.eval()
        features = model.encoder(BATCH.inputs.to("cuda"))
        gpu.waits.clear()
        assert batch_loss(model, SplitBatch(RECORDS, [features], None))[1] == 5
        assert len(gpu.waits) == 1
