"""A model in another form says the same."""

import pytest
import torch
from helpers.tiny import METHODS, picture, run_script, tiny_model
from safetensors.torch import load_file

import export
from encoder import image_transform
from inference import Captioner
from model import CaptionModel
from model_file import read_metadata


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "best.safetensors"
    tiny_model().save(path, scores={"CIDEr": 0.5}, training={"epochs": 3})
    return path


def test_half_the_size_and_the_same_captions(checkpoint, tmp_path, capsys):
    small = tmp_path / "small.safetensors"
    code, out, _ = run_script(export, checkpoint, small, capsys=capsys)
    assert code == 0 and out.startswith(str(small)) and "MB" in out
    assert small.stat().st_size < 0.55 * checkpoint.stat().st_size
    large, half = (Captioner.load(path, "cpu") for path in (checkpoint, small))
    pictures = [picture(seed) for seed in range(8)]
    for method in METHODS:
        said = [list(each.caption_many(pictures, method=method)) for each in (large, half)]
        same = [a[0].text == b[0].text for a, b in zip(*said, strict=True)]
        assert sum(same) >= 7
    assert next(half.model.parameters()).dtype == torch.float32


def test_batchnorm_and_what_float16_cannot_hold_stay_in_float32(tmp_path):
    model = tiny_model()
    model.encoder.cnn.bn0.running_var.fill_(83_614)
    model.decoder.project.weight.data[0, 0] = 1e5
    model.save(tmp_path / "half.safetensors", half=True)
    kept = load_file(tmp_path / "half.safetensors")
    assert kept["encoder.cnn.bn0.running_var"].dtype == torch.float32
    assert kept["decoder.project.weight"].dtype == torch.float32
    assert kept["encoder.cnn.conv0.weight"].dtype == torch.float16
    loaded = CaptionModel.load(tmp_path / "half.safetensors")
    assert float(loaded.encoder.cnn.bn0.running_var[0]) == 83_614


def test_int8_is_smaller_still_and_gives_nearly_the_same_features(checkpoint, tmp_path, capsys):
    half, small, mean = (tmp_path / f"{name}.safetensors" for name in ("half", "small", "mean"))
    assert run_script(export, checkpoint, half, capsys=capsys)[0] == 0
    assert run_script(export, checkpoint, small, "--int8", capsys=capsys)[0] == 0
    kinds = {name: tensor.dtype for name, tensor in load_file(small).items()}
    assert kinds["encoder.cnn.conv4.weight"] == torch.int8
    assert kinds["encoder.cnn.conv0.weight"] == kinds["decoder.project.weight"] == torch.float16
    assert small.stat().st_size < 0.75 * half.stat().st_size
    transform = image_transform(64, train=False)
    batch = torch.stack([transform(picture(seed)) for seed in range(4)])
    with torch.no_grad():
        before, after = (CaptionModel.load(each).encoder(batch) for each in (checkpoint, small))
    assert (before - after).norm() < 0.02 * before.norm()
    # Such a file can be exported and averaged like any other.
    assert run_script(export, small, mean, "--average", small, "--int8", capsys=capsys)[0] == 0
    first, second = (CaptionModel.load(each).state_dict() for each in (small, mean))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)


def test_int8_is_refused_where_the_form_has_none(checkpoint, tmp_path, capsys):
    output = tmp_path / "model.onnx"
    code, _, error = run_script(export, checkpoint, output, "--int8", capsys=capsys)
    assert code == 2 and "--int8 is for .safetensors files" in error and not output.exists()


@pytest.mark.parametrize("int8", [False, True])
def test_scores_and_training_go_along(int8, checkpoint, tmp_path):
    export.export(checkpoint, tmp_path / "small.safetensors", int8=int8)
    about = read_metadata(tmp_path / "small.safetensors")
    assert about["scores"] == {"CIDEr": 0.5} and about["training"] == {"epochs": 3}


