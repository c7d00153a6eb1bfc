"""torch that believes in one GPU of capability 9.0, for fake tensors only: nothing is computed, nothing is allocated.

Import this before torch: it compiles stub.c with `cc` and loads it in front of the real CUDA runtime. Shapes, strides,
types, devices, the choice of attention and memory go through torch's own dispatcher, autocast and autograd; times and
values do not exist. The changes to torch are not taken back, so a process that imports this is for nothing else.
"""

import collections
import ctypes
import glob
import linecache
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = str(Path(__file__).parents[2]) + os.sep
NO_COMPILER = 77  # exit status where there is no C compiler


def load_stub() -> None:
    """Compile stub.c, in a tenth of a second, and load it before anything else that has these symbols."""
    found = [p for path in sys.path for p in glob.glob(f"{path or '.'}/nvidia/*/include/driver_types.h")]
    if not found:
        sys.exit("no nvidia/*/include/driver_types.h beside torch: this is a build of torch without CUDA")
    with tempfile.TemporaryDirectory() as scratch:
        # What driver_types.h includes and the wheels leave out: nothing but decorations.
        (Path(scratch) / "crt").mkdir()
        (Path(scratch) / "crt" / "host_defines.h").write_text(
            "#define __device_builtin__\n#define CUDARTAPI\n"
            "#define __builtin_align__(n) __attribute__((aligned(n)))\n#define __align__(n) __builtin_align__(n)\n"
        )
        command = [
            os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-w", "-DCUDA=13020", "-Wl,-soname,libcuda.so.1",
            f"-I{scratch}", f"-I{Path(found[0]).parent}", str(Path(__file__).parent / "stub.c"), "-o",
            f"{scratch}/stub.so",
        ]  # fmt: skip
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            print(f"{command[0]} was not found: install a C compiler, or name one in CC", file=sys.stderr)
            sys.exit(NO_COMPILER)
        ctypes.CDLL(f"{scratch}/stub.so", mode=ctypes.RTLD_GLOBAL)


assert "torch" not in sys.modules, "import fakecuda before torch"
load_stub()

import torch  # noqa: E402
import torch._subclasses.fake_tensor as fake_tensor  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

from pipeline.compute.memory import MemoryCounter  # noqa: E402

GIB = 2**30
PROPERTIES = types.SimpleNamespace(
    name="FAKE H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * GIB, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, L2_cache_size=50 * 2**20,
    gcnArchName="",
)  # fmt: skip


def _answer(module: object, **answers: object) -> None:
    for name, value in answers.items():
        setattr(module, name, value if callable(value) else (lambda *_, value=value, **__: value))


_answer(
    torch.cuda, _lazy_init=None, is_initialized=True, is_available=True, current_device=0, device_count=1,
    get_device_capability=(9, 0), get_device_properties=PROPERTIES, get_device_name=PROPERTIES.name,
    is_bf16_supported=True, synchronize=None, manual_seed_all=None,
)  # fmt: skip
_answer(torch._C, _cuda_getDeviceCount=1)
_answer(torch._utils, _get_available_device_type="cuda")
_answer(torch.Tensor, numpy=lambda x: x, pin_memory=lambda x: x)
if hasattr(fake_tensor, "init_gpu_context"):
    _answer(fake_tensor, init_gpu_context=None)


class FakeCUDA(fake_tensor.FakeTensorMode):
    """Mode in which every new tensor is fake; torch.tensor(..., device="cuda") makes a CPU tensor and moves it."""

    avoid_device_init = True  # is_available is answered with yes above, but nothing real may be moved

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)


def move_to_device(net: torch.nn.Module) -> torch.nn.Module:
    """Move a network of the meta device to the fake one in channels_last, within the mode.

    Module.to cannot: it wants to swap what fake tensors keep weak references to.
    """
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    kept = torch.channels_last if x.ndim == 4 else torch.contiguous_format
                    made = torch.empty(x.shape, dtype=x.dtype, device="cuda", memory_format=kept)
                    tensors[name] = torch.nn.Parameter(made) if isinstance(x, torch.nn.Parameter) else made
    return net


