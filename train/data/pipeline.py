"""Batches as a pure function of the step: the global batch of step t depends on (seed, t) alone.

`config.data` is a mapping with `name` (a module of this package, `train/data/NAME.py`, optionally
`NAME:VARIANT`) and `options` (passed on to it). A family module offers

- `OPTIONS`: the options it knows with their defaults; `VARIANTS`: variant name -> options;
- `SPLITS`: (training split, evaluation split, ...);
- `element_spec(options)`: name -> `jax.ShapeDtypeStruct` of one example, without any data;
- optional `num_classes(options)`, of its labels, or a constant `NUM_CLASSES` (by `options["set"]`);
- optional `eval_element_spec(options)`: the same for evaluation, where it differs (whole graphs);
- `split_sizes(options)`: split -> number of examples, without data where that is known;
- `source(split, options)`: a picklable random-access sequence of raw examples;
- `train_transform(options)`: picklable `(example, rng) -> example`;
- `eval_transform(options)`: picklable `example -> example`;
- optional `symbols(options)`: what each id of its texts stands for, which a run keeps and compares
  with; optional `save_vocabulary(options, folder)`: writes the files of its tokenizer there, for
  the option `tokenizer` of what starts from the run (`train.vocabulary`);
- optional `IN_ORDER = True`: training examples come in their order, never shuffled;
- optional `stages(options)`: [(first step, options)] where options change during a run: at each of
  these steps the data begin anew, in a new order, under the new options.

Options known to every family are in `COMMON_OPTIONS`.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import pkgutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from train.naming import nearest

Batch = dict[str, np.ndarray]

# path: the data set's folder, or where bundled data is prepared.
# workers: Grain worker processes (0: threads of this process only). threads: 0 chooses.
COMMON_OPTIONS: dict[str, Any] = {"path": None, "workers": 0, "threads": 0}

# Prefetching holds whole batches in memory; this bounds them.
_PREFETCH_BYTES = 1 << 30
_SHUFFLE, _AUGMENT = 0, 1


def load(name: str) -> ModuleType:
    """The family module for `name` (`NAME` or `NAME:VARIANT`).

    Raises:
      ValueError: one line with the nearest spelling and the names there are.
    """
    family, _, variant = name.partition(":")
    families = _families()
    if family not in families:
        raise ValueError(_unknown("data.name", family, families))
    module = importlib.import_module(f"{__package__}.{family}")
    if variant and variant not in module.VARIANTS:
        raise ValueError(_unknown(f"data.name variant of {family}", variant, module.VARIANTS))
    return module


def resolve(data: Mapping[str, Any]) -> tuple[ModuleType, dict[str, Any]]:
    """The family module of `config.data` and its complete options, defaults filled in."""
    if "name" not in data:
        raise ValueError(f"config.data needs a key `name`, one of: {', '.join(_families())}")
    module = load(data["name"])
    variant = data["name"].partition(":")[2]
    options = {**COMMON_OPTIONS, **module.OPTIONS}
    given = dict(module.VARIANTS[variant]) if variant else {}
    given.update(dict(data.get("options") or {}))
    for key, value in given.items():
        if key not in options:
            raise ValueError(_unknown(f"data.options of {data['name']}", key, options))
        options[key] = value
    return module, options


def element_spec(data: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one example (no batch axis); needs no data on disk."""
    module, options = resolve(data)
    return module.element_spec(options)


def split_sizes(data: Mapping[str, Any]) -> dict[str, int]:
    """Number of examples of each split; published numbers where no data is on disk."""
    module, options = resolve(data)
    return module.split_sizes(options)


def num_classes(data: Mapping[str, Any]) -> int | None:
    """Number of classes of the labels; None where there are none, or the data must be there."""
    module, options = resolve(data)
    if hasattr(module, "num_classes"):
        return module.num_classes(options)
    classes = getattr(module, "NUM_CLASSES", None)
    return classes[options["set"]] if isinstance(classes, dict) else classes


