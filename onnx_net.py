"""ONNX networks as differentiable torch modules: a graph, and a loop over its nodes.

    python onnx_net.py FILE.onnx --output DIRECTORY   # config.json, the graph, and onnx_net.safetensors

    net = OnnxNet.from_pretrained(DIRECTORY)   # or from_onnx(FILE), which needs the onnx package
    outputs = net(x)                           # a list; gradients flow into x, never into weights

The operators are in onnx_operators.py. Three things differ from ONNX. Floating-point tensors have the
precision and the device of the weights, float32 on the CPU until `.to()` says otherwise; a Cast from one
precision to another does nothing. Whole numbers have 64 bits and start on the CPU, for most are shapes, which
must not wait for a GPU. Shapes are computed in each call, and those that a file declares are ignored: batch
and size are free as far as the operators allow.
"""
import inspect
from pathlib import Path

import cli

import numpy as np
import torch
from torch import nn

from files import (
    NOTHING,
    InputError,
    check_file,
    check_form,
    is_finite,
    read_json,
    read_weights,
    save_weights,
)
from forms import ONNX_GRAPH
from onnx_operators import OPERATORS

STANDARD = ("", "ai.onnx")            # the domain of ONNX's own operators
NUMBERS = ("value", "scales", "roi")  # inputs that operators read as numbers; these stay on the CPU


class Step:
    """A node of a graph, checked, and the function of its operator. `done` names what no later step reads."""

    def __init__(self, node, opset, where):
        self.node, self.where, self.done = node, where, set()
        self.function = OPERATORS[node["operator"]]
        signature = inspect.signature(self.function)
        parameters = signature.parameters
        forms = {f"{name}?": parameter.annotation for name, parameter in parameters.items()
                 if parameter.annotation is not parameter.empty}
        check_form(node["attributes"], {**forms, str: NOTHING}, where)
        context = {"opset": opset, "count": len(node["outputs"])}
        self.keywords = {name: context[name] for name in context if name in parameters} | node["attributes"]
        try:
            signature.bind(*node["inputs"], **self.keywords)
        except TypeError as error:
            raise InputError(f"{where} has other inputs or attributes than onnx_operators.py expects "
                             f"({error}); export the network with another opset") from None
        named = zip(parameters, node["inputs"], strict=False)
        self.numbers = {name for parameter, name in named if parameter in NUMBERS}

    def run(self, values):
        """{name: tensor} of the outputs. `values` holds the inputs; an absent one is None."""
        tensors = [values[name] for name in self.node["inputs"]]
        try:
            result = self.function(*tensors, **self.keywords)
            results = result if isinstance(result, tuple) else (result,)
            return dict(zip(self.node["outputs"], results, strict=True))
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors if tensor is not None)
            raise InputError(f"{self.where} fails on inputs of shape {shapes} ({first_line(error)}); "
                             f"give inputs of a size that the network takes") from error


class OnnxNet(nn.Module):
    """A network of ONNX operators: net(*inputs) -> list of outputs, both in the order of the graph.

    graph: forms.ONNX_GRAPH. constants: {name: tensor}, what nodes read beside inputs and results. where: the
    file, for errors. Its weights are buffers, none of which is trained, and `.train()` changes nothing.
    """

    def __init__(self, graph, constants, where):
        super().__init__()
        lacking = sorted({node["operator"] for node in graph["nodes"]} - OPERATORS.keys())
        if lacking:
            raise InputError(f"{where} needs {' and '.join(lacking)}, which onnx_operators.py lacks; "
                             f"add such a function to its OPERATORS")
        check_form(graph, ONNX_GRAPH, where)
        check_names(graph, constants, where)

        # What depends on constants alone is computed now.
        values, steps = {"": None}, []
        for name, tensor in constants.items():
            values[name] = tensor.float() if tensor.is_floating_point() else tensor
        for i, node in enumerate(graph["nodes"]):
            step = Step(node, graph["opset"], f"{where}: node {i} ({node['operator']})")
            if not values.keys() >= set(node["inputs"]):
                steps.append(step)
                continue
            with torch.no_grad():
                for name, tensor in step.run(values).items():
                    values[name] = tensor.clone()  # no two tensors share memory, as a file needs it

        # From the outputs back: which steps are needed, and which of them reads a value last.
        self.steps = []
        needed = set(graph["outputs"])
        for step in reversed(steps):
            if not needed.isdisjoint(step.node["outputs"]):
                self.steps.insert(0, step)
                step.done = set(step.node["inputs"]) - needed - {""}
                needed |= set(step.node["inputs"])
        self.graph = {**graph, "nodes": [step.node for step in self.steps]}

        self.numbers = {}  # {name: tensor} of the constants that stay on the CPU
        self.weights = {}  # {name: name of a buffer, in which there may be no dots} of the others
        numbers = set().union(*(step.numbers for step in self.steps))
        for name in values:
            if name == "" or name not in needed:
                continue
            if not is_finite(values[name]):
                raise InputError(f"{where}: {name} has NaN or infinite values; copy or make the file again")
            if name in numbers or not values[name].is_floating_point():
                self.numbers[name] = values[name]
            else:
                self.weights[name] = f"weight_{len(self.weights)}"
                self.register_buffer(self.weights[name], values[name])

    def forward(self, *inputs):
        names = self.graph["inputs"]
        if len(inputs) != len(names):
            raise InputError(f"the network got {len(inputs)} inputs; give {len(names)}: {', '.join(names)}")
        floats = [tensor for tensor in (*self.buffers(), *inputs) if tensor.is_floating_point()]
        like = floats[0] if floats else torch.empty(())
        values = {"": None, **self.constants(), **dict(zip(names, inputs, strict=True))}
        for step in self.steps:
            for name, tensor in step.run(values).items():
                values[name] = tensor.to(like) if tensor.is_floating_point() else tensor
            for name in step.done:  # frees its memory, unless backward needs it
                del values[name]
        return [values[name] for name in self.graph["outputs"]]

    def constants(self):
        """{name: tensor} of all constants."""
        return self.numbers | {name: self.get_buffer(buffer) for name, buffer in self.weights.items()}

    def save_pretrained(self, directory):
        """Write one directory with the graph, config.json, and the constants, onnx_net.safetensors."""
        save_weights(directory, self.constants(), self.graph, name="onnx_net")

    @classmethod
    def from_pretrained(cls, directory):
        """Load what `save_pretrained` wrote, in float32. InputError unless graph and constants match."""
        path = Path(directory, "config.json")
        if not path.is_file():
            raise InputError(f"{directory} holds no ONNX network (config.json is missing); "
                             f"convert one with onnx_net.py")
        graph = read_json(path, ONNX_GRAPH)
        constants = {name: read() for name, _, read in read_weights(directory)}
        net = cls(graph, constants, path)
        unread = sorted(constants.keys() - net.constants().keys())
        if unread:
            raise InputError(f"{directory} has {unread[0]}, which its graph does not read; "
                             f"convert the network again")
        return net

    @classmethod
    def from_onnx(cls, path):
        """Read a .onnx file. InputError, with its name, for an operator that onnx_operators.py lacks."""
        check_file(path)
        try:
            import onnx
        except ImportError:
            raise InputError("reading ONNX needs onnx; install it with: pip install onnx") from None
        try:
            graph, constants = convert(onnx, onnx.load(path))
        except Exception as error:  # protobuf, onnx and numpy raise many kinds
            raise InputError(f"{path} is damaged or not an ONNX file ({first_line(error)}); "
                             f"copy or make it again") from None
        return cls(graph, constants, path)


