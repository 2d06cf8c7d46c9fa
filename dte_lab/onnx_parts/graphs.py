"""A `Part` -> an ONNX graph; the graphs' weights -> one file that they share.

The file has first what half precision holds exactly, as fp16: all of weights that were saved in
fp16; then the rest. A graph casts what it reads to fp32, and computes in that.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from dte_lab.onnx_parts.parts import Part
from dte_lab.onnx_parts.tuning import gradient_decompositions

OPSET = 20
WEIGHT_FILE = "weights.bin"
INLINE = 1024  # bytes; what is smaller stays in the graph
ALIGNED = 64  # bytes
# What the exporter's own `optimize` does takes minutes with a gradient, and ONNX Runtime does it.
TIDY = Sequential(
    ClearMetadataAndDocStringPass(), IdentityEliminationPass(),
    CommonSubexpressionEliminationPass(), RemoveUnusedNodesPass(),
)  # fmt: skip


def to_onnx(part: Part) -> onnx.ModelProto:
    """The graph of a part, with its weights inside, and nothing that says where it was made."""
    examples = tuple(part.inputs.values())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _quiet():
        traced = make_fx(part.function, decomposition_table=gradient_decompositions())(*examples)
        program = torch.onnx.export(
            traced, examples, dynamo=True, verbose=False, optimize=False, opset_version=OPSET,
            input_names=list(part.inputs), output_names=list(part.outputs),
        )  # fmt: skip
        TIDY(program.model)
    model = program.model_proto
    model.graph.ClearField("value_info")
    model.graph.name = part.name
    return model


class WeightStore:
    """Arrays of all graphs, each kept once, by their content."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, array: np.ndarray) -> str:
        key = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
        self.arrays[key] = array
        return key

    def layout(self) -> tuple[dict[str, int], bytes, int]:
        """{key: offset}, the file, and how many of its bytes are fp16."""
        keys = sorted(self.arrays, key=lambda key: self.arrays[key].dtype != np.float16)  # stable
        offsets, data, halves = {}, bytearray(), 0
        for key in keys:
            offsets[key] = len(data)
            data += self.arrays[key].tobytes()
            data += bytes(-len(data) % ALIGNED)
            if self.arrays[key].dtype == np.float16:
                halves = len(data)
        return offsets, bytes(data), halves


def gather_words(model: onnx.ModelProto, tokens: np.ndarray, ids: np.ndarray) -> None:
    """Have a graph read the words' embeddings out of the text tower's table: `tokens[ids]`."""
    embeddings, graph = tokens[ids], model.graph
    for tensor in list(graph.initializer):
        array = numpy_helper.to_array(tensor)
        if array.shape == embeddings.shape and (array == embeddings).all():
            taken = (f"{tensor.name}.tokens", f"{tensor.name}.ids")
            node = helper.make_node("Gather", taken, [tensor.name])
            graph.node.insert(0, node)
            graph.initializer.remove(tensor)
            arrays = zip((tokens, ids), taken, strict=True)
            graph.initializer.extend(numpy_helper.from_array(*pair) for pair in arrays)


def take_weights(model: onnx.ModelProto, weights: WeightStore) -> dict[str, str]:
    """Move a graph's weights to `weights`: {initializer: key}; casts take their place."""
    graph, keys, casts = model.graph, {}, []
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.nbytes < INLINE:
            continue
        if array.dtype == np.float32:
            with np.errstate(over="ignore"):
                half = array.astype(np.float16)
            if (half == array).all():
                array = half
                stored = f"{tensor.name}.half"
                casts.append(
                    helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT)
                )
                tensor.name = stored
        keys[tensor.name] = weights.add(array)
    nodes = [*casts, *graph.node]
    graph.ClearField("node")
    graph.node.extend(nodes)
    return keys


def point_to(
    model: onnx.ModelProto, keys: dict[str, str], weights: WeightStore, offsets: dict[str, int]
) -> None:
    """Have a graph read its weights from the file."""
    for tensor in model.graph.initializer:
        if (key := keys.get(tensor.name)) is None:
            continue
        array = weights.arrays[key]
        place = {"location": WEIGHT_FILE, "offset": offsets[key], "length": array.nbytes}
        stored = TensorProto(
            name=tensor.name, dims=array.shape, data_location=TensorProto.EXTERNAL,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        )  # fmt: skip
        for name, value in place.items():
            stored.external_data.add(key=name, value=str(value))
        tensor.CopyFrom(stored)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on libraries that it would like to find."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
