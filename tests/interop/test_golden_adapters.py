"""Adapters read what a case holds: its title, and what it may leave out, do not matter."""

import json
import re

import numpy as np
import pytest

from jaxmodels.retrieval.lead import LayerDistillation
from tests import golden_case
from tests.test_golden import test_golden as check


@pytest.fixture
def variant(tmp_path):
    """A committed case with its meta data and arrays changed in place by a function."""

    def make(identity, change):
        source = golden_case.COMMITTED / identity
        meta = json.loads((source / "meta.json").read_text(encoding="utf-8"))
        with np.load(source / "io.npz") as stored:
            arrays = dict(stored)
        change(meta, arrays)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        np.savez(folder / "io.npz", **arrays)
        if (source / "weights.safetensors").exists():
            (folder / "weights.safetensors").symlink_to(source / "weights.safetensors")
        return golden_case.GoldenCase(folder, identity)

    return make


UNTITLED = (
    "biomedical/losses", "biomedical/plans", "biomedical/postprocessing", "biomedical/ranking",
    "biomedical/segmentation_metrics", "biomedical/topology", "compressed_sr/deform_conv_v2",
    "compressed_sr/losses_augment", "compressed_sr/metrics", "compressed_sr/resize",
    "compressed_sr/spynet_and_warp", "video2stylegan/latent_edit",
)  # fmt: skip


@pytest.mark.parametrize("identity", UNTITLED)
def test_a_case_needs_no_known_title(variant, identity):
    check(variant(identity, lambda meta, arrays: meta.update(model="something")))


@pytest.mark.parametrize("identity", ("scalenet/soft_loss", "vitas/lr_schedule"))
def test_what_explains_a_title_does_not_matter(variant, identity):
    check(variant(identity, lambda meta, arrays: meta.update(model=meta["model"] + " (again)")))


def drop(arrays, pattern):
    for name in [n for n in arrays if re.search(pattern, n)]:
        del arrays[name]


def fewer_rows(meta, arrays):
    """Records too rare to hold the points whose Hessians are asked for."""
    meta["config"]["record_every"] *= 4
    for name in ("step", "loss", "grad_norm", "singular_values", "balancedness"):
        arrays[f"out.{name}"] = arrays[f"out.{name}"][::4]


def no_future(meta, arrays):
    drop(arrays, r"in\.future|out\.(loss|grad)")


def one_boundary(meta, arrays):
    drop(arrays, r"in\.(n[23]|latent)|out\.(proj[23]|w_norm|delta)")


def no_statistics(meta, arrays):
    """Of settings whose spans do not fit into the hundred words of the statistics."""
    meta["config"]["log"] = meta["config"]["nl"] | {"mean_span_count": 10, "mean_span_length": 10}
    drop(arrays, r"out\.stats\.")


def another_peak(meta, arrays):
    meta["notes"] = "base lr 0.24; linear warm-up"
    arrays["out.lr"] = arrays["out.lr"] * 2


def another_border(meta, arrays):
    """A point between two clusters, given to the second."""
    meta["config"] = {"eps": 0.7, "min_samples": 4}
    x = np.array([0, 0.05, 0.1, 0.2, 0.85, 1.5, 1.6, 1.65, 1.7], np.float32)
    arrays["in.points"] = np.stack([x, 0 * x], 1)
    arrays["out.labels"] = np.repeat([0, 1], [4, 5])
    arrays["out.ambiguous"] = x == x[4]
    arrays["out.core"] = x != x[4]


def unknown_window(meta, arrays):
    """No kernel of three rows is known: the published code does not smooth."""
    meta["config"]["size_smooth_window"] = 3
    arrays["out.smoothed"] = arrays["out.angle"]
    drop(arrays, r"out\.(ground|no_ground|beta|labels|counts)")


def only_ranges(meta, arrays):
    meta["config"] = {}
    drop(arrays, "inclination_range|uniform")


