"""`fit`: the only loop in the project."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from train import metrics as sums_
from train import vocabulary
from train.building import build_task
from train.checkpoints import Checkpoints
from train.data import pipeline
from train.initialization import starting_variables
from train.naming import ConfigError, nearest
from train.optimizers import make_optimizer, make_schedule
from train.parallel import (
    any_process,
    batch_sharding,
    check_batch,
    gather_over_fsdp,
    global_batch,
    make_mesh,
    state_sharding,
)
from train.probe import RankProbe
from train.reporting import Reporter
from train.state import create_state
from train.step import execute_jit, execute_pmap, make_train_step, on_mesh


class NonFiniteLoss(ArithmeticError):
    """The loss or a gradient stopped being a number; the message says where to go on from."""


class Plan:
    """Everything decided before the first step: task, optimizer, mesh, shapes and shardings."""

    def __init__(self, config, devices=None):
        if config.steps < 1 or config.batch_size < 1:
            raise ConfigError("config.steps and config.batch_size: both must be at least 1")
        for key, value in (
            ("log_every", config.log_every),
            ("optimizer.accumulate", config.optimizer.accumulate),
            ("schedule.hold_for", config.schedule.hold_for),
        ):
            if value < 1:
                raise ConfigError(f"config.{key}: {value}; it must be at least 1")
        if config.parallel.mode not in ("jit", "pmap"):
            raise ConfigError(f"config.parallel.mode: {config.parallel.mode!r}; known: jit, pmap")
        if config.checkpoint.report_best and not config.checkpoint.best_metric:
            raise ConfigError("config.checkpoint.report_best: set checkpoint.best_metric as well")
        self.config = config
        if config.init_from and not os.path.exists(config.init_from):
            raise ConfigError(f"config.init_from: no file or directory {config.init_from!r}")
        self.task = build_task(config)
        self.mesh = make_mesh(config.parallel, devices)
        check_batch(config.batch_size, self.mesh, config.optimizer.accumulate)
        if config.parallel.mode == "pmap" and self.mesh.shape["data"] != self.mesh.size:
            raise ConfigError(
                "config.parallel.mode: pmap replicates; use jit for fsdp and model axes"
            )
        self.schedule = make_schedule(config.schedule, config.steps)
        self.optimizer = make_optimizer(config.optimizer, self.schedule)
        self.spec = pipeline.element_spec(config.data)
        if config.eval.split:
            # Or the first evaluation would say so, which may come after the last step.
            pipeline.check_split(config.data, config.eval.split, "config.eval.split")
        self.rules = tuple(config.parallel.rules)
        # Held: JAX finds a traced function by its identity, and `make` lowers what is traced here.
        self._create = self.create
        self.abstract = jax.eval_shape(self._create)
        self.sharding = state_sharding(self.abstract, self.mesh, self.rules)
        self.like = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            self.abstract,
            self.sharding,
        )
        pmap = config.parallel.mode == "pmap"
        self.step = make_train_step(
            self.task,
            self.optimizer,
            ema_decay=config.ema.decay,
            accumulate=config.optimizer.accumulate,
            axis_name="batch" if pmap else None,
            gather=gather_over_fsdp(self.mesh, self.rules),
        )
        if pmap:
            self.run = execute_pmap(self.step, self.mesh, "batch")
        else:
            self.run = execute_jit(self.step, self.mesh, self.sharding)

    def create(self):
        """A fresh state: the function of `config.seed` that `eval_shape` and `jit` share."""
        init_rng = jax.random.fold_in(jax.random.key(self.config.seed), 0)
        example = {k: jnp.zeros((1, *s.shape), s.dtype) for k, s in self.spec.items()}
        params, extra = self.task.init(init_rng, example)
        ema = self.config.ema.decay > 0
        return create_state(params, extra, self.optimizer, self.run_rng(), ema=ema)

    def run_rng(self):
        """The key from which every step draws its own."""
        return jax.random.fold_in(jax.random.key(self.config.seed), 1)

    def fresh(self):
        """A fresh state in place; `init_from` replaces what the checkpoint holds."""
        if not self.config.init_from and not hasattr(self.task, "start"):
            return self.make(self.sharding)
        if self.config.init_from:
            begins = getattr(self.task, "begins_with", "")
            if begins and not os.path.isdir(self.config.init_from):
                # A file of one network would leave the others untrained without a word.
                raise ConfigError(
                    f"config.init_from: {self.config.init_from} is one network's file; a run of "
                    f"several begins with {begins}"
                )
            params, extra = starting_variables(self.config, self.abstract, self.task, self.make)
        else:
            state = self.make()
            params, extra = self.task.start(state.params, state.extra)
        ema = self.config.ema.decay > 0
        state = create_state(params, extra, self.optimizer, self.run_rng(), ema=ema)
        return jax.device_put(state, self.sharding)

    def make(self, sharding=None):
        """`create`, compiled for its one call: on a CPU most of the time would go to optimizing."""
        cheap = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
        lowered = jax.jit(self._create, out_shardings=sharding).lower()
        return lowered.compile(compiler_options=cheap)()

    def evaluate(self):
        """`variables -> metrics` over the whole evaluation split."""
        if hasattr(self.task, "measure"):
            return lambda variables: self.task.measure(variables, self.config, self.mesh)
        config, rows = self.config, batch_sharding(self.mesh)
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        size = -(-(config.eval.batch_size or config.batch_size) // parts) * parts
        # Sums of whatever the task counts, to be added up over batches.
        step = jax.jit(on_mesh(self.task.evaluate, self.mesh))

        def run(variables):
            total = None
            for batch in pipeline.eval_batches(
                config.data,
                config.eval.split or pipeline.eval_split(config.data),
                batch_size=size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            ):
                sums = step(variables, global_batch(batch, rows))
                if hasattr(self.task, "score"):
                    sums = self.task.score(self.host_copy(sums))
                total = sums_.merge(total, sums)
            if total is None:
                raise ConfigError(f"config.data: {config.data.name} has no examples to evaluate on")
            return sums_.compute(total)

        return run

    def host_copy(self, tree):
        """One numpy copy of a tree that may be spread over devices and processes."""
        if jax.process_count() == 1:
            return jax.device_get(tree)
        everywhere = jax.NamedSharding(self.mesh, jax.P())
        whole = jax.jit(lambda t: t, out_shardings=everywhere)(tree)
        return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)


def fit(config, workdir, *, command: str = "") -> dict[str, float]:
    """Train (or, with `eval_only`, evaluate) as the config says; resume when `workdir` has a run.

    Returns the final numbers: the evaluation metrics and what the task reports beside them.
    """
    workdir = Path(workdir)
    first = jax.process_index() == 0
    _prepare(workdir, first)
    plan = Plan(config)
    reporter = Reporter(
        workdir, config.steps, config.batch_size, active=first, tensorboard=config.tensorboard
    )
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep=config.checkpoint.keep,
        best_metric=MovingAverage.key_of(config.checkpoint) or None,
        best_mode=config.checkpoint.best_mode,
        config=config.to_dict(),
        report=reporter.say,
    )
    evaluate = _judged(plan.evaluate(), config, reporter)
    try:
        restored = checkpoints.restore(plan.like)
        start = 0 if restored is None else restored[0]
        patience = Patience(config.checkpoint, checkpoints.metrics(start))
        # Data that is not there is said before anything slow begins.
        batches = None if config.eval_only else _batches(config, start)
        state = plan.fresh() if restored is None else restored[1]
        vocabulary.keep(workdir, config, write=first)
        if first:
            _write_config(workdir, config)
        if restored is not None:
            reporter.say(f"resumed from step {start} of {workdir}")
        ended = start >= config.steps or patience.over or _finished(plan, state)
        begun = restored is not None or config.init_from or hasattr(plan.task, "start")
        if config.eval_only and not begun:
            reporter.say(
                f"{workdir} holds no checkpoint and config.init_from names none: what is evaluated "
                "is the initialization"
            )
        if config.eval_only or ended:
            numbers = evaluate(state.eval_variables)
            reporter.log(start, "eval", numbers)
        else:
            parts = (batches, reporter, checkpoints, evaluate, patience)
            state, numbers = _train(plan, state, start, *parts)
        if numbers is None:  # asked to stop
            return {}
        if config.checkpoint.report_best:
            state, numbers = _best(plan, state, numbers, checkpoints, evaluate, reporter)
        if hasattr(plan.task, "report"):
            variables = plan.host_copy(state.eval_variables)
            if first:
                numbers = {**numbers, **plan.task.report(variables, numbers, config)}
        reporter.finish(
            f"{config.task}: {config.model}", {"steps": config.steps, **numbers}, command
        )
        return numbers
    finally:
        checkpoints.close()


def _judged(evaluate, config, reporter):
    """`evaluate`, which says once where it does not give what checkpoints are chosen by."""
    wanted = config.checkpoint.best_metric

    def run(variables):
        nonlocal wanted
        numbers = evaluate(variables)
        if wanted and wanted not in numbers:
            reporter.say(
                f"config.checkpoint.best_metric: the evaluation gives no {wanted!r}, so that no "
                f"checkpoint is the best; {nearest(wanted, numbers)}"
            )
            wanted = ""
        return numbers

    return run


def _best(plan, state, numbers, checkpoints, evaluate, reporter):
    """The state and the numbers of the best checkpoint there is."""
    step = checkpoints.best_step()
    if step is None or step == int(jax.device_get(state.step)):
        return state, numbers
    reporter.say(f"the report is of step {step}, the best by {plan.config.checkpoint.best_metric}")
    state = checkpoints.restore_step(step, plan.like)
    return state, {**numbers, **evaluate(state.eval_variables)}


def _batches(config, start: int):
    return pipeline.train_batches(
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _train(plan, state, start, batches, reporter, checkpoints, evaluate, patience):
    config, run = plan.config, plan.run
    probe = RankProbe(config.probe.rank, reporter) if config.probe.rank else None
    numbers, evaluated, pending, keys = None, -1, [], ()
    average = MovingAverage(config.checkpoint, checkpoints.metrics(start))
    state = run.place(state)
    reporter.start(start)
    with StopSignal() as stop:
        for step in range(start, config.steps):
            batch = next(batches)
            keys = tuple(batch)
            with _profile(config.profile, step, config.steps - 1, reporter.workdir):
                state, measured = run.step(state, run.put(batch))
            pending.append(measured)
            done = step + 1
            last = done == config.steps
            looked = last or done % config.log_every == 0
            if looked and not last and _finished(plan, state):
                last = True
                reporter.say(f"finished at step {done} of {config.steps}: the task is done")
            if looked:
                host = jax.device_get(pending)
                means = {k: np.mean([m[k] for m in host]) for k in host[0]}
                pending = []
                _check_finite(state, checkpoints, keys, config)
                reporter.log(done, "train", {**means, "learning_rate": float(plan.schedule(step))})
                if probe is not None:
                    probe.look(done, run.whole(state).params, means)
            # Alone, a process may stop at any step; several must agree, which takes a message.
            stopping = (
                stop.asked if jax.process_count() == 1 else looked and any_process(stop.asked)
            )
            if (config.eval.every and done % config.eval.every == 0) or last:
                numbers = average.add(evaluate(run.whole(state).eval_variables))
                reporter.log(done, "eval", numbers)
                reporter.resume_clock(done)
                evaluated = done
                if patience.runs_out(numbers) and not last:
                    last = True
                    reporter.say(f"finished at step {done} of {config.steps}: {patience}")
            if (
                (config.checkpoint.every and done % config.checkpoint.every == 0)
                or last
                or stopping
            ):
                _check_finite(state, checkpoints, keys, config)
                known = average.carried(numbers if evaluated == done else {}) | patience.carried()
                checkpoints.save(done, run.whole(state), known, wait=stopping)
                reporter.resume_clock(done)
            if stopping and not last:
                reporter.say(f"stopped by signal: step {done} is saved; the same command goes on")
                return run.whole(state), None
            if last:
                break
    checkpoints.wait()
    if probe is not None:
        numbers = {**numbers, **probe.finish()}
    return run.whole(state), numbers


def _finished(plan, state) -> bool:
    """Whether the task says that training has done all it can (its loss stopped decreasing)."""
    return hasattr(plan.task, "finished") and plan.task.finished(state.extra)


def _check_finite(state, checkpoints, keys, config) -> None:
    bad = int(np.max(state.bad_step.addressable_data(0)))
    if bad < 0:
        return
    checkpoints.wait()
    steps = checkpoints.steps()
    good = f"step {steps[-1]}" if steps else "none"
    raise NonFiniteLoss(
        f"loss or gradient not finite at step {bad} (batch keys {', '.join(keys)}; "
        f"seed {config.seed}); last good checkpoint: {good}"
    )


class MovingAverage:
    """What decides which checkpoint is the best where single evaluations are noisy.

    m <- a m + (1 - a) x over the evaluations x of `best_metric`, from the first one on, with
    a = `best_smoothing`: nnU-Net's `ema_fg_dice` for a = 0.9. It travels in the checkpoints'
    manifests, so that a resumed run goes on with it. A smoothing of 0 takes x itself.
    """

    def __init__(self, config, saved):
        if not 0 <= config.best_smoothing < 1:
            raise ConfigError(
                f"config.checkpoint.best_smoothing: {config.best_smoothing} is not in [0, 1)"
            )
        self.share, self.metric = config.best_smoothing, config.best_metric
        self.key = self.key_of(config)
        self.value = saved.get(f"last_{self.key}") if self.share else None

    @staticmethod
    def key_of(config) -> str:
        """Name of the number that is compared."""
        name = config.best_metric
        return f"ema_{name}" if name and config.best_smoothing else name

    def add(self, numbers):
        """The numbers of an evaluation with the average beside them."""
        new = numbers.get(self.metric)
        if not self.share or new is None or not np.isfinite(new):
            return numbers
        before = new if self.value is None else self.value
        self.value = self.share * before + (1 - self.share) * float(new)
        return {**numbers, self.key: self.value}

    def carried(self, numbers):
        """What a checkpoint keeps: its own numbers, if it has any, and the average so far."""
        return numbers if self.value is None else {**numbers, f"last_{self.key}": self.value}


class Patience:
    """Early stopping: a run ends after `patience` evaluations without a better `best_metric`.

    Its best value and the evaluations since travel in the checkpoints' manifests, so that a resumed
    run ends where the unbroken one does.
    """

    def __init__(self, config, saved):
        if config.patience < 0 or (config.patience and not config.best_metric):
            raise ConfigError(
                f"config.checkpoint.patience: {config.patience}; wanted a number of evaluations "
                "and config.checkpoint.best_metric to judge by, or 0"
            )
        self.limit, self.key = config.patience, MovingAverage.key_of(config)
        self.sign = -1 if config.best_mode == "min" else 1
        self.best, self.since = saved.get("patience_best"), int(saved.get("patience_since", 0))

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return bool(self.limit) and self.since >= self.limit

    def runs_out(self, numbers) -> bool:
        """Take the numbers of an evaluation into account; whether it is the last one."""
        value = numbers.get(self.key) if self.limit else None
        if value is not None and np.isfinite(value):
            better = self.best is None or self.sign * value > self.sign * self.best
            self.best, self.since = (float(value), 0) if better else (self.best, self.since + 1)
        return self.over

    def carried(self):
        """What a checkpoint keeps of it."""
        if self.best is None:
            return {}
        return {"patience_best": self.best, "patience_since": self.since}

    def __str__(self) -> str:
        better = "fallen below" if self.sign < 0 else "risen above"
        return f"{self.key} has not {better} {self.best:g} for {self.since} evaluations"


class StopSignal:
    """Remembers SIGTERM (preemption) and SIGINT until the loop can leave cleanly."""

    def __enter__(self):
        self.asked = False
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number, frame):
        del frame
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _profile:
    """A profiler trace of steps [start, start + steps), or to the last, below `workdir/profile`."""

    def __init__(self, config, step, last, workdir):
        stop = min(config.start + config.steps - 1, last)
        self.start = config.start >= 0 and step == config.start
        self.stop = config.start >= 0 and step == stop >= config.start
        self.directory = os.path.join(workdir, "profile")

    def __enter__(self):
        if self.start:
            jax.profiler.start_trace(self.directory)

    def __exit__(self, *_):
        if self.stop:
            jax.profiler.stop_trace()


def _prepare(workdir: Path, first: bool) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if first:
            probe = workdir / ".writable"
            probe.write_text("")
            probe.unlink()
    except OSError as error:
        raise ConfigError(f"--workdir {workdir}: cannot be written ({error.strerror})") from None


def _write_config(workdir: Path, config) -> None:
    text = json.dumps(config.to_dict(), indent=2, default=str) + "\n"
    part = workdir / "config.json.part"
    part.write_text(text)
    part.replace(workdir / "config.json")
