"""Results of eval.py as tables for the terminal."""

import math


def retrieval_table(name: str, result: dict) -> str:
    """Recalls in percent, both ways, beside chance."""
    ways = {"contrast": result["contrast"]}
    if result["matching"]:
        weight = f", weight {result['weight']:g}" if "weight" in result else ""
        ways[f"re-ranked, k={result['k']}{weight}"] = result["matching"]
    ways["chance"] = result["chance"]
    for value, part in result["apart"].items():
        ways |= {f"{value}: {way}": recall for way, recall in part.items()}
    lines = [f"{name}: {result['images']} pictures, {result['texts']} captions; R@1 / R@5 / R@10 in %"]
    lines.append(f"  {'':28}{'image to text':>24}{'text to image':>24}{'mean':>8}")
    for way, recall in ways.items():
        six = [value for side in ("image_to_text", "text_to_image") for value in recall[side].values()]
        cells = (
            "".join(f"{value:6.1f}" for value in recall[side].values()) for side in ("image_to_text", "text_to_image")
        )
        lines.append(f"  {way:28}" + "".join(f"{cell:>24}" for cell in cells) + f"{sum(six) / 6:8.1f}")
    if result.get("separation"):
        areas = ", ".join(f"{area:.3f} against {kind} captions" for kind, area in result["separation"].items())
        lines.append(f"  matching logit, area under the curve (chance 0.5): {areas}")
    return "\n".join(lines)


def foil_table(name: str, result: dict) -> str:
    """Accuracy in percent per kind, by contrast and by matching, beside chance."""
    lines = [f"{name}: caption above foil in %, chance 50.0"]
    lines.append(f"  {'':28}" + "".join(f"{kind:>10}" for kind in result["n"]))
    for title, part in {"": result, **result["apart"]}.items():
        for way in ("contrast", "matching"):
            if part[way]:
                label = f"{title}: {way}" if title else way
                lines.append(
                    f"  {label:28}" + "".join(f"{part[way].get(kind, math.nan):10.1f}" for kind in result["n"])
                )
    lines.append(f"  {'rows':28}" + "".join(f"{n:10d}" for n in result["n"].values()))
    return "\n".join(lines)


def line_of(name: str, one: dict) -> str:
    """One estimate: value, interval, chance, rows."""
    return (
        f"  {name:28}{one['value']:6.1f} %   95 % interval {one['low']:5.1f} to {one['high']:5.1f}   "
        f"chance {one['chance']:5.1f}   n {one['n']}"
    )


def result_table(name: str, result: dict) -> str:
    """Every estimate of a task's result, one a line; then the confusion table of entailment."""
    lines = [name]
    for key, value in result.items():
        if isinstance(value, dict) and "value" in value:
            lines.append(line_of(key, value))
        elif key == "types":
            lines += [line_of(f"  {kind}", one) for kind, one in value.items()]
        elif key == "confusion":
            lines.append(f"  {'label, and the answers to it':28}" + "".join(f"{answer:>15}" for answer in value))
            lines += [f"    {label:26}" + "".join(f"{n:15d}" for n in row.values()) for label, row in value.items()]
        elif key == "map":
            lines.append(f"  by {value}")
        elif isinstance(value, float):
            lines.append(f"  {key:28}{value:6.1f} %")
    return "\n".join(lines)