def test_an_unknown_form_is_one_clear_line(checkpoint, tmp_path, capsys):
    code, _, error = run_script(export, checkpoint, tmp_path / "model.pkl", capsys=capsys)
    assert code == 2 and "end it in .safetensors" in error and not (tmp_path / "model.pkl").exists()


def test_the_mean_of_several_checkpoints_is_written(checkpoint, tmp_path, capsys):
    other, mean = tmp_path / "other.safetensors", tmp_path / "mean.safetensors"
    tiny_model(seed=14).save(other, training={"epochs": 4})
    code, *_ = run_script(export, checkpoint, mean, "--average", other, checkpoint, capsys=capsys)
    assert code == 0
    first, second, made = (CaptionModel.load(each) for each in (checkpoint, other, mean))
    for name, tensor in made.state_dict().items():
        if tensor.is_floating_point():
            expected = (2 * first.state_dict()[name] + second.state_dict()[name]) / 3
            torch.testing.assert_close(tensor, expected, atol=5e-3, rtol=2e-3)
    about = read_metadata(mean)
    assert "scores" not in about
    assert [each["epochs"] for each in about["training"]["mean_of"]] == [3, 4, 3]


def test_models_of_other_words_have_no_mean(checkpoint, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    tiny_model(words=["other", "words"]).save(other)
    code, _, error = run_script(
        export, checkpoint, tmp_path / "m.safetensors", "--average", other, capsys=capsys
    )
    assert code == 2 and "same words" in error and not (tmp_path / "m.safetensors").exists()


# --- files that would be lost


def test_a_checkpoint_is_not_replaced_by_its_own_export(checkpoint, tmp_path, capsys):
    before = checkpoint.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(checkpoint)
    for output in (checkpoint, tmp_path / "link.safetensors"):
        code, _, error = run_script(export, checkpoint, output, capsys=capsys)
        assert code == 2 and "this command uses the same file" in error
    folder = tmp_path / "run"
    folder.mkdir()
    tiny_model(seed=2).save(folder / "best.safetensors")
    for source in (folder, checkpoint):
        code, _, error = run_script(export, source, folder / "best.safetensors", capsys=capsys)
        assert code == 2 and ("same file" in error or "is the model of a run" in error)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx", "model.step.onnx"])
def test_a_file_of_another_kind_is_not_replaced(name, checkpoint, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"another program's")
    output = tmp_path / name.replace(".step", "")
    code, _, error = run_script(export, checkpoint, output, capsys=capsys)
    assert code == 2 and f"{name} is there, and does not hold an exported model" in error
    assert (tmp_path / name).read_bytes() == b"another program's"
    assert {path.name for path in tmp_path.iterdir()} == {"best.safetensors", name}


def test_an_export_of_before_is_written_again(checkpoint, tmp_path, capsys):
    for _ in range(2):
        assert run_script(export, checkpoint, tmp_path / "a.safetensors", capsys=capsys)[0] == 0


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
def test_a_limit_of_repetitions_becomes_the_models_own(suffix, checkpoint, tmp_path, capsys):
    if suffix == ".onnx":
        for library in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(library)
    limited, again, off = (tmp_path / f"{name}{suffix}" for name in ("limited", "again", "off"))
    kept = tmp_path / "kept.safetensors"
    for source, output, *flags in (
        (checkpoint, limited, "--no-repeat-ngram", "2"),
        (checkpoint, kept, "--no-repeat-ngram", "2"),
        (kept, again),
        (kept, off, "--no-repeat-ngram", "0"),
    ):
        assert run_script(export, source, output, *flags, capsys=capsys)[0] == 0
    found = [Captioner.load(path).model.no_repeat_ngram for path in (limited, again, off)]
    assert found == [2, 2, 0]
    code, _, error = run_script(export, kept, off, "--no-repeat-ngram", "-1", capsys=capsys)
    assert code == 2 and "no_repeat_ngram is not a number between 0 and 1000" in error
