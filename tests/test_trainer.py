"""What the training loop keeps between steps: rates, average of weights, patience, state."""

import contextlib
import copy
import math

import pytest
import torch
from helpers.tiny import BATCH, take_step, tiny_model, tiny_trainer

from config import TrainConfig
from dataset import Batch
from decoder import DECODERS
from trainer import Trainer
from util.files import UserError
from util.layers import Dropout
from vocabulary import PAD


def test_the_learning_rate_rises_then_falls_to_nothing():
    trainer = tiny_trainer(warmup=0.1, epochs=1)
    rates = []
    for trainer.batch in range(100):
        rates.append(trainer.relative_rate())
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


def test_without_an_average_the_weights_themselves_are_lent():
    trainer = tiny_trainer(ema=0.0)
    take_step(trainer, BATCH)
    for name, tensor in trainer.model.trainable_state():
        assert torch.equal(trainer.average[name], tensor)


def test_the_average_follows_its_formula_and_is_lent_and_given_back():
    trainer = tiny_trainer(ema=0.9)
    expected = {name: tensor.clone() for name, tensor in trainer.average.items()}
    for step in range(3):
        take_step(trainer, BATCH)
        decay = min(0.9, (2 + step) / (11 + step))
        for name, tensor in trainer.model.trainable_state():
            if tensor.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * tensor
    own = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with trainer.averaged_model() as model:
        name = "decoder.embedding.weight"
        torch.testing.assert_close(model.state_dict()[name], expected[name])
        assert not model.training
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, own[name])


def test_patience_counts_epochs_since_the_best():
    trainer = tiny_trainer(patience=2)
    for scores, over in (([0.1, 0.3, 0.2], False), ([0.3, 0.2, 0.1], True), ([], False)):
        trainer.rows = [{"epoch": n, "CIDEr": score} for n, score in enumerate(scores, 1)]
        assert trainer.out_of_patience() == over


def test_patience_counts_neither_epoch_0_nor_the_first_stage():
    trainer = tiny_trainer(patience=2)
    trainer.rows = [{"epoch": n, "CIDEr": score} for n, score in enumerate([0.9, 0.1, 0.2, 0.3])]
    assert not trainer.out_of_patience()
    assert trainer.best_row()["epoch"] == 0 and trainer.best_score() == 0.9
    trainer.rows += [{"epoch": 4, "CIDEr": 0.2}, {"epoch": 5, "CIDEr": 0.1}]
    assert trainer.out_of_patience()
    trainer.first_epoch = 3
    assert not trainer.out_of_patience()


def test_every_learning_parameter_is_in_one_group_and_vectors_do_not_decay():
    trainer = tiny_trainer()
    grouped = [each for group in trainer.optimizer.param_groups for each in group["params"]]
    assert len(grouped) == len(list(trainer.model.parameters()))
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] > 0) == (parameter.dim() > 1)


@pytest.mark.parametrize(("trained", "cnn_lr"), [("last", 1e-5), ("all", 1e-3)])
def test_a_cnn_that_is_finetuned_and_each_stage_have_rates_of_their_own(trained, cnn_lr):
    trainer = tiny_trainer(lr=1e-3, cnn_lr=1e-5, scst_lr=1e-4)
    trainer.model.encoder.trained = trained
    for critical, scale in ((False, 1.0), (True, 0.1)):
        trainer.start_stage(critical)
        peaks = {p: g["peak"] for g in trainer.optimizer.param_groups for p in g["params"]}
        assert {peaks[each] for each in trainer.model.encoder.parameters()} == {cnn_lr * scale}
        assert {peaks[each] for each in trainer.model.decoder.parameters()} == {1e-3 * scale}


def test_an_interrupted_epoch_goes_on_after_the_images_it_has_had_with_another_batch_size():
    first, second = tiny_trainer(batch_size=4), tiny_trainer(batch_size=8)
    first.batch = 5
    second.load(first.state())
    assert second.batch == 2  # 16 of 20 images are skipped, 4 come again
    assert second.relative_rate() > 0


