"""Digits as strokes of a pen, the way people write them: what the tests of the page draw."""

Point = tuple[float, float]  # right and down, 0 to 1

DIGITS: dict[str, list[list[Point]]] = {
    "0": [[(.52, .1), (.34, .16), (.25, .36), (.24, .6), (.33, .82), (.5, .9), (.67, .82), (.76, .6), (.75, .36),
           (.67, .17), (.52, .1)]],
    "1": [[(.36, .3), (.5, .12), (.5, .88)]],
    "2": [[(.28, .3), (.34, .15), (.5, .1), (.66, .17), (.69, .34), (.58, .54), (.42, .7), (.27, .88), (.5, .86),
           (.74, .87)]],
    "3": [[(.3, .16), (.48, .1), (.66, .18), (.66, .34), (.46, .46), (.66, .56), (.7, .74), (.54, .88), (.3, .84)]],
    "4": [[(.52, .1), (.38, .34), (.26, .58), (.5, .58), (.76, .56)], [(.6, .36), (.56, .6), (.54, .9)]],
    "5": [[(.68, .12), (.38, .12), (.34, .44), (.54, .4), (.7, .54), (.68, .74), (.52, .88), (.3, .84)]],
    "6": [[(.62, .1), (.44, .24), (.32, .48), (.3, .72), (.44, .88), (.62, .84), (.7, .68), (.58, .54), (.42, .58),
           (.32, .7)]],
    "7": [[(.28, .14), (.72, .13), (.58, .4), (.48, .64), (.42, .9)], [(.36, .5), (.66, .48)]],
    "8": [[(.66, .22), (.52, .1), (.36, .18), (.38, .34), (.6, .56), (.66, .76), (.5, .9), (.34, .78), (.4, .58),
           (.62, .36), (.66, .22)]],
    "9": [[(.66, .28), (.52, .12), (.36, .2), (.34, .4), (.5, .5), (.64, .4), (.68, .26), (.66, .56), (.6, .76),
           (.46, .9)]],
}


def smooth(stroke: list[Point], between: int = 2) -> list[Point]:
    """A stroke with so many more points on a curve between every two (Catmull and Rom's)."""
    ends = [stroke[0], *stroke, stroke[-1]]
    curve = [stroke[0]]
    for before, start, end, after in zip(ends, ends[1:], ends[2:], ends[3:], strict=False):
        for t in ((step + 1) / (between + 1) for step in range(between + 1)):
            weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            curve.append((sum(w * p[0] for w, p in zip(weights, (before, start, end, after), strict=True)) / 2,
                          sum(w * p[1] for w, p in zip(weights, (before, start, end, after), strict=True)) / 2))
    return curve
