"""One file a task: how a batch becomes a loss and metrics.

A task module `train/tasks/NAME.py` has `from_config(config) -> task`, a frozen dataclass:

- `init(rng, batch) -> (params, extra)`: fresh parameters and the other collections;
- `loss(params, extra, batch, rng) -> (loss, (extra, metrics))`: scalar loss, updated collections,
  scalar metrics to log;
- `evaluate(variables, batch) -> sums`: a flat dict of sums with `count`, the number of examples;
  `batch["mask"]` [b] is 0 on padding rows;
- optional `update(state, batch, rng) -> (state, loss, metrics)` in place of `loss`, for alternating
  or constrained updates;
- optional `finished(extra) -> bool`: asked at log lines; True ends the run before `config.steps`;
- optional `check_loaded(arrays)`: refuses a checkpoint (dotted name -> array) in better words;
- optional `report(variables, sums, config) -> {name: number}`: final numbers, such as the baseline
  to beat;
- optional `predict(variables, path, config) -> rows`: what `python -m train.predict` writes.
"""
