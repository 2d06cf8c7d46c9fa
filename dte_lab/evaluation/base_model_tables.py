"""The measures of the base model as the Markdown tables of its model card."""

from dte_lab.common.stats import percent

DRAWN_MEASURES = {  # of generated pictures
    "scene": "scene", "style": "style",
    "concept_top1": "concept, top-1", "concept_top5": "concept, top-5",
}  # fmt: skip


def seeds_table(by_seed: list[dict]) -> str:
    """The generated pictures' measures of several seeds beside each other, for the model card."""
    n = by_seed[0]["generated_seen"]["scene"]["n"]
    seeds = [f"seed {i}" for i in range(len(by_seed))]
    heads = [f"Generated, n = {n} each", f"{seeds[0]} (shipped)", *seeds[1:]]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for key in ("seen", "novel"):
        for measure, name in DRAWN_MEASURES.items():
            cells = [percent(results[f"generated_{key}"][measure]) for results in by_seed]
            rows.append(f"| {name}, {key} combinations | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def measures_table(results: dict) -> str:
    """The measures as the Markdown table of the model card."""
    rows = ["| Measure | Value | 95 % interval | n |", "|---|---|---|---|"]

    def share(name: str, value: dict) -> str:
        low, high = 100 * value["low"], 100 * value["high"]
        return f"| {name} | {100 * value['mean']:.1f} % | {low:.1f} to {high:.1f} | {value['n']} |"

    psnr_db = results["autoencoder_psnr_val_db"]
    rows.append(f"| autoencoder, PSNR on val | {psnr_db['mean']:.1f} dB | | {psnr_db['n']} |")
    for key, name in (
        ("clip_concept_top1", "CLIP, concept among all train concepts, top-1"),
        ("clip_concept_top5", "CLIP, the same, top-5"),
        ("clip_style", "CLIP, style"),
        ("clip_scene", "CLIP, scene"),
        ("clip_group_of_val_concepts", "CLIP, group of an unseen concept by its nearest name"),
        ("outside_group_of_val_concepts", "the outside classifier, the same"),
    ):
        rows.append(share(name, results[key]))
    kinds = {
        "generated": "generated pictures",
        "autoencoder": "the autoencoder's reconstructions",
        "true": "true renderings",
    }
    for key in ("seen", "novel"):
        for measure, name in DRAWN_MEASURES.items():
            for kind, text in kinds.items():
                value = results[f"{kind}_{key}"][measure]
                rows.append(share(f"{text}, {key} combinations: {name}", value))
    distance = results["kernel_distance"]
    for kind, name in kinds.items():
        text = f"kernel distance of {name} to other true renderings (1,000 times)"
        rows.append(f"| {text} | {1000 * distance[kind]:.1f} | | {distance['n']} |")
    for key, name in (("nearest", "nouns to their nearest token"), ("random", "random pairs")):
        value = results["words"][key]
        low, high = f"{value['low']:.2f}", f"{value['high']:.2f}"
        text = f"similarity in meaning, {name}"
        rows.append(f"| {text} | {value['mean']:.2f} | {low} to {high} | {value['n']} |")
    rows.append(f"| four pictures, 25 steps | {results['seconds_for_four_pictures']:.1f} s | | 1 |")
    return "\n".join(rows)


def curve_table(points: list[dict]) -> str:
    """The curve as the Markdown table of the model card."""
    rows = [
        "| Steps of 512 | Samples | Concept, top-1 | Concept, top-5 | Style | Scene | Told error |",
        "|---" * 7 + "|",
    ]
    for point in points:
        cells = [f"{point['steps']:,}", f"{point['samples'] / 1e6:.2f} M"]
        cells += [percent(point[m]) for m in ("concept_top1", "concept_top5", "style", "scene")]
        rows.append("| " + " | ".join([*cells, f"{point['told_error']['mean']:.3f}"]) + " |")
    return "\n".join(rows)
