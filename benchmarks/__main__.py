"""`python -m benchmarks [NAME ...] [--quick]`: run all benchmarks, or some, and write results."""

import argparse
import importlib
from pathlib import Path


def names() -> list[str]:
    """The files here that have a function `run(quick) -> path of the results`."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [f.stem for f in files if "\ndef run(" in f.read_text(encoding="utf-8")]


def main() -> None:
    known = names()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="few repetitions, to try it out")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(known))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    for name in arguments.names or known:
        path = importlib.import_module(f"benchmarks.{name}").run(quick=arguments.quick)
        print(f"{path}\n\n{path.read_text()}")


if __name__ == "__main__":
    main()
