"""Pictures that are streamed, cropped and cut out of boxes."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from dte_lab.training import cache
from dte_lab.training.batches import batches_of
from dte_lab.training.cache import CachedPictures, fill_cache
from dte_lab.training.config import PretrainConfig
from dte_lab.training.pictures import (
    ClassPictures,
    Example,
    ExampleList,
    cut_out,
    example_of_row,
    load_pictures,
)
from dte_lab.training.step import Processes
from dte_lab.training.streams import StreamedPictures, is_webdataset

BAD = 5  # the number of the picture in the tars that is none


def grey(value, size=(20, 20)):
    return Image.new("RGB", size, (value, value, value))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Two tars of six pictures in ten greys a piece of the number, class number // 4."""
    folder = tmp_path_factory.mktemp("tars")
    for t in range(2):
        with tarfile.open(folder / f"{t}.tar", "w") as tar:
            for n in range(6 * t, 6 * t + 6):
                data = b"no picture" if n == BAD else png(grey(10 * n))
                for name, content in ((f"{n:03d}.png", data), (f"{n:03d}.cls", b"%d" % (n // 4))):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def number(item):
    """Which of the pictures of `tars` it shows."""
    return round((item["image"].mean().item() + 1) * 127.5 / 10)


def drawn(part, count):
    items = iter(part)
    return [next(items) for _ in range(count)]


def test_a_webdataset_is_shared_out_and_goes_on_where_it_was(tars):
    pytest.importorskip("datasets")
    assert is_webdataset(tars) and is_webdataset(tars / "0.tar") and not is_webdataset("a/name")
    pictures = StreamedPictures(tars, 16)
    shares = [drawn(pictures.part(Processes(rank, 2), 0), 12) for rank in (0, 1)]
    for epoch in (slice(6), slice(6, 12)):  # a share is a tar; older libraries change them round
        seen = [{number(item) for item in share[epoch]} for share in shares]
        assert sorted(seen, key=min) == [{0, 1, 2, 3, 4}, {6, 7, 8, 9, 10, 11}]
    for share in shares:
        first = [number(item) for item in share[:6]]
        assert first != [number(item) for item in share[6:]], "another order in each epoch"
        assert all(item["concept"] == number(item) // 4 for item in share)
        assert "target" not in share[0] and share[0]["prompt"] == "a picture of S*"
    skipped = [i for share in shares for i, item in enumerate(share) if item["skipped"]]
    assert len(skipped) == 2, "the bad one, in each of two epochs"
    whole = drawn(pictures.part(Processes(1, 2), 0), 12)
    for start in (3, 7, 11):  # wherever the bad one lies, one item stands for each row
        rest = drawn(pictures.part(Processes(1, 2), start), 12 - start)
        assert [x["skipped"] for x in rest] == [x["skipped"] for x in whole[start:]]
        assert all(
            torch.equal(a["image"], b["image"]) for a, b in zip(rest, whole[start:], strict=True)
        )

    config = PretrainConfig(batch_size=4, steps=3)
    one = batches_of(pictures, config, 1, torch.device("cpu"), Processes(1, 2))
    batch = next(iter(one))
    assert torch.equal(batch["image"], torch.stack([x["image"] for x in whole[2:4]]))


def test_a_cache_takes_whole_shards_of_a_stream(tars, tiny_backbone, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(cache, "SHARD", 4)
    monkeypatch.setattr(cache, "ENCODED_AT_ONCE", 2)
    pictures = StreamedPictures(tars, 16, crops=1)
    with pytest.raises(ValueError, match="say how many --pictures"):
        fill_cache(tmp_path, pictures, tiny_backbone, -1, Accelerator(cpu=True))
    pictures.pictures = 9
    assert fill_cache(tmp_path, pictures, tiny_backbone, -1, Accelerator(cpu=True))
    whole = [path.read_bytes() for path in sorted(tmp_path.glob("*.safetensors"))]
    cached, items = CachedPictures(tmp_path), drawn(pictures.part(Processes(), 0), 12)
    assert cached.concepts.tolist() == [item["concept"] for item in items] and len(whole) == 3
    latents = tiny_backbone.encode_images(torch.stack([items[7]["target"], items[7]["image"]]))
    torch.testing.assert_close(cached[7]["latents"], latents.half(), rtol=2e-3, atol=1e-5)

    settings = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(settings | {"whole": False}))
    (tmp_path / "000002.safetensors").unlink()
    assert fill_cache(tmp_path, pictures, tiny_backbone, -1, Accelerator(cpu=True))
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.safetensors"))] == whole


def test_without_the_library_one_sentence_says_what_to_install(tars, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        StreamedPictures(tars, 16)


def gradient():
    """64 x 48: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.arange(64) * 4, np.arange(48) * 5)
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_crops_are_squares_of_the_picture_and_the_target_is_another():
    pictures = ClassPictures(ExampleList([Example(gradient(), 3)]), 32, crops=200)
    assert len(pictures) == 200 and pictures.concepts == [3] * 200
    mirrored, sides, differ = [], [], 0
    for i in range(200):
        item, again = pictures[i], pictures[i]
        assert torch.equal(item["image"], again["image"])
        assert torch.equal(item["target"], again["target"]) and item["concept"] == 3
        differ += not torch.equal(item["image"], item["target"])
        red, green, _ = (item["image"] + 1) * 127.5
        slope = (red[:, -3] - red[:, 2]).mean().item() / 27  # of red for each of 32 columns
        down = (green[-3] - green[2]).mean().item() / 27
        mirrored.append(slope < 0)
        sides.append(abs(slope) / 4 * 32)
        assert abs(slope) / 4 == pytest.approx(down / 5, rel=0.05), "a square"
    assert differ == 200 and 70 < sum(mirrored) < 130
    assert min(sides) > 0.68 * 48 and max(sides) < 1.02 * 48 and max(sides) - min(sides) > 12


def test_boxes_are_cut_out_with_something_around_them():
    image = gradient()
    assert cut_out(image, (0.0, 0.0, 1.0, 1.0)) is image
    cut = cut_out(image, (0.25, 0.25, 0.5, 0.5))  # 16 x 12 around (24, 18)
    assert cut.size == (21, 21)
    red, green, _ = np.asarray(cut).mean(axis=(0, 1))
    assert red / 4 == pytest.approx(24, abs=1) and green / 5 == pytest.approx(18, abs=1)
    corner = cut_out(image, (0.0, 0.75, 0.25, 1.0))
    assert np.asarray(corner)[-1, 0].tolist() == [0, 47 * 5, 0], "moved into the picture"
    assert cut_out(image, (0.0, 0.2, 1.0, 0.9)).size == (48, 48)
    for box in ((0.5, 0, 0.5, 1), (0.0, 0.0, 1.5, 1.0), (-0.5, 0.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="is no box"):
            cut_out(image, box)


def test_the_largest_object_of_a_row_is_its_concept():
    objects = {"bbox": [[0, 0, 16, 12], [32, 12, 32, 36]], "category": [5, 8]}
    example = example_of_row({"image": gradient(), "objects": objects})
    assert example.concept == 8 and example.box == (0.5, 0.25, 1.0, 1.0)
    assert example_of_row({"image": gradient(), "label": 4}).concept == 4
    row = {"jpg": {"bytes": png(gradient()), "path": None}, "cls": 2}
    assert example_of_row(row).concept == 2 and example_of_row(row).picture.size == (64, 48)
    with pytest.raises(ValueError, match="no box in"):
        example_of_row({"image": gradient(), "objects": {"bbox": [], "category": []}})


def test_open_images_boxes_are_concepts(tmp_path):
    for name in ("aa", "bb"):
        gradient().save(tmp_path / f"{name}.png")
    head = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsGroupOf"
    rows = [
        "aa,x,/m/dog,1,0.25,0.75,0.5,1.0,0,0", "aa,x,/m/cat,1,0,0.5,0,0.5,0,0",
        "bb,x,/m/dog,1,0.1,0.6,0.1,0.5,0,0", "bb,x,/m/ant,1,0,0.1,0,0.1,0,0",
        "bb,x,/m/dog,1,0,1,0,1,0,1", "cc,x,/m/dog,1,0,1,0,1,0,0",
    ]  # fmt: skip
    (tmp_path / "boxes.csv").write_text("\n".join([head, *rows]))
    examples = load_pictures(tmp_path, 16).examples
    assert [(e.picture.stem, e.concept, e.box) for e in examples] == [
        ("aa", 1, (0.25, 0.5, 0.75, 1.0)), ("aa", 0, (0, 0, 0.5, 0.5)),
        ("bb", 1, (0.1, 0.1, 0.6, 0.5)),
    ]  # fmt: skip
    (tmp_path / "boxes.csv").write_text("a,b\n1,2")
    with pytest.raises(ValueError, match="not the columns of OpenImages"):
        load_pictures(tmp_path, 16)
    (tmp_path / "boxes.csv").write_text(head + "\n" + rows[-1])
    with pytest.raises(ValueError, match="has no picture to which a box"):
        load_pictures(tmp_path, 16)
