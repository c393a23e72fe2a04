"""The operators of ONNX that onnx_net.py knows, as functions of torch tensors.

Positional arguments are an operator's inputs, keywords its attributes. What changed from one to the other
between opsets (axes, pads, ...) may come as either. Annotations are forms (files.check_form): an attribute
that says something else, or that has no annotation, is refused when a graph is loaded. `opset`, and `count`,
the number of outputs, are filled in then. An attribute that no line reads does not change the result.

To add an operator, write such a function and put it into OPERATORS.
"""
import math
from functools import reduce

import torch
import torch.nn.functional as F

FLAG, ZERO, ONE, INTS = range(2), range(1), range(1, 2), [int]
AUTO_PAD = {"NOTSET", "VALID"}
PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
GELU_MODES = {"none", "tanh"}
RESIZES = {  # mode, place of a pixel, rounding -> mode and align_corners of F.interpolate
    ("nearest", "asymmetric", "floor"): ("nearest", None),
    ("nearest", "half_pixel", "round_prefer_ceil"): ("nearest-exact", None),
    ("linear", "half_pixel"): ("linear", False),
    ("linear", "pytorch_half_pixel"): ("linear", False),
    ("linear", "align_corners"): ("linear", True)}
RESIZE_MODES = {"nearest", "linear"}
COORDINATES = {"asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners"}
ROUNDINGS = {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"}
ASPECT = {"stretch"}
FLOATS = (1, 10, 11, 16)                             # float, half, double and bfloat16
TYPES = (range(1, 8), range(9, 14), range(16, 17))   # those, whole numbers, and 9, bool

LARGEST = 2**28  # values (1 GB) of what is made out of nothing: a small file must not fill the memory


# ------------------------------------------------------------------------------ what operators share

def listed(value):
    """The numbers of an attribute or of a tensor, as a list; None stays None."""
    return value.flatten().tolist() if torch.is_tensor(value) else value


def bounded(shape):
    """A shape, unless it is absurd."""
    if math.prod(shape) > LARGEST:
        raise ValueError(f"a result of shape {list(shape)} is too large")
    return shape


def together(*tensors):
    """The tensors on one device: whole numbers leave the CPU where they meet others."""
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), "cpu")
    return [tensor.to(device) for tensor in tensors]


def unary(function):
    return lambda x: function(x)


def binary(function):
    return lambda a, b: function(*together(a, b))


def variadic(function):
    return lambda *tensors: reduce(function, together(*tensors))


def reduction(function):
    def operator(x, axes: INTS = None, *, keepdims: FLAG = 1, noop_with_empty_axes: FLAG = 0):
        axes = listed(axes)
        if not axes and noop_with_empty_axes:
            return x
        return function(x, dim=tuple(axes or range(x.ndim)), keepdim=bool(keepdims))
    return operator


def extend(x, before, after, mode="constant", value=0):
    """Pad the last len(before) axes, or cut them where a number is negative."""
    pairs = zip(reversed(before), reversed(after), strict=True)  # F.pad begins at the last axis
    return F.pad(x, [n for pair in pairs for n in pair], mode, value)


def window(kernel, strides, dilations, pads):
    """(strides, dilations, padding before, padding after) of a convolution or a pool, with their defaults."""
    n = len(kernel)
    pads = pads or [0] * 2 * n
    return strides or [1] * n, dilations or [1] * n, pads[:n], pads[n:]


# ------------------------------------------------------------------------------ layers

def conv(x, weight, bias=None, *, auto_pad: AUTO_PAD = "NOTSET", dilations: INTS = None, group: int = 1,
         kernel_shape: INTS = None, pads: INTS = None, strides: INTS = None):
    strides, dilations, before, after = window(weight.shape[2:], strides, dilations, pads)
    zeros = [0] * len(before)
    if before != after:
        x, before = extend(x, before, after), zeros
    return torch.convolution(x, weight, bias, strides, before, dilations, False, zeros, group)


