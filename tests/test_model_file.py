"""Model files: what is saved is what is loaded, and each fault is named in words."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers.small_model import (
    KNOWN,
    SIZES,
    assert_same,
    build,
    lively,
    outputs,
    pixels,
)
from helpers.tiny import tiny_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from decoder import DECODERS, DecoderConfig
from inference import Captioner
from model import CaptionModel, ModelEnsemble
from model_file import checkpoint_file, read_metadata
from util import files, program
from util.quantization import dequantize


@pytest.fixture(params=DECODERS)
def model(request) -> CaptionModel:
    return lively(build(request.param))


@pytest.fixture
def saved(tmp_path):
    """Return a small model's file."""
    path = tmp_path / "run" / "best.safetensors"
    build().save(path, scores={"CIDEr": 0.5})
    return path


# ---- saving and loading ----------------------------------------------------------------------


def test_a_loaded_model_says_what_the_saved_one_said(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    loaded = CaptionModel.load(tmp_path / "model.safetensors")
    assert not any(module.training for module in loaded.modules())
    assert_same(loaded, model.eval())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key]), key
    assert (loaded.vocabulary, loaded.config) == (model.vocabulary, model.config)
    assert loaded.img_size == model.img_size
    assert (loaded.encoder.name, loaded.encoder.trained) == ("tiny", "all")


def test_metadata_is_read_without_a_tensor(saved, monkeypatch):
    def fail(*_):
        raise AssertionError("tensors were read")

    monkeypatch.setattr("safetensors.torch.load_file", fail)
    assert read_metadata(saved.parent)["scores"] == {"CIDEr": 0.5}
    with pytest.raises(AssertionError, match="tensors were read"):
        CaptionModel.load(saved)


def test_a_runs_folder_is_loaded_as_its_file(saved):
    assert checkpoint_file(saved.parent) == checkpoint_file(str(saved)) == saved
    assert_same(CaptionModel.load(saved.parent), CaptionModel.load(saved))


def test_a_loaded_model_saved_again_is_the_same(saved, tmp_path):
    CaptionModel.load(saved).save(tmp_path / "again", scores={"CIDEr": 0.5})
    assert read_metadata(tmp_path / "again") == read_metadata(saved)
    again, tensors = load_file(tmp_path / "again"), load_file(saved)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items())


def test_metadata_is_in_the_header_and_cannot_replace_the_model(tmp_path):
    path = tmp_path / "model.safetensors"
    build().save(path, scores={"CIDEr": 0.5}, words="犬", format="another", vocabulary=["x"])
    metadata = read_metadata(path)
    assert metadata["scores"] == {"CIDEr": 0.5} and metadata["words"] == "犬"
    assert CaptionModel.load(path).vocabulary.words[4:] == KNOWN
    assert metadata["model"]["d_model"] == SIZES["d_model"]


def test_the_tied_embedding_is_stored_once(saved):
    shape = (len(KNOWN) + 4, SIZES["d_model"])
    assert sum(tensor.shape == shape for tensor in load_file(saved).values()) == 1


def rewritten(saved, change):
    """Save the file again after `change(header, tensors)`; header values are JSON."""
    metadata, tensors = read_metadata(saved), load_file(saved)
    change(metadata, tensors)
    save_file(tensors, saved, {key: json.dumps(value) for key, value in metadata.items()})
    return saved


def test_weights_stored_in_half_precision_are_loaded_as_float32(saved):
    before = CaptionModel.load(saved)

    def halve(_, tensors):
        tensors |= {key: each.half() for key, each in tensors.items() if each.dim()}

    after = CaptionModel.load(rewritten(saved, halve))
    assert {each.dtype for each in after.parameters()} == {torch.float32}
    for mine, theirs in zip(outputs(before)[:2], outputs(after)[:2], strict=True):
        torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0.02)


def test_a_size_that_an_older_file_does_not_name_has_its_default(saved):
    older = CaptionModel.load(
        rewritten(saved, lambda metadata, _: metadata["model"].pop("dropout"))
    )
    assert older.config.dropout == DecoderConfig().dropout


def test_int8_is_of_the_cnns_large_matrices_alone_and_is_loaded_as_float32(model, tmp_path):
    path = tmp_path / "small.safetensors"
    model.save(path, int8=True, scores={"CIDEr": 0.5})
    stored, loaded = load_file(path), CaptionModel.load(path)
    for name, before in model.state_dict().items():
        held, after = stored.pop(name), loaded.state_dict()[name]
        assert after.dtype == before.dtype
        if name in {f"encoder.cnn.conv{number}.weight" for number in (2, 3, 4)}:
            assert held.dtype == torch.int8
            assert torch.equal(after, dequantize(held, stored.pop(f"{name}_scale")))
            assert (after - before).abs().max() <= 0.004 * before.abs().max()
        else:
            halved = before.dim() > 1
            assert held.dtype == (torch.float16 if halved else before.dtype)
            assert torch.equal(after, before.half().float() if halved else before)
    assert not stored
    assert read_metadata(path)["scores"] == {"CIDEr": 0.5}
    assert (
        torch.nn.functional.cosine_similarity(
            loaded.encode(pixels()).flatten(), model.eval().encode(pixels()).flatten(), dim=0
        )
        > 0.99
    )


