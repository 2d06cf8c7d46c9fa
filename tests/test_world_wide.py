"""The wide world: what is held out, what is drawn, and that a build is what the list says."""

import http.client
import io
import json
import tarfile
import urllib.error

import numpy as np
import pytest
import torch

from dte_lab.common.errors import DTEError
from dte_lab.world import wide
from dte_lab.world.sprites import split_names
from dte_lab.world.wide_names import Emoji, HeldOut, icon_name, singular, squashed

pytest.importorskip("resvg_py")

SQUARE = '<path fill="#ff0000" d="M0 0h8v16H0z"/>'
PLAIN = '<path fill="currentColor" d="M2 2h12v12H2z"/>'
SMALL = (
    wide.Source("fluent-emoji-flat", "fluent flat", is_emoji=True),
    wide.Source("fxemoji", "fxemoji", is_emoji=True),
    wide.Source("game-icons", "game"),
)


def tarball(path, files: dict) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def entry(label, code, group=4):
    return {"label": label, "hexcode": code, "group": group}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Three tiny packages and emojibase, as if they had been fetched; the versions of all."""
    monkeypatch.setattr(wide, "SOURCES", SMALL)
    held = split_names("val") + split_names("test")
    labels = [*held, "red apple", "boy"]
    codes = {n: f"{0xE000 + i:X}" for i, n in enumerate(labels)}
    entries = [entry(n, c, 1 if n == "boy" else 4) for n, c in codes.items()]
    shortcodes = {codes["strawberry"]: "garden_berry"}
    folder = tmp_path / "npm"
    folder.mkdir()
    tarball(
        folder / "emojibase-data-17.0.0.tgz",
        {"en/data.json": entries}
        | {f"en/shortcodes/{name}.json": shortcodes for name in wide.SHORTCODES},
    )
    shifted = {
        "red-apple": SQUARE, "boy": SQUARE.replace("h8", "h9"), "gardenberry": SQUARE,
        "strawberry": SQUARE, "pear": SQUARE.replace("h8", "h7"), "hollow": "<g/>",
    }  # fmt: skip
    plain = ("kangaroo", "strawberry-2", "jam-of-strawberries", "metro-bus", "paint-brush")
    icons = {
        "fluent-emoji-flat": shifted,
        "fxemoji": {"gardenberry": SQUARE, "redapple": SQUARE},
        "game-icons": {
            name: PLAIN.replace("h12", f"h{i + 5}") for i, name in enumerate(plain)
        } | {"lama": SQUARE, "twin": SQUARE},
    }  # fmt: skip
    for source in SMALL:
        about = {
            "icons.json": {"icons": {k: {"body": b} for k, b in icons[source.package].items()}},
            "info.json": {"license": {"spdx": "MIT"}, "author": {"name": "me"}},
        }
        tarball(folder / f"iconify-json-{source.package}-1.0.0.tgz", about)
    return {s.package: "1.0.0" for s in SMALL} | {wide.EMOJIBASE: "17.0.0"}


def test_names_in_plain_words():
    assert icon_name("donut-flat") == icon_name("donut-2") == icon_name("donut-two") == "donut"
    assert icon_name("360-view") == "view" and icon_name("4k") == "k"
    assert [singular(w) for w in ("cherries", "boxes", "socks", "glass", "bus")] == [
        "cherry", "box", "sock", "glass", "bus",
    ]  # fmt: skip
    assert squashed("Paw Prints") == squashed("pawprint")


@pytest.mark.parametrize(
    "name",
    ["strawberry", "strawberries", "jam of strawberry", "paint-brush", "paintbrushes",
     "bolt-and-nut", "print-paw", "pawprints", "disco ball", "burger", "sportsmedal"],
)  # fmt: skip
def test_held_out_under_other_names(name):
    assert HeldOut({"discoball": "mirror ball"}).inside(name)


@pytest.mark.parametrize("name", ["straw", "berries and straw hat", "busy", "keyboard", "kangaroo"])
def test_other_names_are_not_held_out(name):
    assert HeldOut({}).inside(name) is None


def test_every_name_of_val_and_test_is_held_out_and_no_train_name_as_a_whole():
    held_out = HeldOut({})
    for split in ("val", "test"):
        assert all(held_out.thing(name) == name for name in split_names(split))
    hit = [n for n in split_names("train") + split_names("extra") if held_out.thing(n)]
    assert hit == ["houses", "musical notes"]  # plurals: their wide drawings stay out, too


def test_an_alias_that_names_a_thing_to_train_on_is_dropped():
    entries = [entry(n, "1F600") for n in split_names("val") + split_names("test")]
    aliases = Emoji(entries, [{"1F600": ["cat", "grinning"]}]).aliases()
    assert "grinning" in aliases and "cat" not in aliases  # 'cat' is a train concept


def test_choice_and_build(tmp_path, packages):
    listed = wide.make_list(packages, tmp_path / "npm")
    fluent, unseen, game = (listed["packages"][s.package] for s in SMALL)
    assert [i[1] for i in fluent["icons"]] == ["pear", "red-apple"]
    assert fluent["left_out"] | {"hidden": 0, "style": 0} == fluent["left_out"]
    assert fluent["left_out"]["person"] == 1 and fluent["left_out"]["held out"] == 2, fluent
    assert fluent["left_out"]["blank"] == 1
    assert [i[:3] for i in unseen["icons"]] == [["held_out", "gardenberry", "strawberry"]]
    assert unseen["left_out"]["style"] == 1
    assert [i[1] for i in game["icons"]] == ["kangaroo", "lama"] and game["left_out"]["twice"] == 1
    assert game["left_out"]["held out"] == 4

    built = wide.main(tmp_path, SMALL, listed)
    assert [d.name for d in built.drawings] == ["pear", "red apple", "kangaroo", "lama"]
    assert [d.colour is None for d in built.drawings] == [True, True, False, True]
    assert [d.name for d in built.held_out] == ["strawberry"]
    assert built.rgba.dtype == torch.uint8 and built.rgba.shape == (4, 48, 48, 4)
    pear = built.rgba[0].numpy()
    assert np.array_equal(pear[10, 5], [255, 0, 0, 255]) and not pear[:, 30:].any()
    again = wide.load(tmp_path)
    assert torch.equal(again.rgba, built.rgba) and again.drawings == built.drawings


def test_another_archive_or_half_a_build_is_refused(tmp_path, packages):
    listed = wide.make_list(packages, tmp_path / "npm")
    wide.main(tmp_path, SMALL, listed)
    (tmp_path / "wide.json").write_text('{"drawings": [], "held_out": []}')
    with pytest.raises(ValueError, match="two builds"):
        wide.load(tmp_path)
    archive = tmp_path / "npm" / "iconify-json-game-icons-1.0.0.tgz"
    tarball(archive, {"icons.json": {"icons": {}}})
    with pytest.raises(ValueError, match="checksum"):
        wide.main(tmp_path, SMALL, listed)


def test_the_committed_list_holds_nothing_that_is_held_out():
    listed = json.loads(wide.LIST.read_text())
    held_out = HeldOut(listed["aliases"])
    assert set(listed["packages"]) == {s.package for s in wide.SOURCES}
    total = 0
    for source in wide.SOURCES:
        package = listed["packages"][source.package]
        kept = [i for i in package["icons"] if i[0] == "drawings"]
        assert package["integrity"].startswith("sha512-") and package["licence"]
        assert not [i for i in kept if held_out.inside(i[1]) or held_out.inside(i[2])]
        assert len({i[3] for i in kept}) == len(kept)
        total += len(kept)
        if source.style == wide.UNSEEN_STYLE:
            assert not kept
            held = set(split_names("val") + split_names("test"))
            assert {i[2] for i in package["icons"]} <= held
    assert total > 14_000 and "openmoji" not in json.dumps([vars(s) for s in wide.SOURCES])


@pytest.mark.parametrize("name", ["wide.json", "wide.safetensors"])
@pytest.mark.parametrize("data", [b"", b"\xff\xfe{", bytes(range(99)), None])
def test_a_damaged_cache_is_one_sentence(name, data, wide_cache, tmp_path):
    for path in wide_cache.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-9] if data is None else data)
    with pytest.raises(DTEError, match="build it anew"):
        wide.load(tmp_path)


class CutOff(io.BytesIO):
    def read(self, *_):
        raise http.client.IncompleteRead(b"half", 9)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (urllib.error.URLError(OSError(-3, "Name or service not known")), "Name or service not"),
        (urllib.error.HTTPError("", 404, "Not Found", None, None), "(Not Found)"),
        (TimeoutError("timed out"), "(timed out)"),
        (CutOff(), "IncompleteRead"),
    ],
)
def test_an_archive_that_cannot_be_fetched_is_one_sentence(answer, said, tmp_path, monkeypatch):
    def opened(address, timeout):
        assert timeout > 0
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(wide.urllib.request, "urlopen", opened)
    with pytest.raises(DTEError) as error:
        wide.fetch_package("@iconify-json/noto-v1", "1.2.3", None, tmp_path)
    (line,) = str(error.value).splitlines()
    assert line.startswith("https://registry.npmjs.org/@iconify-json/noto-v1/-/noto-v1-1.2.3.tgz ")
    assert said in line and str(tmp_path / "iconify-json-noto-v1-1.2.3.tgz") in line
    assert not list(tmp_path.iterdir())
