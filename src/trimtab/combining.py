"""Weighted sums of LoRAs: many adapter folders, one adapter folder. Knows factors, weights and folders; refuses to know
base models, none of which is loaded.

Adapter i changes a projection by Δ_i = s_i B_i A_i, A_i [r_i, in], B_i [out, r_i]; w_i is its weight. The result is an
ordinary LoRA B A of scale 1. There are two ways to put a rule f for sums of tensors to work:

    linear, ties, dare_linear, dare_ties    on the factors: A = f(A_i; sign(w_i) √(|w_i| s_i)), B = f(B_i; √(|w_i| s_i))
    svd, ties_svd, dare_…_svd               on the changes: Δ = f(Δ_i; w_i) [out, in], then its best B A of rank r

and three rules:

    linear      f = Σ_i w_i τ_i
    ties        τ'_i = the share `density` of τ_i's elements that are largest by magnitude, the others 0;
                γ = sgn Σ_i τ'_i;  f = Σ_{i: sgn τ'_i = γ} w_i τ'_i / |{i: sgn τ'_i = γ}|, element by element
    dare        τ'_i = m ⊙ τ_i / density, m ~ Bernoulli(density);  then linear or the signs and means of ties

TIES: Yadav et al. 2023, arXiv:2306.01708 (on changes of weights: ties_svd is the paper's). DARE: Yu et al. 2023,
arXiv:2311.03099. The factors' sum is not the sum of the changes: (Σ B_i)(Σ A_i) has cross terms. `cat` is that sum
exactly: A = [w_i s_i A_i], B = [B_i], of rank Σ r_i; `svd` is its best approximation of a given rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from trimtab import config as settings
from trimtab.apart import check_apart
from trimtab.checkpoint import (
    CHECKSUM,
    COMBINED,
    CONFIG,
    WEIGHTS,
    atomic_folder,
    read_adapter_config,
    read_tensors,
    write_json,
)
from trimtab.errors import UserError, unknown
from trimtab.files import digest
from trimtab.hub import at_hand
from trimtab.methods.lora import LoRA
from trimtab.methods.spec import method_from_dict, method_to_dict
from trimtab.report import CARD, read_object, write_report
from trimtab.run_folder import RUN

Rule = Callable[[Sequence[torch.Tensor], Sequence[float]], torch.Tensor]
FACTORS = ("linear", "ties", "dare_linear", "dare_ties")
CHANGES = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd")
WAYS = ("linear", "cat", *FACTORS[1:], *CHANGES)
FILES = (CONFIG, WEIGHTS, RUN, CARD)
"""What a sum's folder consists of; `overwrite` replaces a folder of these and no other."""
_HEAD = "head_"


@dataclass(frozen=True)
class Part:
    """One of the adapters that are summed."""

    folder: Path
    weight: float
    config: Mapping[str, Any]
    method: LoRA
    tensors: Mapping[str, torch.Tensor]

    @property
    def sites(self) -> list[str]:
        """The keys of its projections, in order."""
        return sorted({key.rpartition(".")[0] for key in self.tensors if not key.startswith(_HEAD)})

    def factors(self, site: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r]"""
        return self.tensors[f"{site}.A"].float(), self.tensors[f"{site}.B"].float()

    def change(self, site: str) -> torch.Tensor:
        """s B A [out, in]"""
        down, up = self.factors(site)
        return self.method.scale * up @ down


def combine(
    folders: Sequence[str | Path],
    weights: Sequence[float],
    output: str | Path,
    *,
    how: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write the weighted sum of several LoRA adapters of one base model as one LoRA adapter folder; returns it.

    `how` is one of WAYS (the equations stand at the top of this file). `rank` belongs to the ways that end in an SVD
    (default: the largest rank among the adapters), `density` (0 to 1) to ties and dare, `seed` to dare. Task heads with
    the same labels become their weighted mean Σ w_i H_i / Σ w_i. Task and settings are those of the first folder.

    Raises UserError for adapters that are no LoRAs, DoRAs, adapters of different bases or labels, targets and ranks
    that the way of combining cannot join, and options that it does not take; the folder appears whole or not at all.
    """
    output = Path(output).expanduser()
    _check_options(how, weights, rank, density)
    parts = _read([at_hand(folder) for folder in folders], weights)
    for part in parts:
        check_apart(output, part.folder, f"the adapter folder {part.folder}")
    _check_output(output, overwrite)
    _check_alike(parts, how)
    method, tensors = _combined(parts, how, rank, _rule(how, density, torch.Generator().manual_seed(seed)))
    made = {"how": how, "rank": rank, "density": density, "seed": seed if how.startswith("dare") else None}
    said: dict[str, Any] = {key: value for key, value in made.items() if value is not None}
    names = [part.folder.resolve().name for part in parts]
    said |= {"of": [{"folder": name, "weight": part.weight} for name, part in zip(names, parts, strict=True)]}
    atomic_folder(output, lambda path: _write(path, output.name, parts[0], method, tensors, said), overwrite=overwrite)
    return output