def test_every_part_of_a_step_counts_by_its_words_whatever_parts_are_empty():
    """As on a rank that has no image in a step."""
    empty = Batch(
        [], torch.empty(0), torch.empty(0, 1, dtype=torch.long), torch.empty(0, dtype=torch.long)
    )
    plain, parted = tiny_trainer(amp=False), tiny_trainer(amp=False)
    take_step(plain, BATCH)
    take_step(parted, empty, BATCH, empty)
    for name, tensor in plain.trainable.items():
        torch.testing.assert_close(parted.trainable[name], tensor)
    assert parted.words == plain.words == 5


def test_the_sums_of_an_interrupted_epoch_go_on():
    first, second = tiny_trainer(scst_epochs=1), tiny_trainer(scst_epochs=1)
    take_step(first, BATCH)
    first.add_rewards(torch.tensor([[1.0, 2.0, 6.0]]))
    second.load(first.state())
    assert second.sums == {"rewarded": 9.0, "baselines": 9.0, "samples": 3}
    assert second.total_sums() == first.total_sums() and second.nll > 0
    assert second.epoch_row()["train_loss"] == first.epoch_row()["train_loss"]


def test_a_state_of_another_version_is_named():
    trainer = tiny_trainer()
    state = trainer.state()
    state["weights"].popitem()
    with pytest.raises(ValueError, match="begun by another version of the project"):
        trainer.load(state)


@pytest.mark.parametrize("mixed", [False, True])
def test_mixed_precision_learns_the_same_as_full(mixed, monkeypatch):
    monkeypatch.setattr("trainer.multiplies_bfloat16", lambda device: mixed)
    trainer = tiny_trainer(ema=0.0, lr=0.01, label_smoothing=0.0)
    for _ in range(40):
        take_step(trainer, BATCH)
    first = float(trainer.nll)
    for _ in range(40):
        take_step(trainer, BATCH)
    assert float(trainer.nll) - first < 0.7 * first
    assert all(weights.dtype == torch.float32 for weights in trainer.model.parameters())


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_step_waits_for_nothing_that_the_device_works_out(decoder, monkeypatch):
    """The "meta" device works out no value; what wants one raises, as it would wait for a GPU.

    Words and their owners are on the CPU, as the loader gives them.
    """
    trainer = tiny_trainer(decoder, "meta", grad_clip=1.0)
    monkeypatch.setattr(Trainer, "autocast", lambda self: contextlib.nullcontext())
    before = trainer.step_number
    take_step(trainer, BATCH)
    take_step(trainer, BATCH)
    assert trainer.step_number == before + 2
    with pytest.raises((NotImplementedError, RuntimeError)):
        trainer.check_finite()  # which looks at the losses: it would wait


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_step_never_waits_for_the_gpu():
    trainer = tiny_trainer("transformer", "cuda", grad_clip=1.0)
    take_step(trainer, BATCH)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(trainer, BATCH)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_machine_that_cannot_compile_says_so(monkeypatch):
    def broken(function, **how):
        raise RuntimeError("no working C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"--compile .* \(no working C\+\+ compiler\); leave"):
        tiny_trainer(compile=True)


# --- small mistakes that would change training without a word


def test_gradients_are_scaled_to_the_largest_norm():
    free, clipped = tiny_trainer(grad_clip=0.0), tiny_trainer(grad_clip=1e-3)
    norms = []
    for trainer in (free, clipped):
        take_step(trainer, BATCH)
        norms.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm())
    assert norms[0] > 0.1
    assert float(norms[1]) == pytest.approx(1e-3, rel=1e-3)


def test_a_resumed_run_takes_its_rates_and_decay_from_the_command_line():
    first = tiny_trainer(lr=1e-3, weight_decay=0.1, warmup=0.0)
    take_step(first, BATCH)
    second = tiny_trainer(lr=5e-4, weight_decay=0.2, warmup=0.0)
    second.load(first.state())
    second.set_learning_rate()
    for group in second.optimizer.param_groups:
        assert group["lr"] == pytest.approx(5e-4, rel=1e-3)
        assert group["weight_decay"] in (0.2, 0.0)
    steps = [float(state["step"]) for state in second.optimizer.state.values()]
    assert set(steps) == {1.0}  # but the moments are the run's


