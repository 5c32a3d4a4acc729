"""The outputs of the epoch before, and their similarity to the outputs of this epoch."""

from typing import Any, get_args

import torch
from torch import Tensor

from neq.measure.base import Where
from neq.measure.equilibrium import cosine
from neq_kernels import row_similarity

POSITIONS = 1024  # per neuron and batch, in a sketch


class KeptOutputs:
    """The outputs of each group, kept for comparison with those of the next pass.

    Both sides of a comparison are rounded and sketched alike. So outputs that don't change have
    φ = 1 exactly.

    Args:
        neurons: How many neurons each group has.
        devices: Where each group is.
        where: ``"device"`` keeps outputs beside the model; ``"host"`` keeps them in main memory.
            ``"sketch"`` keeps a part of them beside the model: at most ``POSITIONS`` positions of
            each neuron and batch, or one per sample if there are more samples. The positions are
            drawn once.
        per_sample: Compare sample by sample, and average.
        keeps_precision: Keep outputs in their own precision. Otherwise those of more than 16 bits
            are kept in bfloat16.
    """

    def __init__(
        self,
        neurons: list[int],
        devices: list[torch.device],
        where: Where,
        per_sample: bool,
        keeps_precision: bool,
    ) -> None:
        if where not in get_args(Where):
            raise ValueError(f"memory must be 'device', 'host' or 'sketch', got {where!r}")
        self.neurons, self.devices = neurons, devices
        self.where, self.per_sample, self.keeps_precision = where, per_sample, keeps_precision
        self.outputs: dict[int, list[Tensor]] = {}  # group -> its outputs, call by call
        self._chosen: dict[tuple[torch.device, int, int], Tensor] = {}
        self.start()

    @property
    def sketches(self) -> bool:
        return self.where == "sketch"

    def start(self) -> None:
        """Begin a pass."""
        self._before, self.outputs = self.outputs, {}
        zeros = {"dtype": torch.float64}
        # [2, n]: the sum of cosines and the count of samples; or [3, n]: the sums for a cosine
        rows = 2 if self.per_sample else 3
        self._sums = [
            torch.zeros(rows, n, device=device, **zeros)  # type: ignore[call-overload]
            for n, device in zip(self.neurons, self.devices, strict=True)
        ]
        self._compared = [0] * len(self.neurons)

    def observe(self, group: int, y: Tensor, channel_dim: int) -> None:
        """Take an output y [samples, ...] of a group; ``channel_dim`` counts its neurons."""
        if y.numel() == 0:
            return  # of an expert without tokens, say
        kept, channel_dim = self._keep(y.detach(), channel_dim)
        now = self.outputs.setdefault(group, [])
        before = self._before.get(group, [])
        if len(now) < len(before) and before[len(now)].shape == kept.shape:
            previous = before[len(now)].to(kept.device, non_blocking=True)
            sums = row_similarity(kept, previous, channel_dim, self.per_sample)
            if self.per_sample:
                cosines = cosine(sums)  # [samples, n]
                samples = torch.full_like(cosines[0], len(cosines))
                sums = torch.stack([cosines.sum(0), samples])
            self._sums[group] += sums.to(self._sums[group].device)
            self._compared[group] += 1
        now.append(kept.to("cpu", non_blocking=True) if self.where == "host" else kept)

    def sums(self) -> Tensor:
        """What the pass found: a float64 vector on a device, which adds up over ranks."""
        counts = torch.tensor(self._compared, dtype=torch.float64)
        parts = [*(sums.flatten() for sums in self._sums), counts]
        return torch.cat([part.to(self.devices[0], non_blocking=True) for part in parts])

    def phi(self, sums: Tensor) -> Tensor:
        """φ of all neurons, one group after the other; NaN for neurons that were not measured.

        ``sums`` is what ``sums()`` returned, on the CPU.
        """
        groups = len(self.neurons)
        rows = 2 if self.per_sample else 3
        values, compared = sums[:-groups], sums[-groups:]
        phis = []
        for part, count in zip(
            values.split([rows * n for n in self.neurons]), compared, strict=True
        ):
            part = part.view(rows, -1)
            phi = part[0] / part[1] if self.per_sample else cosine(part)
            phis.append(phi if count > 0 else torch.full_like(phi, torch.nan))
        return torch.cat(phis)

    def _keep(self, y: Tensor, channel_dim: int) -> tuple[Tensor, int]:
        """What to keep of y [samples, ...], and its dimension that counts the neurons.

        A copy, since an activation that works in place may overwrite y.
        """
        kept = y
        if self.sketches:
            kept, channel_dim = self._sketch(y, channel_dim)
        if not self.keeps_precision and kept.dtype.itemsize > 2:
            kept = kept.to(torch.bfloat16)
        return kept.clone() if kept is y else kept, channel_dim

    def _sketch(self, y: Tensor, channel_dim: int) -> tuple[Tensor, int]:
        """Some positions of each sample of y, the same for each neuron and in each pass."""
        samples, positions = len(y), y[0].numel() // y.shape[channel_dim]
        wanted = max(1, POSITIONS // samples)
        if positions <= wanted:
            return y, channel_dim
        key = (y.device, samples, positions)
        if key not in self._chosen:
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randint(positions, (samples, wanted), generator=generator)
            self._chosen[key] = chosen.to(y.device)
        chosen = self._chosen[key]
        if channel_dim > 1:
            flat = y.movedim(channel_dim, -1).flatten(1, -2)  # [samples, positions, n]
            return flat.gather(1, chosen.unsqueeze(2).expand(-1, -1, flat.shape[2])), 2
        flat = y.flatten(2)  # [samples, n, positions]
        return flat.gather(2, chosen.unsqueeze(1).expand(-1, flat.shape[1], -1)), 1

    def state_dict(self) -> dict[str, Any]:
        outputs = {str(group): list(kept) for group, kept in self.outputs.items()}
        return {"sketched": self.sketches, "outputs": outputs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.outputs = {
            int(group): [
                kept.to("cpu" if self.where == "host" else self.devices[int(group)])
                for kept in outputs
            ]
            for group, outputs in state["outputs"].items()
        }
