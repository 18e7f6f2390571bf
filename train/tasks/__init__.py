"""One file a task: how a batch becomes a loss and metrics.

A task module `train/tasks/NAME.py` has `from_config(config) -> task`, a frozen dataclass:

- `init(rng, batch) -> (params, extra)`: fresh parameters and the other collections;
- `loss(params, extra, batch, rng) -> (loss, (extra, metrics))`: scalar loss, updated collections,
  scalar metrics to log;
- `evaluate(variables, batch) -> sums`: a flat dict of sums with `count`, the number of examples;
  `batch["mask"]` [b] is 0 on padding rows; a sum named `name|other` is divided by the sum `other`;
- optional `uses_step`: `loss` takes the step's number as a fifth argument, `step`; optional
  `weighted_by`: the metric in proportion to which micro-batches and `pmap` devices are averaged;
- optional `measure(variables, config, mesh) -> {name: number}` in place of `evaluate`, where
  metrics do not add up over batches (ranking a collection); every process calls it;
- optional `score(sums) -> sums`: what only the host can count (text metrics), from the global
  arrays that `evaluate` returned; runs on every process alike;
- optional `update(state, batch, rng) -> (state, loss, metrics)` in place of `loss`, for alternating
  or constrained updates;
- optional `finished(extra) -> bool`: asked at log lines; True ends the run before `config.steps`;
- optional `check_loaded(arrays)`: refuses a checkpoint (dotted name -> array) in better words;
- optional `start(params, extra) -> (params, extra)`: what a fresh run begins with in place of its
  initialization, as models that other runs trained; not called on resuming;
- optional `frozen`: names of the collections of `extra` that `start` loads and nothing trains; with
  `init_from` it is also called for what the checkpoint lacks of them;
- optional `report(variables, sums, config) -> {name: number}`: final numbers, such as the baseline
  to beat;
- optional `predict(variables, path, config) -> rows`: what `python -m train.predict` writes;
- optional `predict_files(variables, path, output, config) -> str` in place of `predict`, where
  predictions are pictures, videos or label maps: writes them to `output` and returns the line to
  print; with `predicts_test = True` it also takes the word `test` for the data's own test split.
"""
