"""What a layer computes from its eigenvalues: see ``neq.spectral``."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from neq.layers.base import autocast
from neq.spectral.factors import factorised, triangle
from neq.spectral.ways import formed
from neq_kernels import _torch

Kind = Literal["two", "one", "svd", "qr"]
"""What trains: two sets of eigenvalues, one set, singular values too, or a triangle too."""
By = Literal["weight", "eigenvalue"]
"""What a sparse layer goes by: |w_ij|, or |λin_j - λout_i|."""

Through = Callable[[Tensor], Tensor]


class Spectral(nn.Module):
    """What a layer computes from its eigenvalues, all of which train.

    Parameters that neurons share have a leading 1, so that nothing takes them for one element for
    each neuron. φ is [outputs, inputs of a group, *kernel].
    """

    __signature__: ClassVar[inspect.Signature]  # what ``help`` and notebooks show
    weight: Any  # λout [outputs]
    bias: Any
    lambda_in: Tensor | None  # [1, inputs]
    singular: Tensor | None  # [1, rank]: of "svd"
    triangle: Tensor | None  # [1, elements]: of "qr"
    phi: Tensor | None  # φ, of "two" and "one"
    left: Tensor | None  # [outputs, rank]: of "svd"
    right: Tensor | None  # [rank, inputs, *kernel]: of "svd" and "qr"

    def __init__(
        self,
        *args: Any,
        kind: Kind = "two",
        sparsity: float = 0.0,
        sparse_by: By = "weight",
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        phi = torch.empty_like(self.weight)
        nn.init.normal_(phi, std=(phi.numel() // len(phi)) ** -0.5)
        self.take_apart(phi, kind, sparsity, sparse_by)
        with torch.no_grad():
            if kind == "two":
                cast(Tensor, self.lambda_in).uniform_(-0.97, 0.97)
                self.weight.uniform_(-0.13, 0.13)
            elif kind == "one":
                self.weight.uniform_(-0.97, 0.97)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        vendor = next(c for c in cls.__mro__ if c.__module__.startswith("torch.nn"))
        _, *own = inspect.signature(Spectral.__init__).parameters.values()
        own = [p for p in own if p.kind is p.KEYWORD_ONLY]
        given = inspect.signature(vendor).parameters.values()
        theirs = [p for p in given if p.kind is not p.VAR_KEYWORD]
        cls.__signature__ = inspect.Signature([*theirs, *own])

    def take_apart(self, weight: Tensor, kind: Kind, sparsity: float, sparse_by: By) -> None:
        """Make parameters and buffers, with which the layer's weight is ``weight``."""
        check(kind, sparsity, sparse_by, getattr(self, "groups", 1))
        self.kind, self.sparsity, self.sparse_by = kind, sparsity, sparse_by
        phi = weight.detach().clone()
        inputs = self._inputs(phi)
        parameter = partial(nn.Parameter, requires_grad=self.weight.requires_grad)
        self.weight = parameter(phi.new_full((len(phi),), -1.0 if kind == "one" else 0.0))
        factors = factorised(phi, kind)
        trained = {
            "lambda_in": None if kind == "one" else phi.new_ones(1, inputs),
            "singular": factors.singular,
            "triangle": factors.triangle,
        }
        for name, values in trained.items():
            self.register_parameter(name, None if values is None else parameter(values))
        for name, fixed in (("phi", factors.whole), ("left", factors.left)):
            self.register_buffer(name, fixed)
        self.register_buffer("right", factors.right)

    @property
    def lambda_out(self) -> Tensor:
        """The eigenvalues of the neurons: [outputs]."""
        return cast(Tensor, self.weight)

    @property
    def shared(self) -> dict[str, Tensor]:
        """The parameters that neurons share, by name."""
        named = {n: self._parameters[n] for n in ("lambda_in", "singular", "triangle")}
        return {name: p for name, p in named.items() if p is not None}

    @property
    def formed_shape(self) -> torch.Size:
        """The shape of ``formed_weight()``."""
        if self.phi is not None:
            return self.phi.shape
        return torch.Size((len(self.weight), *cast(Tensor, self.right).shape[1:]))

    def formed_weight(self) -> Tensor:
        """The weight that a plain layer needs to give the same outputs."""
        phi = self._sparse(self._whole_phi(self.shared), self.weight, self.shared)
        lambda_in = self.weight.new_zeros(1, self._inputs(phi))
        return formed(phi, self.shared.get("lambda_in", lambda_in), self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """The map.

        Args:
            input: As for the plain layer.
        """
        return self._map(input, self.weight, self.bias, self.shared)

    def extra_repr(self) -> str:
        sparse = f", sparsity={self.sparsity:g} by {self.sparse_by}" * (self.sparsity > 0)
        return f"{super().extra_repr()}, kind={self.kind!r}{sparse}"

    def _map(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, shared: dict[str, Tensor]
    ) -> Tensor:
        self._check_input(input)
        phi = self.phi
        if self.sparsity > 0:
            phi = self._sparse(self._whole_phi(shared), weight, shared)
        lambda_in = shared.get("lambda_in")
        y = None
        if phi is not None and lambda_in is not None and not phi.requires_grad:
            y = self._by_tiles(input, weight, lambda_in, phi)
        if y is None:
            y = self._by_products(phi, shared, input, lambda_in, weight)
        return y if bias is None else y + self._along(bias).to(y.dtype)

    def _check_input(self, input: Tensor) -> None:
        dim = -self._along(self.weight).dim()
        inputs = self._inputs(self.right if self.phi is None else self.phi)
        if input.dim() < -dim or input.shape[dim] != inputs:
            raise ValueError(
                f"{type(self).__name__}: dimension {dim} of the input must be its {inputs} inputs, "
                f"got shape {list(input.shape)}"
            )

    def _by_products(
        self,
        phi: Tensor | None,
        shared: dict[str, Tensor],
        x: Tensor,
        lambda_in: Tensor | None,
        weight: Tensor,
    ) -> Tensor:
        """φ(λin x) - λout φ(x)."""
        through = partial(self._through_phi, phi, shared)
        if lambda_in is None:
            y = through(x)
            return -(self._along(weight) * y).to(y.dtype)
        y, scaled = self._both(through, x, x * self._along(lambda_in[0]))
        return (scaled - self._along(weight) * y).to(y.dtype)

    def _by_tiles(self, x: Tensor, weight: Tensor, lambda_in: Tensor, phi: Tensor) -> Tensor | None:
        """None where the products are the better way, or the only one."""
        if _torch.beyond_backward() or x.layout is not torch.strided or x.is_nested:
            return None
        return self._tiled(autocast(x), weight, lambda_in, phi)

    def _through_phi(self, phi: Tensor | None, shared: dict[str, Tensor], x: Tensor) -> Tensor:
        """φ(x)."""
        if phi is not None:
            return self._product(x, phi)
        h = self._product(x, cast(Tensor, self.right))  # rank channels
        if "singular" in shared:
            h = h * self._along(shared["singular"][0]).to(h.dtype)
        return self._pointwise(h, self._left(shared))

    def _left(self, shared: dict[str, Tensor]) -> Tensor:
        """[outputs, rank]."""
        if self.left is not None:
            return self.left
        return triangle(shared["triangle"][0], len(self.weight), len(cast(Tensor, self.right)))

    def _whole_phi(self, shared: dict[str, Tensor]) -> Tensor:
        if self.phi is not None:
            return self.phi
        right = cast(Tensor, self.right)
        left = self._left(shared)
        if "singular" in shared:
            left = left * shared["singular"]
        return (left @ right.flatten(1)).view(len(left), *right.shape[1:])

    def _sparse(self, phi: Tensor, weight: Tensor, shared: dict[str, Tensor]) -> Tensor:
        """φ, zero where the layer's weight is to be zero."""
        if not self.sparsity:
            return phi
        with torch.no_grad():
            zeros = weight.new_zeros(1, self._inputs(phi))
            of = phi if self.sparse_by == "weight" else torch.ones_like(phi)
            magnitude = formed(of, shared.get("lambda_in", zeros), weight).abs()
            gone = round(self.sparsity * magnitude.numel())
            if gone == 0:
                return phi
            keep = magnitude > magnitude.flatten().kthvalue(gone).values
        return phi * keep

    def _inputs(self, phi: Any) -> int:
        return int(phi.shape[1]) * cast(int, getattr(self, "groups", 1))

    # -- what linear layers and convolutions do in their own way --------------------------------

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The plain layer's map by a weight, without a bias."""
        raise NotImplementedError

    def _both(self, through: Through, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """``through`` of two inputs."""
        return through(x), through(other)

    def _pointwise(self, h: Tensor, matrix: Tensor) -> Tensor:
        """A matrix [outputs, rank] at each position of h."""
        raise NotImplementedError

    def _along(self, values: Tensor) -> Tensor:
        """Values [channels], shaped to broadcast against inputs or outputs."""
        raise NotImplementedError

    def _tiled(self, x: Tensor, weight: Tensor, lambda_in: Tensor, phi: Tensor) -> Tensor | None:
        raise NotImplementedError


def check(kind: str, sparsity: float, sparse_by: str, groups: int) -> None:
    """Raise a ValueError that says what is allowed."""
    if kind not in get_args(Kind):
        allowed = ", ".join(map(repr, get_args(Kind)))
        raise ValueError(f"kind must be one of {allowed}; got {kind!r}")
    if sparse_by not in get_args(By):
        raise ValueError(f"sparse_by must be 'weight' or 'eigenvalue', got {sparse_by!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
    if groups > 1 and kind in ("svd", "qr"):
        raise ValueError(
            f"kind={kind!r} takes φ apart as one matrix, but this convolution has {groups} groups: "
            "take kind='two' or 'one'"
        )