def test_each_step_and_each_process_draws_numbers_of_its_own(monkeypatch):
    """Two processes with the same dropout would train on half of the noise."""
    trainer, drawn = tiny_trainer(), {}
    for rank in range(3):
        monkeypatch.setattr("util.distributed.rank", lambda rank=rank: rank)
        for trainer.step_number in range(3):
            trainer.seed_step()
            drawn[rank, trainer.step_number] = tuple(torch.rand(4).tolist())
    assert len(set(drawn.values())) == 9
    trainer.seed_step()
    assert tuple(torch.rand(4).tolist()) == drawn[2, 2]  # the same again


def test_the_second_stage_warms_up_from_its_own_first_step():
    trainer = tiny_trainer(epochs=3, scst_epochs=2, warmup=0.1)  # of 200 steps
    trainer.epoch = 3
    trainer.start_stage(critical=True)
    assert trainer.relative_rate() == pytest.approx(1 / 20)
    trainer.batch = 19
    assert trainer.relative_rate() == pytest.approx(1.0)
    trainer.epoch, trainer.batch = 4, 99
    assert trainer.relative_rate() < 0.001


# --- states of other runs


@pytest.fixture(scope="module")
def state():
    """Return the state of a tiny run after one step."""
    trainer = Trainer(tiny_model(), TrainConfig(ema=0.5), 6)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    trainer.finish_step(3)
    return trainer.state()


def load(state, config=None) -> Trainer:
    trainer = Trainer(tiny_model(seed=1), config or TrainConfig(ema=0.5), 6)
    trainer.load(state)
    return trainer


def test_a_state_is_taken_whole_but_for_the_flags_of_the_optimiser(state):
    loaded = load(state, TrainConfig(ema=0.5, lr=0.25, weight_decay=0.125))
    again = loaded.state()
    for part in ("weights", "average"):
        assert all(torch.equal(again[part][name], each) for name, each in state[part].items())
    assert again["step_number"] == 1 and again["words"] == 3
    assert {group["peak"] for group in loaded.optimizer.param_groups} == {0.25}
    assert {group["weight_decay"] for group in loaded.optimizer.param_groups} == {0.125, 0.0}


def first(tensors: dict) -> str:
    return next(name for name, each in tensors.items() if each.is_floating_point())


