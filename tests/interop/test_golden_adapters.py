"""Adapters on cases that differ from the recorded ones in what a case may leave out or vary."""

import json

import numpy as np
import pytest

from jaxmodels.retrieval.lead import LayerDistillation
from tests.golden_case import COMMITTED, adapter_of, differences, find_cases


@pytest.fixture
def changed(tmp_path):
    """`build(name, config, arrays)`: a committed case with another config and other arrays."""

    def build(name, config=None, arrays=lambda stored: stored):
        source = COMMITTED / name
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / name
        folder.mkdir(parents=True)
        meta = json.loads((source / "meta.json").read_text())
        meta["config"] |= config or {}
        (folder / "meta.json").write_text(json.dumps(meta))
        with np.load(source / "io.npz") as stored:
            np.savez(folder / "io.npz", **arrays({k: stored[k] for k in stored.files}))
        if (source / "weights.safetensors").exists():
            (folder / "weights.safetensors").symlink_to(source / "weights.safetensors")
        (case,) = find_cases(folder)
        return case

    return build


def test_capstones_rows_end_with_the_longest_of_the_batch(changed):
    longer = {"max_query_length": 40, "max_seq_length": 200}
    case = changed("capstone/batch_append_sep", longer)
    found = adapter_of("capstone").run(case)
    for name in ("query_ids", "doc_ids", "ce_ids"):
        lengths = (found[name] != 0).sum(-1)
        assert lengths.max() == found[name].shape[-1] < 60


def test_leads_coefficients_may_be_none_and_a_mask_may_be_missing(changed):
    adapter = adapter_of("lead")
    assert adapter._objective({"teacher": "de", "distill_para_db": None}) == LayerDistillation()

    def real(stored):
        return {**stored, "in.tea_doc_mask": np.ones_like(stored["in.tea_doc_mask"])}

    def none(stored):
        return {k: v for k, v in stored.items() if k != "in.tea_doc_mask"}

    name = "lead/loss_col_teacher_masked"
    whole = adapter.run(changed(name, arrays=real))
    missing = adapter.run(changed(name, arrays=none))
    np.testing.assert_array_equal(whole["loss"], missing["loss"])


def test_a_graph_networks_depth_is_that_of_its_file(changed):
    arguments = adapter_of("meguide").network_arguments(changed("meguide/gcn_undirected"))
    assert arguments["num_layers"] == 2 and "num_nodes" not in arguments


def test_recorded_beams_may_be_as_narrow_as_their_longest(changed):
    def shortest(stored):
        """The last sentence alone, whose hypotheses are short."""
        kept = {k: v[2:] for k, v in stored.items() if k.startswith(("in.", "out.beam0"))}
        width = int((kept["out.beam0.tokens"] != 1).sum(-1).max())
        assert width < kept["out.beam0.tokens"].shape[-1]
        wide = ("out.beam0.tokens", "out.beam0.positional_scores")
        return {k: v[..., :width] if k in wide else v for k, v in kept.items()}

    beams = json.loads((COMMITTED / "ganlm/finetune_generation/meta.json").read_text())["config"]
    case = changed("ganlm/finetune_generation", {"beams": beams["beams"][:1]}, shortest)
    assert differences(case, adapter_of("ganlm").run(case)) == []
