"""Rewards against the reference scorer, and what the stage that maximises them does.

B images · n captions an image · T words
"""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import SMALL, WORDS, assert_same_run, losses, run_code, take_step

import train
from config import TrainConfig, configure
from dataset import Batch
from decoder import DecoderConfig
from decoding import sample
from encoder import Encoder
from losses import (
    Reward,
    SampledBatch,
    Totals,
    leave_one_out,
    sample_captions,
    self_critical_objective,
)
from masks import NEVER
from model import CaptionModel
from model_file import read_metadata
from readers import Record
from trainer import Trainer
from vocabulary import END, PAD, START, Vocabulary

CAPTIONS = {
    "one": ("A dog runs .", "a brown dog runs on grass", "The dog's running!"),
    "two": ("two men sit on a bench", "men on a bench"),
    "three": ("a man with a dog", "a man walks a dog on the grass"),
}
RECORDS = [Record(name, Path(name), lines) for name, lines in CAPTIONS.items()]
VOCABULARY = Vocabulary(["a", "dog", "runs", "on", "grass", "man", "men", "bench", "with", "two"])


def tokens(*captions: str, length: int = 8) -> torch.Tensor:
    """Return captions (n, T) as decoding returns them; one that ends in "…" has no end token."""
    rows = torch.full((len(captions), length), PAD)
    for row, caption in zip(rows, captions, strict=True):
        ids = VOCABULARY.encode(caption.removesuffix("…"), 20)[1:]
        ids = ids[:-1] if caption.endswith("…") else ids
        row[: len(ids)] = torch.tensor(ids)
    return rows


SAMPLES = torch.stack([
    tokens("a dog runs", "a man with a…", "dog"),
    tokens("two men on a bench", "a bench on a bench", "two men sit…"),
])  # fmt: skip


def test_rewards_are_the_reference_scorers_with_the_end_as_a_word():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer").CiderScorer
    rewards = Reward(RECORDS, VOCABULARY)
    found = rewards(["one", "two"], SAMPLES)
    for row, name in enumerate(["one", "two"]):
        for column in range(3):
            reference = scorer(n=4, sigma=6.0)
            for place, record in enumerate(RECORDS):
                spoken = rewards.to_words(SAMPLES[row, column].tolist())
                said = " ".join(spoken) if record.image_id == name else ""
                reference += (
                    said,
                    [" ".join(words) for words in rewards.reference_words(place)],
                )
            _, each = reference.compute_score()
            expected = each[[record.image_id for record in RECORDS].index(name)]
            assert float(found[row, column]) == pytest.approx(expected, abs=1e-5)


def test_a_caption_that_breaks_off_has_no_end_in_its_reward():
    rewards = Reward(RECORDS, VOCABULARY)
    assert rewards.to_words(SAMPLES[0, 0].tolist()) == ["a", "dog", "runs", Reward.END_WORD]
    assert rewards.to_words(SAMPLES[0, 1].tolist()) == ["a", "man", "with", "a"]
    whole, broken = rewards(["three"], tokens("a man with a dog", "a man with a dog…")[None])[0]
    assert whole > broken > 0


def test_bleu_is_added_with_its_weight():
    scorer = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer").BleuScorer
    plain, mixed = (Reward(RECORDS, VOCABULARY, weight) for weight in (0.0, 0.5))
    more = mixed(["one", "two"], SAMPLES) - plain(["one", "two"], SAMPLES)
    for row in range(2):
        for column in range(3):
            reference = scorer(n=4)
            said = " ".join(plain.to_words(SAMPLES[row, column].tolist()))
            reference += (said, [" ".join(words) for words in plain.reference_words(row)])
            bleu = reference.compute_score(option="closest", verbose=0)[0][3]
            assert float(more[row, column]) == pytest.approx(0.5 * bleu, abs=1e-6)


def test_the_baseline_is_the_mean_of_the_others():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert leave_one_out(rewards).tolist() == [[4.0, 3.5, 1.5], [1.5, 1.5, 0.0]]


def test_the_objectives_of_parts_add_up_to_that_of_the_whole_batch():
    rows = torch.nn.functional.pad(SAMPLES.flatten(0, 1), (1, 0), value=START)
    logits = torch.randn(6, 8, len(VOCABULARY), generator=torch.Generator().manual_seed(0))
    advantage = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0])
    totals = Totals(float((rows[:, 1:] != PAD).sum()), 6)

    def objective(part: slice) -> torch.Tensor:
        sampled = SampledBatch([], torch.empty(0), rows[part], torch.empty(0), advantage[part], 20)
        return self_critical_objective(logits[part], None, sampled, totals, None).objective

    parts = [objective(part) for part in (slice(0, 1), slice(1, 6), slice(6, 6))]
    torch.testing.assert_close(sum(parts), objective(slice(None)))
    assert abs(float(objective(slice(None)))) > 0.1


