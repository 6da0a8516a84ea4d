"""Files from strangers: no code in them runs; absurd ones are refused before memory is taken."""

import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import METHODS, picture, run_script, tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file

import inference
from encoder import build_encoder
from features import FeatureCache
from inference import Captioner
from model import CaptionModel
from model_file import MAX_HEADER, read_metadata
from util.checkpoints import load_state


class Trap:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return self.mark.touch, ()


def model(path: Path) -> object:
    return CaptionModel.load(path)


def weights(path: Path) -> object:
    return build_encoder("resnet18", path)


def state(path: Path) -> object:
    return load_state(path.parent)


def cache(path: Path) -> object:
    path.with_suffix(".json").write_text('{"image_ids": ["a"], "left_out": []}')
    return FeatureCache(path)


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (model, "best.safetensors"),
        (weights, "cnn.pth"),
        (weights, "cnn.safetensors"),
        (state, "last.pt"),
        (state, "previous.pt"),
        (cache, "features.npy"),
    ],
)
@pytest.mark.parametrize("way", ["bare", "legacy", "zipped", "among tensors", "array"])
def test_code_in_a_file_never_runs(load, name, way, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / name
    trap = Trap(mark)
    if way == "bare":
        path.write_bytes(pickle.dumps(trap))
    elif way == "array":
        with path.open("wb") as file:
            np.save(file, np.array([trap], dtype=object), allow_pickle=True)
    else:
        held = {"conv1.weight": torch.zeros(1), "epoch": trap} if way[0] == "a" else trap
        torch.save(held, path, _use_new_zipfile_serialization=way != "legacy")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    if way == "bare":  # the trap does work where it is let in
        pickle.loads(path.read_bytes())
        assert mark.exists()


# --- model files


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, dict]:
    path = tmp_path_factory.mktemp("whole") / "best.safetensors"
    tiny_model(decoder="lstm").save(path)
    return read_metadata(path), load_file(path)


def rewritten(whole, path: Path, sizes=None, tensors=None, **about) -> Path:
    """Write the model with other sizes, tensors or words in its header."""
    header, held = whole
    header = header | about
    if sizes:
        header = header | {"model": header["model"] | sizes}
    said = {key: json.dumps(value) for key, value in header.items()}
    save_file(held | (tensors or {}), path, said)
    return path


def peak() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


@pytest.fixture
def thrifty():
    """Fail where the test took more than 500 MB beyond what had ever been in use."""
    if not Path("/proc/self/clear_refs").exists():
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = peak()
    yield
    assert peak() - before < 500e6


SIZES = [
    *[(key, value) for key in ("d_model", "n_decode", "n_head", "fc_dim", "seq_len", "img_size")
      for value in (10**6, 10**9, 10**30, -1, 0, 1.5, "64", True, [64])],
    ("img_size", None), ("img_size", 2049), ("dropout", "0.2"), ("dropout", 5), ("grid", 10**9),
    ("grid", "1"), ("grid", 0), ("cnn_backbone", ["tiny"]), ("cnn_trained", None),
    ("decoder", ["lstm"]), ("transform", 3), ("layers", 3),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), SIZES)
def test_absurd_sizes_are_refused_in_a_line(key, value, whole, tmp_path, thrifty):
    path = rewritten(whole, tmp_path / "best.safetensors", sizes={key: value})
    refused = (
        r"best\.safetensors (does not describe a model|has other weights than its header says)"
    )
    with pytest.raises(ValueError, match=refused) as caught:
        CaptionModel.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(path))