def eval_split(data: Mapping[str, Any]) -> str:
    """Name of the split that the family evaluates on by default."""
    return resolve(data)[0].SPLITS[1]


def check_split(data: Mapping[str, Any], split: str, what: str) -> None:
    """Raises ValueError, which calls the split `what`, where the family has no such split."""
    known = resolve(data)[0].SPLITS
    if split not in known:
        raise ValueError(_unknown(f"{what} of {data['name']}", split, known))


def train_batches(
    data: Mapping[str, Any],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless training batches from `start_step` on: this process's rows of each global batch.

    Process p of P yields rows `[p * B / P, (p + 1) * B / P)` of the global batch of B examples,
    which is the same on any number of processes, threads and workers and from any start. Every
    epoch is shuffled anew; batches run across epoch ends. The iterator has `close()`.

    Args:
      data: `config.data`.
      batch_size: global batch size B.
      seed: any non-negative integer.
      start_step: the step of the first batch.
      process_index: p. process_count: P.

    Raises:
      ValueError: P does not divide B, unknown name or option.
    """
    module, options = resolve(data)
    local = _local_batch_size(batch_size, process_index, process_count)
    stages = module.stages(options) if hasattr(module, "stages") else [(0, options)]
    if len(stages) == 1:
        return _stage_batches(
            data, module, stages[0][1], seed, local, start_step, process_index, process_count
        )
    return _StagedBatches(
        stages,
        start_step,
        lambda number, step: _stage_batches(
            data,
            module,
            stages[number][1],
            # A new shuffle at every stage; the first keeps the seed itself.
            seed if not number else _stream_seed(seed, 2 + number),
            local,
            step,
            process_index,
            process_count,
        ),
    )


def _stage_batches(data, module, options, seed, local, start_step, process_index, process_count):
    split = module.SPLITS[0]
    examples = module.source(split, options)
    if len(examples) == 0:
        raise ValueError(f"{data['name']}: split {split!r} holds no examples")
    # Grain permutes numbers and the map reads: a fifth faster for small examples than `source`.
    ds = grain.MapDataset.range(len(examples))
    if not getattr(module, "IN_ORDER", False):
        ds = ds.shuffle(seed=_stream_seed(seed, _SHUFFLE))
    ds = ds.repeat(None)
    read = functools.partial(_random_example, examples, module.train_transform(options))
    ds = ds.random_map(read, seed=_stream_seed(seed, _AUGMENT))
    # Without `drop_remainder` Grain rounds the endless length up through a float, past what fits.
    ds = ds.batch(local, drop_remainder=True)
    ds = ds[process_index + start_step * process_count :: process_count]
    return _prefetched(ds, module, options, local)


class _StagedBatches(Iterator[Batch]):
    """Batches of a family whose options change at known steps, opened stage by stage."""

    def __init__(self, stages, step: int, make: Callable[[int, int], Iterator[Batch]]):
        self._starts = [start for start, _ in stages]
        self._step, self._make = step, make
        self._number = self._stage_of(step)
        self._open = make(self._number, step - self._starts[self._number])

    def _stage_of(self, step: int) -> int:
        return max(i for i, start in enumerate(self._starts) if start <= step)

    def __next__(self) -> Batch:
        number = self._stage_of(self._step)
        if number != self._number:
            self._open.close()
            self._number = number
            self._open = self._make(number, self._step - self._starts[number])
        batch = next(self._open)
        self._step += 1
        return batch

    def close(self) -> None:
        """Ends worker threads and processes."""
        self._open.close()


def eval_batches(
    data: Mapping[str, Any],
    split: str,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every example of `split` once, in order; `mask` float32 [b] is 1 for examples, 0 for padding.

    All processes yield the same number of batches of the same shape; padding rows are zeros.

    Raises:
      ValueError: unknown split, or `process_count` does not divide `batch_size`.
    """
    module, options = resolve(data)
    local = _local_batch_size(batch_size, process_index, process_count)
    check_split(data, split, "split")
    examples = module.source(split, options)
    count = len(examples)
    padded = math.ceil(count / batch_size) * batch_size
    specs = getattr(module, "eval_element_spec", module.element_spec)(options)
    blank = {key: np.zeros(spec.shape, spec.dtype) for key, spec in specs.items()}
    read = functools.partial(_masked_example, examples, module.eval_transform(options), blank)
    ds = grain.MapDataset.range(padded).map(read)
    ds = ds.batch(local)[process_index::process_count]
    return _prefetched(ds, module, options, local)


def _random_example(
    examples: Sequence,
    transform: Callable[[Any, np.random.Generator], Batch],
    index: int,
    rng: np.random.Generator,
) -> Batch:
    return transform(examples[int(index)], rng)


def _masked_example(
    examples: Sequence, transform: Callable[[Any], Batch], blank: Batch, index: int
) -> Batch:
    if index >= len(examples):
        return {**blank, "mask": np.float32(0)}
    return {**transform(examples[int(index)]), "mask": np.float32(1)}


def _prefetched(
    ds: grain.MapDataset, module: ModuleType, options: Mapping[str, Any], local: int
) -> Iterator[Batch]:
    example_bytes = sum(
        math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        for spec in module.element_spec(options).values()
    )
    held = max(2, _PREFETCH_BYTES // max(1, example_bytes * local))
    threads = int(options["threads"]) or min(8, os.cpu_count() or 1)
    workers = int(options["workers"])
    if workers:
        # Each worker decodes one batch at a time; parallelism comes from the workers.
        threads = int(options["threads"]) or 1
        held = max(1, held // workers)
    threads = min(threads, held)
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=min(held, 2 * threads))
    iterable = ds.to_iter_dataset(reading)
    if workers:
        if not flags.FLAGS.is_parsed():
            # Grain reads its own flags before it starts workers; in a notebook nothing parses them.
            flags.FLAGS.mark_as_parsed()
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=min(held, 2))
        )
    return _Batches(iter(iterable), in_shared_memory=workers > 0)


