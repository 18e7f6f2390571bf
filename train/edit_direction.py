"""A direction to edit along, from codes and the scores of an attribute: InterFaceGAN's boundary.

`python -m train.edit_direction --codes drawn/codes.npy --scores scores.txt --output smile.npy`

CODES [N, w_dim] are those of pictures (`train.predict` of configs/stylegan2.py writes them beside
what it draws), SCORES N numbers in the same order, as text or npy, that say how strongly each
picture has the attribute. OUTPUT is what `train.edit_video` takes as `config.edit.direction` and
`config.edit.conditions`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxmodels.platform_choice import choose_platform

choose_platform()

from train.command_line import stop_with_one_line  # noqa: E402
from train.naming import ConfigError  # noqa: E402


def main(argv: list[str]) -> int:
    """Train the boundary, write its normal, and say how well it tells the two sides apart."""
    parser = argparse.ArgumentParser(prog="python -m train.edit_direction", description=__doc__)
    parser.add_argument("--codes", required=True, metavar="FILE", help="npy, [N, w_dim]")
    parser.add_argument("--scores", required=True, metavar="FILE", help="npy or text, N numbers")
    parser.add_argument("--output", required=True, metavar="FILE", help="an npy file")
    parser.add_argument(
        "--share", type=float, default=0.02, help="codes of either extreme that are used"
    )
    given = parser.parse_args(argv[1:])

    import numpy as np

    from jaxmodels.video.latent_editing import train_boundary

    output = Path(given.output)
    if output.suffix != ".npy":
        raise ConfigError(f"--output {output}: a direction is an npy file")
    codes, scores = _numbers(given.codes, "--codes"), _numbers(given.scores, "--scores")
    normal, accuracy = train_boundary(codes, scores, given.share)
    part = output.with_name(output.name + ".part")
    with open(part, "wb") as file:
        np.save(file, normal)
    part.replace(output)
    print(
        f"{output}: direction of width {normal.shape[1]}, accuracy {accuracy:.3f} on held-out codes"
    )
    return 0


def _numbers(path: str, flag: str):
    import numpy as np

    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag}: no file {path!r}")
    try:
        if path.endswith(".npy"):
            return np.load(path, allow_pickle=False)
        return np.loadtxt(path, np.float64, delimiter="," if path.endswith(".csv") else None)
    except (ValueError, EOFError) as error:
        raise ConfigError(f"{flag}: {path} holds no numbers ({error})") from None


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
