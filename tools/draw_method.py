"""Draw docs/method.svg, the picture of the method in the README.

    python -m tools.draw_method
"""
from pathlib import Path

OUTPUT = Path(__file__).parents[1] / "docs" / "method.svg"
INK, GREY, RED, BLUE, PALE = "#24292f", "#6e7781", "#cf222e", "#2f6db5", "#f6f8fa"


def text(x, y, words, size=15, colour=INK, anchor="middle", weight="normal"):
    return (f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{words}</text>')


def box(x, y, width, height, colour, *lines):
    """A rounded box around the lines of text."""
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" '
             f'fill="{colour}" fill-opacity="0.12" stroke="{colour}" stroke-width="2"/>']
    first = y + height / 2 + 5 - 10 * (len(lines) - 1)
    for i, line in enumerate(lines):
        parts.append(text(x + width / 2, first + 20 * i, line, colour=colour if i == 0 else INK))
    return "\n".join(parts)


def arrow(colour, *points):
    """A line through the points. A red one is a gradient: it is dashed."""
    path = " ".join(f"{x},{y}" for x, y in points)
    dashes = ' stroke-dasharray="6 4"' if colour == RED else ""
    marker = "back" if colour == RED else "forward"
    return (f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes} '
            f'marker-end="url(#{marker})"/>')


def head(name, colour):
    """The tip of an arrow."""
    return (f'<marker id="{name}" markerWidth="9" markerHeight="8" refX="7" refY="4" orient="auto" '
            f'markerUnits="userSpaceOnUse"><path d="M0,0 L9,4 L0,8 z" fill="{colour}"/></marker>')


def panel(x, y, width, height, title):
    return (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{PALE}" '
            f'stroke="#d0d7de"/>\n' + text(x + 18, y + 30, title, 17, anchor="start", weight="bold"))


def reward_phase():
    """k steps without gradient, one with, PAVRM on the result, and the gradient back through both."""
    y = 142  # the row of solver steps
    parts = [panel(16, 16, 660, 294, "Reward phase: one step of a rollout is judged")]

    # The rollout.
    parts += [text(60, y + 5, "noise"), arrow(INK, (86, y), (109, y))]
    for x, words in [(112, "step 0"), (202, "step 1"), (312, "step k-1")]:
        parts.append(box(x, y - 26, 74, 52, GREY, words))
    parts += [arrow(INK, (186, y), (199, y)), arrow(INK, (276, y), (287, y)), text(299, y + 4, "..."),
              arrow(INK, (386, y), (407, y)),
              text(249, y - 42, "k solver steps without gradient", colour="#57606a")]

    # The step that learns, and its judge.
    parts += [box(410, y - 26, 74, 52, RED, "step k"), text(447, y - 42, "with gradient", colour=RED),
              arrow(INK, (484, y), (549, y)), text(515, y - 9, "noisy", 13), text(515, y + 18, "latent", 13),
              box(552, y - 34, 108, 68, BLUE, "PAVRM", "frozen"),
              arrow(INK, (590, y + 34), (590, y + 99)), text(582, y + 86, "reward", 13, anchor="end"),
              box(460, y + 102, 200, 44, INK, "loss = 0.1 · (2 - reward)")]

    # The way back: from the loss through PAVRM and step k, and no further.
    parts += [arrow(RED, (632, y + 102), (632, y + 38)),
              arrow(RED, (566, y + 34), (566, y + 56), (447, y + 56), (447, y + 30)),
              text(506, y + 50, "gradient", 13, RED)]
    for i, line in enumerate(["The gradient ends at step k.", "Each micro-step draws a new k.",
                              "Nothing is decoded to pixels."]):
        parts.append(text(112, y + 94 + 22 * i, line, 14, anchor="start"))
    return parts


def sft_phase():
    """The flow-matching loss on a real clip."""
    x = 828  # the middle of the panel
    return [panel(692, 16, 276, 294, "SFT phase: real clips"),
            text(x, 78, "a real clip, noised"), arrow(INK, (x, 86), (x, 109)),
            box(x - 66, 112, 132, 60, RED, "generator", "one forward"),
            arrow(INK, (x, 172), (x, 241)), text(x - 10, 211, "velocity v", 13, anchor="end"),
            box(x - 118, 244, 236, 44, INK, "loss = |v - (noise - clip)|²"),
            arrow(RED, (x + 42, 244), (x + 42, 176)), text(x + 52, 214, "gradient", 13, RED, "start")]


def main():
    width, height = 984, 326
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
             f'height="{height}" font-family="Helvetica, Arial, sans-serif">',
             f'<defs>{head("forward", INK)}{head("back", RED)}</defs>',
             f'<rect width="{width}" height="{height}" rx="14" fill="#ffffff"/>',
             *reward_phase(), *sft_phase(), "</svg>"]
    OUTPUT.write_text("\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
