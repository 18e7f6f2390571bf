"""Runs of several stages: what is skipped, what is run again, and what goes on where it stopped."""

import json

import pytest

from train.defaults import default_config
from train.naming import ConfigError
from train.progression import Stage, run_stages, stage_config, stages_of


def stage(name, uses=(), log=None, result="value.txt", stop=(), given="", **settings):
    """A stage that writes the sum of what it reads and its own `add`."""

    def run(folder, results):
        log.append(name)
        if name in stop:
            (folder / "half.txt").write_text("half")
            return None
        total = settings.get("add", 1) + sum(int(results[u].read_text()) for u in uses)
        (folder / "value.txt").write_text(str(total))
        return {"total": float(total)}

    return Stage(name, settings, tuple(uses), run, result, given)


def chain(log, stop=(), given="", **adds):
    """a -> b -> c, and d alone."""
    return [
        stage("a", log=log, stop=stop, given=given, add=adds.get("a", 1)),
        stage("b", ("a",), log=log, stop=stop, add=adds.get("b", 1)),
        stage("d", log=log, stop=stop, add=adds.get("d", 1)),
        stage("c", ("a", "b"), log=log, stop=stop, add=adds.get("c", 1)),
    ]


def quiet(_):
    pass


def test_finished_stages_are_skipped_and_leave_metrics_and_a_manifest(tmp_path):
    log = []
    done = run_stages(chain(log), tmp_path, quiet)
    assert log == ["a", "b", "d", "c"] and done["c"]["metrics"] == {"total": 4.0}
    manifest = json.loads((tmp_path / "c" / "stage.json").read_text())
    assert manifest["files"] == {"value.txt": 1} and set(manifest["uses"]) == {"a", "b"}
    again = run_stages(chain(log), tmp_path, quiet)
    assert len(log) == 4 and again["c"]["metrics"] == done["c"]["metrics"]


def test_a_changed_setting_runs_its_stage_and_all_that_read_it_again(tmp_path):
    log = []
    run_stages(chain(log), tmp_path, quiet)
    log.clear()
    done = run_stages(chain(log, b=5), tmp_path, quiet)
    assert log == ["b", "c"] and done["c"]["metrics"]["total"] == 8.0
    assert (tmp_path / "c.outdated" / "value.txt").read_text() == "4"
    log.clear()
    run_stages(chain(log, a=0, b=5), tmp_path, quiet)
    assert log == ["a", "b", "c"]


def test_a_stopped_progression_goes_on_at_the_stage_that_stopped(tmp_path):
    log = []
    assert run_stages(chain(log, stop=("b",)), tmp_path, quiet) is None
    assert log == ["a", "b"] and (tmp_path / "b" / "half.txt").exists()
    log.clear()
    assert run_stages(chain(log), tmp_path, quiet) is not None
    # The unfinished folder is the stage's own: it can go on from what lies there.
    assert log == ["b", "d", "c"] and (tmp_path / "b" / "half.txt").exists()


def test_a_result_that_lost_a_file_is_made_again(tmp_path):
    log = []
    run_stages(chain(log), tmp_path, quiet)
    (tmp_path / "b" / "value.txt").unlink()
    log.clear()
    run_stages(chain(log), tmp_path, quiet)
    assert log == ["b"]


def test_a_stage_can_be_given_from_elsewhere(tmp_path):
    log = []
    elsewhere = tmp_path / "elsewhere" / "value.txt"
    elsewhere.parent.mkdir()
    elsewhere.write_text("10")
    done = run_stages(chain(log, given=str(elsewhere)), tmp_path / "run", quiet)
    assert log == ["b", "d", "c"] and done["c"]["metrics"]["total"] == 22.0
    with pytest.raises(ConfigError, match=r"stages\.a\.given: no file or directory"):
        run_stages(chain(log, given="/nowhere"), tmp_path / "run", quiet)


def test_a_stage_must_come_after_what_it_uses(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.stages\.b\.uses: 'a' does not come before it"):
        run_stages([stage("b", ("a",), log=[])], tmp_path, quiet)


def progression():
    config = default_config()
    config.task, config.model, config.steps = "ranking", "retrieval.dual_encoder", 100
    config.model_args = {"hidden_size": 8, "share_weight": True}
    config.task_args.score_scale = 0.5
    config.order = ("first", "second")
    config.stages.first = {"kind": "train", "changes": {"steps": 5, "schedule": {"peak": 0.5}}}
    config.stages.second = {
        "kind": "train",
        "changes": {"model_args": {"hidden_size": 16}, "optimizer": {"clip_norm": 2.0}},
        "uses": {"task_args": {"start_from": "first"}},
    }
    return config


def test_changes_merge_into_the_config_but_arguments_are_replaced():
    config = progression()
    first, second = stage_config(config, "first"), stage_config(config, "second")
    assert (first.steps, first.schedule.peak, first.model_args.hidden_size) == (5, 0.5, 8)
    assert dict(second.model_args) == {"hidden_size": 16} and second.optimizer.clip_norm == 2.0
    assert second.steps == 100 and config.steps == 100 and "order" not in first


def test_how_a_run_is_watched_does_not_make_a_stage_outdated():
    config = progression()
    before = [s.settings for s in stages_of(config)]
    config.log_every, config.checkpoint.every, config.parallel.data = 7, 3, 1
    assert [s.settings for s in stages_of(config)] == before
    config.stages.first.changes.steps = 6
    assert [s.settings for s in stages_of(config)] != before


def test_what_ends_a_stage_early_makes_it_outdated():
    config = progression()
    before = [s.settings for s in stages_of(config)]
    config.checkpoint.update(best_metric="mrr@10", patience=3)
    after = [s.settings for s in stages_of(config)]
    assert after != before
    config.checkpoint.keep = 7
    assert [s.settings for s in stages_of(config)] == after


MISTAKES = {
    "no stage 'thrid'": ("order", ("first", "thrid")),
    "config.stages.first.kind: 'tain'; did you mean 'train'": ("stages.first.kind", "tain"),
    "no key 'stepps' in the config; did you mean 'steps'": (
        "stages.first.changes",
        {"stepps": 1},
    ),
    "steps = 'many' is not of the key's type": ("stages.first.changes", {"steps": "many"}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_the_stages_is_named(message):
    config = progression()
    key, value = MISTAKES[message]
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        stages_of(config)