def test_only_a_file_with_int8_has_the_new_format(tmp_path):
    path = tmp_path / "model.safetensors"
    for form, number in [({}, 2), ({"half": True}, 2), ({"int8": True}, 3)]:
        build().save(path, **form)
        assert read_metadata(path)["format"] == f"image-captioning {number}"
    CaptionModel.load(path).save(path)
    assert read_metadata(path)["format"] == "image-captioning 2"


def test_loading_never_unpickles(tmp_path):
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return trap.touch, ()

    bare, zipped = tmp_path / "bare.safetensors", tmp_path / "zipped.safetensors"
    bare.write_bytes(pickle.dumps(Trap()))
    torch.save({"weight": Trap()}, zipped)
    for path in (bare, zipped):
        with pytest.raises(ValueError, match="is not a model file"):
            CaptionModel.load(path)
    assert not trap.exists()


# ---- errors ----------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        CaptionModel.load(tmp_path / "nowhere.safetensors")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no best.safetensors in .*first epoch"):
        CaptionModel.load(tmp_path)


@pytest.mark.parametrize("share", (0.0, 0.00001, 0.001, 0.5, 0.9999))
def test_a_model_file_that_is_cut_short_is_named(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"best.safetensors is not a model file, or is cut short"):
        CaptionModel.load(saved)


@pytest.mark.parametrize("content", (b"{}", b"\0" * 99, b"<html>404</html>" * 9, b"\xff" * 99))
def test_a_file_of_something_else_is_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is not a model file"):
        CaptionModel.load(path)


@pytest.mark.parametrize(
    "metadata", (None, {"format": "pt"}, {"format": '"captions 9"'}, {"a": ""})
)
def test_another_programs_safetensors_are_named(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, path, metadata)
    with pytest.raises(
        ValueError, match=r"is not a captioning model of this.*\"image-captioning 2\" or \"im.* 3"
    ):
        CaptionModel.load(path)


def forget(key):
    return lambda metadata, _: metadata.pop(key)


def describe(**changes):
    return lambda metadata, _: metadata["model"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forget("model"), "'model'"),
        (forget("vocabulary"), "'vocabulary'"),
        (describe(fourier=3), "fourier"),
        (describe(decoder="gpt"), "decoder 'gpt' is not known"),
        (describe(cnn_backbone="vgg"), "backbone 'vgg' is not known"),
        (describe(transform="crop"), "image transform 'crop' is not known"),
        (describe(n_head=7), "not divisible by --n-head 7"),
    ],
)
def test_a_header_that_this_version_cannot_build_is_explained(saved, change, message):
    with pytest.raises(ValueError, match=r"best.safetensors does not describe a model") as error:
        CaptionModel.load(rewritten(saved, change))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata, tensors: tensors.pop("decoder.embedding.weight"),
        lambda metadata, tensors: tensors.update(more=torch.zeros(1)),
        lambda metadata, tensors: metadata["vocabulary"].append("cat"),
        describe(d_model=48),
        describe(img_size=128),
        describe(cnn_backbone="resnet18"),
    ],
)
def test_weights_that_do_not_fit_their_header_are_named_in_a_few_words(saved, change):
    with pytest.raises(
        ValueError, match=r"best.safetensors has other weights than its header says"
    ) as error:
        CaptionModel.load(rewritten(saved, change))
    assert len(program.explain(error.value)) < 500 + len(str(saved))


CONV = "encoder.cnn.conv4.weight"


