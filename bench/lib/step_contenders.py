"""The contenders for one training step: each way to take it with a share f of the neurons active.

    dense     the plain model
    none      no weight gradient in any converted layer, and every input gradient
    neq       a random share f of each converted layer's neurons is active
    masked    dense, then zeros for the frozen neurons: the published way
    gather    neq, but a naive gather around the vendor's call computes every weight gradient
    layers    plain, with requires_grad=False on random layers that hold the share 1 - f of the
              weight gradients' FLOPs

A norm in which no neuron is active normalises by its running statistics. So in none, one neuron of
each is active, and neq at f = 0 is compared with a dense step whose norms do so too.

Every layer that neq knows is converted, except the last Linear and what shares its weight: a
Controller leaves these alone too. dense, masked and layers step with torch's fused optimizer. none,
neq and gather step with neq.optim's of the same name, which treats every parameter without a frozen
neuron in the same way.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from math import sqrt
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import neq
from bench.lib import naive_gather, optimizers
from bench.lib.networks import Network
from bench.lib.wgrad_contenders import WrongResultError, active_count, granule_in, random_mask
from neq import Account, NeuronLayer
from neq.layers.active import ActiveSet
from neq.layers.embedding import NEqEmbedding
from neq.layers.norm import NEqNorm
from neq_kernels import ops
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.geometry import Conv

BY_ROWS = ("none", "neq", "gather")


class Bench:
    """One network in one layout: the plain and the converted model have the same tensors."""

    def __init__(
        self,
        name: str,
        network: Network,
        model: nn.Module,
        layout: str,
        samples: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        granule: int = 1,  # neighbours that are active together
        graphs: bool = False,
    ) -> None:
        contiguous = torch.contiguous_format
        of_images = torch.channels_last if layout == "channels_last" else contiguous
        self.name, self.layout, self.device, self.dtype = name, layout, device, dtype
        self.granule = granule
        self.plain = deepcopy(model).to(device, memory_format=of_images)
        tensors = {id(t): t for t in (*self.plain.parameters(), *self.plain.buffers())}
        self.converted = self.convert(deepcopy(self.plain, tensors))
        self.parameters = dict(self.plain.named_parameters())
        modules = self.converted.named_modules()
        self.layers = {name: m for name, m in modules if isinstance(m, NeuronLayer)}
        torch.manual_seed(0)  # the same values in every layout
        self.batch = {
            name: t.to(device, memory_format=of_images if t.dim() == 4 else contiguous)
            for name, t in network.batch(samples).items()
        }
        self.options: dict[str, Any] = {**optimizers.OPTIONS[network.optimizer], "fused": True}
        if graphs and network.optimizer == "AdamW":
            self.options["capturable"] = True
        self._fix_statistics()
        theirs, ours = optimizers.both(network.optimizer)
        self.optimizer = theirs(self.plain.parameters(), **self.options)
        self.row_optimizer = ours(
            self.converted.parameters(), **self.options, layers=self.converted
        )
        self.keeps_dgrad = False
        self.undo: Callable[[], None] | None = None  # what a contender has done to the models
        self._hook = next(iter(self.layers.values())).register_forward_hook(self._keep_dgrad)

    @staticmethod
    def convert(model: nn.Module) -> nn.Module:
        """All layers but the last Linear, and what shares its weight."""
        last = [m.weight for m in model.modules() if isinstance(m, nn.Linear)][-1:]
        return neq.convert(
            model,
            filter_fn=lambda module, name: all(module.weight is not weight for weight in last),
        )

    def _fix_statistics(self) -> None:
        """Running statistics are those of the batch, and stay: steps compute the same each time."""
        for momentum in (1.0, 0.0):
            for model in (self.plain, self.converted):
                for norm in norms_with_statistics(model):
                    norm.momentum = momentum
            if momentum and norms_with_statistics(self.plain):
                with torch.no_grad():
                    self.plain(**self.batch)

    def _keep_dgrad(self, layer: nn.Module, args: Any, y: Tensor) -> None:
        """Makes backward reach the first layer's output even if no neuron is active."""
        if self.keeps_dgrad and not y.requires_grad:
            y.requires_grad_()

    def compile(self) -> None:
        self._hook.remove()  # compiled, layers with no active neuron stay in the graph
        self.plain, self.converted = torch.compile(self.plain), torch.compile(self.converted)

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)

    def account(self) -> Account:
        """The FLOPs of one sample: only their shares are needed."""
        return neq.account(self.converted, {name: t[:1] for name, t in self.batch.items()})


