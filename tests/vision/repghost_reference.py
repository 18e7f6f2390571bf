"""RepGhost's published tables, written out independently of the model for the tests."""

import math

STAGES = [
    [(3, 8, 16, 0, 1)],
    [(3, 24, 24, 0, 2)],
    [(3, 36, 24, 0, 1)],
    [(5, 36, 40, 1, 2)],
    [(5, 60, 40, 1, 1)],
    [(3, 120, 80, 0, 2)],
    [
        (3, 100, 80, 0, 1),
        (3, 120, 80, 0, 1),
        (3, 120, 80, 0, 1),
        (3, 240, 112, 1, 1),
        (3, 336, 112, 1, 1),
    ],
    [(5, 336, 160, 1, 2)],
    [(5, 480, 160, 0, 1), (5, 480, 160, 1, 1), (5, 480, 160, 0, 1), (5, 480, 160, 1, 1)],
]

# width: stem, outs of blocks 0..8 (first of each), blocks.6 outs, mids of blocks 0..5,
# blocks.6 mids, mid 7 / mid 8, final.
WIDTHS = {
    0.5: "8|8,12,12,20,20,40,40,80,80|40,40,40,56,56|4,12,20,20,32,60|52,60,60,120,168|168,240|480",
    0.58: "12|12,16,16,24,24,48,48,92,92|48,48,48,64,64|8,16,20,20,36,68|56,68,68,140,196|196,280"
    "|556",
    0.8: "12|12,20,20,32,32,64,64,128,128|64,64,64,88,88|8,20,28,28,48,96|80,96,96,192,268|268,384"
    "|768",
    1.0: "16|16,24,24,40,40,80,80,160,160|80,80,80,112,112|8,24,36,36,60,120|100,120,120,240,336"
    "|336,480|960",
    1.11: "16|16,28,28,44,44,88,88,176,176|88,88,88,124,124|8,28,40,40,68,132"
    "|112,132,132,268,372|372,532|1064",
    1.3: "20|20,32,32,52,52,104,104,208,208|104,104,104,144,144|12,32,48,48,80,156"
    "|132,156,156,312,436|436,624|1248",
    1.5: "24|24,36,36,60,60,120,120,240,240|120,120,120,168,168|12,36,56,56,92,180"
    "|152,180,180,360,504|504,720|1440",
    2.0: "32|32,48,48,80,80,160,160,320,320|160,160,160,224,224|16,48,72,72,120,240"
    "|200,240,240,480,672|672,960|1920",
}


def divisible(v):
    n = max(4, math.floor((v + 2) / 4) * 4)
    return n + 4 if n < 0.9 * v else n


def bottlenecks(width):
    """(name, inp, mid, out, kernel, se, stride) of every bottleneck."""
    inp = divisible(16 * width)
    for i, stage in enumerate(STAGES):
        for j, (k, mid, out, se, s) in enumerate(stage):
            mid, out = divisible(mid * width), divisible(out * width)
            yield f"blocks.{i}.{j}", inp, mid, out, k, se, s
            inp = out


def macs(width, height, width_pixels, folded, classes=1000):
    """Multiply-accumulates by the authors' rule, from the tables alone."""
    h, w = math.ceil(height / 2), math.ceil(width_pixels / 2)
    stem = divisible(16 * width)
    total = h * w * stem * 27
    out = stem
    bias = 1 if folded else 0
    for _, inp, mid, out, k, se, s in bottlenecks(width):
        total += h * w * (inp * mid + mid * (9 + bias))
        if s == 2:
            h2, w2 = math.ceil(h / 2), math.ceil(w / 2)
            total += h2 * w2 * mid * k * k
        else:
            h2, w2 = h, w
        if se:
            r = divisible(mid * 0.25)
            total += r * (mid + 1) + mid * (r + 1)
        total += h2 * w2 * (mid * out + out * (9 + bias))
        if s == 2 or inp != out:
            total += h2 * w2 * (inp * k * k + inp * out)
        h, w = h2, w2
    final = divisible(960 * width)
    return total + h * w * out * final + 1280 * (final + 1) + 1280 * classes


def names(width, folded):
    """Official state-dict names of a network with BN fusion branches."""
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = ["conv_stem.weight", *(f"bn1.{leaf}" for leaf in bn)]
    for block, inp, _, out, _, se, s in bottlenecks(width):
        for ghost in ("ghost1", "ghost2"):
            keys.append(f"{block}.{ghost}.primary_conv.0.weight")
            keys += [f"{block}.{ghost}.primary_conv.1.{leaf}" for leaf in bn]
            if folded:
                keys += [f"{block}.{ghost}.cheap_operation.{leaf}" for leaf in ("weight", "bias")]
            else:
                keys.append(f"{block}.{ghost}.cheap_operation.0.weight")
                keys += [f"{block}.{ghost}.cheap_operation.1.{leaf}" for leaf in bn]
                keys += [f"{block}.{ghost}.fusion_bn.0.{leaf}" for leaf in bn]
        if s == 2:
            keys += [f"{block}.conv_dw.weight", *(f"{block}.bn_dw.{leaf}" for leaf in bn)]
        if se:
            keys += [
                f"{block}.se.{conv}.{leaf}"
                for conv in ("conv_reduce", "conv_expand")
                for leaf in ("weight", "bias")
            ]
        if s == 2 or inp != out:
            for conv in (0, 2):
                keys.append(f"{block}.shortcut.{conv}.weight")
                keys += [f"{block}.shortcut.{conv + 1}.{leaf}" for leaf in bn]
    keys += ["blocks.9.0.conv.weight", *(f"blocks.9.0.bn1.{leaf}" for leaf in bn)]
    keys += [
        f"{head}.{leaf}" for head in ("conv_head", "classifier") for leaf in ("weight", "bias")
    ]
    return keys
