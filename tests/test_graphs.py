"""Graphs of strangers: refused in a line, or run with bounded memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

from util import graphs
from util.files import UserError

onnx = pytest.importorskip("onnx", reason="onnx is not installed (requirements-onnx.txt)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
helper, FLOAT, INT = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def tensor(values, name: str, kind=np.float32):
    return onnx.numpy_helper.from_array(np.asarray(values, kind), name)


def model(*nodes, weights=(), **how):
    """Return a model from x (b, 3) to y (b, 3)."""
    places = [helper.make_tensor_value_info(name, FLOAT, ["b", 3]) for name in "xy"]
    graph = helper.make_graph(list(nodes), "graph", places[:1], places[1:], list(weights))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("strange", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **how)


def write(path: Path, made) -> Path:
    path.write_bytes(made.SerializeToString())
    return path


def plain():
    return model(helper.make_node("Add", ["x", "w"], ["y"]), weights=[tensor([1, 2, 3], "w")])


def test_a_plain_graph_is_computed(tmp_path):
    made = plain()
    made.metadata_props.add(key="about", value='"it"')
    graph = graphs.open_graph(write(tmp_path / "a.onnx", made))
    (found,) = graph(torch.zeros(2, 3))
    assert found.tolist() == [[1, 2, 3]] * 2 and graph.metadata == {"about": '"it"'}


# --- what is refused when it is opened


def looping():
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Identity", ["before"], ["after"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("count", INT, []),
            helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", FLOAT, ["b", 3]),
        ],
        [
            helper.make_tensor_value_info("go_on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", FLOAT, ["b", 3]),
        ],
    )
    weights = [tensor(2**62, "most", np.int64), tensor(True, "yes", bool)]
    return model(helper.make_node("Loop", ["most", "yes", "x"], ["y"], body=body), weights=weights)


def branching():
    def part(name):
        node = helper.make_node("Identity", ["x"], [name])
        place = helper.make_tensor_value_info(name, FLOAT, ["b", 3])
        return helper.make_graph([node], name, [], [place])

    node = helper.make_node("If", ["yes"], ["y"], then_branch=part("a"), else_branch=part("b"))
    return model(node, weights=[tensor(True, "yes", bool)])


def with_functions():
    """Functions that call each other: 2**40 nodes once they are written out."""
    functions = []
    for number in range(40):
        inner = f"f{number + 1}" if number < 39 else "Identity"
        domain = "strange" if number < 39 else ""
        nodes = [
            helper.make_node(inner, ["a"], ["c"], domain=domain),
            helper.make_node(inner, ["c"], ["d"], domain=domain),
        ]
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("strange", 1)]
        functions.append(helper.make_function("strange", f"f{number}", ["a"], ["d"], nodes, opsets))
    node = helper.make_node("f0", ["x"], ["y"], domain="strange")
    return model(node, functions=functions)


def with_external_weights(place: str, length: int = 12):
    made = plain()
    weight = made.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", place), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    return made


def with_dims(*dims: int):
    made = plain()
    del made.graph.initializer[0].dims[:]
    made.graph.initializer[0].dims.extend(dims)
    return made


def sparse():
    made = model(helper.make_node("Add", ["x", "w"], ["y"]))
    weight = helper.make_sparse_tensor(
        tensor([1.0], "w"), tensor([5], "places", np.int64), [2**30, 3]
    )
    made.graph.sparse_initializer.append(weight)
    return made


def constant_of_dims(*dims: int):
    value = helper.make_tensor("v", FLOAT, [1], [1.0])
    del value.dims[:]
    value.dims.extend(dims)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=value),
        helper.make_node("Add", ["x", "w"], ["y"]),
    ]
    return model(*nodes)


def without(field: str):
    made = plain()
    made.ClearField(field)
    return made


REFUSED = {
    "a loop": (looping, "loops or branches"),
    "a branch": (branching, "loops or branches"),
    "functions": (with_functions, "operations of its own"),
    "another domain": (
        lambda: model(helper.make_node("Read", ["x"], ["y"], domain="strange")),
        "operations of its own",
    ),
    "weights elsewhere": (lambda: with_external_weights("secret"), "in other files"),
    "weights above": (lambda: with_external_weights("../../etc/passwd"), "in other files"),
    "weights without end": (lambda: with_external_weights("/dev/zero", 2**33), "in other files"),
    "huge dims": (lambda: with_dims(2**31, 3), "larger than the file"),
    "dims that overflow": (lambda: with_dims(2**62, 2**62), "larger than the file"),
    "negative dims": (lambda: with_dims(-3), "larger than the file"),
    "a huge constant": (lambda: constant_of_dims(2**31), "larger than the file"),
    "sparse weights": (sparse, "sparse weights"),
    "an unknown operation": (lambda: model(helper.make_node("Fly", ["x"], ["y"])), "Fly"),
    "no input": (lambda: model(helper.make_node("Identity", ["nothing"], ["y"])), "nothing"),
    "a circle": (
        lambda: model(
            helper.make_node("Add", ["x", "y"], ["z"]), helper.make_node("Abs", ["z"], ["y"])
        ),
        "y",
    ),
    "no graph": (lambda: without("graph"), ""),
    "no operation set": (lambda: without("opset_import"), ""),
    "no version": (lambda: without("ir_version"), ""),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_graph_that_could_do_more_than_compute_is_one_line(what, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("secret").write_bytes(bytes(12))
    make, said = REFUSED[what]
    with pytest.raises(UserError) as error:
        graphs.open_graph(write(tmp_path / "a.onnx", make()))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))
    assert capfd.readouterr() == ("", "")  # onnxruntime would print lines of its own


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"no graph",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:40] + bytes(20) + content[60:],
        lambda content: b"\x0a" * 10**5,
        lambda content: b"\x3a\xff\xff\xff\xff\x07" + content,  # a length of 2 GB
    ],
)
def test_a_file_that_is_damaged_is_one_line(damage, tmp_path, capfd):
    path = write(tmp_path / "a.onnx", plain())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UserError, match=r"a\.onnx is not a graph that onnxruntime can run"
    ) as error:
        graphs.open_graph(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 + len(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_a_file_larger_than_any_graph_is_not_read(tmp_path):
    with open(tmp_path / "a.onnx", "wb") as file:
        file.truncate(graphs.MOST_BYTES + 1)
    with pytest.raises(UserError, match="is too large for a graph"):
        graphs.open_graph(tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError, match="no graph at"):
        graphs.open_graph(tmp_path)


# --- what is refused when it is run


def filling(shape, name: str = "shape"):
    """Return a model that fills a tensor of `shape`, times that of its input."""
    one = helper.make_tensor("one", FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("Shape", ["x"], ["own"]),
        helper.make_node("Mul", ["own", name], ["large"]),
        helper.make_node("ConstantOfShape", ["large"], ["filled"], value=one),
        helper.make_node("ReduceSum", ["filled"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return model(*nodes, weights=[tensor(shape, name, np.int64)])


def peak() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read in /proc")
def test_a_graph_gets_no_more_memory_than_the_limit(tmp_path, capfd):
    graph = graphs.open_graph(write(tmp_path / "a.onnx", filling([2**14, 2**15])))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = peak()
    with pytest.raises(UserError, match=r"takes more than 4\.3 GB; try a smaller --batch-size"):
        graph(torch.zeros(1, 3))  # 6.4 GB
    assert peak() - before < 200e6
    assert capfd.readouterr() == ("", "")
    small = graphs.open_graph(write(tmp_path / "b.onnx", filling([2, 2])))
    assert small(torch.zeros(1, 3))[0].tolist() == [[12.0] * 3]


def test_inputs_that_do_not_fit_are_one_line(tmp_path, capfd):
    graph = graphs.open_graph(write(tmp_path / "a.onnx", plain()))
    for inputs in ((torch.zeros(2, 4),), (torch.zeros(3),), (torch.zeros(2, 3).long(),), ()):
        with pytest.raises(UserError, match=r"a\.onnx can't be run") as error:
            graph(*inputs)
        assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