DAMAGE = {
    "another shape": lambda s: s["weights"].update({first(s["weights"]): torch.zeros(2, 2)}),
    "another type": lambda s: s["average"].update(
        {first(s["average"]): s["average"][first(s["average"])].double()}
    ),
    "NaN": lambda s: s["weights"][first(s["weights"])].fill_(float("nan")),
    "infinity": lambda s: s["average"][first(s["average"])].fill_(float("inf")),
    "moments of another shape": lambda s: s["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(1, 1)
    ),
    "moments that are gone": lambda s: s["optimizer"]["state"][0].pop("exp_avg_sq"),
    "moments of another kind": lambda s: s["optimizer"]["state"].update({0: [1, 2]}),
    "no groups": lambda s: s["optimizer"].pop("param_groups"),
    "fewer groups": lambda s: s["optimizer"]["param_groups"].pop(),
    "groups of another kind": lambda s: s["optimizer"].update(param_groups="none"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_state_of_another_run_is_one_line(what, state):
    damaged = copy.deepcopy(state)
    DAMAGE[what](damaged)
    with pytest.raises(UserError) as error:
        load(damaged)
    assert "last.pt is damaged, or not of this run" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_no_number_of_the_optimiser_comes_from_the_file(state):
    strange = copy.deepcopy(state)
    for group in strange["optimizer"]["param_groups"]:
        group |= {"betas": ("a", "b"), "eps": None, "lr": "fast", "fused": "yes"}
    loaded = load(strange)
    assert {group["betas"] for group in loaded.optimizer.param_groups} == {(0.9, 0.98)}
    assert {group["eps"] for group in loaded.optimizer.param_groups} == {1e-8}


# --- the loop, a step or two of it


def parts_of(batch: Batch) -> list[Batch]:
    """Return a batch of two images with a caption each as two micro-batches of different length."""
    parts = []
    for row in range(2):
        tokens = batch.tokens[row : row + 1]
        tokens = tokens[:, : int((tokens != PAD).sum())]
        images = batch.image_ids[row : row + 1], batch.inputs[row : row + 1]
        parts.append(Batch(*images, tokens, torch.zeros(1, dtype=torch.long)))
    return parts


def test_steps_are_those_of_a_plain_loop():
    """Of PyTorch as tutorials have it: also from micro-batches, for which BatchNorm is fixed."""
    flags = {"lr": 0.01, "warmup": 0.02, "weight_decay": 0.0, "label_smoothing": 0.0}
    trainer = tiny_trainer(amp=False, grad_clip=0.5, epochs=1, ema=0.0, **flags)
    trainer.model.encoder.eval()
    trainer.model.encoder.train = lambda mode=True: trainer.model.encoder
    model = copy.deepcopy(trainer.model)
    plain = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    for rate in (0.005, 0.01, 0.01):
        plain.zero_grad()
        logits = model(*BATCH[1:]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), BATCH.tokens[:, 1:].flatten(), ignore_index=PAD
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        plain.param_groups[0]["lr"] = rate
        plain.step()
    for _ in range(3):
        take_step(trainer, *parts_of(BATCH))
    # Not the weights: the bias of the keys changes nothing, so its gradient is rounding errors.
    found = trainer.model(*BATCH[1:]).logits
    torch.testing.assert_close(found, model(*BATCH[1:]).logits, atol=1e-3, rtol=1e-3)
    assert trainer.step_number == trainer.batch == 3 and trainer.words == 15


def test_the_loss_of_an_epoch_is_the_mean_over_all_its_words():
    trainer = tiny_trainer(amp=False, lr=1e-12)
    take_step(trainer, BATCH)
    once = float(trainer.nll)
    take_step(trainer, BATCH, BATCH)
    assert float(trainer.nll) == pytest.approx(3 * once, rel=1e-4)
    assert trainer.epoch_row()["train_loss"] == pytest.approx(once / 5, rel=1e-4)


def test_dropout_depends_on_the_seed_and_the_step_alone():
    def train(seed: int, before: int) -> torch.Tensor:
        trainer = tiny_trainer(seed=seed, warmup=0.0)
        for part in trainer.model.modules():
            if isinstance(part, Dropout):
                part.p = 0.5
        torch.manual_seed(before)
        take_step(trainer, BATCH)
        return trainer.model.decoder.embedding.weight.detach().clone()

    first = train(seed=1, before=5)
    assert torch.equal(first, train(seed=1, before=6))
    assert not torch.equal(first, train(seed=2, before=5))


def test_gradients_are_a_sum_over_processes_taken_with_the_last_part(monkeypatch):
    """DistributedDataParallel, which is not there, takes the mean of two processes' gradients."""
    trainers, waited = (tiny_trainer(amp=False, grad_clip=0.0) for _ in range(2)), []
    alone, of_two = trainers
    parts = [BATCH._replace(image_ids=[]) for _ in range(3)]
    take_step(alone, *parts)

    @contextlib.contextmanager
    def no_sync():
        waited.append(of_two.nll.item())
        yield

    of_two.model.no_sync = no_sync
    monkeypatch.setattr("util.distributed.world_size", lambda: 2)
    monkeypatch.setattr("util.distributed.all_reduce_sum", list)
    take_step(of_two, *parts)
    assert len(waited) == 2 and waited[0] == 0 < waited[1] < of_two.nll
    for one, other in zip(alone.model.parameters(), of_two.model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, 2 * one.grad)


def test_a_loss_that_is_no_number_is_noticed_in_any_part_and_without_clipping():
    trainer = tiny_trainer(grad_clip=0.0)
    take_step(trainer, BATCH._replace(inputs=BATCH.inputs * math.nan), BATCH)
    with pytest.raises(UserError, match="the loss became nan at step 1 .*images one, two"):
        trainer.check_finite()


def test_a_gradient_that_is_no_number_is_noticed_where_the_loss_is_one():
    trainer = tiny_trainer()
    trainer.watch([BATCH], torch.tensor([1.0, math.inf]))
    with pytest.raises(UserError, match="the gradient became inf at step 1 "):
        trainer.check_finite()
