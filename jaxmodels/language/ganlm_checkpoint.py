"""Official GanLM checkpoints in and out: tied tables, parts that a strategy drops, old layouts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

TABLE = "encoder.discriminator.embed_tokens.weight"
GENERATOR, DISCRIMINATOR = "decoder.generator", "decoder.discriminator"
# A constant that fairseq's decoders carry along.
_VERSION = np.asarray([3.0], np.float32)
_DROPPED_HEAD = rf"{re.escape(DISCRIMINATOR)}\.output_projection\..*"


def TORCH_RULES(module: Any) -> dict[str, Any]:
    """Tied tables, shared layers, and what the module's strategy does not keep."""
    if not hasattr(module, "initialization_strategy"):
        return {}
    aliases, drops, fresh = {}, [r"encoder\.embed_tokens\.weight"], {"decoder.version": _VERSION}
    if module.has_generator:
        aliases[f"{GENERATOR}.embed_tokens.weight"] = TABLE
        aliases[f"{GENERATOR}.output_projection.weight"] = TABLE
        fresh[f"{GENERATOR}.version"] = _VERSION
    else:
        drops.append(r"decoder\.generator\..*")
        aliases[f"{DISCRIMINATOR}.output_projection.weight"] = TABLE
    if module.has_discriminator:
        aliases[f"{DISCRIMINATOR}.embed_tokens.weight"] = TABLE
        fresh[f"{DISCRIMINATOR}.version"] = _VERSION
    else:
        drops.append(r"decoder\.discriminator\..*")
    if module.shares_layers:
        names = ["embed_positions.weight"]
        if module.layernorm_embedding:
            names += ["layernorm_embedding.weight", "layernorm_embedding.bias"]
        for i in range(module.discriminator_decoder_layers):
            names += [f"layers.{i}.{leaf}" for leaf in _layer_leaves()]
        aliases |= {f"{DISCRIMINATOR}.{n}": f"{GENERATOR}.{n}" for n in names}
    if not module.num_classes:
        drops.append(r"classification_heads\..*")
    return {"aliases": aliases, "drops": drops, "fresh": fresh}


def _layer_leaves() -> list[str]:
    projections = [
        f"{attention}.{p}_proj"
        for attention in ("self_attn", "encoder_attn")
        for p in ("q", "k", "v", "out")
    ]
    norms = ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]
    return [f"{m}.{leaf}" for m in (*projections, *norms, "fc1", "fc2") for leaf in _LEAVES]


_LEAVES = ("weight", "bias")


def check_checkpoint(keys: Iterable[str], module: Any) -> None:
    """Refuse a file without the decoder that the strategy keeps, naming the missing prefix."""
    if not hasattr(module, "initialization_strategy"):
        return
    keys = list(keys)
    wanted = [p for p, kept in _kept(module) if kept]
    missing = [p for p in wanted if not any(f"{p}." in key for key in keys)]
    if missing and any("encoder.discriminator." in key for key in keys):
        raise ValueError(
            f"the checkpoint has no key below {missing[0]!r}, which initialization_strategy "
            f"{module.initialization_strategy!r} needs; it has "
            f"{', '.join(sorted({'.'.join(k.split('.')[:2]) for k in keys}))}"
        )


def _kept(module: Any) -> list[tuple[str, bool]]:
    own = module.has_discriminator and not module.shares_layers
    return [(GENERATOR, module.has_generator), (DISCRIMINATOR, own)]


def upgrade_checkpoint(state: Mapping[str, Any], module: Any) -> Mapping[str, Any]:
    """A published or older state dict in the layout that the module's strategy expects.

    Splits fused `in_proj_weight` and `in_proj_bias` (query, key, value in that order), leaves out
    version buffers and, with strategy "discriminator", the two-way head; casts half precision up;
    with `resize_checkpoint` clips tables or extends them with zeros.

    Raises ValueError for a dictionary or position table of another size without
    `resize_checkpoint`.
    """
    if not hasattr(module, "initialization_strategy"):
        return state
    upgraded: dict[str, Any] = {}
    headed = f"{DISCRIMINATOR}.output_projection.dense.weight" in state
    for key, value in state.items():
        if key.endswith("decoder.version") or re.fullmatch(r"decoder\.\w+\.version", key):
            continue
        if not module.has_generator and headed and re.fullmatch(_DROPPED_HEAD, key):
            continue
        value = np.asarray(value)
        if value.dtype.kind in "fV" and value.dtype.itemsize == 2:
            value = value.astype(np.float32)
        fused = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", key)
        if fused:
            for name, part in zip("qkv", np.split(value, 3)):
                upgraded[f"{fused[1]}.{name}_proj.{fused[2]}"] = part
        else:
            upgraded[key] = value
    return _resized(upgraded, module)


def _resized(state: dict[str, Any], module: Any) -> dict[str, Any]:
    sizes = {}
    for key, value in state.items():
        last = key.rsplit(".", 2)[-2:]
        if last == ["embed_tokens", "weight"] or (
            last == ["output_projection", "weight"] and len(value) != 2
        ):
            sizes[key] = ("dictionary", module.vocab_size, 0)
        elif last == ["embed_positions", "weight"]:
            side = "source" if key.startswith("encoder") else "target"
            limit = getattr(module, f"max_{side}_positions")
            sizes[key] = (f"table of {side} positions", limit, module.pad_id + 1)
    for key, (what, size, offset) in sizes.items():
        table = state[key]
        if len(table) == size + offset:
            continue
        if not module.resize_checkpoint:
            raise ValueError(
                f"{key}: the checkpoint's {what} has {len(table) - offset} rows, the model's "
                f"{size}; resize_checkpoint=True clips it or extends it with zeros"
            )
        rows = min(len(table), size + offset)
        state[key] = np.zeros((size + offset, *table.shape[1:]), table.dtype)
        state[key][:rows] = table[:rows]
    return state
