"""ONNX networks agree with those they were exported from, values and gradients, and refuse what is wrong."""
import importlib.util
import json
import math
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import onnx_net
from files import InputError
from onnx_net import OnnxNet
from testdata.golden import agree, draw, fill_
from testdata.helpers import golden

NETWORKS = ["iresnet_narrow", "scrfd_narrow", "vit_torchscript", "vit_dynamo"]
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="onnx is not installed")


def published(name):
    """(net, reference values, their metadata) of a golden file."""
    values, meta = golden(f"onnx_{name}")
    shared = golden("onnx_vit_torchscript")[0] if name == "vit_dynamo" else {}
    constants = {key.removeprefix("constant."): tensor for key, tensor in (shared | values).items()}
    if name == "iresnet_narrow":
        constants["fc.weight"] = torch.empty(64, 1176)
        fill_({"fc.weight": constants["fc.weight"]}, 13)
        constants["fc.weight"] *= 1.2
    return OnnxNet(json.loads(meta["graph"]), constants, name), values, meta


def node(operator, inputs, outputs, **attributes):
    """A node of a graph. Names are parted by single spaces, between which an absent input has none."""
    return {"operator": operator, "inputs": inputs.split(" "), "outputs": outputs.split(" "),
            "attributes": attributes}


def graph(*nodes, opset=17, inputs="x", outputs="y"):
    return {"opset": opset, "inputs": inputs.split(), "outputs": outputs.split(), "nodes": list(nodes)}


def apply(operator, *tensors, opset=17, outputs="y", **attributes):
    """What an operator makes of tensors; those with gradient are a network's inputs, others its constants."""
    tensors = {f"x{i}": tensor for i, tensor in enumerate(tensors)}
    inputs = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    inputs = inputs or {"unread": torch.zeros(())}
    constants = {name: tensor for name, tensor in tensors.items() if name not in inputs}
    step = node(operator, " ".join(tensors), outputs, **attributes)
    net = OnnxNet(graph(step, opset=opset, inputs=" ".join(inputs), outputs=outputs), constants, "a test")
    return net(*inputs.values())


# ------------------------------------------------------------------------------ whole networks

