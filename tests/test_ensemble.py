"""Several checkpoints decoded together, whatever their CNNs, sizes and decoders."""

import json
import zlib

import pytest
import torch
from helpers.tiny import METHODS, WORDS, picture, run_script, tiny_model
from PIL import Image

import evaluate
import inference
from evaluate import encode_split
from inference import Captioner, caption
from model import ModelEnsemble, load_models
from readers import Record
from util import shapes
from util.images import read_image

KINDS = [("transformer", 64, 2), ("lstm", 64, 4), ("attention-lstm", 96, 5)]  # size, seed


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> list:
    """The run folders of three models; the first two have one CNN."""
    folder = tmp_path_factory.mktemp("members")
    models = [tiny_model(seed, decoder, img_size=size) for decoder, size, seed in KINDS]
    models[1].encoder.load_state_dict(models[0].encoder.state_dict())
    for model, (decoder, *_) in zip(models, KINDS, strict=True):
        (folder / decoder).mkdir()
        model.save(folder / decoder / "best.safetensors")
    return [folder / decoder for decoder, *_ in KINDS]


@pytest.fixture(scope="module")
def pictures() -> list:
    return [picture(number, (80, 60 + number)) for number in range(12)]


def test_the_first_word_has_the_mean_of_the_members_probabilities(members, pictures):
    ensemble = Captioner.load(members, "cpu")
    pixels = [torch.stack([see(pictures[0])]) for see in ensemble.transforms]
    token = torch.ones(1, 1, dtype=torch.int64)
    with torch.no_grad():
        joint, _ = ensemble.model.decoder.step(
            token, ensemble.model.decoder.start(ensemble.model.encode(*pixels))
        )
        alone = []
        for path in members:
            one = Captioner.load(path, "cpu")
            seen = one.transforms[0](pictures[0])[None]
            state = one.model.decoder.start(one.model.encode(seen))
            alone.append(one.model.decoder.step(token, state)[0].exp())
    torch.testing.assert_close(joint.exp(), torch.stack(alone).mean(0))


def test_one_cnn_works_once_for_the_members_that_share_it(members):
    model = load_models(members)
    assert isinstance(model, ModelEnsemble)
    assert [size for _, size in model.encoders] == [64, 96]
    calls = []
    for member in model.models:
        member.encoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        memories = model.encode(*(torch.rand(2, 3, size, size) for _, size in model.encoders))
    assert len(memories) == 3 and len(calls) == 2


def test_one_member_alone_is_the_model(members, pictures):
    expected = caption(pictures, checkpoint=members[0])
    assert caption(pictures, checkpoint=members[:1]) == expected
    assert caption(pictures, checkpoint=[members[0]] * 2) == expected


@pytest.mark.parametrize("method", METHODS)
def test_an_ensemble_captions_a_picture_alone_as_in_a_batch(method, members, pictures):
    ensemble = Captioner.load(members, "cpu", method=method)
    alone = [ensemble.caption(each) for each in pictures]
    assert [found[0].text for found in ensemble.caption_many(pictures, batch_size=5)] == alone
    assert len(set(alone)) > 1


def test_a_large_photo_is_read_alike_by_inference_and_evaluation(members, tmp_path):
    """For all members as the largest needs it, so that samples and captions are the same."""
    path = tmp_path / "noise.jpg"
    Image.effect_noise((1200, 760), 90).convert("RGB").save(path)
    for paths, size in ((members, (600, 380)), (members[0], (300, 190))):
        captioner = Captioner.load(paths, "cpu", precision="float32")
        assert read_image(path, captioner.at_least).size == size
        pixels = captioner._preprocess(path)
        (batch,) = encode_split(captioner.model, [Record("a", path, ("a",))], workers=0)
        assert batch.seeds == [zlib.crc32(pixels[0].contiguous().numpy())]
        pairs = zip(captioner.encoders, pixels, batch.features, strict=True)
        for encode, one, found in pairs:
            torch.testing.assert_close(encode(one[None]).half(), found, atol=2e-3, rtol=2e-3)


def test_the_scripts_and_the_function_agree(members, tmp_path, capsys):
    data = shapes.draw(tmp_path / "data", train=2, val=2, test=9)
    test = [path for path in sorted((data / "images").iterdir()) if "test" in path.name]
    expected = caption(test, checkpoint=members)
    assert expected != caption(test, checkpoint=members[0])
    code, out, _ = run_script(inference, *test, "--ensemble", *members, capsys=capsys)
    assert code == 0 and [line.split("\t")[1] for line in out.splitlines()] == expected
    found = tmp_path / "found.json"
    code, _, err = run_script(
        evaluate, "--checkpoint", members[0], "--ensemble", *members[1:], "--dataset", "shapes",
        "--data-dir", data, "--batch-size", 4, "--captions-json", found, "--no-java",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert [row["caption"] for row in json.loads(found.read_text())] == expected


@pytest.mark.parametrize("script", [inference, evaluate])
def test_different_vocabularies_are_one_clear_line(script, members, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    tiny_model(words=WORDS[:-1]).save(other)
    picture(1).save(tmp_path / "a.png")
    place = [tmp_path / "a.png"] if script is inference else []
    if script is evaluate:
        data = shapes.draw(tmp_path / "data", train=1, val=1, test=1)
        place = ["--dataset", "shapes", "--data-dir", data]
    code, out, err = run_script(script, *place, "--ensemble", members[0], other, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{members[0]} and {other} have different vocabularies (12 and 11 words)" in err