def _check_options(how: str, weights: Sequence[float], rank: int | None, density: float | None) -> None:
    if how not in WAYS:
        raise unknown("the way to combine", how, WAYS)
    if not all(math.isfinite(weight) and weight for weight in weights):
        raise UserError(f"the weights {', '.join(map(str, weights))} must be finite numbers other than 0")
    if rank is not None and how not in CHANGES:
        raise UserError(f"rank belongs to {', '.join(CHANGES)}, not to {how}")
    if rank is not None and rank < 1:
        raise UserError(f"rank={rank} must be at least 1")
    pruned = how.startswith(("ties", "dare"))
    if density is not None and not pruned:
        raise UserError(f"density belongs to ties and dare, not to {how}")
    if pruned and (density is None or not 0 < density <= 1):
        raise UserError(f"{how} needs a density above 0 and at most 1, the share of elements it keeps, not {density}")


def _read(folders: Sequence[Path], weights: Sequence[float]) -> list[Part]:
    if not folders:
        raise UserError("there is no adapter to combine")
    if len(folders) != len(weights):
        raise UserError(f"{len(folders)} adapters need as many weights, not {len(weights)}")
    found = []
    for folder, weight in zip(folders, weights, strict=True):
        config = read_adapter_config(folder)
        method: Any = method_from_dict(config["method"])
        if not isinstance(method, LoRA):
            raise UserError(f"{folder} is an adapter of {method.name}; only LoRAs are summed")
        if method.dora:
            raise UserError(f"{folder} is a DoRA, whose magnitudes are no sum; merge it into the base instead")
        found.append(Part(folder, float(weight), config, method, read_tensors(folder, config)))
    return found


def _check_alike(parts: Sequence[Part], how: str) -> None:
    first = parts[0]
    for other in parts[1:]:
        names = f"{first.folder} and {other.folder}"
        if first.config["base"].get("fingerprint") != other.config["base"].get("fingerprint"):
            raise UserError(f"{names} were trained on different base models")
        if first.config.get("labels") != other.config.get("labels"):
            mine, theirs = (", ".join(one.config.get("labels") or ["none"]) for one in (first, other))
            raise UserError(f"{names} have heads with different labels ({mine}; {theirs})")
        if how in FACTORS and first.method.r != other.method.r:
            raise UserError(
                f"{names} have the ranks {first.method.r} and {other.method.r}, and {how} adds factors of one rank; "
                "use cat or svd"
            )
        if first.sites != other.sites:
            if how in FACTORS:
                raise UserError(
                    f"{names} adapt different projections, and {how} adds those that both have; use cat or svd"
                )
            if first.method.layers != other.method.layers:
                raise UserError(f"{names} adapt different layers; cat and svd join other targets, not other layers")
    if any(key.startswith(_HEAD) for key in first.tensors) and sum(part.weight for part in parts) <= 0:
        raise UserError("the weights of adapters with task heads must add up to more than 0: the heads become a mean")


# -- the sums -------------------------------------------------------------------------------------------------------


def _combined(parts: Sequence[Part], how: str, rank: int | None, rule: Rule) -> tuple[LoRA, dict[str, torch.Tensor]]:
    """The method and the tensors of the sum."""
    if how == "cat":
        rank = sum(part.method.r for part in parts)
    elif how in FACTORS or rank is None:
        rank = max(part.method.r for part in parts)
    tensors: dict[str, torch.Tensor] = {}
    for site in sorted({site for part in parts for site in part.sites}):
        own = [part for part in parts if f"{site}.A" in part.tensors]
        if how == "cat":
            down, up = _side_by_side(own, site)
        elif how in FACTORS:
            down, up = _of_factors(own, site, rule)
        else:
            down, up = low_rank(rule([part.change(site) for part in own], [part.weight for part in own]), rank)
        down, up = _filled(down, up, rank)
        tensors |= {f"{site}.A": down.contiguous(), f"{site}.B": up.contiguous()}
    targets = dict.fromkeys(role for part in parts for role in part.method.targets)
    first = parts[0].method
    method = LoRA(r=rank, alpha=float(rank), dropout=first.dropout, targets=tuple(targets), layers=first.layers)
    return method, tensors | _mean_head(parts)