class Step:
    """One contender's step: call ``prepare``, then ``gradients`` and ``update``."""

    def __init__(self, bench: Bench, name: str, active: float, wgrads: Mapping[str, int]) -> None:
        """wgrads: the FLOPs of each layer's weight gradient."""
        self.bench, self.name, self.active = bench, name, active
        self.requested: float | None = None  # the share of a dense step's time, of a budget
        self.active_sets: dict[str, ActiveSet] = {}
        frozen = _whole_layers(wgrads, 1 - active) if name == "layers" else ()
        for seed, (layer, module) in enumerate(bench.layers.items()):
            n = module.n_neurons
            granule = granule_in(n, bench.granule)
            k = n * (layer not in frozen) if name == "layers" else active_count(active, n, granule)
            if name == "none" and has_statistics(module):
                k = granule = 1
            self.active_sets[layer] = ActiveSet(n, bench.device)
            self.active_sets[layer].set(random_mask(n, k, granule, seed))
        self.model = bench.converted if name in BY_ROWS else bench.plain
        self._optimizer = bench.row_optimizer if name in BY_ROWS else bench.optimizer
        self._graphs: list[torch.cuda.CUDAGraph] = []

    @property
    def layers(self) -> dict[str, NeuronLayer]:
        """The converted layers of the model that it runs."""
        return self.bench.layers if self.model is self.bench.converted else {}

    @property
    def optimizer(self) -> str:
        return f"{type(self._optimizer).__module__.split('.')[0]} {type(self._optimizer).__name__}"

    def prepare(self) -> None:
        if self.bench.undo is not None:
            self.bench.undo()
            self.bench.undo = None
        for name, layer in self.bench.layers.items():
            layer.active = self.active_sets[name]
            trains = self.name != "layers" or self.active_sets[name].k > 0
            for p in layer.parameters(recurse=False):
                p.requires_grad_(trains)
        self.bench.keeps_dgrad = self.name == "none"

    def lead(self, turn: int) -> None:
        """Comes before the two parts that are timed."""
        self.prepare()
        if self.bench.device.type == "cuda":  # in training, a step is launched during the last one
            self.whole()

    def gradients(self, turn: int) -> Tensor | None:
        """Forward and backward."""
        if self._graphs:
            self._graphs[0].replay()
            return None
        with naive_gather.everywhere() if self.name == "gather" else nullcontext():
            loss = self._forward()
            loss.backward()
        if self.name == "masked":
            self._mask()
        return loss.detach()

    def _forward(self) -> Tensor:
        with self.bench.autocast():
            loss: Tensor = self.model(**self.bench.batch)["loss"]
        return loss

    def update(self, turn: int) -> None:
        """The optimizer's step; gradients are freed."""
        if self._graphs:
            self._graphs[1].replay()
        else:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def take_gradients(self) -> dict[str, Tensor]:
        """Those of the plain model's parameters, by name. The model keeps none."""
        taken = {n: p.grad for n, p in self.bench.parameters.items() if p.grad is not None}
        for p in self.bench.parameters.values():
            p.grad = None
        return taken

    def whole(self) -> None:
        self.gradients(0)
        self.update(0)

    def capture(self, pool: Any) -> None:
        """From here on, the two parts are replays of CUDA graphs."""
        self.prepare()
        stream, graphs = torch.cuda.Stream(), []
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made or chosen once
            for _ in range(3):
                self.whole()
        torch.cuda.current_stream().wait_stream(stream)
        for part in (self.gradients, self.update):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=pool):
                part(0)
        self._graphs = graphs

    def _mask(self) -> None:
        for name, layer in self.bench.layers.items():
            frozen = self.active_sets[name].frozen
            for p, dim in ((layer.weight, layer.neuron_dim), (layer.bias, 0)):
                if p is not None:
                    p.grad.index_fill_(dim, frozen, 0)


