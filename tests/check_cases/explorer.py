"""Answers to the exercises of 06_ablation_explorer."""

from dte_lab.panels.explorer_expeditions import temperature_pair


def pair(a, b, swapped=False):
    """An answer that changes these switches of `usual` in A, and those in B."""

    def answer(usual):
        sides = usual | {"temperature": 0.03} | a, usual | {"temperature": 1.0} | b
        return sides[::-1] if swapped else sides

    return answer


def into(usual):
    """An answer that writes into what it was given."""
    usual["temperature"] = 0.03
    return usual, dict(usual, temperature=1.0)


OWN = {"guess_stop": lambda: 3, "fair_pair": temperature_pair, "what_follows": lambda: "ac"}
OTHER_RIGHT = {
    "guess_stop": lambda: 1,
    "fair_pair": pair({"steps": 25}, {"steps": 25}),
    "what_follows": lambda: ["c", "a"],
}
WRONG = {  # check: [(what the message must say, the wrong function)]
    "guess_stop": [
        ("number of a stop", lambda: 0),
        ("number of a stop", lambda: True),
        ("number of a stop", lambda: "the last"),
        ("number of a stop", lambda: None),
    ],
    "fair_pair": [
        ("and seed: which", pair({}, {"seed": 1})),
        ("and regulariser: which", pair({"regulariser": "none"}, {})),
        ("More than the temperature", pair({"regulariser": "none"}, {"seed": 1})),
        ("does not read", pair({"regulariser": "none"}, {"regulariser": "none"})),
        ("does not read", pair({"regulariser": "l2"}, {"regulariser": "l2"})),
        ("nothing is tuned", pair({"steps": 0}, {"steps": 0})),
        ("weight of 0", pair({"contrastive_weight": 0.0}, {"contrastive_weight": 0.0})),
        ("0.03 and B 1", pair({}, {}, swapped=True)),
        ("temperatures to compare", pair({"temperature": 1.0}, {})),
        ("Return two settings", lambda usual: usual),
        ("all switches", lambda usual: ({"temperature": 0.03}, {"temperature": 1.0})),
        ("makes a new dictionary", into),
        ("stopped with KeyError", lambda usual: usual["weight"]),
    ],
    "what_follows": [
        ("b does not hold", lambda: "abc"),
        ("d does not hold", lambda: {"a", "c", "d"}),
        ("one more does. Think of this: All else", lambda: "a"),
        ("one more does. Think of this: These seeds", lambda: "c"),
        ("Return letters", lambda: ""),
        ("Return letters", lambda: None),
    ],
}
