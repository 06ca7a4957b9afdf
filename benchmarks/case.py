"""One (workload, p) made ready: tensors, the layers of every provider, their correctness and their memory.

Rows of one case share all of it, so that torch.compile compiles once and every mode is timed on the same tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from benchmarks import check, memory, rivals
from benchmarks.providers import PROVIDERS, build
from benchmarks.rivals.onednn import OneDNN
from benchmarks.workloads import COLD, Workload


class Case:
    """Raises AssertionError when the fused layer is wrong: such a case must not be timed. Where time on the machine is
    dear (`strict` off), it is kept as `wrong` beside the figures instead. `sample` bounds the elements checked.

    `missing` says why a peer or a rival could not run (torch.compile needs a C++ compiler and Python's headers).
    `attempt`, by a provider's name, is around what that one does: an error that it swallows costs only that provider.
    """

    def __init__(
        self,
        workload: Workload,
        p: float,
        providers: tuple[str, ...] = PROVIDERS,
        device="cpu",
        strict=True,
        sample=None,
        against: tuple[str, ...] = (),
        attempt: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        # All compiled layers share the code of nn.Sequential.forward, and torch.compile allows few variants of a code.
        torch._dynamo.reset()
        self.workload, self.p, self.device = workload, p, device
        self.x = workload.randn(0, device).requires_grad_()
        self.inputs = (self.x, workload.randn(3, device).requires_grad_()) if workload.adds else (self.x,)
        self.modules = {"fused": build("fused", workload, p, device)}
        self.error, self.wrong = {}, None
        self.out = torch.empty_like(self.x.detach())
        self.grads, self.saved, self.missing = {}, {}, {}
        for provider in sorted(providers, key=lambda name: name != "fused"):  # a wrong one is told at once
            try:
                with attempt(provider):
                    if provider == "fused":
                        self._check(strict, sample)
                    self._prepare(provider)
            except Exception as error:
                if provider != "compile":
                    raise
                self.missing[provider] = f"{type(error).__name__}: {error}".splitlines()[0]
        self.providers = tuple(provider for provider in providers if provider in self.saved)
        self.rivals = {}
        for name in against:
            try:
                stock = build("eager", workload, p, device)
                self.rivals[name] = OneDNN(name, workload, self.x, self.grad_like(self.x), stock)
            except rivals.Unavailable as error:
                self.missing["onednn"] = str(error)  # said once, for all of them
                break
            except Exception as error:  # one that is wrong is not timed, and spoils nobody else's figures
                self.missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]

    def _check(self, strict: bool, sample: int | None) -> None:
        grad = self.workload.randn(1, self.device)
        try:
            self.error = check.fused(self.modules["fused"], self.workload, self.p, self.inputs, grad, sample)
        except AssertionError as error:
            if strict:
                raise
            self.wrong = str(error)

    def inputs_of(self, provider: str) -> tuple[torch.Tensor, ...]:
        return self.inputs[:1] if provider == "default" else self.inputs

    def _prepare(self, provider: str) -> None:
        module = self.modules.get(provider) or build(provider, self.workload, self.p, self.device)
        inputs = self.inputs_of(provider)
        y = module(*inputs)
        self.grads[provider] = self.grad_like(y)
        y.backward(self.grads[provider])
        del y
        self.modules[provider] = module
        self.saved[provider] = memory.saved_bytes(module, *inputs, ignore=memory.vectors(self.workload.channels))

    def grad_like(self, y: torch.Tensor) -> torch.Tensor:
        # In a model the gradient arrives in the layout of the layer's own output, and providers may differ in that.
        for grad in self.grads.values():
            if grad.stride() == y.stride():
                return grad
        return torch.empty_like(y).copy_(self.workload.randn(1, self.device))

    def peak_mb(self, provider: str, mode: str) -> float | None:
        """What one step adds to the tensors alive, at most, in MB; None where it is not known (memory.peak_bytes)."""
        if mode == "backward":
            return None  # a backward has no step of its own: its peak is that of forward+backward
        self.clear()
        self.step(provider, mode)  # torch.compile compiles evaluation here, which is no part of the figure
        self.clear()
        peak = memory.peak_bytes(lambda: self.step(provider, mode), self.x.device)
        self.clear()
        return None if peak is None else peak / 1e6

    def clear(self) -> None:
        """Forget all gradients: every step, of any provider, starts without."""
        for x in self.inputs:
            x.grad = None
        for module in self.modules.values():
            for parameter in module.parameters():
                parameter.grad = None

    def step(self, provider: str, mode: str):
        """One untimed step; what it returns keeps alive what the caller of a layer would keep alive."""
        module, grad = self.modules[provider].train(mode != "eval"), self.grads[provider]
        inputs = self.inputs_of(provider)
        if mode == "eval":
            with torch.no_grad():
                return module(*inputs)
        y = module(*inputs)
        if mode in ("both", COLD):
            y.backward(grad)
        return y