VIEWS = {
    "view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "detach",
    "as_strided", "alias", "split", "chunk", "unbind", "split_with_sizes", "_reshape_alias", "unfold", "lift_fresh",
    "empty", "empty_like", "new_empty",
}  # fmt: skip
FILLS = {"new_full", "new_zeros", "zeros_like", "full_like"}  # they read nothing
WAITS = {"nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"}
NORMS = {"native_group_norm", "native_layer_norm", "native_batch_norm", "cudnn_batch_norm"}
MANY = {"linalg_vector_norm", "_foreach_norm"}  # 3 launches; fake tensors make them one for each tensor


def find_line() -> str:
    """Return the line of the project that runs now; "autograd" in a backward pass."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and "/tests/" not in file and "site-packages" not in file:
            line = linecache.getline(file, frame.f_lineno).strip()[:60]
            return f"{file.removeprefix(ROOT)}:{frame.f_lineno} {line}"
        frame = frame.f_back
    return "autograd"


class Count(MemoryCounter):
    """Counts what a GPU would be asked to do, operator by operator, if nothing were fused.

    ops: operators that are no views, and the bias of a convolution, which cuDNN adds and differentiates in kernels of
    its own; bytes: what they read and write; waits: transfers and whatever makes the host
    wait; float64: operators with such a result; norms and convolutions: by type and layout.
    """

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__("cuda")
        self.ops, self.waits, self.float64, self.norms, self.convolutions, self.where = (
            collections.Counter() for _ in range(6)
        )
        self.bytes = 0
        self.count_tensors(held)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        before = [a for a in pytree.tree_leaves((args, kwargs or {})) if isinstance(a, torch.Tensor)]
        on_device = any(t.device.type == "cuda" for t in before)
        if name == "_local_scalar_dense":  # .item(), int(), bool(): a fake tensor has no value
            if on_device:
                self.waits["item", find_line()] += 1
            return int(on_device)
        result = func(*args, **(kwargs or {}))
        after = [a for a in pytree.tree_leaves(result) if isinstance(a, torch.Tensor)]
        self.count_tensors(after)
        everything = before + after
        if not any(t.device.type == "cuda" for t in everything) or name in VIEWS or func.namespace == "prim":
            return result
        self._note(name, everything, after, args, kwargs or {})
        return result

    def _note(self, name: str, everything: list, after: list, args: tuple, kwargs: dict) -> None:
        line = find_line()
        if len({t.device.type for t in everything}) > 1 and name in ("_to_copy", "copy_"):
            is_blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            self.waits["copy" if is_blocking else "copy that goes on", line] += 1
        if name in WAITS:
            self.waits[name, line] += 1
        self.float64[line] += any(t.dtype == torch.float64 for t in after)
        first = next((t for t in everything if t.ndim > 2), None)
        if first is not None and name in NORMS:
            self.norms[str(first.dtype).removeprefix("torch.")] += 1
        if name == "convolution":
            self.convolutions[_name_layout(first)] += 1
        backward = name == "convolution_backward"
        if (name == "convolution" and args[2] is not None) or (backward and args[10][2]):
            self.ops["bias"] += 1
            output = args[0] if backward else after[0]
            self.bytes += (1 if backward else 2) * output.numel() * output.element_size()
        self.ops[name] += 1
        self.where[line] += 1
        moved = after if name in FILLS else everything
        self.bytes += sum(t.numel() * t.element_size() for t in moved if t.device.type == "cuda")

    def count_launches(self) -> int:
        """Return about how many kernels there are."""
        return sum(self.ops.values()) - sum(max(0, self.ops[name] - 3) for name in MANY)

    def summarise(self) -> dict:
        """Return what was found, as JSON takes it."""
        return {
            "launches": self.count_launches(), "gigabytes": self.bytes / 1e9, "gib": self.peak / GIB,
            "waits": {line: n for (what, line), n in self.waits.items() if what != "copy that goes on"},
            "float64": {line: n for line, n in self.float64.items() if n},
            "norms": sorted(self.norms),
            "convolutions": dict(self.convolutions),
            "attention": sorted(op for op in self.ops if "attention" in op or op == "bmm"),
            "by line": dict(self.where.most_common(12)),
        }  # fmt: skip


def _name_layout(x: torch.Tensor) -> str:
    if x.ndim != 4 or (x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)):
        return "any"  # also where both hold, as for one pixel or one channel
    return "NHWC" if x.is_contiguous(memory_format=torch.channels_last) else "NCHW"
