"""Adam for parameters whose number of rows changes during training."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from flexgs.config import LearningRatesConfig
from flexgs.splats import Splats


class Optimizer:
    """Fused Adam over named parameter groups, whose learning rates may decay exponentially over a stage.

    For batches of B views it uses lr * sqrt(B), eps / sqrt(B) and betas^B (Malladi et al. 2022, adopted for
    3DGS by Zhao et al. 2024), so that a step of B views does about what B steps of one view do. A group of
    lengths names their unit, so that eps scales with their gradients.

    This calls torch's function: torch's class imports the compiler, two seconds for every training process.
    """

    def __init__(self, groups: list[dict[str, Any]], batch: int):
        """Take groups as Transform.groups describes them, and B, the number of views in a batch."""
        self.groups, self.batch = groups, batch
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (unique name, parameter) for every parameter that requires a gradient."""
        for g in self.groups:
            for i, p in enumerate(g["params"]):
                if p.requires_grad:
                    yield (g["name"] if len(g["params"]) == 1 else f"{g['name']}.{i}"), p

    def take_gradients(self) -> list[Tensor]:
        """Return and clear the gradients of all parameters, in their order; zeros where there is none."""
        taken = []
        for _, p in self.parameters():
            taken.append(torch.zeros_like(p) if p.grad is None else p.grad)
            p.grad = None
        return taken

    @torch.no_grad()
    def step(self, gradients: list[Tensor], progress: float) -> None:
        """Update with gradients in the order of take_gradients(); progress in [0, 1] sets the decay."""
        left = iter(gradients)
        for g in self.groups:
            params = [p for p in g["params"] if p.requires_grad]
            eps = 1e-15 / self.batch**0.5 / g.get("unit", 1.0)
            for p in params:
                if p not in self.state:
                    self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                     "exp_avg_sq": torch.zeros_like(p)}
            step, mean, square = ([self.state[p][key] for p in params]
                                  for key in ("step", "exp_avg", "exp_avg_sq"))
            taken = [next(left) for _ in params]
            for rows, first, last in g.get("rows", [(..., 1.0, 1.0)]):
                after = [s.clone() for s in step]  # adam counts a step in it
                adam([p[rows] for p in params], [t[rows] for t in taken], [m[rows] for m in mean],
                     [s[rows] for s in square], [], after, fused=True, amsgrad=False, maximize=False,
                     weight_decay=0.0, beta1=0.9**self.batch, beta2=0.999**self.batch, eps=eps,
                     lr=g["lr"] * first * (g["decay"] * last / first) ** progress * self.batch**0.5)
            for s, new in zip(step, after, strict=True):
                s.copy_(new)

    def rate(self, name: str, progress: float) -> float:
        """Return the learning rate of the group of this name at progress in [0, 1], as step() uses it."""
        group = next(g for g in self.groups if g["name"] == name)
        return float(group["lr"] * group["decay"] ** progress * self.batch**0.5)

    def moments(self) -> dict[str, Tensor]:
        """Return Adam's state by parameter name and field, such as "splats.means/exp_avg"."""
        return {f"{name}/{key}": value for name, p in self.parameters()
                for key, value in self.state.get(p, {}).items()}

    def load_moments(self, tensors: dict[str, Tensor]) -> None:
        """Copy in what moments() returned; parameters without moments there start afresh."""
        for name, p in self.parameters():
            state = {key: tensors[f"{name}/{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
                     if f"{name}/{key}" in tensors}
            if state:
                self.state[p] = {k: v if k == "step" else v.to(p) for k, v in state.items()}

    def drop(self, prefix: str) -> None:
        """Forget the parameters of the groups whose names begin with a prefix."""
        for g in [g for g in self.groups if g["name"].startswith(prefix)]:
            self.groups.remove(g)
            for p in g["params"]:
                self.state.pop(p, None)

    def replace_rows(self, name: str, keep: Tensor, new: Tensor,
                     move: Callable[[Tensor], Tensor]) -> nn.Parameter:
        """Replace a parameter by its rows `keep`, followed by new rows, whose moments start at zero.

        Args:
            name: name of the group, which has one parameter.
            keep: mask [N] or indices [M] of the rows to keep.
            new: [K, ...] rows to append.
            move: puts all of these in their order; see Shard.mover.
        """
        group = next(g for g in self.groups if g["name"] == name)
        old = group["params"][0]
        state = self.state.pop(old, None)
        p = nn.Parameter(move(torch.cat([old.detach()[keep], new])), requires_grad=old.requires_grad)
        if state:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = move(torch.cat([state[key][keep], torch.zeros_like(new)]))
            self.state[p] = state
        group["params"] = [p]
        return p


def splat_groups(splats: Splats, rates: LearningRatesConfig, scene_scale: float, shN_factor: float = 1.0,
                 unit: float = 1.0) -> list[dict[str, Any]]:
    """Make the parameter groups of the Gaussians, one per attribute: "splats.means" and so on.

    Args:
        splats: the Gaussians.
        rates: learning rates for batches of one view.
        scene_scale: factor on the learning rate of the means.
        shN_factor: factor on the learning rate of shN.
        unit: length in world units that the eps of the means is counted in.
    """
    lrs = {"means": rates.means * scene_scale, "quats": rates.quats, "scales": rates.scales,
           "opacities": rates.opacities, "sh0": rates.sh0, "shN": rates.shN * shN_factor}
    return [{"name": f"splats.{name}", "params": [p], "lr": lrs[name],
             "decay": 0.01 if name == "means" else 1.0, "unit": unit if name == "means" else 1.0}
            for name, p in splats.items()]