def losses_alone(meta, arrays):
    """No clusters to measure, and the published weights of the terms."""
    meta["config"] = {}
    drop(arrays, "stat_")


def null_options(meta, arrays):
    meta["config"]["act_layer"] = None


def gray_luma(meta, arrays):
    """The luma of one channel is that channel."""
    arrays["out.gray.psnr_y_crop4"] = arrays["out.gray.psnr_crop4"]
    drop(arrays, "crop0|ssim|psnrb")


LESS = {
    "ai_security/cpl_losses": losses_alone,
    "coditt5/corruption": no_statistics,
    "compressed_sr/metrics": gray_luma,
    "dmf_theory/gd_L2_d8": fewer_rows,
    "lidar_camera/dbscan": another_border,
    "lidar_camera/depth_cluster_wrap": unknown_window,
    "lidar_camera/range_to_points": only_ranges,
    "repghost/module_bn": null_options,
    "scalenet/lr_schedule": another_peak,
    "vectornet/coords3d_train": no_future,
    "video2stylegan/latent_edit": one_boundary,
}


@pytest.mark.parametrize("identity", LESS)
def test_a_case_may_hold_less_or_other_values(variant, identity):
    check(variant(identity, LESS[identity]))


def test_capstones_rows_end_with_the_longest_of_the_batch(variant):
    def longer(meta, arrays):
        meta["config"] |= {"max_query_length": 40, "max_seq_length": 200}

    found = golden_case.adapter_of("capstone").run(variant("capstone/batch_append_sep", longer))
    for name in ("query_ids", "doc_ids", "ce_ids"):
        lengths = (found[name] != 0).sum(-1)
        assert lengths.max() == found[name].shape[-1] < 60


def test_capstones_documents_may_lack_pseudo_queries(variant):
    def empty(meta, arrays):
        arrays["in.pseudo_query"] = np.full_like(arrays["in.pseudo_query"], "")

    def none(meta, arrays):
        del meta["config"]["append"], arrays["in.pseudo_query"]

    run = golden_case.adapter_of("capstone").run
    found, wanted = (run(variant("capstone/batch_prepend_blank", c)) for c in (none, empty))
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], name)


def test_leads_coefficients_may_be_none_and_a_mask_may_be_missing(variant):
    adapter = golden_case.adapter_of("lead")

    def nothing(meta, arrays):
        meta["config"] = {"teacher": "de", "distill_para_db": None}

    case = variant("lead/loss_col_teacher_masked", nothing)
    assert adapter._objective(case) == LayerDistillation()

    def real(meta, arrays):
        arrays["in.tea_doc_mask"] = np.ones_like(arrays["in.tea_doc_mask"])

    def none(meta, arrays):
        drop(arrays, "in.tea_doc_mask")

    whole, missing = (
        adapter.run(variant("lead/loss_col_teacher_masked", change)) for change in (real, none)
    )
    np.testing.assert_array_equal(whole["loss"], missing["loss"])


def test_a_graph_networks_depth_is_that_of_its_file(variant):
    case = variant("meguide/gcn_undirected", lambda meta, arrays: None)
    arguments = golden_case.adapter_of("meguide").network_arguments(case)
    assert arguments["num_layers"] == 2 and "num_nodes" not in arguments


def test_recorded_beams_may_be_as_narrow_as_their_longest(variant):
    def shortest(meta, arrays):
        """The last sentence alone, whose hypotheses are short."""
        meta["config"]["beams"] = meta["config"]["beams"][:1]
        drop(arrays, r"^(?!in\.|out\.beam0)")
        for name in arrays:
            arrays[name] = arrays[name][2:]
        width = int((arrays["out.beam0.tokens"] != 1).sum(-1).max())
        assert width < arrays["out.beam0.tokens"].shape[-1]
        for name in ("out.beam0.tokens", "out.beam0.positional_scores"):
            arrays[name] = arrays[name][..., :width]

    check(variant("ganlm/finetune_generation", shortest))
