"""`python -m benchmarks [NAME ...] [--quick]`: run all benchmarks, or some, and write results."""

import argparse
import importlib

NAMES = ("depthwise", "repghost", "repghost_profile", "loop_overhead", "coral")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="few repetitions, to try it out")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for name in arguments.names or NAMES:
        path = importlib.import_module(f"benchmarks.{name}").run(quick=arguments.quick)
        print(f"{path}\n\n{path.read_text()}")


if __name__ == "__main__":
    main()