class _Batches(Iterator[Batch]):
    """Grain's iterator, closed when dropped or at exit, with plain arrays that outlive it."""

    def __init__(self, iterator: grain.DatasetIterator, in_shared_memory: bool):
        self._open = [iterator]
        self._in_shared_memory = in_shared_memory
        # Also runs at interpreter exit, while Grain's modules and the worker processes still live.
        self._close = weakref.finalize(self, _close_and_drop, self._open)

    def __next__(self) -> Batch:
        if not self._open:
            raise StopIteration
        batch = next(self._open[0])
        if self._in_shared_memory:
            return {key: np.array(value, subok=False) for key, value in batch.items()}
        return batch

    def close(self) -> None:
        """Ends worker threads and processes; the iterator is then at its end."""
        self._close()


def _close_and_drop(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def _stream_seed(seed: int, stream: int) -> int:
    # Grain adds the epoch number to the shuffle seed: neighboring seeds must not be neighbors here,
    # or seed 0's second epoch would be seed 1's first.
    return int(np.random.SeedSequence((int(seed), stream)).generate_state(1)[0])


def _local_batch_size(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"config.batch_size = {batch_size} must be a positive multiple of the "
            f"{process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not below {process_count}")
    return batch_size // process_count


@functools.cache
def _families() -> tuple[str, ...]:
    # A data family is a module with a `source`; told from the text, so that none is imported.
    package = importlib.import_module(__package__)
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        spec = info.module_finder.find_spec(info.name)
        text = spec.loader.get_source(info.name) if spec and spec.loader else None
        if text and "\ndef source(" in text:
            found.append(info.name)
    return tuple(sorted(found))


def _unknown(what: str, given: str, known: Any) -> str:
    return f"unknown {what} {given!r}; {nearest(given, known)}"
