"""oneDNN's batch normalisation as a contestant: the compiled onednn.cpp, loaded, and one layer of it, checked."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from benchmarks import check
from benchmarks.rivals import DTYPES, Unavailable
from benchmarks.workloads import Workload

LIBRARY = Path(__file__).resolve().parents[2] / "build" / "rivals" / "libonednn_rival.so"

FORMATS = ("channels-first", "channels-last", "blocked")  # the numbers that onednn.cpp knows them by, like DTYPES


class _Tensors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("x", "scale", "shift", "grad_y", "y", "grad_x", "grad_scale", "grad_shift")
    ]


def shares_threads(library: ctypes.CDLL) -> bool:
    """Whether torch's number of threads is oneDNN's too, so that there is one OpenMP runtime for both.

    That they share it is what loading torch first brings about: libdnnl asks for libgomp.so.1, and torch's copy, which
    has that name, is there already. Measured by the CPU time of threads: the two that work for torch are the two that
    work for oneDNN, evenly. Were there two runtimes, the idle threads of each would spin (5 to 13 ms of CPU time after
    a call, 0.4 with GOMP_SPINCOUNT=0) when it is another contestant's turn; with one the next call takes them over.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        return library.onednn_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    handle, number, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    for name, result, arguments in (
        ("error", text, ()),
        ("version", None, (ctypes.POINTER(ctypes.c_int),)),
        ("threads", ctypes.c_int, ()),
        ("new", handle, (number,) * 3 + (ctypes.c_int,) * 3 + (ctypes.c_float, ctypes.POINTER(_Tensors))),
        ("free", None, (handle,)),
        ("implementation", text, (handle,)),
        ("workspace_bytes", number, (handle,)),
        *((name, ctypes.c_int, (handle,)) for name in ("load", "store", "forward", "backward")),
    ):
        function = getattr(library, f"onednn_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def load() -> ctypes.CDLL:
    if not LIBRARY.is_file():
        raise Unavailable("its library is not built: `make rivals` builds it")
    try:
        library = _load(LIBRARY)
    except OSError as error:
        raise Unavailable(f"its library cannot be loaded, `make rivals` may mend that: {error}") from error
    if not shares_threads(library):
        raise Unavailable(
            "it has another OpenMP runtime than torch, and their threads would spin on each other's cores"
        )
    return library


class OneDNN:
    """One layer: tensors, primitives and workspace, made once; `forward` and `backward` do nothing but the work.

    Raises AssertionError where it does not give what the stock layers give.
    """

    _handle = None  # until there is one

    def __init__(self, name: str, workload: Workload, x: torch.Tensor, grad_y: torch.Tensor, stock: torch.nn.Module):
        self.name, self.library = name, load()
        n, channels = workload.shape[:2]
        spatial = workload.numel // (n * channels)
        layout = "blocked" if name == "onednn_blocked" else workload.layout
        if layout == "rows":  # one picture of N pixels, channels-last: as N pictures of one pixel it runs unvectorised
            n, spatial, layout = 1, n, "channels-last"
        norm = stock[0]
        vectors = [v.detach().float().contiguous() for v in (norm.weight, norm.bias)]
        self.x, self.grad_y = x.detach(), grad_y
        self.y, self.grad_x = torch.empty_like(self.x), torch.empty_like(self.x)
        self.grad_weight, self.grad_bias = (torch.empty_like(v) for v in vectors)
        # Kept: oneDNN holds their addresses.
        self._tensors = (self.x, *vectors, grad_y, self.y, self.grad_x, self.grad_weight, self.grad_bias)
        if any(t.stride() != self.x.stride() for t in (grad_y, self.y, self.grad_x)):
            raise ValueError("the tensors of one layer must be laid out alike")
        kind = DTYPES.index(workload.dtype), FORMATS.index(layout), int(workload.act == "relu")
        at = _Tensors(*(t.data_ptr() for t in self._tensors))
        self._handle = self.library.onednn_new(n, channels, spatial, *kind, norm.eps, ctypes.byref(at))
        if not self._handle:
            self._raise()
        self.implementation = self.library.onednn_implementation(self._handle).decode()
        self.saved_bytes = self.x.untyped_storage().nbytes() + self.library.onednn_workspace_bytes(self._handle)
        self._run, self._run_back = self.library.onednn_forward, self.library.onednn_backward
        self.error = self._check(stock, workload)

    def __del__(self):
        if self._handle:
            self.library.onednn_free(self._handle)

    def _raise(self) -> None:
        raise RuntimeError(f"oneDNN: {self.library.onednn_error().decode()}")

    @property
    def version(self) -> str:
        numbers = (ctypes.c_int * 3)()
        self.library.onednn_version(numbers)
        return ".".join(map(str, numbers))

    def forward(self) -> None:
        if self._run(self._handle):
            self._raise()

    def backward(self) -> None:
        if self._run_back(self._handle):
            self._raise()

    def _check(self, stock: torch.nn.Module, workload: Workload) -> dict[str, float]:
        if self.library.onednn_load(self._handle):
            self._raise()
        self.forward()
        self.backward()
        if self.library.onednn_store(self._handle):
            self._raise()
        given = {"output": self.y, "grad_x": self.grad_x, "grad_weight": self.grad_weight, "grad_bias": self.grad_bias}
        return check.against_stock(self.name, given, stock, workload, self.x, self.grad_y)
