"""Answers to the exercises of 07_your_own_encoder."""

from dte_lab.training import drawings


def hours(steps, batch_size, tflop, speed):
    return steps * batch_size * tflop / speed / 3600


def pair(image, target, asked):
    """An answer that takes the scenes by their numbers, 0 or 1."""

    def answer(draw, say, *scenes):
        image_scene, target_scene = scenes[image], scenes[target]
        prompt = say(None if asked is None else scenes[asked])
        return {"image": draw(image_scene), "target": draw(target_scene), "prompt": prompt}

    return answer


OWN = {
    "guess_breadth": lambda: 0.9,
    "training_pair": drawings.training_pair,
    "why_jumpy": lambda: "ab",
    "training_hours": hours,
}
OTHER_RIGHT = {
    "guess_breadth": lambda: 1,
    "training_pair": pair(0, 1, 1),
    "why_jumpy": lambda: {"b", "a"},
    "training_hours": lambda steps, batch, tflop, speed: steps / 60 * (batch * tflop / speed / 60),
}
WRONG = {  # check: [(what the message must say, the wrong function)]
    "guess_breadth": [
        ("one number", lambda: None),
        ("one number", lambda: "less"),
        ("one number", lambda: float("nan")),
        ("negative", lambda: -0.1),
        ("not per cent", lambda: 80),
    ],
    "training_pair": [
        ("as it was: what", pair(0, 0, 0)),
        ("scene of the input, and", pair(0, 1, 0)),
        ("target does not show it", pair(0, 0, 1)),
        ("but to copy", pair(1, 1, 1)),
        ("changed places", pair(1, 0, 1)),
        ("or S. has to", pair(0, 1, None)),
        ("not right yet", pair(1, 0, 0)),
        ("a dictionary", lambda draw, say, first, second: (draw(first), draw(second))),
    ],
    "why_jumpy": [
        ("c does not hold", lambda: "abc"),
        ("d does not hold", lambda: ["a", "d"]),
        ("one more does. Think of this: Each step draws", lambda: "a"),
        ("one more does. Think of this: Each step sees", lambda: "b"),
        ("Return letters", lambda: ""),
        ("Return letters", lambda: "noise"),
        ("Return letters", lambda: None),
    ],
    "training_hours": [
        ("seconds", lambda s, b, t, v: s * b * t / v),
        ("minutes", lambda s, b, t, v: s * b * t / v / 60),
        ("batch_size pictures", lambda s, b, t, v: s * t / v / 3600),
        ("divide it by the speed", lambda s, b, t, v: s * b * t),
        ("not multiplied", lambda s, b, t, v: s * b * t * v / 3600),
        ("a number of hours", lambda s, b, t, v: None),
        ("7,200,000 TFLOP", lambda s, b, t, v: 3),
    ],
}