VOCABULARIES = {
    "no list": "abcdefgh",
    "numbers": list(range(8)),
    "none": None,
    "control characters": [f"\x1b[2J{n}" for n in range(8)],
    "lone surrogates": [f"\ud800{n}" for n in range(8)],
    "repeated": ["a"] * 8,
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_vocabulary_that_is_none_is_refused(kind, whole, tmp_path):
    path = rewritten(whole, tmp_path / "best.safetensors", vocabulary=VOCABULARIES[kind])
    with pytest.raises(ValueError, match=r"best\.safetensors does not describe a model.*vocabul"):
        CaptionModel.load(path)


def test_more_words_or_other_shapes_than_the_file_holds_are_refused(whole, tmp_path, thrifty):
    path = tmp_path / "best.safetensors"
    many = [f"w{number}" for number in range(300_000)]
    for change, said in [
        ({"vocabulary": many}, r"has shape \(12.*expected \(300004"),
        ({"sizes": {"d_model": 16384}}, r"expected \(.*16384"),
        ({"sizes": {"fc_dim": 65536}}, r"expected \(262144, 16"),
        ({"sizes": {"n_decode": 128}}, "lacks decoder.* more"),
        ({"sizes": {"decoder": "transformer", "n_decode": 128}}, "lacks decoder.* more"),
        ({"tensors": {"x" * 5000: torch.zeros(1)}}, "has an unknown 'x{99}', and 0 more"),
    ]:
        with pytest.raises(ValueError, match=f"other weights than its header says: .*{said}"):
            CaptionModel.load(rewritten(whole, path, **change))


def test_a_header_too_long_is_refused_unread(tmp_path, thrifty):
    path = tmp_path / "best.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 9)
    with pytest.raises(ValueError, match="is not a model file.* header of 10,000,001 bytes"):
        CaptionModel.load(path)


def test_a_header_nested_too_deep_is_refused(whole, tmp_path):
    held = whole[1]
    path = tmp_path / "best.safetensors"
    header = {"format": json.dumps("image-captioning 2"), "model": "[" * 200_000}
    save_file(held, path, header)
    with pytest.raises(ValueError, match="is not a model file"):
        CaptionModel.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda each: each * float("nan"), "holds infinity or NaN"),
        (lambda each: each + float("inf"), "holds infinity or NaN"),
        (lambda each: each.to(torch.int8), "holds torch.int8"),
        (lambda each: each.to(torch.complex64), "holds torch.complex64"),
    ],
)
def test_weights_that_are_no_numbers_to_use_are_refused(change, said, whole, tmp_path):
    name = "decoder.output.weight"
    path = rewritten(whole, tmp_path / "best.safetensors", tensors={name: change(whole[1][name])})
    with pytest.raises(ValueError, match=rf"best\.safetensors is damaged: {name} {said}"):
        CaptionModel.load(path)


@pytest.mark.parametrize("method", METHODS)
def test_weights_so_large_that_nothing_comes_of_them_are_one_line(method, whole, tmp_path):
    large = {key: torch.full_like(each, 1e38) for key, each in whole[1].items() if each.dim()}
    captioner = Captioner.load(rewritten(whole, tmp_path / "m.safetensors", tensors=large), "cpu")
    with pytest.raises(ValueError, match="the model's probabilities are NaN"):
        captioner.caption(picture(1), method=method)


def test_a_state_dict_that_unpacks_to_far_more_than_the_file_is_no_captioner(tmp_path):
    path = tmp_path / "best.safetensors"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(ValueError, match="is not a model file"):
        CaptionModel.load(path)


# --- the memory of a batch


def test_a_script_says_one_line_of_a_picture_too_large(run, tmp_path, capsys, recwarn):
    Image.new("1", (9460, 9460)).save(tmp_path / "bomb.png")
    code, out, err = run_script(
        inference, tmp_path / "bomb.png", "--checkpoint", run, capsys=capsys
    )
    assert (code, out, err.count("\n"), len(recwarn)) == (2, "", 1, 0)
    assert (
        "bomb.png is not an image that can be read (9460 x 9460 pixels; at most 89,478,485" in err
    )


def test_a_batch_is_made_smaller_where_beams_or_pixels_are_many(run, monkeypatch):
    captioner, sizes = Captioner.load(run, "cpu"), []
    decoded = Captioner._decode

    def counting(self, batch, n, config):
        sizes.append(len(batch))
        return decoded(self, batch, n, config)

    pictures = [picture(seed) for seed in range(6)]
    expected = [each[0].text for each in captioner.caption_many(pictures, batch_size=6)]
    monkeypatch.setattr(Captioner, "_decode", counting)
    monkeypatch.setattr(inference, "MAX_ROWS", 10)
    found = captioner.caption_many(pictures, batch_size=10**9)
    assert [each[0].text for each in found] == expected and sizes == [2, 2, 2]
    monkeypatch.setattr(inference, "MAX_PIXELS", 64 * 64)
    found = captioner.caption_many(pictures, batch_size=10**9)
    assert [each[0].text for each in found] == expected and sizes[3:] == [1] * 6


def test_of_a_picture_no_more_is_kept_than_the_cnn_sees(run, thrifty):
    """Sixteen pictures of 40 MB each, decoded, would be 640 MB."""
    large = picture(1).resize((3000, 3300))
    captioner = Captioner.load(run, "cpu", method="greedy")
    found = captioner.caption_many((large.copy() for _ in range(16)), batch_size=16)
    assert len({each[0].text for each in found}) == 1


@pytest.mark.parametrize("setting", [{"beam_size": 1001}, {"n": 1001}, {"n": 10**9}])
@pytest.mark.parametrize("method", ["beam", "sample"])
def test_beams_and_captions_without_number_are_refused(setting, method, run):
    with pytest.raises(ValueError, match=r"(beam size|n) \d+ must be at most 1,000"):
        inference.caption(picture(1), checkpoint=run, method=method, **setting)
