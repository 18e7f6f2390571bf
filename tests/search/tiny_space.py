"""A ScaleNet space of two stages that compiles in seconds."""

from jaxmodels.search import scalenet_space

MULTIPLIERS = ((1.0,), (1.1, 1.2), (1.4, 1.6))
ARGUMENTS = {
    "backbone": scalenet_space.backbone(
        (6, 4, 6), (1, 2), (1, 2), 2, 8, ("id", "ir_3x3_se", "ir_5x5_nse")
    ),
    "head": {"linear1": {"dim_in": 8, "dim_out": 3}},
    "depth_multiplier": MULTIPLIERS,
    "channel_multiplier": MULTIPLIERS,
    "resolution_multiplier": ((12,), (12, 13), (14, 16)),
    "max_scaling_stage": 2,
}
SPACE = scalenet_space.make_space(**ARGUMENTS)
