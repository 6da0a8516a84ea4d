"""Training end to end: what a run leaves behind, how it goes on, and how it says no."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.tiny import (
    BATCH,
    SMALL,
    as_flickr8k,
    assert_same_run,
    losses,
    run_code,
    take_step,
    tiny_trainer,
)
from PIL import Image

import train
from config import PRESETS
from corpora import Corpus
from encoder import Encoder
from model import CaptionModel
from model_file import read_metadata
from util.signals import Interrupts


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.main([*SMALL, "--data-dir", str(drawn), "--output", str(folder)])
    return folder


STOPPED = """
    import os, signal, sys
    import train, trainer
    from util import program
    finish_step = trainer.Trainer.finish_step
    def stopping(self, words):
        finish_step(self, words)
        if self.step_number == 8:  # epochs have six steps: in the middle of the second
            os.kill(os.getpid(), signal.{signal})
    trainer.Trainer.finish_step = stopping
    program.run(lambda: train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGINT", 130), ("SIGTERM", 130)])
def test_a_stopped_run_resumes_to_the_same_weights(name, code, drawn, whole, tmp_path):
    folder = tmp_path / "run"
    place = ["--data-dir", str(drawn), "--output", str(folder)]
    stopped = run_code(STOPPED.format(signal=name), *SMALL, *place)
    assert stopped.returncode == code, stopped.stderr
    assert len(losses(folder)) == 1
    train.main(["--resume", "--output", str(folder)])
    assert_same_run(folder, whole)
    assert losses(folder) == losses(whole)


def test_a_run_in_another_thread_than_the_main_one_is_the_same(drawn, whole, tmp_path):
    argv = [*SMALL, "--data-dir", str(drawn), "--output", str(tmp_path / "run")]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train.main, argv).result()
    assert_same_run(tmp_path / "run", whole)


def test_a_run_leaves_the_files_that_are_promised(whole):
    for name in ("config.json", "best.safetensors", "last.pt", "previous.pt", "scores.json"):
        assert (whole / name).stat().st_size > 0
    assert len(losses(whole)) == 2
    for picture in ("learning_curve.png", "samples/epoch-01.png", "samples/test.png"):
        assert Image.open(whole / picture).size[0] > 400
    scores = json.loads((whole / "scores.json").read_text())
    assert {"BLEU-4", "CIDEr", "ROUGE-L", "loss", "images"} <= scores["test"].keys()
    assert not list(whole.glob(".*"))  # no temporary file is left, and no lock


def test_the_model_file_names_no_path_of_the_machine(whole, drawn):
    about = read_metadata(whole / "best.safetensors")
    assert about["training"]["epochs"] == 2
    assert str(drawn) not in json.dumps(about) and str(whole.parent) not in json.dumps(about)


def test_the_same_seed_gives_the_same_run(drawn, whole, tmp_path):
    folder = tmp_path / "again"
    train.main([*SMALL, "--data-dir", str(drawn), "--output", str(folder)])
    assert_same_run(folder, whole)


def test_a_finished_run_resumed_trains_no_more(whole, tmp_path, drawn):
    before = (whole / "last.pt").read_bytes()
    train.main(["--resume", "--output", str(whole)])
    assert (whole / "last.pt").read_bytes() == before


def test_resume_refuses_another_width_and_names_both(whole):
    with pytest.raises(ValueError, match=r"--d-model 32 differs from the run's 16"):
        train.main(["--resume", "--output", str(whole), "--d-model", "32"])


