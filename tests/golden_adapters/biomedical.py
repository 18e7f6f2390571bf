"""Biomedical cases: nnU-Net's networks, losses, planner and windows; metrics and rankings."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.biomedical import (
    components,
    folds,
    losses,
    metrics,
    planning,
    postprocessing,
    ranking,
    sliding_window,
    surface_distance,
)


def run(case) -> dict[str, Any]:
    """Every wanted output of one case, in the layout of the case."""
    if case.model in ("PlainConvUNet", "ResidualEncoderUNet"):
        return _network(case)
    # What a case holds says what it is of; the first of its kind's arrays is always there.
    for name, function in (
        ("in.logits", _losses),
        ("in.patch", _topology),
        ("in.median_shape", _plans),
        ("out.kfold", _plans),
        ("in.tile", _sliding_window),
        ("in.gtile", _sliding_window),
        ("in.toy_image", _sliding_window),
        ("out.area", _surface_tables),
        ("out.contour_length", _surface_tables),
        ("out.code", _surface_tables),
        ("in.ref", _metrics),
        ("in.mask", _postprocessing),
        ("in.sweep_score", _postprocessing),
        ("in.scores", _ranking),
    ):
        if any(key.startswith(name) for key in case.arrays):
            return function(case)
    raise ValueError(f"{case.id}: no model {case.model!r}")


def _numbered(names, stem: str) -> list[int]:
    """Numbers that follow a stem among names."""
    found = (re.fullmatch(rf"{stem}(\d+)", name) for name in names)
    return sorted(int(m[1]) for m in found if m)


def _last(x):
    return np.moveaxis(np.asarray(x), 1, -1)


def _first(x):
    return np.moveaxis(np.asarray(x), -1, 1)


def _number(text: str | None, before: str, default: float) -> float:
    """The number that follows `before` in a layer's description."""
    found = re.search(rf"{before}\D*?(\d[\d.]*(?:e-?\d+)?)", text or "", re.IGNORECASE)
    return float(found[1]) if found else default


def _negative_slope(text: str | None) -> float:
    return _number(text, "leakyrelu", 0.01 if "leaky" in (text or "leaky").lower() else 0.0)


def _each_stage(values, stages: int, dims: int | None = None):
    """One number for all stages, or one a stage, spelled out (and for every axis with `dims`)."""
    values = [values] * stages if isinstance(values, int) else values
    return [[v] * dims if dims and isinstance(v, int) else v for v in values]


def _network(case) -> dict[str, Any]:
    config = case.config
    stages, dims = len(config["feats"]), case.inputs["images"].ndim - 2
    arguments = dict(
        input_channels=config["inc"],
        num_classes=config["k"],
        features_per_stage=config["feats"],
        kernel_sizes=_each_stage(config["ks"], stages, dims),
        strides=_each_stage(config["st"], stages, dims),
        n_conv_per_stage=_each_stage(config["n"], stages),
        n_conv_per_stage_decoder=_each_stage(config["dec"], stages - 1),
        conv_bias=config.get("conv_bias", True),
        deep_supervision=config.get("deep_supervision", True),
        epsilon=_number(config.get("norm"), "eps", 1e-5),
        negative_slope=_negative_slope(config.get("nonlin")),
    )
    if case.float64:
        arguments |= {"dtype": jnp.float64, "param_dtype": jnp.float64}
    if config.get("stem_channels") and case.model == "ResidualEncoderUNet":
        arguments["stem_channels"] = config["stem_channels"]
    module, variables = jaxmodels.load(f"biomedical.unet:{case.model}", case.weights, **arguments)
    apply = jax.jit(functools.partial(module.apply, method="intermediates"))
    maps = apply(variables, _last(case.inputs["images"]))
    results = {}
    for name, value in maps.items():
        if name.startswith("skip"):
            results[f"{name}_mean"] = value.mean(tuple(range(1, value.ndim - 1)))
            results[name] = _first(value)
        else:
            results[name] = _first(value)
    return results