class SettledStep(Step):
    """The dense step, but norms normalise by their running statistics."""

    def _forward(self) -> Tensor:
        norms = norms_with_statistics(self.model)
        for norm in norms:
            norm.eval()
        try:
            return super()._forward()
        finally:
            for norm in norms:
                norm.train()


def norms_with_statistics(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if has_statistics(module)]


def has_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None


def _whole_layers(wgrads: Mapping[str, int], share: float) -> set[str]:
    """Random layers, together at most the share of all FLOPs."""
    left, drawn, names = share * sum(wgrads.values()), set(), list(wgrads)
    for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist():
        if wgrads[names[i]] <= left:
            left -= wgrads[names[i]]
            drawn.add(names[i])
    return drawn


class Gate:
    """Admits a step if its loss and the gradients of its active neurons are the dense step's."""

    def __init__(self, bench: Bench, dense: Step) -> None:
        self.bench = bench
        tf32 = bench.dtype == torch.float32 and bench.device.type == "cuda"
        # half of the digits: a sum over all pixels loses some, and not the same in every kernel
        self.allowed = sqrt(2**-10 if tf32 else torch.finfo(bench.dtype).eps)
        self.loss, self.truth = self._run(dense)
        # of a module's weight and bias together: one of the two may have only rounding errors
        self.sizes: dict[str, float] = {}
        for name, t in self.truth.items():
            self.sizes[_owner(name)] = max(self.sizes.get(_owner(name), 0.0), float(t.abs().max()))

    def admit(self, step: Step) -> None:
        loss, gradients = self._run(step)
        self._compare(step, "the loss", loss, self.loss, float(self.loss))
        for name, truth in self.truth.items():
            got, what = gradients.get(name, torch.zeros_like(truth)), f"the gradient of {name}"
            if layer := self.bench.layers.get(_owner(name)):
                active, dim = (
                    step.active_sets[_owner(name)],
                    layer.neuron_dim if truth.dim() > 1 else 0,
                )
                if got.index_select(dim, active.frozen).count_nonzero():
                    self._reject(step, f"{what} is not zero for frozen neurons")
                truth, got = (t.index_select(dim, active.rows) for t in (truth, got))
            if truth.numel():
                self._compare(step, what, got, truth, self.sizes[_owner(name)])

    def _run(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        step.prepare()
        return step.gradients(0), step.take_gradients()

    def _compare(self, step: Step, what: str, got: Tensor, truth: Tensor, size: float) -> None:
        error = float((got - truth).abs().max())
        if not error <= self.allowed * size:  # also when it is nan
            self._reject(
                step, f"{what} is off by {error:.3g}, allowed are {self.allowed * size:.3g}"
            )

    def _reject(self, step: Step, fault: str) -> NoReturn:
        raise WrongResultError(
            f"{step.name} is wrong for {self.bench.name} ({self.bench.layout}) "
            f"with {step.active:.3g} of the neurons active: {fault}"
        )


def _owner(parameter: str) -> str:
    """The name of the parameter's module."""
    return parameter.rpartition(".")[0]


class Backends(TorchDispatchMode):
    """Counts the backends that compute the weight gradients of a step; prints as a summary."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        others = NEqNorm | NEqEmbedding
        matrices = {n: m for n, m in step.layers.items() if not isinstance(m, others)}
        some = (0 < step.active_sets[name].k < m.n_neurons for name, m in matrices.items())
        self.layers = sum(some)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        if func in (ops.linear_wgrad, ops.conv_wgrad):
            _, x, weight, order, count, bias, *geometry = args
            conv = Conv.of(*geometry) if geometry else None
            sizes = len(order), int(count), bias
            self.asked[str(planner.choose(x, weight, *sizes, conv, **options))] += 1
        return result

    def __str__(self) -> str:
        asked = self.asked.copy()
        # a layer that asked for no backend was dense, in a joint backward
        asked["dense"] += self.layers - asked.total()
        return ", ".join(f"{name} {n}" for name, n in asked.most_common() if n)