@pytest.mark.parametrize("name", NETWORKS)
def test_official_values(name, tmp_path):
    net, values, meta = published(name)
    net.save_pretrained(tmp_path / "net")
    written = sorted(file.name for file in (tmp_path / "net").iterdir())
    assert written == ["config.json", "onnx_net.safetensors"]
    net = OnnxNet.from_pretrained(tmp_path / "net").train()
    x = draw(json.loads(meta["shape"]), int(meta["seed"])).requires_grad_()
    outputs = net(x)
    references = [values[f"output.{i}"] for i in range(len(outputs))]
    assert f"output.{len(outputs)}" not in values
    for ours, reference in zip(outputs, references, strict=True):
        assert agree(ours, reference, 2e-5)
    draws = [draw(output.shape, int(meta["draw_seed"]) + i) for i, output in enumerate(outputs)]
    sum((output * weight).sum() for output, weight in zip(outputs, draws, strict=True)).backward()
    assert agree(x.grad[..., ::3, ::3], values["grad_input"], 1e-4)
    assert not list(net.parameters()) and not any(buffer.requires_grad for buffer in net.buffers())
    assert net.double()(x.detach().double())[0].dtype == torch.float64
    assert agree(net(x.detach().double())[0].float(), references[0], 2e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_shape_waits_for_the_device(name):
    """The meta device has shapes and no values: whoever asked it for a number would fail."""
    net, values, meta = published(name)
    shape = json.loads(meta["shape"])
    (output, *_) = net.to("meta")(torch.empty(shape, device="meta"))
    assert output.device.type == "meta" and output.shape == values["output.0"].shape
    twice = net(torch.empty([2 * shape[0], *shape[1:]], device="meta"))[0]
    assert len(twice) == 2 * len(output)


def test_memory_is_freed_when_no_step_reads_it_any_more(monkeypatch):
    alive = []

    def relu(x):
        result = F.relu(x)
        alive.append(weakref.ref(result))
        held.append(sum(each() is not None for each in alive))
        return result

    held = []
    monkeypatch.setitem(onnx_net.OPERATORS, "Relu", relu)
    names = ["x", *(f"v{i}" for i in range(8)), "y"]
    net = OnnxNet(graph(*(node("Relu", a, b) for a, b in zip(names, names[1:], strict=False))), {}, "a test")
    net(torch.zeros(2))
    assert len(held) == 9 and max(held) == 2


def test_under_activation_checkpointing():
    net, _, meta = published("vit_dynamo")
    grads = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        x = draw(json.loads(meta["shape"]), 1).requires_grad_()
        run(x)[0].square().mean(0)[0].backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_all_results_have_the_precision_and_the_device_of_the_weights():
    """Numbers that are read, such as the scales of Resize, keep theirs."""
    steps = [node("Pad", "x pads value", "p"), node("Resize", "p  scales", "r", mode="linear"),
             node("Shape", "r", "s"), node("Cast", "s", "c", to=1), node("ConstantOfShape", "s", "z"),
             node("Mul", "r w", "m"), node("Mul", "m numbers", "n"), node("Sum", "c n z", "y")]
    net = OnnxNet(graph(*steps), {
        "pads": whole(0, 0, 1, 0, 0, 0, 0, 1), "value": torch.tensor(0.1), "w": draw((4,), 0),
        "numbers": whole(1, 2, 3, 4), "scales": torch.tensor([1, 1, 85.75, 1])}, "a test")
    assert net.to(torch.bfloat16)(torch.zeros(1, 4, 2, 3, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
    (output,) = net.to("meta")(torch.empty(1, 4, 2, 3, dtype=torch.bfloat16, device="meta"))
    assert output.device.type == "meta" and output.shape == (1, 4, 257, 4)

    third = torch.tensor(1 / 3, dtype=torch.float64)
    to_half = OnnxNet(graph(node("Cast", "x", "y", to=10)), {}, "a test")
    assert torch.equal(to_half(third)[0], third)


def test_what_depends_on_constants_alone_is_computed_once(tmp_path):
    weight = draw((3, 4), 1)
    net = OnnxNet(graph(node("Neg", "w", "t"), node("Identity", "t", "s"),
                        node("Shape", "x", "unread"), node("MatMul", "x t", "a"), node("MatMul", "x s", "b"),
                        node("Add", "a b", "y")), {"w": weight, "more": weight}, "a test")
    assert [step["operator"] for step in net.graph["nodes"]] == ["MatMul", "MatMul", "Add"]
    assert sorted(net.constants()) == ["s", "t"]
    x = draw((2, 3), 2)
    assert agree(net(x)[0], -2 * x @ weight, 1e-6)
    net.save_pretrained(tmp_path / "net")
    assert torch.equal(OnnxNet.from_pretrained(tmp_path / "net")(x)[0], net(x)[0])


# ------------------------------------------------------------------------------ operators

X = draw((2, 4, 9, 7), 0).requires_grad_()
Y = draw((3, 5), 1).requires_grad_()
Z = draw((2, 1, 3), 1).requires_grad_()
W = draw((6, 2, 3, 2), 2)
V = draw((4, 3, 3, 2), 3)
B = draw((4,), 4)
ONE = torch.ones(4)


def whole(*numbers):
    return torch.tensor(numbers)


CASES = {  # operator, inputs, attributes and opset -> what torch gives
    "convolution, groups": (
        ("Conv", X, W), dict(group=2, pads=[0, 1, 2, 1], strides=[2, 1], dilations=[1, 2]),
        lambda: F.conv2d(F.pad(X, (1, 1, 0, 2)), W, None, (2, 1), 0, (1, 2), 2)),
    "transposed convolution": (
        ("ConvTranspose", X, V), dict(pads=[1, 0, 1, 0], strides=[2, 3], output_padding=[1, 0]),
        lambda: F.conv_transpose2d(X, V, None, (2, 3), (1, 0), (1, 0))),
    "transposed convolution, uneven pads": (
        ("ConvTranspose", X, V), dict(pads=[1, 0, 0, 1]), lambda: F.conv_transpose2d(X, V)[..., 1:, :-1]),
    "max pool, uneven pads": (
        ("MaxPool", X), dict(kernel_shape=[3, 2], pads=[1, 0, 0, 1], strides=[2, 2]),
        lambda: F.max_pool2d(F.pad(X, (0, 1, 1, 0), value=-math.inf), (3, 2), 2)),
    "max pool, ceil": (
        ("MaxPool", X), dict(kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        lambda: F.max_pool2d(X, 2, 2, ceil_mode=True)),
    "average pool without its padding": (
        ("AveragePool", X), dict(kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], ceil_mode=1),
        lambda: F.avg_pool2d(X, 3, 2, 1, ceil_mode=True, count_include_pad=False)),
    "average pool with its padding": (
        ("AveragePool", X), dict(kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        lambda: F.avg_pool2d(X, 3, 1, 1)),
    "average pool, uneven pads": (
        ("AveragePool", X), dict(kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
        lambda: F.avg_pool2d(F.pad(X, (0, 1, 0, 1)), 2, 1) / F.avg_pool2d(
            F.pad(torch.ones_like(X), (0, 1, 0, 1)), 2, 1)),
    "global average": (("GlobalAveragePool", X), {}, lambda: F.adaptive_avg_pool2d(X, 1)),
    "batch normalization": (
        ("BatchNormalization", X, B, 2 * B, 3 * B, B.abs()), dict(epsilon=0.1),
        lambda: F.batch_norm(X, 3 * B, B.abs(), B, 2 * B, eps=0.1)),
    "instance normalization": (
        ("InstanceNormalization", X, B, 2 * B), {}, lambda: F.instance_norm(X, weight=B, bias=2 * B)),
    "layer normalization": (
        ("LayerNormalization", X, draw((9, 7), 5)), dict(axis=-2),
        lambda: F.layer_norm(X, (9, 7), draw((9, 7), 5))),
    "gemm": (
        ("Gemm", Y, Y.detach(), draw((5,), 6)), dict(transA=1, alpha=2.0, beta=3.0),
        lambda: 2 * Y.T @ Y.detach() + 3 * draw((5,), 6)),
    "softmax": (("Softmax", X), dict(axis=1), lambda: X.softmax(1)),
    "softmax, opset 12": (
        ("Softmax", X), dict(opset=12), lambda: X.flatten(1).softmax(1).view(X.shape)),
    "a slope for each channel": (("PRelu", X, B[:, None, None]), {}, lambda: F.prelu(X, B)),
    "a slope for each column": (
        ("PRelu", X, draw((7,), 5)), {}, lambda: torch.where(X > 0, X, X * draw((7,), 5))),
    "leaky relu": (("LeakyRelu", X), dict(alpha=0.2), lambda: F.leaky_relu(X, 0.2)),
    "hard sigmoid": (("HardSigmoid", X), dict(alpha=0.5), lambda: (0.5 * X + 0.5).clamp(0, 1)),
    "hard swish": (("HardSwish", X), {}, lambda: X * (X / 6 + 0.5).clamp(0, 1)),
    "gelu": (("Gelu", X), dict(opset=20), lambda: F.gelu(X)),
    "gelu, tanh": (
        ("Gelu", X), dict(opset=20, approximate="tanh"), lambda: F.gelu(X, approximate="tanh")),
    "clip, opset 6 to 10": (("Clip", X), dict(opset=10, min=0.0, max=6.0), lambda: X.clamp(0, 6)),
    "clip, one bound": (("Clip", X, torch.tensor(0.5)), {}, lambda: X.clamp(min=0.5)),
    "erf": (("Erf", X), {}, lambda: torch.erf(X)),
    "smallest": (
        ("Min", X, ONE[:, None, None], -X.detach()), {},
        lambda: torch.minimum(X, -X.detach()).clamp(max=1)),
    "power": (("Pow", X, torch.tensor(2)), {}, lambda: X * X),
    "division": (("Div", X, torch.tensor(3.0)), {}, lambda: X / 3),
    "mean, opset 17": (("ReduceMean", X), dict(axes=[2, -1], keepdims=0), lambda: X.mean((2, 3))),
    "mean, opset 18": (
        ("ReduceMean", X, whole(2, -1)), dict(opset=18), lambda: X.mean((2, 3), keepdim=True)),
    "sum of all": (("ReduceSum", X), {}, lambda: X.sum().reshape(1, 1, 1, 1)),
    "sum of nothing": (("ReduceSum", X), dict(noop_with_empty_axes=1), lambda: X + 0),
    "largest": (("ReduceMax", X), dict(axes=[1], keepdims=0), lambda: X.amax(1)),
    "length": (("ReduceL2", X), dict(axes=[1]), lambda: X.norm(dim=1, keepdim=True)),
    "resize, by size": (
        ("Resize", X, torch.empty(0), torch.empty(0), whole(2, 4, 18, 20)),
        dict(coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        lambda: F.interpolate(X, (18, 20))),
    "resize, opset 10": (
        ("Resize", X, torch.tensor([1, 1, 2, 1.5])), dict(opset=10),
        lambda: F.interpolate(X, scale_factor=(2, 1.5))),
    "resize, linear": (
        ("Resize", X, torch.empty(0), torch.tensor([1, 1, 2, 1.5])), dict(mode="linear"),
        lambda: F.interpolate(X, scale_factor=(2, 1.5), mode="bilinear")),
    "resize, corners": (
        ("Resize", X, torch.empty(0), torch.empty(0), whole(2, 4, 18, 20)),
        dict(mode="linear", coordinate_transformation_mode="align_corners"),
        lambda: F.interpolate(X, (18, 20), mode="bilinear", align_corners=True)),
    "upsample, opset 7": (
        ("Upsample", X), dict(opset=7, scales=[1, 1, 2, 2]), lambda: F.interpolate(X, scale_factor=2)),
    "upsample, opset 9": (
        ("Upsample", X, torch.tensor([1., 1, 2, 2])), dict(opset=9),
        lambda: F.interpolate(X, scale_factor=2)),
    "quantized weights": (
        ("DequantizeLinear", whole(3, -4), torch.tensor([0.5, 2]), whole(1, 1)), dict(axis=0),
        lambda: torch.tensor([1.0, -10])),
    "reshape": (("Reshape", X, whole(0, -1)), {}, lambda: X.flatten(1)),
    "reshape, 0 is a size": (
        ("Reshape", torch.empty(2, 0), whole(0, 3)), dict(allowzero=1), lambda: torch.empty(0, 3)),
    "flatten": (("Flatten", X), dict(axis=-2), lambda: X.reshape(8, 63)),
    "transpose": (("Transpose", X), {}, lambda: X.permute(3, 2, 1, 0)),
    "unsqueeze, opset 11": (("Unsqueeze", Y), dict(opset=11, axes=[-1, 0]), lambda: Y[None, ..., None]),
    "unsqueeze, opset 13": (("Unsqueeze", Y, whole(3, 1)), {}, lambda: Y[:, None, :, None]),
    "squeeze": (("Squeeze", Z, whole(1)), {}, lambda: Z[:, 0]),
    "slice, opset 9": (
        ("Slice", X), dict(opset=9, starts=[1, 0], ends=[2**31, -2], axes=[2, 3]), lambda: X[:, :, 1:, :-2]),
    "slice backwards": (
        ("Slice", X, whole(-1, 1), whole(-2**63, 3), whole(3, 1), whole(-2, 1)), {},
        lambda: X[:, 1:3].flip(3)[..., ::2]),
    "gather": (("Gather", X, whole(-1, 0, 0)), dict(axis=2), lambda: X[:, :, [8, 0, 0]]),
    "gather one": (("Gather", X, torch.tensor(-2)), dict(axis=-1), lambda: X[..., 5]),
    "concat": (("Concat", X, X.detach()), dict(axis=-1), lambda: torch.cat([X, X.detach()], -1)),
    "expand": (("Expand", Y, whole(2, 1, 5)), {}, lambda: Y.expand(2, 3, 5)),
    "tile": (("Tile", Y, whole(2, 3)), {}, lambda: Y.repeat(2, 3)),
    "pad, opset 10": (
        ("Pad", Y), dict(opset=10, pads=[0, 1, 2, 0], value=3.0), lambda: F.pad(Y, (1, 0, 0, 2), value=3)),
    "pad, opset 18": (
        ("Pad", X, whole(1, 2), torch.tensor(2.0), whole(-1)), dict(opset=18),
        lambda: F.pad(X, (1, 2), value=2)),
    "pad, reflected": (
        ("Pad", X, whole(0, 0, 1, 2, 0, 0, 3, 4)), dict(mode="reflect"),
        lambda: F.pad(X, (2, 4, 1, 3), mode="reflect")),
    "where": (
        ("Where", torch.tensor([True, False, True, False, True]), Y, torch.tensor(9.0)), {},
        lambda: Y * torch.tensor([1., 0, 1, 0, 1]) + 9 * torch.tensor([0., 1, 0, 1, 0])),
    "shape": (("Shape", X), dict(start=1, end=-1), lambda: whole(4, 9)),
    "whole division": (("Div", whole(7, -7), whole(2, 2)), {}, lambda: whole(3, -3)),
    "cast": (("Cast", torch.tensor([-1.7, 1.7])), dict(to=7), lambda: whole(-1, 1)),
    "range": (("Range", torch.tensor(1), torch.tensor(8), torch.tensor(3)), {}, lambda: whole(1, 4, 7)),
    "a constant of a shape": (
        ("ConstantOfShape", whole(2, 3)), dict(value=4), lambda: torch.full((2, 3), 4)),
    "dropout": (("Dropout", X), dict(opset=11, ratio=0.5), lambda: X + 0),
}


@pytest.mark.parametrize("name", CASES)
def test_operator(name):
    (operator, *tensors), options, expected = CASES[name]
    (ours,) = apply(operator, *tensors, **options)
    expected = expected()
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    assert not expected.numel() or agree(ours.double(), expected.double(), 2e-6)
    for tensor in tensors:
        if tensor.requires_grad and expected.requires_grad:
            weight = draw(expected.shape, 9)
            reference, = torch.autograd.grad(expected, tensor, weight)
            assert agree(torch.autograd.grad(ours, tensor, weight)[0], reference, 2e-6)


@pytest.mark.parametrize("opset, sizes, attributes, expected", [
    (11, None, {"split": [1, 4]}, [1, 4]), (13, whole(1, 4), {}, [1, 4]),
    (18, None, {"num_outputs": 2}, [3, 2])])
def test_split(opset, sizes, attributes, expected):
    tensors = [Y] if sizes is None else [Y, sizes]
    outputs = apply("Split", *tensors, opset=opset, outputs="a b", axis=1, **attributes)
    assert [output.shape[1] for output in outputs] == expected and torch.equal(torch.cat(outputs, 1), Y)


def test_an_absent_input_has_no_name():
    net = OnnxNet(graph(node("Clip", "x  max", "y")), {"max": torch.tensor(1.0)}, "a test")
    assert torch.equal(net(torch.tensor([-2.0, 2]))[0], torch.tensor([-2.0, 1]))


# ------------------------------------------------------------------------------ what is refused

@pytest.fixture
def saved(tmp_path):
    """A network in a directory: y = Relu(x w + b)."""
    net = OnnxNet(graph(GEMM, RELU), {"w": draw((3, 4), 0), "b": draw((4,), 1)}, "a test")
    net.save_pretrained(tmp_path / "net")
    return tmp_path / "net"


GEMM, RELU = node("Gemm", "x w b", "h"), node("Relu", "h", "y")


@pytest.mark.parametrize("change, message", [
    ({"nodes": [GEMM, node("Print", "h", "y")]}, r"config.json needs Print, which onnx_operators.py lacks"),
    ({"nodes": [RELU, GEMM]}, r"node 0 \(Relu\) reads 'h', which is no input, no constant and not made "),
    ({"nodes": [node("Gemm", "y w b", "h"), RELU]}, r"node 0 \(Gemm\) reads 'y'"),  # a circle
    ({"nodes": [GEMM, node("Relu", "h", "x")]}, r"node 1 \(Relu\) makes 'x', which exists already"),
    ({"outputs": ["z"]}, "the output 'z' is made by no node"),
    ({"nodes": [GEMM, node("Relu", "h", "y", alpha=1)]}, r"node 1 \(Relu\): alpha is 1; expected no such"),
    ({"nodes": [node("Gemm", "x w b", "h", transA="a"), RELU]}, 'transA is "a"; expected a whole number'),
    ({"nodes": [GEMM, node("Relu", "h h", "y")]}, "has other inputs or attributes than .*too many"),
    ({"nodes": [GEMM, node("Softmax", "h", "y", opset=9)]}, "opset is 9; expected no such key"),
    ({"nodes": [node("Gemm", "x w", "h"), RELU]}, "has b, which its graph does not read"),
    ({"nodes": [RELU | {"operator": 3}]}, r"nodes\[0\].operator is 3; expected text"),
    ({"nodes": []}, "nodes is a list; expected a list that is not empty"),
    ({"opset": 99}, "opset is 99; expected a whole number from 7 to 28"),
    ({"nodes": [node("Reshape", "w b", "h"), RELU]}, r"node 0 \(Reshape\) fails on inputs of shape \[3"),
])
def test_refuses_a_strange_graph(saved, change, message):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        OnnxNet.from_pretrained(saved)


@pytest.mark.parametrize("change, message", [
    ({"w": torch.full((3, 4), torch.nan)}, "w has NaN or infinite values"),
    ({"c": torch.zeros(4)}, "has c, which its graph does not read"),
])
def test_refuses_strange_constants(saved, change, message):
    file = saved / "onnx_net.safetensors"
    save_file(load_file(file) | change, file)
    with pytest.raises(InputError, match=message):
        OnnxNet.from_pretrained(saved)


def test_loads_in_float32(saved, tmp_path):
    net = OnnxNet.from_pretrained(saved)
    net.bfloat16().save_pretrained(tmp_path / "bf16")
    weight = OnnxNet.from_pretrained(tmp_path / "bf16").constants()["w"]
    assert weight.dtype == torch.float32 and torch.equal(weight, net.constants()["w"].float())


def test_refuses_a_file_beside_the_directory(saved):
    index = {"weight_map": {"w": "../other.safetensors"}}
    (saved / "onnx_net.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="it may only name .safetensors files beside it"):
        OnnxNet.from_pretrained(saved)
    with pytest.raises(InputError, match="holds no ONNX network .config.json is missing.; convert one"):
        OnnxNet.from_pretrained(saved.parent)


@pytest.mark.parametrize("operator, tensors", [
    ("ConstantOfShape", [whole(10**5, 10**5)]), ("Expand", [ONE, whole(10**9, 1)]),
    ("Tile", [ONE, whole(10**9)]), ("Range", [torch.tensor(0), torch.tensor(10**12), torch.tensor(1)])])
def test_refuses_to_fill_the_memory(operator, tensors):
    with pytest.raises(InputError, match="is too large"):
        apply(operator, *tensors)


def test_says_where_inputs_do_not_fit(saved, monkeypatch):
    net = OnnxNet.from_pretrained(saved)
    with pytest.raises(InputError, match=r"node 0 \(Gemm\) fails on inputs of shape \[2, 5\], \[3, 4\]"):
        net(torch.zeros(2, 5))
    with pytest.raises(InputError, match="the network got 2 inputs; give 1: x"):
        net(torch.zeros(2, 3), torch.zeros(2, 3))

    def full(x):
        raise torch.OutOfMemoryError("the memory is full")

    monkeypatch.setattr(net.steps[1], "function", full)
    with pytest.raises(torch.OutOfMemoryError):
        net(torch.zeros(2, 3))


# ------------------------------------------------------------------------------ from ONNX files

def write_onnx(path, description, constants):
    """A .onnx file in an old manner: weights are inputs too, whole numbers come from Constant nodes."""
    import onnx
    from onnx import helper, numpy_helper

    nodes, weights = [], []
    for name, tensor in constants.items():
        proto = numpy_helper.from_array(tensor.numpy(), name)
        if tensor.is_floating_point():
            weights.append(proto)
        else:
            nodes.append(helper.make_node("Constant", [], [name], value=proto))
    for each in description["nodes"]:
        attributes = dict(each["attributes"])
        if each["operator"] == "ConstantOfShape":
            attributes["value"] = numpy_helper.from_array(torch.tensor([attributes["value"]]).numpy())
        domain = attributes.pop("domain", "")
        nodes.append(helper.make_node(each["operator"], each["inputs"], each["outputs"], domain=domain,
                                      **attributes))

    def declared(names):
        return [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in names]

    inputs = declared([*description["inputs"], *(proto.name for proto in weights)])
    made = helper.make_graph(nodes, "network", inputs, declared(description["outputs"]), weights)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", description["opset"])]), path)


@needs_onnx
@pytest.mark.parametrize("name", NETWORKS)
def test_from_onnx(name, tmp_path):
    net = published(name)[0]
    write_onnx(tmp_path / "net.onnx", net.graph, net.constants())
    ours = OnnxNet.from_onnx(tmp_path / "net.onnx")
    assert ours.graph == net.graph and ours.constants().keys() == net.constants().keys()
    assert all(torch.equal(tensor, net.constants()[key]) for key, tensor in ours.constants().items())


@needs_onnx
def test_other_kinds_of_numbers(tmp_path):
    import onnx

    for kind, numbers, dtype in [("BFLOAT16", [1.5, -2.0], torch.float32), ("INT8", [1, -2], torch.int64),
                                 ("FLOAT16", [1.5, -2.0], torch.float32), ("BOOL", [True, False], torch.bool),
                                 ("DOUBLE", [1.5, -2.0], torch.float32), ("UINT8", [1, 255], torch.int64)]:
        proto = onnx.helper.make_tensor("a", getattr(onnx.TensorProto, kind), [2], numbers)
        tensor = onnx_net.tensor_of(onnx, proto)
        assert tensor.dtype == dtype and tensor.tolist() == numbers
    with pytest.raises(ValueError, match="a is of the type object"):
        onnx_net.tensor_of(onnx, onnx.helper.make_tensor("a", onnx.TensorProto.STRING, [1], ["text"]))


@needs_onnx
@pytest.mark.parametrize("last, lacks", [
    (node("WaveletPacket", "h", "y", domain="example.invalid"), "needs WaveletPacket of example.invalid"),
    (node("Relu", "h", "y", domain="example.invalid"), "needs Relu of example.invalid, which"),
    (node("NonZero", "h", "y"), "net.onnx needs NonZero, which onnx_operators.py lacks; add"),
    (node("Dropout", "h", "g y"), "the output 'y' is made by no node"),
    (node("Resize", "h", "y", mode="cubic"), 'node 1 .Resize.: mode is "cubic"; expected linear or nearest'),
])
def test_says_what_it_lacks(tmp_path, last, lacks):
    write_onnx(tmp_path / "net.onnx", graph(node("Relu", "x", "h"), last), {})
    with pytest.raises(InputError, match=lacks):
        OnnxNet.from_onnx(tmp_path / "net.onnx")


@needs_onnx
def test_lacks_branches_and_old_opsets(tmp_path):
    import onnx

    branch = onnx.helper.make_graph([], "branch", [], [])
    choice = node("If", "x", "y", then_branch=branch, else_branch=branch)
    old = graph(RELU, inputs="h", opset=6)
    for description, lacks in [(graph(choice), "needs If, which"), (old, "opset is 6; expected")]:
        write_onnx(tmp_path / "net.onnx", description, {})
        with pytest.raises(InputError, match=lacks):
            OnnxNet.from_onnx(tmp_path / "net.onnx")


@needs_onnx
def test_refuses_what_is_not_onnx(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no network")
    with pytest.raises(InputError, match="net.onnx is damaged or not an ONNX file"):
        OnnxNet.from_onnx(tmp_path / "net.onnx")


def test_onnx_is_needed_for_nothing_else(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    OnnxNet.from_pretrained(saved)
    with pytest.raises(InputError, match="reading ONNX needs onnx; install it with: pip install onnx"):
        OnnxNet.from_onnx(saved / "config.json")


@needs_onnx
def test_the_command_writes_what_loads(tmp_path, capsys):
    net = published("vit_dynamo")[0]
    write_onnx(tmp_path / "net.onnx", net.graph, net.constants())
    onnx_net.main([str(tmp_path / "net.onnx"), "--output", str(tmp_path / "net")])
    assert "74 nodes, 51,460 weights, inputs pixel_values, outputs image_embeds" in capsys.readouterr().out
    assert OnnxNet.from_pretrained(tmp_path / "net").graph == net.graph
