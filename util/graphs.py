"""ONNX graphs, which may be a stranger's: checked, then run by onnxruntime with bounded memory.

A graph is a program. It has no access to files or the network, but it could loop for ever, read
other files as its weights, or ask for any amount of memory.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.files import UserError

MOST_BYTES = 2**31  # of a file: the most that a protocol buffer holds
MEMORY = 4 * 2**30  # bytes that all graphs of a process may use, weights included
QUIET = 4  # onnxruntime's level of "fatal": the error that is raised says it all


class Graph(NamedTuple):
    """A graph in onnxruntime, its inputs and outputs, and the texts in its metadata."""

    path: Path
    session: Any
    inputs: list[Any]
    outputs: list[Any]
    metadata: dict[str, str]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Return the graph's outputs for its inputs, both in the graph's order.

        Raises UserError where the graph can't compute them.
        """
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.log_severity_level = QUIET
        names = [each.name for each in self.inputs]
        arrays = (np.ascontiguousarray(tensor.numpy()) for tensor in tensors)
        try:
            feed = dict(zip(names, arrays, strict=True))
            found = self.session.run([each.name for each in self.outputs], feed, options)
            return [torch.from_numpy(array) for array in found]
        except Exception as error:  # onnxruntime's errors have no common class
            raise UserError(f"{self.path} can't be run ({explain(error)})") from error


def open_graph(path: Path) -> Graph:
    """Return the graph in a file, ready to run on the CPU.

    Raises FileNotFoundError where there is no file, UserError where it holds no graph, or one that
    could do more than compute, and where a package is not installed.
    """
    with needs_packages():
        import onnxruntime
    if not path.is_file():
        raise FileNotFoundError(
            f"no graph at {path}: a captioner in ONNX is two files, model.onnx and "
            "model.step.onnx; write them with python export.py RUN model.onnx"
        )
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is too large for a graph; at most {MOST_BYTES:,} bytes are read")
    content = path.read_bytes()
    try:
        check_graph(content)
        limit_memory()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = QUIET
        options.add_session_config_entry("session.use_env_allocators", "1")
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # neither onnx's nor onnxruntime's errors have a common class
        reason = explain(error)
        raise UserError(f"{path} is not a graph that onnxruntime can run ({reason})") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    return Graph(path, session, inputs, outputs, session.get_modelmeta().custom_metadata_map)


def check_graph(content: bytes) -> None:
    """Raise an error for a graph that is damaged, or that holds more than plain operations.

    Plain are the operations of ONNX itself on tensors, one after the other; what this project
    writes is plain.
    """
    with needs_packages():
        import onnx
    model = onnx.load_model_from_string(content)
    graph = model.graph
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    tensors = [*graph.initializer, *(each.t for each in attributes if each.HasField("t"))]
    tensors += [tensor for attribute in attributes for tensor in attribute.tensors]
    if any(each.HasField("g") or each.graphs for each in attributes):
        raise UserError("it has loops or branches")
    if model.functions or any(node.domain not in ("", "ai.onnx") for node in graph.node):
        raise UserError("it has operations of its own")
    if graph.sparse_initializer or any(
        each.HasField("sparse_tensor") or each.sparse_tensors for each in attributes
    ):
        raise UserError("it has sparse weights")
    for tensor in tensors:
        if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise UserError("its weights are in other files")
        # At most eight numbers per byte: those of one bit.
        if min(tensor.dims, default=0) < 0 or count(tensor.dims) > 8 * len(content):
            raise UserError(f"its weight {tensor.name[:60]!r} is larger than the file")
    onnx.checker.check_model(model)


def count(sizes: Any) -> int:
    """Return the product of `sizes`: NumPy's would overflow."""
    product = 1
    for size in sizes:
        product *= size
    return product


def limit_memory() -> None:
    """Let all graphs of this process share at most `MEMORY` bytes."""
    import onnxruntime as runtime

    info = runtime.OrtMemoryInfo(
        "Cpu", runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT
    )
    config = {"max_mem": MEMORY, "arena_extend_strategy": 1}  # grow by what is asked for
    config |= {"initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}
    with contextlib.suppress(Exception):  # there is such an allocator already
        runtime.create_and_register_allocator(info, runtime.OrtArenaCfg(config))


def explain(error: Exception) -> str:
    """Return the reason of an error of onnx or onnxruntime in few words."""
    text = " ".join(str(error).split())
    if "Available memory of" in text or "Failed to allocate" in text:
        return f"it takes more than {MEMORY / 1e9:.1f} GB; try a smaller --batch-size"
    return text[:200]


@contextlib.contextmanager
def needs_packages() -> Iterator[None]:
    """Raise UserError, which says what to install, where a package of ONNX can't be imported."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install -r requirements-onnx.txt") from error
