"""Cutting a ViTAS network out of its superformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.search import vitas
from jaxmodels.search.vitas_nets import ViTAS, standalone_arguments


def extract(
    module: vitas.Superformer, variables: Mapping[str, Any], genome: Sequence[int], side: str
) -> tuple[ViTAS, dict[str, Any]]:
    """`(network, variables)` of a genome: the same function, for a corrected superformer.

    The token channels of a cyclic set are taken in their order on the circle, in every tensor
    alike. The official mode's quirks have no stand-alone form (its position vector and softmax
    scale are not the network's own); the cut is the same there, the outputs are not.

    Raises ValueError for an illegal genome.
    """
    from jaxmodels.interop.catalog import export, find, import_state

    space = module.space
    genome = space.check(genome)
    choice = vitas.make_choice(space, genome, side, module.compat)
    tokens = vitas.token_indices(choice, module.dim)
    right, third = bool(choice.right), module.attention // 3
    state = export("search.vitas", module, variables)
    stem = "net.backbone_init_stem_Patch_init_0"
    cut = {}
    for key, value in state.items():
        if key.startswith(f"{stem}.{choice.patch}."):
            value = value[tokens] if "proj" in key else value[..., tokens]
            cut[key.replace(f"{stem}.{choice.patch}.", f"{stem}.0.")] = value
        elif key.startswith(("net.backbone_Norm", "net.backbone_FC")):
            whole = key.endswith("module.0.bias")
            cut[key] = value if whole else value[..., tokens]
    source = f"net.backbone_Block_{'id' if module.identity else 'Block'}"
    for i, op in enumerate(np.asarray(choice.ops)):
        if op == space.identity_index:
            continue
        v, mlp = int(choice.v[i]), int(choice.mlp[i])
        rows = np.arange(v) + (third - v if right else 0)
        hidden = np.arange(mlp) + (module.mlp - mlp if right else 0)
        ours, theirs = f"{source}_{i}.0", f"net.backbone_Block_Block_{i}.0"
        for name in ("norm1", "norm2"):
            for leaf in ("weight", "bias"):
                cut[f"{theirs}.{name}.{leaf}"] = state[f"{ours}.{name}.{leaf}"][tokens]
        for leaf in ("weight", "bias"):
            parts = _qkv(state, f"{ours}.attn", leaf, module, int(op), rows)
            qkv = np.concatenate(parts)
            cut[f"{theirs}.attn.qkv.{leaf}"] = qkv if leaf == "bias" else qkv[:, tokens]
        weights = {
            "attn.proj": (tokens, rows),
            "mlp.fc1": (hidden, tokens),
            "mlp.fc2": (tokens, hidden),
        }
        for name, (outputs, inputs) in weights.items():
            weight = state[f"{ours}.{name}.weight"]
            cut[f"{theirs}.{name}.weight"] = weight[np.ix_(outputs, inputs)]
            cut[f"{theirs}.{name}.bias"] = state[f"{ours}.{name}.bias"][outputs]
    network = ViTAS(**standalone_arguments(space, genome))
    return network, import_state(find("search.vitas:ViTAS"), network, cut)[0]


def _qkv(state, prefix, leaf, module, op, rows):
    third = module.attention // 3
    if module.qkv == 0:
        fused = state[f"{prefix}.qkv.{leaf}"]
        return [fused[rows], fused[third + rows], fused[2 * third + rows]]
    qk = state[f"{prefix}.qk{op if module.qkv == 2 else ''}.{leaf}"]
    v = state[f"{prefix}.v{op if module.qkv == 1 else ''}.{leaf}"]
    return [qk[rows], qk[third + rows], v[rows]]