def _side_by_side(parts: Sequence[Part], site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[w_i s_i A_i] and [B_i]"""
    factors = [(part.weight * part.method.scale, *part.factors(site)) for part in parts]
    return torch.cat([scale * down for scale, down, _ in factors]), torch.cat([up for _, _, up in factors], dim=1)


def _of_factors(parts: Sequence[Part], site: str, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule on all A_i, then on all B_i, each with the root of its weight and scale."""
    factors = [part.factors(site) for part in parts]
    roots = [math.sqrt(abs(part.weight * part.method.scale)) for part in parts]
    signed = [math.copysign(root, part.weight * part.method.scale) for root, part in zip(roots, parts, strict=True)]
    return rule([down for down, _ in factors], signed), rule([up for _, up in factors], roots)


def low_rank(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [k, in] and B [out, k], k ≤ rank, whose product is nearest `change` [out, in]: V_k and U_k S_k of its SVD"""
    u, sigma, v = torch.linalg.svd(change.double(), full_matrices=False)
    return v[:rank].float(), (u[:, :rank] * sigma[:rank]).float()


def _filled(down: torch.Tensor, up: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a lower rank filled up with zeros: an adapter has one rank everywhere."""
    more = rank - down.shape[0]
    return (
        torch.cat([down, down.new_zeros(more, down.shape[1])]),
        torch.cat([up, up.new_zeros(up.shape[0], more)], dim=1),
    )


def _mean_head(parts: Sequence[Part]) -> dict[str, torch.Tensor]:
    """Σ w_i H_i / Σ w_i of every tensor of the task head: heads are whole weights, not changes."""
    total = sum(part.weight for part in parts)
    return {
        key: sum((part.weight / total * part.tensors[key].float() for part in parts), torch.zeros(())).contiguous()
        for key in parts[0].tensors
        if key.startswith(_HEAD)
    }


# -- the rules ------------------------------------------------------------------------------------------------------


def _rule(how: str, density: float | None, generator: torch.Generator) -> Rule:
    """The rule of a way to combine."""

    def rule(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        if how.startswith("ties"):
            return elected(torch.stack([trimmed(one, density or 1.0) for one in tensors]), weights)
        if how.startswith("dare"):
            tensors = [dropped(one, density or 1.0, generator) for one in tensors]
        add = elected if how.startswith("dare_ties") else weighted
        return add(torch.stack(list(tensors)), weights)

    return rule


def weighted(tensors: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Σ_i w_i τ_i of tensors [adapters, …]"""
    return torch.tensordot(torch.tensor(weights, dtype=tensors.dtype), tensors, dims=1)


def elected(tensors: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """TIES' sign election and disjoint mean of tensors [adapters, …]; a sum of 0 counts as positive."""
    sign = torch.where(tensors.sum(dim=0) >= 0, 1.0, -1.0)
    agree = tensors.sign() == sign
    return weighted(tensors * agree, weights) / agree.sum(dim=0).clamp(min=1)


def trimmed(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The ⌊density · n⌋ elements that are largest by magnitude; the others are 0."""
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    return torch.zeros_like(tensor).flatten().index_copy(0, kept, tensor.flatten()[kept]).view_as(tensor)


def dropped(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """DARE: each element is kept with probability `density` and rescaled, so that the expectation stays."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


# -- the folder -----------------------------------------------------------------------------------------------------


def _check_output(output: Path, overwrite: bool) -> None:
    """Raises UserError unless the folder is new or empty, or a sum that may be replaced."""
    if output.is_file():
        raise UserError(f"{output} is a file; --output must be a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output} holds something already; choose another folder or give --overwrite")
    other = sorted(path.name for path in output.iterdir() if path.name not in FILES)
    if other or COMBINED not in read_object(output / CONFIG):
        raise UserError(f"{output} is no sum of adapters that may be replaced; choose another folder")


def _write(
    folder: Path, called: str, first: Part, method: LoRA, tensors: Mapping[str, torch.Tensor], made: Mapping[str, Any]
) -> None:
    config = {**first.config, "method": method_to_dict(method), COMBINED: dict(made)}
    metadata = {"format": "pt", "method": json.dumps(config["method"], sort_keys=True)}
    save_file(dict(tensors), folder / WEIGHTS, metadata=metadata)
    write_json(folder / CONFIG, {**config, CHECKSUM: digest(folder / WEIGHTS)})
    run = first.folder / RUN
    if run.is_file():  # how rows are cut and texts are looked for
        values = {**settings.read_yaml(run, typed=True), "method": config["method"]}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        (folder / RUN).write_text(text, encoding="utf-8")
    write_report(folder, called=called)