def _losses(case) -> dict[str, Any]:
    config, inputs = case.config, case.inputs
    levels = _numbered(inputs, "logits")
    logits = [jnp.asarray(_last(inputs[f"logits{i}"])) for i in levels]
    targets = [jnp.asarray(_last(inputs[f"target{i}"])[..., 0]) for i in levels]
    weights = config.get("ds_weights")
    options = dict(smooth=config.get("smooth", 1e-5), background=config.get("do_bg", False))
    ignored = _last(inputs["target_ignore"])[..., 0] if "target_ignore" in inputs else None

    @jax.jit
    def everything(first):
        results = {}
        for flag in (True, False):
            loss = functools.partial(losses.segmentation_loss, batch_dice=flag, **options)

            def total(first, loss=loss):
                return losses.deep_supervision_loss(loss, [first, *logits[1:]], targets, weights)

            value, gradient = jax.value_and_grad(total)(first)
            for level, y, target in zip(levels, [first, *logits[1:]], targets):
                results[f"dc_ce_bd{int(flag)}_level{level}"] = loss(y, target)
            results[f"ds_total_bd{int(flag)}"] = value
            results[f"ds_grad0_bd{int(flag)}"] = jnp.moveaxis(gradient, -1, 1)
        if ignored is not None:
            loss = functools.partial(
                losses.segmentation_loss, ignore_label=config["ignore_label"], **options
            )
            value, gradient = jax.value_and_grad(loss)(first, jnp.asarray(ignored))
            results["dc_ce_ignore"] = value
            results["dc_ce_ignore_grad"] = jnp.moveaxis(gradient, -1, 1)
        results["soft_dice_bg"] = losses.soft_dice_loss(
            jax.nn.softmax(first),
            jax.nn.one_hot(targets[0], first.shape[-1]),
            smooth=1.0,
            batch_dice=False,
            background=True,
        )
        return results

    return everything(logits[0])


def _topology(case) -> dict[str, Any]:
    config, results = case.config, {}
    for i in _numbered(case.inputs, "spacing"):
        spacing = case.inputs[f"spacing{i}"]
        found = planning.pool_topology(
            spacing,
            case.inputs[f"patch{i}"],
            config["min_feature_map_size"],
            config["max_numpool"],
        )
        stages = len(found.strides)
        dims = len(spacing)
        features = planning.features_of(
            stages, dims, config["base_features"], config["max_features"][f"{dims}d"]
        )
        convs = config["convs_per_stage"]
        blocks, decoder = (convs,) * stages, (convs,) * (stages - 1)
        size = functools.partial(
            planning.feature_map_size,
            found.patch,
            found.strides,
            features,
            blocks,
            decoder,
            config["classes"],
        )
        results |= {
            f"num_pool{i}": np.asarray(found.num_pool),
            f"strides{i}": np.asarray(found.strides),
            f"kernels{i}": np.asarray(found.kernels),
            f"new_patch{i}": np.asarray(found.patch),
            f"divisible{i}": np.asarray(found.divisor),
            f"vram_estimate{i}": np.asarray(size()),
            f"vram_estimate_ds{i}": np.asarray(size(deep_supervision=True)),
        }
        if f"n_params{i}" in case.wanted:  # a patch that never pools has no U-Net
            results[f"n_params{i}"] = np.asarray(
                planning.parameter_count(
                    config["in_channels"],
                    config["classes"],
                    features,
                    found.strides,
                    found.kernels,
                    blocks,
                    decoder,
                )
            )
    return results