def check_names(graph, constants, where):
    """InputError unless each node reads what exists before it, so that there is no circle."""
    known = {"", *graph["inputs"], *constants}
    for i, node in enumerate(graph["nodes"]):
        for name in node["inputs"]:
            if name not in known:
                raise InputError(f"{where}: node {i} ({node['operator']}) reads {name!r}, which is no input, "
                                 f"no constant and not made by an earlier node; convert the network again")
        for name in node["outputs"]:
            if name in known:
                raise InputError(f"{where}: node {i} ({node['operator']}) makes {name!r}, which exists "
                                 f"already; convert the network again")
            known.add(name)
    for name in graph["outputs"]:
        if name == "" or name not in known:
            raise InputError(f"{where}: the output {name!r} is made by no node; convert the network again")


def first_line(error):
    return str(error).strip().partition("\n")[0][:200]


# ------------------------------------------------------------------------------ from the onnx package

def convert(onnx, model):
    """(graph, constants) of a model of the onnx package."""
    constants = {proto.name: tensor_of(onnx, proto) for proto in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        standard = node.domain in STANDARD
        if standard and node.op_type == "Constant":
            (value,) = attributes_of(onnx, node).values()
            constants[node.output[0]] = torch.as_tensor(value)
            continue
        # Only Split has several outputs. Those of other operators are optional, such as the mask of Dropout:
        # check_names finds a node that reads one.
        nodes.append({
            "operator": node.op_type if standard else f"{node.op_type} of {node.domain}",
            "inputs": list(node.input),
            "outputs": list(node.output if node.op_type == "Split" else node.output[:1]),
            "attributes": attributes_of(onnx, node) if standard and node.op_type in OPERATORS else {}})
        for name, value in nodes[-1]["attributes"].items():
            if torch.is_tensor(value):  # the value of ConstantOfShape
                nodes[-1]["attributes"][name] = value.item()
    inputs = [value.name for value in model.graph.input]
    return {"opset": next((entry.version for entry in model.opset_import if entry.domain in STANDARD), 0),
            "inputs": [name for name in inputs if name not in constants],  # old files list the weights too
            "outputs": [value.name for value in model.graph.output],
            "nodes": nodes}, constants


def attributes_of(onnx, node):
    """{name: number, text, list of numbers, tensor} of a node. Empty lists are left out, as if not given."""
    attributes = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = tensor_of(onnx, value)
        elif isinstance(value, bytes):
            value = value.decode()
        elif not isinstance(value, int | float):
            value = list(value)
        if value != []:
            attributes[attribute.name] = value
    return attributes


def tensor_of(onnx, proto):
    """A tensor of the onnx package, some of whose types torch lacks."""
    array = onnx.numpy_helper.to_array(proto)
    types = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float32, "V": np.float32}  # V: bfloat16
    if array.dtype.kind not in types:
        raise ValueError(f"{proto.name} is of the type {array.dtype}")
    return torch.from_numpy(array.astype(types[array.dtype.kind]))


def main(argv=None):
    parser = cli.Parser("Convert a .onnx file to what OnnxNet.from_pretrained reads. Needs the onnx package.")
    parser.add_argument("file", metavar="FILE", help="a .onnx file")
    parser.add_argument("--output", default="outputs/onnx_net", help="directory of the graph and its weights")
    args = parser.parse_args(argv)
    net = OnnxNet.from_onnx(args.file)
    net.save_pretrained(args.output)
    count = sum(weight.numel() for weight in net.buffers())
    print(f"{args.output}: {len(net.steps)} nodes, {count:,} weights, "
          f"inputs {', '.join(net.graph['inputs'])}, outputs {', '.join(net.graph['outputs'])}")


if __name__ == "__main__":
    cli.run(main)