def store(name, change):
    """Return a change of a file that replaces a tensor by `change(tensor)`, or drops it (None)."""

    def changed(_, tensors):
        made = change(tensors.pop(name))
        tensors.update({} if made is None else {name: made})

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (store(f"{CONV}_scale", lambda _: None), f"damaged: {CONV}_scale is missing"),
        (store(f"{CONV}_scale", lambda each: each * torch.nan), f"damaged: {CONV}_scale holds"),
        (store(f"{CONV}_scale", lambda each: each + 3e38), f"damaged: {CONV} holds infinity"),
        (store(CONV, lambda each: each.float()), f"unknown '{CONV}_scale'"),
        (store(CONV, lambda each: each[:, :2].clone()), f"{CONV} has shape"),
        (lambda metadata, _: metadata.update(format="image-captioning 2"), "unknown 'encoder.cnn."),
    ],
)
def test_int8_with_odd_scales_is_one_line(saved, change, message):
    build().save(saved, int8=True)
    with pytest.raises(ValueError, match=rf"best\.safetensors .*{message}") as error:
        CaptionModel.load(rewritten(saved, change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ("decoder.project.weight", "encoder.cnn.bn0.weight", "encoder.cnn.bn0.running_var")
)
@pytest.mark.parametrize("scaled", [False, True])
def test_int8_of_anything_else_is_refused(saved, name, scaled):
    def change(_, tensors):
        tensors[name] = tensors[name].to(torch.int8)
        if scaled:
            tensors[f"{name}_scale"] = torch.ones(len(tensors[name]))

    build().save(saved, int8=True)
    expected = f"unknown '{name}_scale'" if scaled else f"damaged: {name} holds torch.int8"
    with pytest.raises(ValueError, match=rf"best\.safetensors .*{expected}"):
        CaptionModel.load(rewritten(saved, change))


def test_a_file_that_cannot_be_written_leaves_the_old_one(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        build().save(saved)
    assert saved.read_bytes() == before
    assert [each.name for each in saved.parent.iterdir()] == [saved.name]


# --- a file that has changed since it was written


@pytest.fixture(scope="module", params=["float32", "half", "int8"])
def kept(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("digest") / "model.safetensors"
    form = {} if request.param == "float32" else {request.param: True}
    training = {"text": "é", "lr": float("inf")}
    tiny_model().save(path, **form, scores={"CIDEr": 0.5}, training=training)
    return path.read_bytes()


def test_a_model_file_that_is_as_it_was_written_is_loaded(kept, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(kept)
    CaptionModel.load(path)
    assert "digest" not in read_metadata(path)  # it is of the file, not of the model


def test_a_flipped_bit_anywhere_in_the_weights_is_noticed(kept, tmp_path):
    path = tmp_path / "model.safetensors"
    start = 8 + int.from_bytes(kept[:8], "little")
    places = [*range(start, len(kept), (len(kept) - start) // 60), len(kept) - 1]
    for number, place in enumerate(places):
        content = bytearray(kept)
        content[place] ^= 1 << number % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            CaptionModel.load(path)


def test_a_changed_word_or_score_in_the_header_is_noticed(kept, tmp_path):
    path = tmp_path / "model.safetensors"
    changes = {b"circle": b"circla", b"0.5": b"0.7", b'n_head\\": 2': b'n_head\\": 4'}
    for old, new in changes.items():
        assert kept.count(old) >= 1
        path.write_bytes(kept.replace(old, new))
        with pytest.raises(ValueError, match=r"is damaged: its content is not what was written"):
            CaptionModel.load(path)


def test_a_file_of_an_earlier_version_has_no_digest_and_is_loaded(kept, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(kept)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert len(header.pop("digest")) == 66  # hex digits in quotes
    save_file(load_file(path), path, header)
    assert CaptionModel.load(path).vocabulary == tiny_model().vocabulary


# ---- the default of captions -----------------------------------------------------------------


def repeating() -> CaptionModel:
    """Return a model whose captions say one word again and again."""
    model = build()
    with torch.no_grad():
        model.decoder.norm.weight.zero_()
        model.decoder.norm.bias.copy_(model.decoder.output_weight[4] * 9)
    return model.eval()


def test_a_models_own_limit_of_repetitions_holds_where_none_is_given(tmp_path):
    model, path = repeating(), tmp_path / "model.safetensors"
    image = Image.new("RGB", (80, 60), "red")
    assert "decoding" not in save_and_read(model, path)
    assert Captioner.load(path, "cpu").caption(image, method="greedy") == " ".join(["a"] * 6)
    model.no_repeat_ngram = 2
    assert save_and_read(model, path)["decoding"] == {"no_repeat_ngram": 2}
    captioner = Captioner.load(path, "cpu", method="greedy")
    assert captioner.caption(image).startswith("a a ")
    assert captioner.caption(image) == captioner.caption(image, no_repeat_ngram=2)
    assert captioner.caption(image) != captioner.caption(image, no_repeat_ngram=1)
    assert captioner.caption(image, no_repeat_ngram=0) == " ".join(["a"] * 6)
    plain = CaptionModel.load(path)
    plain.no_repeat_ngram = 0
    assert ModelEnsemble([plain, CaptionModel.load(path)]).no_repeat_ngram == 2


def save_and_read(model: CaptionModel, path: Path) -> dict:
    model.save(path)
    assert CaptionModel.load(path).no_repeat_ngram == model.no_repeat_ngram
    return read_metadata(path)


@pytest.mark.parametrize("value", ["2", -1, 1.0, True, None, 10**9, [2]])
@pytest.mark.parametrize("wrap", [lambda value: {"no_repeat_ngram": value}, lambda value: value])
def test_a_limit_that_is_no_such_number_is_one_line(value, wrap, saved):
    path = rewritten(saved, lambda metadata, _: metadata.update(decoding=wrap(value)))
    with pytest.raises(files.UserError, match=r"best.safetensors .*no_repeat_ngram is not a numb"):
        CaptionModel.load(path)
