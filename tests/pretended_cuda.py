"""CUDA without a GPU: tensors that say `cuda`, computed on the CPU; FakeTensorMode judges operations across devices.

    with pretended_cuda() as cuda:
        ...  # any code that is told torch.device("cuda")
    cuda.reads  # {(file, function): how often the host read a value of the device there}

Each tensor on the device is a `Pretended` with its values in CPU memory. An operation runs on the values, so that code
goes on with real numbers whatever it branches on; one whose operands lie on different devices is first tried on fake
tensors, where torch's FakeTensorMode raises what a GPU would. Each value that the host reads is counted with its place.

What only a GPU can show stays unchecked: kernels and their rounding, streams, memory and its pinning, autocast and the
GradScaler (torch switches both off without CUDA), torch.compile, nccl.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

CUDA, META, CPU = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten
# operations that read values on the host, though fake tensors let them pass
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.equal)


class Pretended(Tensor):
    """A tensor on the pretended device. To torch's C++ code it is on `meta`, for which autograd asks no driver."""

    @staticmethod
    def __new__(cls, values: Tensor):
        kind = {"dtype": values.dtype, "layout": values.layout, "device": META, "requires_grad": values.requires_grad}
        place = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, values.shape, **place, **kind)

    def __init__(self, values: Tensor):
        self.values_on_cpu = values

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Pretended({self.values_on_cpu})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function == Tensor.device.__get__:
                return CUDA
            if function in (Tensor.is_cuda.__get__, Tensor.is_meta.__get__):
                return function == Tensor.is_cuda.__get__
            if function is Tensor.new_tensor:  # C++ makes it on the CPU and moves it where no mode sees it
                return torch.tensor(*args[1:], **({"dtype": args[0].dtype} | kwargs)).to(CUDA)
            if function is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
            if function in (Tensor.cpu, Tensor.tolist) or (function is Tensor.to and _asks_for_cpu(args, kwargs)):
                _MODE[-1].note()
                copy = _ToHost.apply(args[0])
                return copy if function is Tensor.cpu else function(copy, *args[1:], **kwargs)
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _MODE[-1].both(function, args, kwargs or {})


_MODE: list["_Pretend"] = []


class _ToHost(torch.autograd.Function):
    """A copy on the CPU; the gradient goes back to the device."""

    @staticmethod
    def forward(ctx, x: Pretended) -> Tensor:  # noqa: ARG004
        with unset_fake_temporarily():
            return x.values_on_cpu.detach().clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad.to(CUDA)


def _asks_for_cpu(args: tuple, kwargs: dict) -> bool:
    asked = [*args[1:], *kwargs.values()]
    targets = [torch.device(a) for a in asked if isinstance(a, str | torch.device)]
    targets += [CUDA if isinstance(a, Pretended) else a.device for a in asked if isinstance(a, Tensor)]
    return any(target.type == "cpu" for target in targets)


class _Pretend(TorchDispatchMode):
    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake, self.reads = fake, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.both(function, args, kwargs or {})

    def note(self) -> None:
        """Count a value that the host reads, by the place in the repository that asks for it."""
        frames = [frame for frame in traceback.extract_stack() if "/site-packages/" not in frame.filename]
        place = next(frame for frame in reversed(frames) if frame.filename != __file__)
        self.reads[Path(place.filename).name, place.name] += 1

    def both(self, function, args: tuple, kwargs: dict):
        everything = tree_leaves((args, kwargs))
        pretended = any(isinstance(x, Pretended) for x in everything)
        device = kwargs.get("device")
        wanted = None if device is None else torch.device(device)
        with unset_fake_temporarily():
            if not pretended and (wanted is None or wanted.type == "cpu"):
                return function(*args, **kwargs)
        where = self.device_of(function, args, kwargs)
        with unset_fake_temporarily():
            values = tree_map_only(Pretended, lambda x: x.values_on_cpu, (args, kwargs))
            out = function(*values[0], **(values[1] | ({} if device is None else {"device": CPU})))
            if where.type == "cpu":
                self.note()
                return out
            out = tree_map_only(Tensor, Pretended, out)
        return return_and_correct_aliasing(function, args, kwargs, out) if pretended else out

    def device_of(self, function, args: tuple, kwargs: dict) -> torch.device:
        """Where the result lies; operands on different devices are tried as fake tensors, which may raise."""
        read = function.overloadpacket in READS
        if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            indices = [i for i in args[1] if i is not None]  # one on the host is copied, the ones in a mask are counted
            read = any(i.dtype is torch.bool or not isinstance(i, Pretended) for i in indices)
        if read:
            self.note()
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if "device" not in kwargs and all(isinstance(x, Pretended) for x in operands):
            return CUDA
        with self.fake:
            out = function(*tree_map(self.faked, args), **tree_map(self.faked, kwargs))
        return next((x.device for x in tree_leaves(out) if isinstance(x, FakeTensor)), CUDA)

    def faked(self, x):
        """The fake tensor of the same shape, strides, type and pretended device."""
        if isinstance(x, torch.device):
            return CUDA if x == META else x
        if not isinstance(x, Tensor):
            return x
        device = CUDA if isinstance(x, Pretended) else CPU
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


@contextmanager
def pretended_cuda() -> Iterator[_Pretend]:
    """Inside, torch.device("cuda") works as far as described above, whatever the machine has."""
    load = torch.load

    def load_values(*args, **kwargs):  # under FakeTensorMode it would make fake tensors
        with _disable_current_modes():
            return load(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda self, *_: self))
        stack.enter_context(patch("torch.cuda.mem_get_info", lambda *_: (2**33, 2**34)))
        stack.enter_context(patch("torch.cuda.get_rng_state", lambda *_: None))  # the device draws from the CPU's
        stack.enter_context(patch("torch.cuda.set_rng_state", lambda *_: None))
        stack.enter_context(patch("torch.load", load_values))
        no_grad = patch("torch.inference_mode", lambda on=True: torch.no_grad() if on else nullcontext())
        stack.enter_context(no_grad)  # inference tensors cannot be wrapped
        mode = stack.enter_context(_Pretend(stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))))
        _MODE.append(mode)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module's parameters become `Pretended`
        try:
            yield mode
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            _MODE.pop()
