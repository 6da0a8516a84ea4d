"""A captioner in ONNX says what the checkpoint says, and faults are one line."""

import json
import shutil
import sys

import numpy as np
import pytest
from helpers.tiny import picture, run_script, tiny_model

import evaluate
import export
import inference
from inference import Captioner

HOWS = (
    {"method": "greedy", "n": 1},
    {"method": "beam", "beam_size": 3, "n": 3},
    {"method": "sample", "n": 2},
    {"method": "beam", "beam_size": 2, "no_repeat_ngram": 2, "max_words": 5},
)


def installed(*libraries):
    for name in libraries:
        pytest.importorskip(name, reason=f"{name} is not installed (requirements-onnx.txt)")


def pair(folder, decoder):
    """Return the path of a tiny model's checkpoint, and of the same model in ONNX."""
    installed("onnx", "onnxscript", "onnxruntime")
    checkpoint, graph = folder / f"{decoder}.safetensors", folder / f"{decoder}.onnx"
    tiny_model(seed=3, decoder=decoder).save(checkpoint)  # whose captions differ, of every decoder
    export.export(checkpoint, graph)
    return checkpoint, graph


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a checkpoint and its graphs; the smallest decoder, for tests that need no other."""
    return pair(tmp_path_factory.mktemp("onnx"), "attention-lstm")


def same_captions(checkpoint, graph):
    """Compare captions by all methods of pictures of several shapes, in uneven batches."""
    ours, theirs = Captioner.load(checkpoint, "cpu"), Captioner.load(graph)
    pictures = [picture(seed, (64, 40 + 9 * seed)) for seed in range(7)]
    for how in HOWS:
        said, said_there = (
            list(each.caption_many(pictures, batch_size=3, **how)) for each in (ours, theirs)
        )
        assert len({captions[0].text for captions in said}) > 1
        for mine, other in zip(said, said_there, strict=True):
            assert [each.text for each in mine] == [each.text for each in other]
            np.testing.assert_allclose(
                [each.log_prob for each in mine], [each.log_prob for each in other], rtol=1e-4
            )


def test_onnx_says_what_the_checkpoint_says(exported):
    same_captions(*exported)


@pytest.mark.parametrize("decoder", ["transformer", pytest.param("lstm", marks=pytest.mark.slow)])
def test_onnx_says_what_the_checkpoint_says_with_other_decoders(decoder, tmp_path):
    same_captions(*pair(tmp_path, decoder))


def test_onnxruntime_alone_gives_the_greedy_caption(exported):
    """All that another program needs is in the files: words, limits, how a picture is prepared."""
    import onnxruntime

    checkpoint, path = exported
    first = onnxruntime.InferenceSession(path)
    step = onnxruntime.InferenceSession(path.with_suffix(".step.onnx"))
    about = {k: json.loads(v) for k, v in first.get_modelmeta().custom_metadata_map.items()}
    form, image = about["picture"], picture(5, (90, 50))
    pixels = np.asarray(image.resize((form["size"], form["size"]), resample=2), dtype=np.float32)
    pixels = (pixels / 255 - form["mean"]) / form["std"]
    state = first.run(None, {"images": pixels.transpose(2, 0, 1)[None].astype(np.float32)})
    state = dict(zip([each.name for each in first.get_outputs()], state, strict=True))
    token, words = about["start"], []
    while len(words) < about["max_words"]:
        outputs = step.run(None, {"token": np.array([[token]]), **state})
        found = dict(zip([each.name for each in step.get_outputs()], outputs, strict=True))
        chances = found.pop("log_probs")[0, 0]
        chances[about["never"]] = -np.inf
        if not words:  # a caption has a word at least
            chances[about["end"]] = -np.inf
        token = int(chances.argmax())
        if token == about["end"]:
            break
        words.append(about["vocabulary"][token])
        state |= {name.removeprefix("next_"): tensor for name, tensor in found.items()}
    assert " ".join(words) == Captioner.load(checkpoint, "cpu").caption(image, method="greedy")


def test_the_script_takes_the_graph_for_a_checkpoint(exported, tmp_path, capsys):
    checkpoint, graph = exported
    picture(1).save(tmp_path / "photo.png")
    spoken = [
        run_script(inference, tmp_path / "photo.png", "--checkpoint", path, capsys=capsys)
        for path in (checkpoint, graph)
    ]
    assert spoken[0] == spoken[1] and spoken[0][0] == 0 and spoken[0][1].strip()


def test_nothing_is_shown_of_attention_that_the_graphs_do_not_give(exported):
    explained = Captioner.load(exported[1]).explain(picture(2))[0]
    assert explained.words and explained.attention is None


def test_a_graph_that_is_not_there_or_not_ours_is_one_line(exported, tmp_path, capsys):
    _, graph = exported
    picture(1).save(tmp_path / "photo.png")

    def error(path, *more):
        argv = (tmp_path / "photo.png", "--checkpoint", path, *more)
        code, _, said = run_script(inference, *argv, capsys=capsys)
        assert code == 2 and said.count("\n") == 1
        return said

    lonely = shutil.copy(graph, tmp_path / "lonely.onnx")
    assert "no graph at" in error(lonely) and "python export.py" in error(lonely)
    assert "no checkpoint at" in error(tmp_path / "none.onnx") or "no graph at" in error(
        tmp_path / "none.onnx"
    )
    shutil.copy(graph, tmp_path / "lonely.step.onnx")
    shutil.copy(graph.with_suffix(".step.onnx"), tmp_path / "wrong.onnx")
    assert "holds the graph of a step" in error(tmp_path / "wrong.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    assert "is not a graph that onnxruntime can run" in error(tmp_path / "text.onnx")
    assert "use --device cpu" in error(graph, "--device", "cuda")
    assert "alone" in error(graph, "--ensemble", exported[0])


def test_graphs_of_different_models_are_refused(exported, tmp_path):
    onnx = pytest.importorskip("onnx")
    _, graph = exported
    shutil.copy(graph, tmp_path / "mixed.onnx")
    other = onnx.load(graph.with_suffix(".step.onnx"))
    next(each for each in other.metadata_props if each.key == "model").value = '"another"'
    onnx.save(other, tmp_path / "mixed.step.onnx")
    with pytest.raises(ValueError, match="are of different models; export both again"):
        Captioner.load(tmp_path / "mixed.onnx")


def test_a_graph_is_not_scored_on_a_split(exported, drawn, capsys):
    argv = ("--checkpoint", exported[1], "--dataset", "shapes", "--data-dir", drawn)
    code, _, said = run_script(evaluate, *argv, capsys=capsys)
    assert code == 2 and "that it was exported from" in said


@pytest.mark.parametrize("library", ["onnx", "onnxscript"])
def test_a_library_that_is_missing_is_named_with_the_file_to_install(
    library, run, tmp_path, monkeypatch, capsys
):
    if library == "onnxscript":
        installed("onnx")
    monkeypatch.setitem(sys.modules, library, None)
    code, _, said = run_script(export, run, tmp_path / "model.onnx", capsys=capsys)
    assert code == 2 and said.count("\n") == 1
    assert f"ONNX needs {library}: pip install -r requirements-onnx.txt" in said


def test_without_onnxruntime_captioning_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="ONNX needs onnxruntime: pip install -r requirements-o"):
        Captioner.load(tmp_path / "model.onnx")


def test_what_torch_cannot_write_is_one_line_and_leaves_no_file(run, tmp_path, monkeypatch, capsys):
    installed("onnx", "onnxscript")

    def fail(*args, **keywords):
        raise RuntimeError("no such operator\nand a long story")

    monkeypatch.setattr("torch.export.export", fail)
    code, _, said = run_script(export, run, tmp_path / "model.onnx", capsys=capsys)
    assert code == 2 and said.count("\n") == 1 and "can't write this model as ONNX" in said
    assert not list(tmp_path.iterdir())
