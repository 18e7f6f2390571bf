"""`python -m jaxmodels list | summary | compare | convert`: models and their checkpoints."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from typing import Any


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmodels", description="Models by name, and their PyTorch checkpoints."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of all models and variants")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("name", help="family.module[:variant], or a variant alone")
    model.add_argument(
        "--set", action="append", type=_argument, default=[], metavar="NAME=VALUE",
        help="constructor argument, as width=0.5",
    )  # fmt: skip
    commands.add_parser("summary", parents=[model], help="parameters and sizes")
    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument(
        "--prefer", action="append", default=[], metavar="KEY",
        help="weight set to take where the file holds several, as state_dict_ema",
    )  # fmt: skip
    reading.add_argument(
        "--prefix", metavar="TEXT",
        help="what stands before the model's names in the file, where it is no usual prefix",
    )  # fmt: skip
    comparing = commands.add_parser(
        "compare", parents=[model, reading], help="activations against a PyTorch recording"
    )
    comparing.add_argument("--weights", required=True, metavar="FILE")
    comparing.add_argument("--io", required=True, metavar="FILE")
    comparing.add_argument("--rtol", type=float, default=1e-4)
    comparing.add_argument("--atol", type=float, default=1e-5)
    comparing.add_argument(
        "--precision", default="highest", choices=["highest", "high", "default"],
        help="matmul precision of the run",
    )  # fmt: skip
    converting = commands.add_parser(
        "convert", parents=[model, reading], help="any checkpoint to safetensors, checked"
    )
    converting.add_argument("file", metavar="FILE")
    converting.add_argument("out", metavar="OUT")
    return parser


def _summary(name: str, overrides: dict[str, Any]) -> int:
    import math

    import jax

    from jaxmodels.interop import catalog, conversion

    found = catalog.find(name)
    module = found.build(**overrides)
    variables = catalog.shapes(module)
    rows: dict[str, list[int]] = {}
    for collection in conversion.COLLECTIONS:
        for path, leaf in conversion.flatten(variables.get(collection, {})).items():
            row = rows.setdefault(path[0], [0, 0, 0])
            row[0 if collection == "params" else 1] += math.prod(leaf.shape)
            row[2] += math.prod(leaf.shape) * leaf.dtype.itemsize
    print(f"{found.name}: {type(module).__name__}")
    for example in jax.tree.leaves(catalog.inputs_of(module)):
        print(f"example input {list(example.shape)} {example.dtype}")
    output = jax.eval_shape(module.apply, variables, *catalog.inputs_of(module))
    for leaf in jax.tree.leaves(output):
        print(f"output {list(leaf.shape)} {leaf.dtype}")
    width = max([len(k) for k in rows] + [5])
    print(f"{'part':{width}}  {'parameters':>12}  {'other':>9}  {'MiB':>8}")
    for part, (parameters, other, size) in rows.items():
        print(f"{part:{width}}  {parameters:12,}  {other:9,}  {size / 2**20:8.2f}")
    totals = [sum(row[n] for row in rows.values()) for n in range(3)]
    print(f"{'total':{width}}  {totals[0]:12,}  {totals[1]:9,}  {totals[2] / 2**20:8.2f}")
    return 0


def _load(arguments: argparse.Namespace, file: str):
    from jaxmodels.interop import catalog

    found = catalog.find(arguments.name)
    module = found.build(**dict(arguments.set))
    read = catalog.read_weights(found, file, arguments.prefer)
    variables, done = catalog.import_state(
        found, module, read.tensors, source=file, prefix=arguments.prefix
    )
    said = catalog.what_was_taken(read.taken, done)
    print(", ".join([f"{file}: {len(read.tensors)} tensors", *said[:1]]))
    if read.others:
        print(f"also in the file: {', '.join(read.others)} (choose with --prefer)")
    if done.dropped:
        print(f"left out: {len(done.dropped)} entries, first {done.dropped[0]}")
    return found, module, variables, read


def _compare(arguments: argparse.Namespace) -> int:
    from jaxmodels.interop import activations

    recording, layout = activations.read_recording(arguments.io)
    _, module, variables, _ = _load(arguments, arguments.weights)
    result = activations.compare(
        module, variables, recording, layout,
        rtol=arguments.rtol, atol=arguments.atol, precision=arguments.precision,
    )  # fmt: skip
    print(activations.format_report(result, arguments.precision, arguments.rtol, arguments.atol))
    if not result.layers:
        print("nothing to compare: no recorded array has a counterpart", file=sys.stderr)
        return 1
    return 1 if result.first_departing else 0


def _convert(arguments: argparse.Namespace) -> int:
    from jaxmodels.interop import catalog, checkpoint

    if not arguments.out.endswith(".safetensors"):
        raise ValueError(f"{arguments.out}: the output is a .safetensors file")
    found, module, variables, read = _load(arguments, arguments.file)
    state = catalog.export(found.name, module, variables, like=read.tensors)
    checkpoint.write_safetensors(arguments.out, state, read.metadata)
    size = os.path.getsize(arguments.out) / 2**20
    print(f"{arguments.out}: {len(state)} tensors, {size:.1f} MiB, every name and shape checked")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; user mistakes end as one line on stderr with status 2."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "list":
            from jaxmodels.interop import catalog

            print("\n".join(catalog.list_models()))
            return 0
        if arguments.command == "summary":
            return _summary(arguments.name, dict(arguments.set))
        return (_compare if arguments.command == "compare" else _convert)(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except TypeError as error:
        if not getattr(arguments, "set", ()):
            raise
        given = ", ".join(f"{k}={v!r}" for k, v in arguments.set)
        print(f"error: --set {given}: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
