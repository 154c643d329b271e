"""A pretended accelerator, for machines that have none: tensors on it hide one of the CPU's, and cannot be mixed with
those of the CPU, just as on a GPU. What is computed there is what the CPU computes.

It changes torch for the whole process, so that it is imported by processes of its own only (`on_a_device.py`). It rests
on what torch says is experimental; where that is missing, the import fails with an ImportError.
"""

from functools import partial

import torch
from torch.library import Library
from torch.utils import _pytree, backend_registration

NAME = "pretended"

_VIEWS = (
    *("alias", "detach", "diagonal", "expand", "permute", "select.int", "slice.Tensor", "split.Tensor"),
    *("split_with_sizes", "squeeze", "squeeze.dim", "squeeze.dims", "t", "transpose.int", "unbind.int", "unfold"),
    *("unsqueeze", "view_as_real"),
)
# What torch itself would make of memory that is not there, or of strides, which these tensors do not have.
_WHOLE = (
    *("abs", "addmv", "dot", "gather", "index.Tensor", "mv", "vdot"),
    *("squeeze_", "squeeze_.dim", "squeeze_.dims", "t_", "transpose_", "unsqueeze_"),
)
_BY_INDEX = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")  # of the CPU, on GPUs, too

try:
    _setup, _create = backend_registration._setup_privateuseone_for_python_backend, torch._C._acc.create_empty_tensor
    _backend_module = backend_registration._DummyBackendModule
except AttributeError as error:
    raise ImportError(f"torch {torch.__version__} cannot have a device made in Python") from error


class _Module(_backend_module):
    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


class _Hidden(torch.Tensor):
    """A class of its own, or `torch.nn.Parameter` would not take it."""


def _is_hidden(x):
    return isinstance(x, torch.Tensor) and x.device.type == NAME


def _hide(tensor):
    hidden = _create(tensor.shape, tensor.dtype)
    hidden.__class__ = _Hidden
    hidden.untyped_storage().hidden = tensor  # which a tensor shares with its shallow copies
    return hidden


def _reveal(x):
    return x.untyped_storage().hidden


def _all_in(tensors, indices):
    return all(any(tensor is index for index in indices) for tensor in tensors)


def _run(op, *args, **kwargs):
    """Any operator, on what the tensors hide."""
    name, apart = op._schema.name, []

    def reveal(x):
        if _is_hidden(x):
            return _reveal(x)
        if isinstance(x, torch.Tensor) and x.ndim:
            apart.append(x)
        return torch.device("cpu") if isinstance(x, torch.device) else x

    # An index may be of the CPU, but not what is put there.
    free = len(args) > 1 and name in _BY_INDEX and _is_hidden(args[0])
    revealed, named = _pytree.tree_map(reveal, (args, kwargs))
    if apart and not (free and _all_in(apart, args[1])):
        raise RuntimeError(f"{name}: expected all tensors on one device, found {NAME} and cpu")
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{name}: expected a generator of {NAME}, found one of the cpu")
    # A number that torch wraps as a tensor comes out of its wrapping.
    revealed = [
        torch.tensor(value) if isinstance(value, (int, float)) and str(argument.type) == "Tensor" else value
        for argument, value in zip(op._schema.arguments, revealed, strict=False)
    ]
    result = op(*revealed, **named)
    given = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    written = [
        given[argument.name]
        for argument in op._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and _is_hidden(given.get(argument.name))
    ]
    for tensor in written:
        if tensor.shape != _reveal(tensor).shape:
            tensor.data = _hide(_reveal(tensor))

    def hide(x):
        if not isinstance(x, torch.Tensor):
            return x
        same = [tensor for tensor in written if _reveal(tensor) is x]
        return same[0] if same else _hide(x)

    return _pytree.tree_map(hide, result)


def _operator(name):
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), overload or "default")


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return _hide(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return _hide(torch.empty_strided(size, stride, dtype=dtype))


def _copy(source, target, non_blocking=False):
    (_reveal(target) if _is_hidden(target) else target).copy_(_reveal(source) if _is_hidden(source) else source)
    return target


def _reshape(x, size, stride=None):
    return _hide(_reveal(x).reshape(size))


def _strided(x, size, stride, offset=None):
    raise NotImplementedError("these tensors have no strides: name the operator in _VIEWS or _WHOLE")


def _convolution(x, weight, bias, *arguments):
    return _run(torch.ops.aten.convolution.default, x, weight, bias, *arguments)


def _convolution_backward(gradient, x, weight, stride, padding, dilation, transposed, outer, groups, mask):
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    arguments = stride, padding, dilation, transposed, outer, groups, mask
    return _run(torch.ops.aten.convolution_backward.default, gradient, x, weight, [outputs], *arguments)


_setup(NAME, backend_module=_Module())
torch.inference_mode = lambda mode=True: torch.no_grad()  # whose tensors refuse to be hidden
_everything = Library("_", "IMPL")
_everything.fallback(_run, "PrivateUse1")
_own = Library("aten", "IMPL")
_OWN = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "_copy_from": _copy,
    "_copy_from_and_resize": _copy,
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias"), _reshape),
    "as_strided": _strided,
    "convolution_overrideable": _convolution,
    "convolution_backward_overrideable": _convolution_backward,
    **{name: partial(_run, _operator(name)) for name in (*_VIEWS, *_WHOLE)},
}
for _name, _function in _OWN.items():
    _own.impl(_name, _function, "PrivateUse1")