def conv_transpose(x, weight, bias=None, *, auto_pad: AUTO_PAD = "NOTSET", dilations: INTS = None,
                   group: int = 1, kernel_shape: INTS = None, output_padding: INTS = None, pads: INTS = None,
                   strides: INTS = None):
    strides, dilations, before, after = window(weight.shape[2:], strides, dilations, pads)
    zeros = [0] * len(before)
    full = torch.convolution(x, weight, bias, strides, zeros, dilations, True, output_padding or zeros, group)
    return extend(full, [-n for n in before], [-n for n in after])


def max_pool(x, *, kernel_shape: INTS, auto_pad: AUTO_PAD = "NOTSET", ceil_mode: FLAG = 0,
             dilations: INTS = None, pads: INTS = None, storage_order: FLAG = 0, strides: INTS = None):
    strides, dilations, before, after = window(kernel_shape, strides, dilations, pads)
    if before != after:
        x, before = extend(x, before, after, value=-math.inf), [0] * len(before)
    pool = [F.max_pool1d, F.max_pool2d, F.max_pool3d][len(kernel_shape) - 1]
    return pool(x, kernel_shape, strides, before, dilations, bool(ceil_mode))


def average_pool(x, *, kernel_shape: INTS, auto_pad: AUTO_PAD = "NOTSET", ceil_mode: FLAG = 0,
                 count_include_pad: FLAG = 0, dilations: [ONE] = None, pads: INTS = None,
                 strides: INTS = None):
    strides, _, before, after = window(kernel_shape, strides, dilations, pads)
    average = [F.avg_pool1d, F.avg_pool2d, F.avg_pool3d][len(kernel_shape) - 1]

    def pool(x, padding):
        return average(x, kernel_shape, strides, padding, bool(ceil_mode), bool(count_include_pad))

    if before == after:
        return pool(x, before)
    total, count = (pool(extend(values, before, after), 0) for values in (x, torch.ones_like(x)))
    return total if count_include_pad else total / count


def batch_normalization(x, scale, bias, mean, var, *, epsilon: float = 1e-5, momentum: float = 0.9,
                        spatial: ONE = 1, training_mode: ZERO = 0):
    return F.batch_norm(x, mean, var, scale, bias, eps=epsilon)


def instance_normalization(x, scale, bias, *, epsilon: float = 1e-5):
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def layer_normalization(x, scale, bias=None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: FLAG = 1):
    return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def gemm(a, b, c=None, *, alpha: float = 1.0, beta: float = 1.0, transA: FLAG = 0, transB: FLAG = 0):
    product = alpha * (a.T if transA else a) @ (b.T if transB else b)
    return product if c is None else product + beta * c


def softmax(x, *, axis: int = None, opset):
    if opset >= 13:
        return x.softmax(-1 if axis is None else axis)
    return x.flatten(1 if axis is None else axis).softmax(-1).view(x.shape)  # over all axes from that one on


def p_relu(x, slope):
    if slope.ndim == x.ndim - 1 and slope.numel() == slope.shape[0]:  # one for each channel: less memory
        return F.prelu(x, slope.flatten())
    return torch.where(x > 0, x, slope * x)


def leaky_relu(x, *, alpha: float = 0.01):
    return F.leaky_relu(x, alpha)


def gelu(x, *, approximate: GELU_MODES = "none"):
    return F.gelu(x, approximate=approximate)


def hard_sigmoid(x, *, alpha: float = 0.2, beta: float = 0.5):
    return (alpha * x + beta).clamp(0, 1)