def _plans(case) -> dict[str, Any]:
    results = {}
    for i, one in enumerate(case.config["cases"]):
        shape = case.inputs[f"median_shape{i}"]
        plan = planning.plan_network(
            case.inputs[f"spacing{i}"],
            shape,
            channels=one["channels"],
            classes=one["labels_incl_background"],
            dataset_voxels=float(np.prod(shape, dtype=np.float64)) * one["n_train"],
            kind=one["kind"],
            memory_gb=one["vram_gb"],
            cap_batch=one.get("cap_batch", True),
        )
        results |= {
            f"patch_size{i}": np.asarray(plan.patch_size),
            f"batch_size{i}": np.asarray(plan.batch_size),
            f"features{i}": np.asarray(plan.features),
            f"strides{i}": np.asarray(plan.strides),
            f"kernels{i}": np.asarray(plan.kernels),
            f"blocks{i}": np.asarray(plan.blocks),
            f"blocks_dec{i}": np.asarray(plan.blocks_decoder),
        }
    counts = {int(m[1]) for name in case.wanted if (m := re.match(r"kfold(\d+)_val\d+$", name))}
    for count in counts:
        split = [n for n in case.wanted if n.startswith(f"kfold{count}_")]
        for number, held in enumerate(folds.fold_indices(count, len(split))):
            results[f"kfold{count}_val{number}"] = held
    return results


def _sliding_window(case) -> dict[str, Any]:
    inputs, config, results = case.inputs, case.config, {}
    for i in _numbered(inputs, "image"):
        starts = sliding_window.window_starts(
            inputs[f"image{i}"], inputs[f"tile{i}"], float(inputs[f"step{i}"])
        )
        for axis, found in enumerate(starts):
            results[f"steps{i}_{axis}"] = np.asarray(found)
    scale = (config["sigma_scale"], config["value_scaling_factor"])
    for i in _numbered(inputs, "gtile"):
        results[f"gauss{i}"] = sliding_window.gaussian_weights(inputs[f"gtile{i}"], *scale)
    if "toy_image" in inputs:
        noted = re.search(r"tile (\d+(?:x\d+)*), step ([\d.]+)", case.meta["notes"])
        tile = config.get("tile") or [int(n) for n in noted[1].split("x")]
        step = config.get("step") or float(noted[2].rstrip("."))
        weight, ramp = jnp.asarray(inputs["toy_W"]), jnp.asarray(inputs["toy_ramp"])

        def toy(tiles):
            return tiles @ weight.T + ramp[..., None] * tiles[..., :1]

        axes = config.get("tta_axes", "all")
        axes = tuple(range(len(tile))) if isinstance(axes, str) else tuple(axes or ())
        logits, totals = sliding_window.sliding_window(
            jax.jit(sliding_window.mirrored(toy, axes)),
            np.moveaxis(inputs["toy_image"], 0, -1),
            tile,
            classes=len(weight),
            step=step,
            weights=sliding_window.gaussian_weights(tile, *scale),
            batch=2,
        )
        results["toy_logits"] = np.moveaxis(logits, -1, 0)
        results["toy_weight"] = totals
    return results


def _surface_tables(case) -> dict[str, Any]:
    results = {}
    normals = case.inputs.get("neighbour_normals", surface_distance.NEIGHBOR_NORMALS)
    for i in _numbered(case.inputs, "spacing"):
        spacing = case.inputs[f"spacing{i}"]
        if len(spacing) == 3:
            results[f"area{i}"] = surface_distance.area_table(spacing, normals)
        else:
            results[f"contour_length{i}"] = surface_distance.length_table(spacing)
    for i in _numbered(case.inputs, "mask"):
        codes = surface_distance.neighbor_codes(case.inputs[f"mask{i}"])
        results[f"code{i}"] = codes.astype(np.int64)
    return results


# Where a mask is empty the references have rules of their own: surface-distance's Hausdorff
# distance is infinite and its average over no elements 0/0, monai's Hausdorff distance is NaN.
EMPTY_HAUSDORFF = {"dm": np.inf, "monai": np.nan}


