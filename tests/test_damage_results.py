"""Whatever stands in a run, a table of boxes, a row of the hub or a cache, it is one sentence."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save_file
from test_cache import Pictures, fill
from test_damage import JSON, bounded, changed, damaged, in_one_sentence, restored

from dte_lab.common.errors import DTEError
from dte_lab.common.resume import cut_back
from dte_lab.evaluation.measures import PICTURE_MEASURES
from dte_lab.evaluation.records import Row, read_run, to_csv
from dte_lab.evaluation.report import finished, markdown, summarise
from dte_lab.training.cache import CachedPictures, shard_path
from dte_lab.training.pictures import Example, example_of_row, load_pictures

BYTES = st.sampled_from(
    [b"", b",", b"\n", b'"', b"\x00", b"\xff", b"nan", b"1e999", b"x", b"[", b"{}"]
)


@pytest.fixture
def run(tmp_path):
    """The folder of a small finished run."""
    rows = [
        Row(method, steps, concept, "any", "noto", "white", edit, edit == "b",
            **{m: 0.1 + 0.01 * i for i, m in enumerate(PICTURE_MEASURES)})
        for method, steps in (("dte", 12), ("oracle", 0), ("other", 0))
        for concept in ("cat", "tree") for edit in ("a", "b")
    ]  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "measures.csv").write_bytes(to_csv(rows))
    document = {"settings": {"methods": ["dte:12"], "scenes": ["a"]}, "summary": summarise(rows)}
    (folder / "run.json").write_text(json.dumps(document))
    return folder


def reported(folder):
    summary, _ = finished(folder)
    return markdown(summary)


@bounded(150)
@given(place=st.floats(0, 0.999), text=BYTES, width=st.integers(0, 40), cut=st.booleans())
def test_any_table_of_measures(run, place, text, width, cut):
    path, good = run / "measures.csv", reported(run)
    with restored(path) as whole:
        at = int(place * len(whole))
        path.write_bytes(whole[:at] + text + (b"" if cut else whole[at + width :]))
        same = path.read_bytes().rstrip() == whole.rstrip()
        said = in_one_sentence(lambda: reported(run), run.name)
    assert said is None or said.count("\n") == good.count("\n")
    assert not (cut and said and not same and at < len(whole) - 10), "half a table is no table"


@bounded(100)
@given(data=st.data())
def test_any_document_of_a_run(run, data):
    path = run / "run.json"
    with restored(path) as whole:
        path.write_text(json.dumps(changed(data, json.loads(whole))))
        in_one_sentence(lambda: reported(run), run.name)


@pytest.mark.parametrize("name", ["run.json", "measures.csv"])
@pytest.mark.parametrize("fault", ["folder", b"", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 10**5])
def test_files_of_a_run_that_are_none(run, name, fault):
    with restored(run / name):
        if fault == "folder":
            (run / name).mkdir()
        else:
            (run / name).write_bytes(fault)
        assert in_one_sentence(lambda: reported(run), run.name) is None
    assert read_run(run)[1][0].concept == "cat"


def test_a_table_of_other_concepts_is_not_that_of_the_summary(run):
    lines = (run / "measures.csv").read_text().splitlines(keepends=True)
    (run / "measures.csv").write_text("".join(x for x in lines if ",tree," not in x))
    with pytest.raises(DTEError, match="has not the rows of which"):
        finished(run)


BOXES = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\na,/m/1,0.1,0.9,0.1,0.9,0\n"


@bounded(80)
@given(place=st.floats(0, 0.999), text=BYTES, width=st.integers(0, 9))
def test_any_table_of_boxes(tmp_path, picture, place, text, width):
    picture.save(tmp_path / "a.png")
    at, table = int(place * len(BOXES)), BOXES.encode()
    (tmp_path / "boxes.csv").write_bytes(table[:at] + text + table[at + width :])
    pictures = in_one_sentence(lambda: load_pictures(tmp_path, 16), "boxes.csv")
    if pictures is not None:
        in_one_sentence(lambda: pictures[0]["image"].isfinite().all())


@bounded(80)
@given(data=st.data())
def test_any_row_of_the_hub(picture, data):
    objects = {"bbox": [[1, 1, 9, 9], [0, 0, 3, 3]], "category": [4, 5]}
    row = changed(data, {"image": picture, "objects": objects, "label": 3}, ["jpg", "cls"])
    found = in_one_sentence(lambda: example_of_row(row))
    assert found is None or isinstance(found, Example)
    whole = example_of_row({"image": picture, "objects": objects})
    assert whole.concept == 4 and whole.box[0] == pytest.approx(1 / picture.width)


@bounded(60)
@given(data=st.data())
def test_any_shard_of_a_cache(cached, tiny_backbone, data):
    path = shard_path(cached, 1)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    with restored(path) as whole:
        tensors = dict(sorted(load(whole).items()))
        if data.draw(st.booleans()):
            tensors, _ = damaged(data, tensors, "foreign")
        else:
            metadata["texts"] = json.dumps(data.draw(JSON))
        save_file(tensors, path, metadata)
        items = in_one_sentence(lambda: [x for x in CachedPictures(cached)], path)
    assert items is None or all(x["latents"].isfinite().all() for x in items)


@pytest.fixture
def cached(tmp_path, tiny_backbone):
    fill(tmp_path / "cache", Pictures(3), tiny_backbone)
    shutil.copy(shard_path(tmp_path / "cache", 0), shard_path(tmp_path / "cache", 1))
    head = json.loads((tmp_path / "cache" / "cache.json").read_text())
    head["settings"]["pictures"] = 200  # two shards
    (tmp_path / "cache" / "cache.json").write_text(json.dumps(head))
    return tmp_path / "cache"


def test_shards_and_heads_of_a_cache_that_are_none(cached):
    assert len(CachedPictures(cached)) == 6
    for path in (shard_path(cached, 1), cached / "cache.json"):
        for fault in (b"", b"[]", b"\xff" * 99, "folder", "missing"):
            with restored(path):
                if fault == "folder":
                    path.mkdir()
                elif fault != "missing":
                    path.write_bytes(fault)
                assert in_one_sentence(lambda: CachedPictures(cached), cached) is None


def test_a_log_that_is_no_text_is_cut_back(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": NaN}\n[' + b"[" * 10**5 + b'\n{"step": 2}\n')
    cut_back(path, 1)
    assert path.read_text() == '{"step": 1}\n'