def resize(x, roi=None, scales: [float] = None, sizes=None, *, antialias: ZERO = 0,
           coordinate_transformation_mode: COORDINATES = None, cubic_coeff_a: float = 0,
           exclude_outside: ZERO = 0, extrapolation_value: float = 0, keep_aspect_ratio_policy: ASPECT = "",
           mode: RESIZE_MODES = "nearest", nearest_mode: ROUNDINGS = "round_prefer_floor", opset):
    where = coordinate_transformation_mode or "half_pixel"
    if opset < 11:  # the second input was the scales
        scales = roi if scales is None else scales
        where, nearest_mode = "asymmetric", "floor"
    kind = (mode, where, nearest_mode) if mode == "nearest" else (mode, where)
    if kind not in RESIZES:
        raise ValueError(f"{', '.join(kind)} is not one of the ways in which torch resizes")
    fixed = [1, 1] if sizes is None else list(x.shape[:2])
    factors = listed(scales if sizes is None else sizes)
    if factors[:2] != fixed:
        raise ValueError("the first two axes cannot be resized")
    method, align_corners = RESIZES[kind]
    method = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim] if mode == "linear" else method
    key = "scale_factor" if sizes is None else "size"
    return F.interpolate(x, **{key: factors[2:]}, mode=method, align_corners=align_corners)


def upsample(x, scales: [float], *, mode: RESIZE_MODES = "nearest"):
    return resize(x, scales=scales, mode=mode, opset=9)


def dequantize_linear(x, scale, zero_point=None, *, axis: int = 1):
    shape = [1] * x.ndim
    if scale.numel() > 1:
        shape[axis] = -1
    zero_point = 0 if zero_point is None else zero_point.reshape(shape)
    return (x - zero_point) * scale.reshape(shape)


def dropout(x, ratio: float = None, training_mode=None, *, seed: int = None):
    return x


# ------------------------------------------------------------------------------ numbers

def clip(x, min: float = None, max: float = None):
    return x if min is None and max is None else x.clamp(min, max)


def div(a, b):
    whole = not a.is_floating_point() and not b.is_floating_point()
    return torch.div(a, b, rounding_mode="trunc" if whole else None)


def power(a, b):
    return torch.pow(a, b).to(a.dtype)


def cast(x, *, to: TYPES, saturate: FLAG = 1):
    if to in FLOATS:
        return x.float() if not x.is_floating_point() else x
    return x.bool() if to == 9 else x.long()


def constant_of_shape(shape, *, value: (float, bool) = 0.0):
    return torch.full(bounded(listed(shape)), value)


def sequence(start, limit, delta):
    start, limit, delta = start.item(), limit.item(), delta.item()
    bounded([abs(int((limit - start) / delta))])
    return torch.arange(start, limit, delta)


# ------------------------------------------------------------------------------ shapes and places

def shape_of(x, *, start: int = 0, end: int = None):
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def reshape(x, shape, *, allowzero: FLAG = 0):
    shape = listed(shape)
    if not allowzero:  # then 0 means: as it is
        shape = [n or x.shape[i] for i, n in enumerate(shape)]
    return x.reshape(shape)


def flatten(x, *, axis: int = 1):
    return x.reshape(math.prod(x.shape[:axis]), -1)


def squeeze(x, axes: INTS = None):
    return x.squeeze() if axes is None else x.squeeze(tuple(listed(axes)))


def unsqueeze(x, axes: INTS):
    axes = listed(axes)
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def transpose(x, *, perm: INTS = None):
    return x.permute(perm or list(reversed(range(x.ndim))))


def concat(*tensors, axis: int):
    return torch.cat(together(*tensors), axis)


def split(x, split: INTS = None, *, axis: int = 0, num_outputs: int = None, count):
    return x.split(listed(split) or math.ceil(x.shape[axis] / count), axis)


def expand(x, shape):
    return x.expand(bounded(torch.broadcast_shapes(x.shape, listed(shape))))


def tile(x, repeats):
    repeats = listed(repeats)
    bounded([n * repeat for n, repeat in zip(x.shape, repeats, strict=True)])
    return x.repeat(repeats)


def where(condition, a, b):
    return torch.where(*together(condition, a, b))