def test_a_run_begun_before_a_flag_was_there_has_its_default(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    flags = json.loads((folder / "config.json").read_text())
    assert flags.pop("tie_weights") is True
    (folder / "config.json").write_text(json.dumps(flags))
    train.main(["--resume", "--output", str(folder)])
    assert_same_run(folder, whole)
    with pytest.raises(ValueError, match=r"--tie-weights False differs from the run's True"):
        train.main(["--resume", "--output", str(folder), "--no-tie-weights"])


def test_resume_falls_back_to_the_state_before_a_damaged_one(drawn, whole, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "previous.pt", "best.safetensors"):
        (folder / name).write_bytes((whole / name).read_bytes())
    (folder / "last.pt").write_bytes((whole / "last.pt").read_bytes()[:1000])
    train.main(["--resume", "--output", str(folder)])
    assert "last.pt can't be read" in caplog.text
    assert_same_run(folder, whole)


def test_resume_without_a_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        train.main(["--resume", "--output", str(tmp_path)])


def test_a_new_run_never_takes_a_folder_in_use(whole, drawn):
    before = (whole / "config.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run already"):
        train.main([*SMALL, "--data-dir", str(drawn), "--output", str(whole)])
    assert (whole / "config.json").read_bytes() == before


FULL_DISK = """
    import resource, signal, sys
    import train
    from util import program
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    original = train.save_state
    def save(folder, state):
        if state["epoch"] == 2:  # the disk fills after the first epoch
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
        original(folder, state)
    train.save_state = save
    program.run(lambda: train.main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_line_and_the_old_state_stays(drawn, whole, tmp_path):
    folder = tmp_path / "run"
    place = ["--data-dir", str(drawn), "--output", str(folder)]
    full = run_code(FULL_DISK, *SMALL, *place)
    errors = [line for line in full.stderr.splitlines() if line.startswith("error:")]
    assert full.returncode == 2, full.stderr
    assert len(errors) == 1 and "last.pt" in errors[0] and "Traceback" not in full.stderr
    assert not list(folder.glob(".*"))
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == 1
    train.main(["--resume", "--output", str(folder)])
    assert_same_run(folder, whole)


def test_no_dataset_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no dataset at .*nowhere"):
        train.main(["--data-dir", str(tmp_path / "nowhere"), "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    """A ResNet-18 state dict with random weights."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(Encoder("resnet18").cnn.state_dict(), path)
    return path


RESNET = ["--cnn-backbone", "resnet18", "--img-size", "64", "--epochs", "1", "--d-model", "16",
          "--n-head", "2", "--n-decode", "1", "--fc-dim", "32", "--min-count", "1"]  # fmt: skip


def train_resnet(resnet: Path, data: Path, tmp_path: Path, *more: str) -> dict[str, torch.Tensor]:
    place = ["--data-dir", str(data), "--output", str(tmp_path / "run")]
    cache = ["--cache-dir", str(tmp_path / "cache"), "--cnn-weights", str(resnet)]
    train.main([*RESNET, *place, *cache, *more])
    return CaptionModel.load(tmp_path / "run").encoder.cnn.state_dict()


def test_a_frozen_cnn_stays_as_it_was_and_is_cached(resnet, drawn, tmp_path):
    data = as_flickr8k(drawn, tmp_path / "data", ("train", "dev"))
    after = train_resnet(resnet, data, tmp_path)
    before = torch.load(resnet, weights_only=True)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert not any(name.startswith("encoder.") for name in state["weights"])
    assert "test" not in json.loads((tmp_path / "run/scores.json").read_text())


def test_finetuning_changes_the_last_stages_and_nothing_else(resnet, drawn, tmp_path):
    data = as_flickr8k(drawn, tmp_path / "data", ("train", "dev"))
    after = train_resnet(resnet, data, tmp_path, "--finetune-cnn", "--limit", "8")
    before = torch.load(resnet, weights_only=True)
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed and all(name.startswith(("layer3.", "layer4.")) for name in changed)
    assert not any("running" in name for name in changed)
    assert not (tmp_path / "cache").exists()


def test_a_run_without_val_and_test_trains_and_says_so(resnet, drawn, tmp_path, caplog):
    data = as_flickr8k(drawn, tmp_path / "data", ("train",))
    train_resnet(resnet, data, tmp_path)
    assert "no val split in" in caplog.text and "no test split in" in caplog.text
    assert losses(tmp_path / "run")[0][1:] == ("", "")


def test_resume_with_other_cnn_weights_is_refused(resnet, drawn, tmp_path):
    data = as_flickr8k(drawn, tmp_path / "data", ("train",))
    train_resnet(resnet, data, tmp_path)
    torch.manual_seed(1)
    torch.save(Encoder("resnet18").cnn.state_dict(), tmp_path / "other.pth")
    again = ["--resume", "--output", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="the CNN's weights are .* but the run began with"):
        train.main([*again, "--cnn-weights", str(tmp_path / "other.pth")])


@pytest.mark.parametrize("decoder", ["lstm", "attention-lstm"])
def test_every_decoder_trains_and_resumes_exactly(decoder, drawn, tmp_path):
    place = ["--data-dir", str(drawn), "--decoder", decoder]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train.main([*SMALL, *place, "--output", str(whole)])
    train.main([*SMALL, *place, "--output", str(parted)])
    (parted / "last.pt").unlink()  # as if it had been stopped after the first epoch
    train.main(["--resume", "--output", str(parted)])
    assert_same_run(whole, parted)


CLASSICS = [name for name in PRESETS if name != "resnet-transformer"]
BACKBONE = {"resnet-transformer": ["--cnn-backbone", "resnet50"]}  # shapes has its own default


@pytest.mark.parametrize(
    "preset",
    ["resnet-transformer", *(pytest.param(name, marks=pytest.mark.slow) for name in CLASSICS)],
)
def test_every_preset_trains_with_its_own_encoder(preset, drawn, tmp_path):
    folder, small = tmp_path / "run", "96"  # pixels: Inception needs 75
    train.main([
        "--preset", preset, "--dataset", "shapes", "--cnn-weights", "none", "--limit", "6",
        "--batch-size", "3", "--epochs", "1", "--img-size", small, "--data-dir", str(drawn),
        "--output", str(folder), *BACKBONE.get(preset, []),
    ])  # fmt: skip
    model = CaptionModel.load(folder)
    expected = {"resnet-transformer": "resnet50"} | {
        name: flags["cnn_backbone"] for name, flags in PRESETS.items() if flags
    }
    assert model.encoder.name == expected[preset]
    assert model.decoder.positions == (1 if "grid" in PRESETS[preset] else 9)
    assert "CIDEr" in json.loads((folder / "scores.json").read_text())["test"]


def test_another_batch_size_keeps_the_schedule(drawn, whole, tmp_path):
    """The schedule counts epochs, not steps: an epoch now has another number of them."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    train.main(["--resume", "--output", str(folder), "--epochs", "4", "--batch-size", "12"])
    rows = torch.load(folder / "last.pt", weights_only=True)["rows"]
    assert [row["lr"] > 0 for row in rows[2:]] == [True, True]
    assert rows[2]["train_loss"] != rows[3]["train_loss"]


# --- what a run keeps, by scores that are made up


@pytest.fixture
def scored(monkeypatch) -> tuple[list[float], list[dict]]:
    """Return the CIDEr of the next scorings, to be filled in, and the weights that were scored."""
    values, weights = [], []

    def score_split(model, *_):
        weights.append({name: each.clone() for name, each in model.state_dict().items()})
        assert not model.training
        row = {"CIDEr": values.pop(0), "BLEU-4": 0.0, "bad_endings": 0.0, "repeats": 0.0}
        return {"loss": 1.0, **row}, {}

    monkeypatch.setattr(train, "score_split", score_split)
    monkeypatch.setattr(train, "write_samples", lambda *_: None)
    monkeypatch.setattr(train, "print_split", lambda *_: None)
    monkeypatch.setattr(train.plots, "learning_curve", lambda *_: None)
    return values, weights


def train_epochs(trainer, folder: Path, count: int) -> None:
    """Train epochs of a step each, and finish each as a run does."""
    for _ in range(count):
        take_step(trainer, BATCH)
        corpora = [Corpus("photos", "csv", {"val": []})]
        train.finish_epoch(trainer, corpora, folder, Interrupts())


def same_weights(found: dict, expected: dict) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_best_epoch_is_kept_with_the_average_of_weights(scored, tmp_path):
    values, weights = scored
    values += [0.1, 0.3, 0.2, 0.3]  # of equal ones the first
    trainer = tiny_trainer(lr=0.01, warmup=0.0)
    train_epochs(trainer, tmp_path, 3)
    assert same_weights(weights[2], trainer.average)
    assert not same_weights(trainer.model.state_dict(), trainer.average)
    train_epochs(trainer, tmp_path, 1)
    assert read_metadata(tmp_path / "best.safetensors")["scores"]["epoch"] == 2
    best = CaptionModel.load(tmp_path).state_dict()
    assert same_weights(best, weights[1]) and not same_weights(best, weights[3])


def test_the_best_model_begins_the_second_stage_and_is_scored_at_the_end(scored, tmp_path):
    values, weights = scored
    values += [0.3, 0.1, 0.3]
    trainer = tiny_trainer(lr=0.01, warmup=0.0, scst_epochs=1)
    train_epochs(trainer, tmp_path, 2)
    train.finish(trainer, [Corpus("photos", "csv", {"test": []})], tmp_path, Interrupts())
    assert same_weights(weights[2], weights[0]) and not same_weights(weights[2], weights[1])
    assert train.start_self_critical(trainer, tmp_path) and trainer.critical
    assert same_weights(trainer.model.state_dict(), weights[0])
    assert not train.start_self_critical(trainer, tmp_path)  # there is no third one


def test_a_stage_ends_after_its_epochs():
    trainer = tiny_trainer(epochs=3, scst_epochs=2, patience=0)
    over = []
    for trainer.epoch in range(4):
        over.append(train.stage_is_over(trainer))
    trainer.start_stage(critical=True)
    for trainer.epoch in range(3, 6):
        over.append(train.stage_is_over(trainer))
    assert over == [False, False, False, True, False, False, True]


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_another(drawn, tmp_path):
    same = [*SMALL, "--no-amp", "--dropout", "0", "--data-dir", str(drawn), "--epochs", "1"]
    folders = tmp_path / "plain", tmp_path / "compiled"
    train.main([*same, "--output", str(folders[0])])
    train.main([*same, "--compile", "--output", str(folders[1])])
    (plain,), (compiled,) = map(losses, folders)
    assert float(compiled[0]) == pytest.approx(float(plain[0]), abs=1e-3)
