"""A picture has one caption, whatever way it comes in, and a script that says what is wrong."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import METHODS, WORDS, picture, run_script, tiny_model
from PIL import Image

import inference
from inference import Captioner, caption
from model import CaptionModel
from util.images import read_image

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of twenty pictures of several sizes: more than a batch."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(20):
        picture(number, (64, 48 + number)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def script(capsys):
    return lambda *argv: run_script(inference, *argv, capsys=capsys)


def texts(captions):
    return [each.text for each in captions]


# --- one caption, whatever the way


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_has_the_same_caption_alone_and_in_any_batch(method, captioner, photos):
    paths = sorted(photos.iterdir())
    alone = [captioner.caption(path, method=method) for path in paths]
    assert len(set(alone)) > 1
    for batch_size in (1, 7, 64):
        many = captioner.caption_many(paths, method=method, batch_size=batch_size)
        assert [captions[0].text for captions in many] == alone
    backwards = captioner.caption_many(paths[::-1], method=method)
    assert [captions[0].text for captions in backwards] == alone[::-1]


@pytest.mark.parametrize("method", METHODS)
def test_the_function_the_class_and_the_script_agree(method, captioner, run, photos, script):
    paths = sorted(photos.iterdir())
    function = caption(paths, checkpoint=run, method=method)
    assert function == [captioner.caption(path, method=method) for path in paths]
    code, out, err = script(photos, "--checkpoint", run, "--method", method)
    assert (code, err) == (0, "")
    expected = [f"{path}\t{text}" for path, text in zip(paths, function, strict=True)]
    assert out.splitlines() == expected


def test_one_image_gives_a_string_and_a_list_gives_a_list(run):
    one, two = picture(1), picture(2)
    assert caption(one, checkpoint=run) == caption([one], checkpoint=run)[0]
    assert caption((one, two), checkpoint=run) == caption([one, two], checkpoint=run)
    assert caption([], checkpoint=run) == []
    best = caption(one, checkpoint=run, n=3)
    assert len(best) == 3 and best[0] == caption(one, checkpoint=run)
    assert caption([one, two], checkpoint=run, n=3) == [best, caption(two, checkpoint=run, n=3)]


def test_every_kind_of_source_has_the_same_caption(captioner, tmp_path):
    photo = picture(3)
    photo.save(tmp_path / "photo.png")
    data = (tmp_path / "photo.png").read_bytes()
    sources = [tmp_path / "photo.png", str(tmp_path / "photo.png"), data, io.BytesIO(data)]
    sources += [photo, np.asarray(photo), np.asarray(photo) / 255]
    first, *others = captioner.caption_many(sources, n=2)
    assert all(other == first for other in others)


def rotated(photo):
    photo.getexif()[0x0112] = 6
    return photo.transpose(Image.Transpose.ROTATE_90), {"exif": photo.getexif()}


# How a picture is written, and the RGB picture that a reader of it should see.
KINDS = {
    "exif rotation.png": (rotated, lambda photo: photo),
    "greyscale.png": (lambda photo: (photo.convert("L"), {}), lambda photo: photo.convert("L")),
    "palette.png": (lambda photo: (photo.quantize(8), {}), lambda photo: photo.quantize(8)),
    "cmyk.tif": (lambda photo: (photo.convert("CMYK"), {}), lambda photo: photo.convert("CMYK")),
    "rgba.png": (
        lambda photo: (Image.merge("RGBA", (*photo.split(), Image.new("L", photo.size))), {}),
        lambda photo: Image.new("RGB", photo.size, "white"),
    ),
    "deep.png": (
        lambda photo: (Image.fromarray(np.asarray(photo.convert("L")).astype("u2") * 257), {}),
        lambda photo: photo.convert("L"),
    ),
    "animated.gif": (
        lambda photo: (
            photo.quantize(8),
            {"save_all": True, "append_images": [picture(9).quantize(8)]},
        ),
        lambda photo: photo.quantize(8),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_file_is_seen_as_people_see_it(name, captioner, run, tmp_path):
    write, seen = KINDS[name]
    image, how = write(picture(4, (64, 40)))
    image.save(tmp_path / name, **how)
    expected = seen(picture(4, (64, 40))).convert("RGB")
    assert caption(tmp_path / name, checkpoint=run) == caption(expected, checkpoint=run)
    found, wanted = captioner.caption_many([tmp_path / name, expected])
    assert found[0].log_prob == pytest.approx(wanted[0].log_prob, abs=1e-4)


# --- the n best


@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
def test_the_n_best_are_sorted_different_and_begin_with_the_best(length_penalty, captioner):
    captions = captioner.candidates(picture(5), n=5, length_penalty=length_penalty)
    assert len(set(texts(captions))) == 5
    lengths = [len(each.text.split()) + 1 for each in captions]  # the end is a word
    ranks = [c.log_prob / n**length_penalty for c, n in zip(captions, lengths, strict=True)]
    assert ranks == sorted(ranks, reverse=True)
    best = captioner.candidates(picture(5), n=1, length_penalty=length_penalty)
    assert best[0].text == captions[0].text


def test_n_above_the_beam_size_widens_the_beam(captioner):
    assert len(captioner.candidates(picture(5), n=4, beam_size=1)) == 4


def test_where_fewer_captions_exist_fewer_are_given(captioner):
    captions = captioner.candidates(picture(5), n=20, max_words=1)
    assert sorted(texts(captions)) == sorted(WORDS)


def test_a_beam_of_one_is_greedy(captioner):
    for seed in range(4):
        beam = captioner.caption(picture(seed), beam_size=1)
        assert beam == captioner.caption(picture(seed), method="greedy")


def test_samples_go_by_the_seed_and_differ_among_themselves(captioner):
    def drawn(**how):
        return texts(captioner.candidates(picture(5), n=6, method="sample", **how))

    assert drawn() == drawn(seed=0) != drawn(seed=1)
    assert len(set(drawn())) > 1
    assert len(set(drawn(top_k=1))) == 1
    assert drawn(top_k=1)[0] == captioner.caption(picture(5), method="greedy")


def test_two_pictures_are_sampled_by_different_chances(captioner):
    """So hot that the picture has no say: only chance is left."""
    hot = {"method": "sample", "temperature": 1e6}
    assert captioner.caption(picture(1), **hot) != captioner.caption(picture(2), **hot)


def test_max_words_bounds_a_caption(captioner):
    for words in (1, 3):
        assert len(captioner.caption(picture(5), max_words=words).split()) <= words


def test_an_explained_caption_is_the_caption_with_a_map_for_each_word(captioner):
    for best, explained in zip(
        captioner.candidates(picture(3), n=4), captioner.explain(picture(3), n=4), strict=True
    ):
        assert (explained.text, explained.log_prob) == best
        assert explained.words == best.text.split()
        assert explained.attention.shape == (len(explained.words), 4, 4)
        np.testing.assert_allclose(explained.attention.sum((1, 2)), 1, rtol=1e-5)


def test_a_model_that_sees_the_whole_picture_at_once_has_no_map():
    captioner = Captioner(tiny_model(decoder="lstm"))
    assert [each.attention for each in captioner.explain(picture(3), n=2)] == [None, None]


def test_the_settings_of_a_captioner_hold_until_a_call_says_otherwise(run):
    greedy = Captioner.load(run, "cpu", method="greedy", max_words=2)
    plain = Captioner.load(run, "cpu")
    one = plain.caption(picture(6), method="greedy", max_words=2)
    assert greedy.caption(picture(6)) == one
    assert greedy.caption(picture(6), method="beam", max_words=8) == plain.caption(
        picture(6), max_words=8
    )


# --- the loaded model


def test_the_model_stays_loaded_until_its_file_changes(tmp_path, monkeypatch):
    loads, load = [], CaptionModel.load
    monkeypatch.setattr(CaptionModel, "load", lambda *argv: loads.append(argv) or load(*argv))
    path = tmp_path / "best.safetensors"
    for seed in (1, 2):
        tiny_model(seed).save(path)
        expected = Captioner(tiny_model(seed)).caption(picture(7), method="greedy")
        for place in (tmp_path, path, str(path)):
            assert caption(picture(7), checkpoint=place, method="greedy") == expected
        assert len(loads) == seed


def test_threads_load_a_model_once_and_caption_as_one_does(tmp_path, monkeypatch):
    loads, load = [], CaptionModel.load

    def slow(*argv):
        loads.append(argv)
        time.sleep(0.1)  # long enough for the others to come
        return load(*argv)

    monkeypatch.setattr(CaptionModel, "load", slow)
    tiny_model(3).save(tmp_path / "best.safetensors")
    settings = [{"method": method} for method in METHODS] + [{"n": 3}]

    def work(number):
        return [
            caption(picture(seed), checkpoint=tmp_path, **settings[(number + seed) % len(settings)])
            for seed in range(6)
        ]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(8)))
    assert len(loads) == 1
    assert together == [work(number) for number in range(8)]


def test_a_failed_load_is_tried_again(tmp_path):
    path = tmp_path / "best.safetensors"
    for content in (b"broken", b"broken"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a model file"):
            caption(picture(1), checkpoint=path)
    tiny_model().save(path)
    assert caption(picture(1), checkpoint=path)


def test_a_few_models_stay_loaded(tmp_path, monkeypatch):
    loads, load = [], CaptionModel.load
    monkeypatch.setattr(CaptionModel, "load", lambda *argv: loads.append(argv) or load(*argv))
    monkeypatch.setattr(inference, "LOADED", type(inference.LOADED)())
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(inference.MAX_LOADED + 1)]
    for seed, path in enumerate(paths):
        tiny_model(seed).save(path)
    for _ in range(3):
        for path in paths[:-1]:
            caption(picture(1), checkpoint=path)
    assert len(loads) == inference.MAX_LOADED >= 3
    caption(picture(1), checkpoint=paths[-1])  # in place of the one used longest ago
    caption(picture(1), checkpoint=paths[1])
    assert len(loads) == inference.MAX_LOADED + 1 and len(inference.LOADED) == inference.MAX_LOADED
    tiny_model(9).save(paths[1])
    caption(picture(1), checkpoint=paths[1])
    assert len(inference.LOADED) == inference.MAX_LOADED  # the old version is gone


def test_captioning_leaves_no_mode_behind(captioner):
    for _ in captioner.caption_many([picture(1), picture(2)], batch_size=1):
        assert not torch.is_inference_mode_enabled()


def test_pictures_are_read_as_they_are_needed(captioner):
    asked = []

    def source():
        for seed in range(6):
            asked.append(seed)
            yield picture(seed)

    found = captioner.caption_many(source(), batch_size=2)
    assert asked == []
    next(found)
    assert asked == [0, 1]


def test_with_no_checkpoint_named_the_shipped_model_is_used_and_said(run, monkeypatch, capsys):
    shipped = run / "best.safetensors"
    monkeypatch.setattr(inference, "SHIPPED", shipped)
    assert Captioner.load(device="cpu").caption(picture(1)) == caption(picture(1), checkpoint=run)
    assert capsys.readouterr() == ("", f"using the shipped model {shipped}\n")


# --- errors


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "bream"}, "method 'bream' is not known; choose from beam, greedy, sample"),
        ({"beam_size": 0}, "beam size 0 must be at least 1"),
        ({"no_repeat_ngram": -1}, "no repeat ngram -1 must be at least 0"),
        ({"max_words": 0}, "max words 0 must be at least 1"),
        ({"max_words": 9}, "max words 9 must be between 1 and the model's 8"),
        ({"top_k": -1}, "top k -1 must be at least 0"),
        ({"method": "sample", "temperature": 0.0}, "temperature 0.0 must be above 0"),
        ({"method": "greedy", "n": 2}, "the greedy method has one caption per image"),
        ({"n": 0}, "n 0 must be at least 1"),
        ({"method": "sample", "n": -1}, "n -1 must be at least 1"),
        ({"device": "banana"}, "device 'banana' can't be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' can't be used"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, said, run):
    with pytest.raises(ValueError, match=said):
        caption(picture(1), checkpoint=run, **settings)


def test_a_batch_of_none_is_refused(captioner):
    with pytest.raises(ValueError, match="batch size 0 must be at least 1"):
        next(captioner.caption_many([picture(1)], batch_size=0))


def test_without_a_model_the_error_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setattr(inference, "SHIPPED", tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint was named and none is shipped"):
        caption(picture(1))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        caption(picture(1), checkpoint=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        caption(picture(1), checkpoint=tmp_path)


def broken_checkpoint(kind, run, folder):
    whole = (run / "best.safetensors").read_bytes()
    content = {"cut": whole[: len(whole) // 2], "pickle": b"\x80\x04}q.", "empty": b""}
    (folder / kind).write_bytes(content[kind])
    return folder / kind


@pytest.mark.parametrize("kind", ["cut", "pickle", "empty"])
def test_a_file_that_is_no_model_is_one_line(kind, run, photos, tmp_path, script):
    checkpoint = broken_checkpoint(kind, run, tmp_path)
    output = tmp_path / "out.json"
    code, out, err = script(photos, "--checkpoint", checkpoint, "--json", output)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {checkpoint} is not a model file") and err.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_every_precision_of_the_cnn_gives_nearly_the_same_features(run, precision):
    exact = Captioner.load(run, "cpu", precision="float32")
    (expected,) = (encode(torch.zeros(1, 3, 64, 64)) for encode in exact.encoders)
    captioner = Captioner.load(run, "cpu", precision=precision)
    (features,) = (encode(torch.zeros(1, 3, 64, 64)) for encode in captioner.encoders)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=0.05, rtol=0.05)
    assert captioner.caption(picture(1))


def test_an_unknown_precision_is_named(run):
    with pytest.raises(ValueError, match="precision 'float16' is not known"):
        Captioner.load(run, "cpu", precision="float16")


def test_a_large_photo_is_decoded_no_larger_than_the_model_needs(run, tmp_path, monkeypatch):
    """A JPEG's own reduction: a twelve-megapixel photo is read in a quarter of the time."""
    picture(1).resize((1200, 900)).save(tmp_path / "large.jpg")
    sizes = []

    def read(source, at_least=None):
        image = read_image(source, at_least)
        sizes.append(image.size)
        return image

    monkeypatch.setattr("util.image_sources.read_image", read)
    captioner = Captioner.load(run, "cpu")
    small = captioner.caption(tmp_path / "large.jpg")
    assert sizes == [(300, 225)]  # a quarter: each side keeps twice the 64 pixels of the model
    assert small == captioner.caption(read_image(tmp_path / "large.jpg"))