def at(axis, x, places):
    """x at places (a slice, or a tensor of indices) of an axis."""
    return x[(slice(None),) * (axis % x.ndim) + (places,)]


def gather(x, indices, *, axis: int = 0):
    return at(axis, x, indices)


def slices(x, starts: INTS, ends: INTS, axes: INTS = None, steps=None):
    starts, ends, axes, steps = map(listed, (starts, ends, axes, steps))
    axes, steps = axes or range(len(starts)), steps or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen = range(x.shape[axis])[start:end:step]
        ahead = chosen if step > 0 else chosen[::-1]  # torch only goes forwards
        x = at(axis, x, slice(ahead.start, ahead.stop, ahead.step))
        x = x if step > 0 else x.flip(axis)
    return x


def pad(x, pads: INTS, value: float = 0, axes=None, *, mode: set(PAD_MODES) = "constant"):
    pads, axes = listed(pads), listed(axes) or range(x.ndim)
    before, after = [0] * x.ndim, [0] * x.ndim
    for axis, first, last in zip(axes, pads[:len(axes)], pads[len(axes):], strict=True):
        before[axis], after[axis] = first, last
    if mode == "constant":
        return extend(x, before, after, value=value.item() if torch.is_tensor(value) else value or 0)
    if any(before[:2] + after[:2]):
        raise ValueError(f"in the mode {mode} the first two axes cannot be padded")
    return extend(x, before[2:], after[2:], PAD_MODES[mode])


OPERATORS = {
    # layers
    "Conv": conv, "ConvTranspose": conv_transpose, "MaxPool": max_pool, "AveragePool": average_pool,
    "GlobalAveragePool": unary(lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True)),
    "BatchNormalization": batch_normalization, "InstanceNormalization": instance_normalization,
    "LayerNormalization": layer_normalization, "Gemm": gemm, "MatMul": binary(torch.matmul),
    "Softmax": softmax, "Resize": resize, "Upsample": upsample, "DequantizeLinear": dequantize_linear,
    "Dropout": dropout, "Identity": unary(lambda x: x),
    # activations
    "Relu": unary(F.relu), "PRelu": p_relu, "LeakyRelu": leaky_relu, "Sigmoid": unary(torch.sigmoid),
    "HardSigmoid": hard_sigmoid, "HardSwish": unary(F.hardswish), "Gelu": gelu, "Erf": unary(torch.erf),
    "Tanh": unary(torch.tanh),
    # numbers
    "Add": binary(torch.add), "Sub": binary(torch.sub), "Mul": binary(torch.mul), "Div": binary(div),
    "Pow": binary(power), "Sum": variadic(torch.add), "Min": variadic(torch.minimum),
    "Max": variadic(torch.maximum), "Neg": unary(torch.neg), "Abs": unary(torch.abs),
    "Exp": unary(torch.exp), "Log": unary(torch.log), "Sqrt": unary(torch.sqrt),
    "Reciprocal": unary(torch.reciprocal), "Floor": unary(torch.floor), "Ceil": unary(torch.ceil),
    "Clip": clip, "Cast": cast, "ReduceMean": reduction(torch.mean), "ReduceSum": reduction(torch.sum),
    "ReduceMax": reduction(torch.amax), "ReduceL2": reduction(torch.linalg.vector_norm),
    "Equal": binary(torch.eq), "Greater": binary(torch.gt), "Less": binary(torch.lt),
    "Not": unary(torch.logical_not), "Where": where, "ConstantOfShape": constant_of_shape,
    "Range": sequence,
    # shapes and places
    "Shape": shape_of, "Reshape": reshape, "Flatten": flatten, "Squeeze": squeeze, "Unsqueeze": unsqueeze,
    "Transpose": transpose, "Concat": concat, "Split": split, "Expand": expand, "Tile": tile,
    "Gather": gather, "Slice": slices, "Pad": pad}
