"""Channel rounding of the mobile networks."""


def make_divisible(value: float, divisor: int = 4, minimum: int | None = None) -> int:
    """Nearest multiple of `divisor`, at least `minimum` and at least 0.9 of `value`.

    `max(minimum, floor((v + d / 2) / d) * d)`, one divisor more where that loses over 10 %.
    `minimum` defaults to `divisor`. Source: MobileNetV3's reference rounding.
    """
    rounded = max(
        divisor if minimum is None else minimum, int(value + divisor / 2) // divisor * divisor
    )
    return rounded + divisor if rounded < 0.9 * value else rounded
