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
from encoder import MEAN, STD, TRANSFORM
from inference import Captioner
from util import files, program

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
    ours = Captioner.load(checkpoint, "cpu", precision="float32")  # as the graph computes
    theirs = Captioner.load(graph)
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
    assert " ".join(words) == Captioner.load(checkpoint, "cpu", precision="float32").caption(
        image, method="greedy"
    )


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


# --- graphs of strangers


def changed(exported, folder, *, step=False, change=lambda graph: None, **metadata):
    """Write the captioner with its image graph, or the one of a step, changed; return its path.

    `metadata` are texts; None removes one.
    """
    onnx = pytest.importorskip("onnx")
    target = folder / "model.onnx"
    shutil.copy(exported[1], target)
    shutil.copy(exported[1].with_suffix(".step.onnx"), target.with_suffix(".step.onnx"))
    path = target.with_suffix(".step.onnx") if step else target
    graph = onnx.load(path)
    held = {each.key: each.value for each in graph.metadata_props} | metadata
    del graph.metadata_props[:]
    for key, value in held.items():
        if value is not None:
            graph.metadata_props.add(key=key, value=value)
    change(graph)
    onnx.save(graph, path)
    return target


WORDS = ["<pad>", "<start>", "<end>", "<unk>", *tiny_model().vocabulary.words[4:]]
PICTURE = {"size": 64, "transform": TRANSFORM, "mean": list(MEAN), "std": list(STD)}
METADATA = [
    *[(name, None) for name in ("format", "model", "vocabulary", "max_words", "picture", "start")],
    *[(name, "no JSON") for name in ("vocabulary", "picture", "more")],
    ("vocabulary", "[" * 10**5), ("vocabulary", "3"), ("vocabulary", '{"a": 1}'),
    ("vocabulary", json.dumps(WORDS[:4])), ("vocabulary", json.dumps([*WORDS, "more"])),
    ("vocabulary", json.dumps(WORDS[4:])), ("vocabulary", json.dumps([*WORDS[:-1], "a"])),
    ("vocabulary", json.dumps([*WORDS[:-1], 3])),
    ("vocabulary", json.dumps([*WORDS[:-1], "\x1b]0;owned\x07"])),
    ("vocabulary", json.dumps([*WORDS[:-1], "\u202egpj"])),
    *[("max_words", value) for value in ("0", "-1", "1e9", '"8"', "100000000", "true", "null")],
    *[("shared", value) for value in ("-1", "4", "3", "0", '"2"', "true", "1e400", "[2]")],
    *[("picture", json.dumps(PICTURE | part)) for part in (
        {"size": 10**6}, {"size": -64}, {"size": "64"}, {"size": 128}, {"size": [64]},
        {"transform": "crop"}, {"mean": [0, 0, 0]}, {"std": None},
    )],
    ("picture", "[]"), ("start", "2"), ("end", "11"), ("never", "[]"), ("model", '"other"'),
    *[("decoding", value) for value in ("[]", "2", '{"no_repeat_ngram": -1}')],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), METADATA, ids=lambda value: str(value)[:20])
def test_metadata_that_this_version_would_not_write_are_one_line(
    name, value, exported, tmp_path, capfd
):
    path = changed(exported, tmp_path, **{name: value})
    with pytest.raises(files.UserError) as error:
        Captioner.load(path)
    said = program.one_line(str(error.value))
    assert "model.onnx" in said and len(said) < 400 + 3 * len(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def rename(places, old, new):
    next(each for each in places if each.name == old).name = new


def widen(graph):
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


SIGNATURES = {
    "an input of another name": (True, lambda g: rename_everywhere(g, "token", "word")),
    "outputs in another order": (True, lambda g: reorder(g.graph.output)),
    "an output too few": (True, lambda g: g.graph.output.pop()),
    "an image output too few": (False, lambda g: g.graph.output.pop()),
    "a graph for one image": (False, widen),
    "a token of floats": (True, lambda g: float_token(g)),
}


def rename_everywhere(graph, old, new):
    rename(graph.graph.input, old, new)
    for node in graph.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def reorder(places):
    first = places.pop(0)
    places.append(first)


def float_token(graph):
    from onnx import TensorProto, helper

    graph.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    cast = helper.make_node("Cast", ["token"], ["whole"], to=TensorProto.INT64)
    for node in graph.graph.node:
        node.input[:] = ["whole" if name == "token" else name for name in node.input]
    graph.graph.node.insert(0, cast)


@pytest.mark.parametrize("what", SIGNATURES)
def test_inputs_and_outputs_that_the_search_does_not_know_are_one_line(what, exported, tmp_path):
    step, change = SIGNATURES[what]
    with pytest.raises(files.UserError, match=r"is not a captioner that this version can use"):
        Captioner.load(changed(exported, tmp_path, step=step, change=change))


def end_with(graph, *nodes):
    """Let the log-probabilities be what `nodes` make of "raw", which they were."""
    for node in graph.graph.node:
        node.output[:] = ["raw" if name == "log_probs" else name for name in node.output]
    graph.graph.node.extend(nodes)


def numbers_of(value):
    """Return what makes all log-probabilities `value`."""
    from onnx import helper

    def change(graph):
        tensor = helper.make_tensor("value", 1, [], [value])
        scale = helper.make_node("Constant", [], ["value"], value=tensor)
        zero = helper.make_node("Sub", ["raw", "raw"], ["zero"])
        end_with(graph, scale, zero, helper.make_node("Add", ["zero", "value"], ["log_probs"]))

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 5.0, 1e30])
@pytest.mark.parametrize("how", [{"method": "beam"}, {"method": "greedy"}, {"method": "sample"}])
def test_numbers_that_are_no_log_probabilities_are_one_line(value, how, exported, tmp_path):
    path = changed(exported, tmp_path, step=True, change=numbers_of(value))
    with pytest.raises(files.UserError, match="does not compute log-probabilities"):
        Captioner.load(path).caption(picture(1), **how)


def test_fewer_words_than_the_vocabulary_are_one_line(exported, tmp_path):
    def change(graph):
        from onnx import helper

        for name, values in (("from", [0]), ("to", [5]), ("axis", [2])):
            tensor = helper.make_tensor(name, 7, [1], values)
            graph.graph.node.insert(0, helper.make_node("Constant", [], [name], value=tensor))
        end_with(graph, helper.make_node("Slice", ["raw", "from", "to", "axis"], ["log_probs"]))
        dims = graph.graph.output[0].type.tensor_type.shape.dim
        dims[2].dim_param = "some"

    path = changed(exported, tmp_path, step=True, change=change)
    with pytest.raises(files.UserError, match="another shape|does not compute log-probabilities"):
        Captioner.load(path).caption(picture(1))