def _metrics(case) -> dict[str, Any]:
    results = {}
    for i in _numbered(case.inputs, "ref"):
        pair = (case.inputs[f"ref{i}"], case.inputs[f"pred{i}"])
        spacing = case.inputs.get(f"spacing{i}")
        elements = surface_distance.surface_distances(*pair, spacing)
        voxels = surface_distance.voxel_distances(*pair, spacing)
        results |= {
            f"dice{i}": metrics.dice(*pair),
            f"iou{i}": metrics.iou(*pair),
            f"dm_asd_{i}": np.where(
                elements.empty, np.nan, surface_distance.average_surface_distance(elements)
            ),
            f"monai_assd_{i}": surface_distance.symmetric_surface_distance(voxels),
        }
        for name in case.wanted:
            match = re.fullmatch(rf"(dm|monai)_(hd|nsd_)(?:([\d.]+)_{i}|{i}_tol([\d.]+))", name)
            if match is None:
                continue
            found = elements if match[1] == "dm" else voxels
            if match[3]:
                results[name] = surface_distance.hausdorff(found, float(match[3]))
                if any(found.empty):
                    results[name] = EMPTY_HAUSDORFF[match[1]]
            else:
                results[name] = surface_distance.surface_dice(found, float(match[4]))
    return results


def _postprocessing(case) -> dict[str, Any]:
    results, config = {}, case.config
    smallest = config.get("min_size", 5)
    for i in _numbered(case.inputs, "mask"):
        mask = case.inputs[f"mask{i}"]
        coarse = (2.5, *(0.7,) * (mask.ndim - 1))
        for name, number in config["connectivity"].items():
            number = "full" if number == "ndim" else number
            _, sizes = components.label_components(mask, number)
            results |= {
                f"n_{name}{i}": np.asarray(len(sizes)),
                f"sizes_sorted_{name}{i}": np.sort(sizes)[::-1],
                f"largest_{name}{i}": components.largest_component(mask, number),
                f"ge{smallest}_{name}{i}": components.remove_small(mask, smallest, number),
                f"filled_{name}{i}": components.fill_holes(mask, number),
            }
        results |= {
            f"edt{i}": components.distance_transform(mask),
            f"edt_aniso{i}": components.distance_transform(mask, coarse),
            f"eroded_face{i}": components.erode(mask, "face"),
            f"opened_full{i}": components.opened(mask, "full"),
        }
    if "sweep_score" in case.inputs:
        values, best = postprocessing.threshold_sweep(
            case.inputs["sweep_score"], case.inputs["sweep_label"]
        )
        results["sweep_dice"], results["sweep_best_threshold"] = values, np.asarray(best)
    return results


def _ranking(case) -> dict[str, Any]:
    config, scores = case.config, case.inputs["scores"]
    order = dict(larger_better=config["larger_better"], ties=config.get("ties", "min"))
    missing = dict(missing=config.get("na_treat", 0.0))
    tests = dict(larger_better=config["larger_better"], adjust=config.get("p_adjust", "none"))
    results: dict[str, Any] = {"per_case_ranks": ranking.per_case_ranks(scores, **order)}
    for name in ranking.AGGREGATES:
        results[f"aggregate_then_rank_{name}"] = ranking.aggregate_then_rank(
            scores, name, **order, **missing
        )
        results[f"rank_then_aggregate_{name}"] = ranking.rank_then_aggregate(scores, name, **order)
    p = ranking.pairwise_tests(scores, **tests, **missing)
    results["wilcoxon_p"] = p
    results["significant"] = ranking.significance(p, config["alpha"]).astype(float)
    results["significance_ranks"] = ranking.test_based(
        scores, **tests, **missing, alpha=config["alpha"], ties=order["ties"]
    )
    if "bootstrap_index" in case.inputs:
        found = ranking.bootstrap_ranking(
            scores, index=case.inputs["bootstrap_index"], **order, **missing
        )
        results["bootstrap_ranks"] = found.ranks
        results["bootstrap_rank_median"] = found.median
        results["bootstrap_rank_ci95"] = found.interval()
        results["kendall_tau_b"] = found.tau
    for name in case.wanted:
        if case.outputs[name].dtype.kind in "iu" and name in results:
            results[name] = np.asarray(results[name]).astype(np.int64)
    return results