# --- the stage


TWO = {"x": ("a red circle", "red circle on a dog"), "y": ("a blue square", "blue square")}


def one_batch(vocabulary: Vocabulary) -> Batch:
    torch.manual_seed(1)
    encoded = [torch.tensor(vocabulary.encode(line, 8)) for two in TWO.values() for line in two]
    padded = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=PAD)
    return Batch(["x", "y"], torch.randn(2, 16, 128), padded, torch.tensor([0, 0, 1, 1]))


def trainer_of_two(decoder: str = "transformer", **changes) -> tuple[Trainer, Batch]:
    torch.manual_seed(0)
    sizes = DecoderConfig(decoder, d_model=16, n_head=2, n_decode=1, fc_dim=32, seq_len=8)
    model = CaptionModel(Encoder("tiny", "all"), sizes, Vocabulary(WORDS), 64)
    batch = one_batch(model.vocabulary)
    trainer = Trainer(model, TrainConfig(scst_epochs=1, warmup=0.0, **changes), 10**6)
    records = [Record(name, Path(name), lines) for name, lines in TWO.items()]
    records.append(Record("z", Path("z"), ("a café",)))
    trainer.reward = Reward(records, model.vocabulary)
    return trainer, batch


@pytest.mark.parametrize("decoder", ["transformer", "lstm", "attention-lstm"])
def test_after_the_captions_the_model_learns_what_is_rewarded(decoder):
    trainer, batch = trainer_of_two(decoder, lr=3e-3, scst_lr=3e-3, ema=0.0)
    for _ in range(40):
        take_step(trainer, batch)
    trainer.start_stage(critical=True)
    means = []
    for _ in range(4):
        trainer.start_epoch()
        for _ in range(25):
            take_step(trainer, batch)
        means.append(trainer.sums["rewarded"] / trainer.sums["samples"])
        assert trainer.sums["baselines"] / trainer.sums["samples"] == pytest.approx(means[-1])
    assert means[-1] > 1.2 * means[0] > 0


def test_samples_have_their_image_and_the_advantage_over_its_other_samples():
    trainer, batch = trainer_of_two()
    given = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    read = []

    def reward(image_ids, samples):
        read.append((image_ids, samples))
        return given

    sampled, rewards = sample_captions(trainer.model.eval(), batch, reward, 3)
    ((image_ids, samples),) = read
    assert image_ids == sampled.image_ids == ["x", "y"] and torch.equal(rewards, given)
    assert sampled.owner.tolist() == [0, 0, 0, 1, 1, 1]
    assert sampled.advantage.tolist() == [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]
    assert (sampled.tokens[:, 0] == START).all()
    assert torch.equal(sampled.tokens[:, 1:].unflatten(0, (2, 3)), samples)


def test_the_rewards_and_baselines_of_a_step_are_added_up_for_every_sample():
    trainer, batch = trainer_of_two(scst_samples=3)
    trainer.start_stage(critical=True)
    given = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])

    def reward(image_ids, samples):
        assert samples.shape[:2] == (2, 3)
        return given

    trainer.reward = reward
    take_step(trainer, batch, batch)
    assert trainer.sums == {"rewarded": 24.0, "baselines": 24.0, "samples": 12}


def test_drawn_captions_are_read_again_with_the_probability_they_were_drawn_with():
    trainer, batch = trainer_of_two(amp=False)
    model = trainer.model
    trainer.start_stage(critical=True)
    with trainer.training_mode():
        memory = model.encode(batch.inputs)
        spoken = sample(model.decoder, memory, max_words=8, n=4)
        start = torch.ones_like(spoken.tokens[..., :1])
        rows = torch.cat([start, spoken.tokens], -1).flatten(0, 1)
        logits = model(batch.inputs, rows, torch.arange(2).repeat_interleave(4)).logits
    told = logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    found = told.masked_fill(rows[:, 1:] == PAD, 0).sum(-1)
    torch.testing.assert_close(found, spoken.log_prob.flatten(), atol=1e-4, rtol=1e-4)
    assert (spoken.tokens == END).sum() == 8


def test_words_that_are_never_drawn_are_not_taught(monkeypatch):
    trainer, batch = trainer_of_two()
    trainer.start_stage(critical=True)
    forward, told = trainer.model.decoder.forward, []

    def watched(*given):
        taught = forward(*given)
        taught.logits.retain_grad()
        told.append(taught.logits)
        return taught

    monkeypatch.setattr(trainer.model.decoder, "forward", watched)
    take_step(trainer, batch)
    (logits,) = told
    assert not logits.grad[..., list(NEVER)].any() and not logits.grad[:, 0, END].any()
    assert logits.grad[:, 1:, END].any()


