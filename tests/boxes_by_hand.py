"""Detection written out in loops, from the papers and from the rules of COCO; nothing of metarun is used."""

import math

import numpy as np
import torch
import torch.nn.functional as F


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def average_precision(pictures, kind, threshold):
    """Average precision and recall of a class; a picture is (true boxes, found boxes), lists with the class first.

    Found boxes have their score after the class.
    """
    ranked, positives = [], 0
    for true, found in pictures:
        own = [box for label, box in true if label == kind]
        free = [True] * len(own)
        positives += len(own)
        for _, score, box in sorted((one for one in found if one[0] == kind), key=lambda one: -one[1]):
            best, at = threshold, None
            for i, other in enumerate(own):
                if free[i] and overlap(box, other) >= best:
                    best, at = overlap(box, other), i
            if at is not None:
                free[at] = False
            ranked.append((score, at is not None))
    if positives == 0:
        return None
    ranked.sort(key=lambda one: -one[0])
    points, hits = [], 0
    for i, (_, hit) in enumerate(ranked, 1):
        hits += hit
        points.append((hits / positives, hits / i))
    # The levels with the rounding of the official code.
    levels = np.linspace(0, 1, 101)
    heights = [max((p for r, p in points if r >= level), default=0.0) for level in levels]
    return sum(heights) / 101, hits / positives


def heat(box, size, stride, label, ways):
    """Heat of one box ``[rows, columns, ways]`` and the geometry at every location ``[rows, columns, 4]``."""
    edge = size // stride
    left, top, right, bottom = (float(v) for v in box)
    x, y = (left + right) / 2 / stride, (top + bottom) / 2 / stride
    column, row = min(int(x), edge - 1), min(int(y), edge - 1)
    spread = [max((b - a) / stride / 8, 0.5) for a, b in ((left, right), (top, bottom))]
    logs = [math.log((right - left) / (size / 4)), math.log((bottom - top) / (size / 4))]
    found, geometry = [], []
    for i in range(edge):
        for j in range(edge):
            far = ((j - column) / spread[0]) ** 2 + ((i - row) / spread[1]) ** 2
            found.append([math.exp(-far / 2) * (kind == label) for kind in range(ways)])
            geometry.append([*logs, x - j - 0.5, y - i - 0.5])
    found, geometry = (torch.tensor(part).reshape(edge, edge, -1) for part in (found, geometry))
    return found, geometry


def targets(pictures, size, stride, ways):
    """Heat and geometry of pictures, each a list of (class, box): ``[pictures, locations, ...]``."""
    heats, geometries = [], []
    for boxes in pictures:
        both = [heat(box, size, stride, label, ways) for label, box in boxes]
        tops = torch.stack([one.amax(-1) for one, _ in both])
        owner = tops.argmax(0)
        heats.append(torch.stack([one for one, _ in both]).amax(0).flatten(0, 1))
        own = torch.stack([geometry for _, geometry in both])
        geometries.append(own.gather(0, owner[None, ..., None].expand(1, *own.shape[1:]))[0].flatten(0, 1))
    return torch.stack(heats), torch.stack(geometries)


def loss(output, heat, geometry, ways):
    """Focal loss per object, and smooth L1 loss weighed by heat."""
    p = output[..., : ways + 1].softmax(-1)[..., :ways]
    centre = heat == 1
    focal = torch.where(centre, -((1 - p) ** 2) * p.log(), -((1 - heat) ** 4) * p**2 * (1 - p).log()).sum()
    weight = heat.amax(-1)
    weight = torch.where(weight < 0.1, 0.0, weight)
    errors = F.smooth_l1_loss(output[..., ways + 1 :], geometry, beta=0.25, reduction="none").sum(-1)
    return focal / centre.sum() + (errors * weight).sum() / weight.sum()


def forward(w, x):
    """The residual network with its pyramid: ``[pictures, locations, outputs]``."""

    def normed(z, name):
        groups = {6: 1, 4: 2, 8: 4}[z.shape[1]]
        return F.group_norm(z, groups, w[f"{name}.weight"], w[f"{name}.bias"])

    z, maps = F.relu(normed(F.conv2d(x, w["trunk.stem.0.weight"], stride=2, padding=1), "trunk.stem.1")), []
    stages = sorted({name.split(".")[2] for name in w if name.startswith("trunk.stages.")})
    for i in stages:
        at = f"trunk.stages.{i}"
        inside = F.relu(normed(F.conv2d(z, w[f"{at}.layers.0.weight"], stride=2, padding=1), f"{at}.layers.1"))
        inside = normed(F.conv2d(inside, w[f"{at}.layers.3.weight"], padding=1), f"{at}.layers.4")
        z = F.relu(inside + F.conv2d(z, w[f"{at}.shortcut.weight"], w[f"{at}.shortcut.bias"], stride=2))
        maps.append(z)
    joined = None
    for i in reversed(stages):
        side = F.conv2d(maps[int(i)], w[f"trunk.lateral.{i}.weight"], w[f"trunk.lateral.{i}.bias"])
        joined = side if joined is None else side + joined.repeat_interleave(2, 2).repeat_interleave(2, 3)
    z, side = (
        F.relu(normed(F.conv2d(joined, w[f"trunk.{name}.0.weight"], padding=1), f"trunk.{name}.1"))
        for name in ("smooth", "geometry")
    )
    geometry = F.conv2d(side, w["trunk.box.weight"], w["trunk.box.bias"])
    z, geometry = (part.flatten(2).transpose(1, 2) for part in (z, geometry))
    return torch.cat([F.linear(z, w["head.weight"], w["head.bias"]), geometry], -1)
