"""Names of the wide world's drawings, and which things no training may see.

An icon is held out when its name holds the name of a `val` or `test` thing, in any order of the
words, in singular or plural, written together or apart; or when it is, as a whole, another name of
that thing: emoji sets call the same code point by many names, and squash them into one word. The
words that the small world knows a thing by ("burger" of "hamburger") count as such, too.
"""

import unicodedata

from dte_lab.world.build import is_clock, plain_name
from dte_lab.world.sprites import concepts, split_names

NUMBER_WORDS = set("one two three four five six seven eight nine ten".split())
ICON_ENDINGS = {"flat", "duo", "light"}  # of a drawing, at the end of an icon's name
PERSONAL = {1, 2, 9}  # groups of emojibase: people and their hands, skin tones, flags
OLD_NAMES = {  # of Firefox OS Emoji, which keep to no list
    "americas globe": "globe showing americas",
    "asia australia globe": "globe showing asia australia",
    "banknote euro": "euro banknote",
    "chili pepper": "hot pepper",
    "closed mailbox lowered": "closed mailbox with lowered flag",
    "front facing chick": "front facing baby chick",
    "waning bibbous moon": "waning gibbous moon",
    "bactrian camel": "two hump camel",
}


def singular(word: str) -> str:
    """'cherries' -> 'cherry', 'boxes' -> 'box', 'socks' -> 'sock', 'glass' -> 'glass'."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def words_of(name: str) -> list[str]:
    return [singular(word) for word in plain_name(name).split()]


def squashed(name: str) -> str:
    """'Paw Prints' and 'pawprint' -> 'pawprint': one word, the last letter's plural dropped."""
    return singular("".join(plain_name(name).split()))


def icon_name(icon: str) -> str:
    """'donut-flat', 'donut-2' -> 'donut': an icon's name in plain words, its variant left out."""
    words = [word for word in icon.split("-") if not word.isdigit()]
    while len(words) > 1 and words[-1] in NUMBER_WORDS | ICON_ENDINGS:
        words.pop()
    return plain_name(" ".join(words)) or plain_name(icon)


class HeldOut:
    """Looks names up among those of things that stay out of training.

    aliases: {another name of the thing, squashed: name in the small world}.
    """

    def __init__(self, aliases: dict[str, str]) -> None:
        self.aliases = aliases
        self.names = [n for split in ("val", "test") for n in split_names(split)]
        self.words = {name: words_of(name) for name in self.names}
        self.squashed = {"".join(words): name for name, words in self.words.items()}
        self.squashed |= {squashed(name): name for name in self.names}
        seen = {squashed(n) for n, c in concepts().items() if c.split in ("train", "extra")}
        tags = [(squashed(tag), name) for name in self.names for tag in concepts()[name].tags]
        self.tags = {tag: name for tag, name in tags if tag not in seen}

    def thing(self, name: str) -> str | None:
        """The held-out thing that is meant by a name as a whole, or None."""
        alias = squashed(name)
        return self.squashed.get(alias) or self.aliases.get(alias)

    def inside(self, name: str) -> str | None:
        """The held-out thing whose name is a part of `name`, whatever the order, or None."""
        words = words_of(name)
        if found := self.thing(name) or self.tags.get(squashed(name)):
            return found
        for thing, parts in self.words.items():
            if set(parts) <= set(words):
                return thing
        runs = ("".join(words[i:j]) for j in range(len(words) + 1) for i in range(j))
        return next((self.squashed[run] for run in runs if run in self.squashed), None)


class Emoji:
    """The list of all emoji, by every name that some emoji set uses.

    entries: `en/data.json` of emojibase-data. shortcodes: its files of shortcodes.
    """

    def __init__(self, entries: list[dict], shortcodes: list[dict]) -> None:
        self.of = {}  # squashed name -> entry; the labels come first
        for entry in entries:
            self.of.setdefault(squashed(entry["label"]), entry)
        for entry in entries:
            for alias in self.names(entry, shortcodes):
                self.of.setdefault(squashed(alias), entry)
        self.entries, self.shortcodes = entries, shortcodes

    @staticmethod
    def names(entry: dict, shortcodes: list[dict]) -> set[str]:
        """Label, shortcodes and Unicode's own name of an emoji."""
        codes = entry["hexcode"].split("-")
        short = [codes.get(entry["hexcode"], []) for codes in shortcodes]
        short = [[s] if isinstance(s, str) else s for s in short]
        own = [unicodedata.name(chr(int(codes[0], 16)), "")] if len(codes) == 1 else []
        return {plain_name(x.replace("_", " ")) for x in [entry["label"], *sum(short, []), *own]}

    def aliases(self) -> dict[str, str]:
        """For `HeldOut`: all other names of the things of val and test.

        Names that are also those of a thing that may be seen are left out ("cat" of "cat face").
        """
        seen = {squashed(n) for n, c in concepts().items() if c.split in ("train", "extra")}
        found = {squashed(alias): name for alias, name in OLD_NAMES.items()}
        for name in split_names("val") + split_names("test"):
            for alias in self.names(self.of[squashed(name)], self.shortcodes):
                found.setdefault(squashed(alias), name)
        return {alias: name for alias, name in sorted(found.items()) if alias not in seen}

    def find(self, icon: str) -> dict | None:
        return self.of.get(squashed(icon))

    def is_personal(self, icon: str, category: str) -> bool:
        """People, flags, skin tones: by emojibase, or by the set's category if it is not there."""
        if entry := self.find(icon):
            return entry.get("group", 2) in PERSONAL or is_clock(plain_name(entry["label"]))
        return category in ("People & Body", "People", "Flags", "Modifiers") or is_clock(icon)