def test_the_stage_averages_all_its_weights_alike():
    trainer, batch = trainer_of_two(scst_lr=3e-3)
    take_step(trainer, batch)
    trainer.start_stage(critical=True)
    name = "decoder.embedding.weight"
    seen = [trainer.model.state_dict()[name].clone()]
    for _ in range(4):
        take_step(trainer, batch)
        seen.append(trainer.model.state_dict()[name].clone())
    torch.testing.assert_close(trainer.average[name], torch.stack(seen).mean(0))


def test_dropout_is_off_and_all_else_as_in_training():
    trainer, batch = trainer_of_two("lstm")
    model = trainer.model
    model.decoder.lstm.dropout = 0.3
    trainer.start_stage(critical=True)
    with trainer.training_mode():
        assert model.decoder.lstm.training and not model.encoder.training
        assert model.decoder.lstm.dropout == 0
        first, second = (model.encode(batch.inputs) for _ in range(2))
        assert torch.equal(first, second)
    assert model.decoder.lstm.dropout == 0.3  # and afterwards all is as it was
    assert model.encoder.training and model.decoder.dropout.training


CRITICAL = [*SMALL, "--scst-epochs", "2", "--scst-lr", "1e-3"]


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("critical") / "run"
    train.main([*CRITICAL, "--data-dir", str(drawn), "--output", str(folder)])
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_both_stages_are_in_one_table(whole):
    table = rows(whole)
    assert [row["epoch"] for row in table] == ["1", "2", "3", "4"]
    assert [bool(row["train_loss"]) for row in table] == [True, True, False, False]
    assert [bool(row["reward"]) for row in table] == [False, False, True, True]
    for row in table:
        assert 0 <= float(row["bad_endings"]) <= 1 and 0 <= float(row["repeats"]) <= 1
    assert float(table[3]["reward"]) == pytest.approx(float(table[3]["baseline"]), abs=1e-4)
    assert float(table[2]["lr"]) <= 1e-3


@pytest.mark.parametrize("step", [14, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_in_the_second_stage_resumes_to_the_same_weights(
    step,
    drawn,
    whole,
    tmp_path,
):
    folder = tmp_path / "run"
    code = f"""
        import os, signal, sys
        import train, trainer
        from util import program
        finish_step = trainer.Trainer.finish_step
        def stopping(self, words):
            finish_step(self, words)
            if self.step_number == {step}:  # six steps an epoch, two epochs a stage
                os.kill(os.getpid(), signal.SIGTERM)
        trainer.Trainer.finish_step = stopping
        program.run(lambda: train.main(sys.argv[1:]))
    """
    stopped = run_code(code, *CRITICAL, "--data-dir", str(drawn), "--output", str(folder))
    assert stopped.returncode == 130, stopped.stderr
    train.main(["--resume", "--output", str(folder)])
    assert_same_run(folder, whole)
    assert losses(folder) == losses(whole)


def test_a_finished_run_can_go_on_with_a_second_stage(drawn, whole, tmp_path):
    folder = tmp_path / "run"
    train.main([*SMALL, "--data-dir", str(drawn), "--output", str(folder)])
    critical = CRITICAL[len(SMALL) :]
    train.main(["--resume", "--output", str(folder), *critical])
    assert_same_run(folder, whole)


# --- from another model


def test_a_run_can_begin_with_another_model(drawn, whole, tmp_path):
    folder = tmp_path / "run"
    train.main([
        "--dataset", "shapes", "--data-dir", str(drawn), "--init-from", str(whole), "--epochs", "0",
        "--scst-epochs", "1", "--scst-lr", "1e-9", "--dropout", "0.3", "--output", str(folder),
    ])  # fmt: skip
    before, after = CaptionModel.load(whole), CaptionModel.load(folder)
    assert after.vocabulary == before.vocabulary and after.config.d_model == 16
    assert after.config.dropout == 0.3
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(tensor, after.state_dict()[name], atol=1e-5, rtol=1e-5)
    about = read_metadata(folder / "best.safetensors")
    assert about["training"]["init_from"]["epochs"] == 2
    assert str(whole) not in str(about)
    assert np.isfinite(float(rows(folder)[0]["CIDEr"]))


def test_a_run_that_begins_with_a_model_keeps_its_sizes(whole):
    with pytest.raises(ValueError, match=r"--d-model 32 differs from the 16 of .*keeps a model's"):
        train.main(["--dataset", "shapes", "--init-from", str(whole), "--d-model", "32"])


def test_no_epochs_without_a_model_are_refused():
    with pytest.raises(ValueError, match="--epochs 0 leaves nothing to train"):
        configure(["--epochs", "0", "--scst-epochs", "3"])


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--scst-epochs", -1), ("--scst-samples", 1), ("--scst-lr", 0.0), ("--scst-bleu", -1.0)],
)
def test_flags_of_the_stage_out_of_range_name_themselves(flag, value):
    with pytest.raises(ValueError, match=f"{flag} {value} must be"):
        configure([flag, str(value)])
