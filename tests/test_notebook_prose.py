"""What the notebooks' text says of results is what the results say."""

import json
import shutil
from pathlib import Path

import jupytext
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from dte_lab.evaluation.conclusions import CLAIMS
from tools import notebooks
from tools.notebook_faults import is_measured, prose_faults, sentences

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


def found(text, name="05_tuning", results=RESULTS):
    """Faults of a source with this text, but for the claims that it does not have."""
    source = new_notebook(cells=[new_markdown_cell(text)])
    return [f for f in prose_faults(source, name, results) if "no longer says" not in f]


@pytest.mark.parametrize(
    "planted",
    [
        "Twelve steps of Textual Inversion are ahead of the tuning-encoder.",
        "The contrastive term\nchanges nothing.",
        "Look at the curve. **DreamBooth LoRA is better at 12 steps.**",
        "- After tuning the loss is twice as large.",
        "1. Whole matrices cost less than rank 4.",
        "One path or two: the dual path is hardly slower.",
    ],
)
def test_a_comparison_that_nothing_computes_is_found(planted):
    (fault,) = found(planted)
    assert fault.startswith("compares in prose: ") and "Compute it in a cell" in fault


@pytest.mark.parametrize(
    "harmless",
    [
        "Is LoRA ahead of the tuning-encoder?",
        "If the loss is higher than before, the steps were too large.",
        "<details>\nLoRA is better than tuning.\n</details>",
        "$$\n\\text{loss} < \\text{loss}$$",
        "The picture shows the thing on a beach.",
        "| LoRA | better than tuning |",
    ],
)
def test_questions_conditions_and_what_is_folded_are_no_claims(harmless):
    assert found(harmless) == []


def test_sentences_are_whole_across_lines_and_lists():
    text = "# A title\n\nOne is\nshorter. Two:\n- three;\n- *four* is\n  longer"
    assert sentences(text) == [
        "A title", "One is shorter.", "Two:", "three;", "*four* is longer",
    ]  # fmt: skip
    assert is_measured("The tuned word is worse than the predicted one.")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.notebook}, {claim.text}")
def test_a_claim_stands_in_its_notebook_and_holds(claim):
    source = jupytext.read(ROOT / "notebooks" / "src" / f"{claim.notebook}.py", fmt="py:percent")
    assert any(
        claim.text in sentences(cell.source) for cell in source.cells
        if cell.cell_type == "markdown"
    )  # fmt: skip
    assert claim.holds(RESULTS)


def contradict(results, claim):
    """Change the copied results so that the claim is wrong."""
    if claim.notebook == "03_lora_hypernetwork":
        name, change = "encoders.json", lambda d: [
            v.update(minutes=99.0) for v in d["variants"] if v["name"] == "rank-1"
        ]  # fmt: skip
    elif "one costs" in claim.text:
        name, change = "dual_path.json", lambda d: d["ways"]["dual attention figure"].update(
            over_single=1.9
        )  # fmt: skip
    elif claim.notebook == "04_dual_path":
        name, change = "blending.json", lambda d: [
            r.update(identity=r["alpha_blend"]) for r in d["rows"] if r["alpha_blend"] is not None
        ]  # fmt: skip
    else:
        name, change = "steps.json", lambda d: [
            p.update(fidelity=1.0) for p in d["points"] if p["steps"] == 500
        ]  # fmt: skip
    document = json.loads((RESULTS / name).read_text())
    change(document)
    (results / name).write_text(json.dumps(document))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.notebook}, {claim.text}")
def test_results_that_contradict_a_claim_are_told(claim, tmp_path):
    contradict(tmp_path, claim)
    (fault,) = found(claim.text, claim.notebook, tmp_path)
    assert fault == f"says {claim.text!r}, and the stored results do not."


def test_a_claim_that_left_the_text_is_told():
    faults = prose_faults(new_notebook(), "05_tuning", RESULTS)
    assert faults and all("take it out of CLAIMS" in fault for fault in faults)


def test_the_check_reads_the_text_and_what_needs_no_results(tmp_path):
    folder = tmp_path / "notebooks" / "src"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "notebooks" / "src" / "07_your_own_encoder.py", folder / "other.py")
    said = "The encoder is better than LoRA."
    with (folder / "other.py").open("a") as file:
        file.write(f"\n# %% [markdown]\n# {said}\n")
    assert any(said in problem for problem in notebooks.check(tmp_path))
    (folder / "reasoned.txt").write_text(f"# why\n{said}\n")
    assert not any(said in problem for problem in notebooks.check(tmp_path))


def test_what_needs_no_results_is_still_in_the_text():
    text = (ROOT / "notebooks" / "src" / "reasoned.txt").read_text()
    reasoned = [line for line in text.splitlines() if not line.startswith("#")]
    told = {
        sentence
        for path in (ROOT / "notebooks" / "src").glob("*.py")
        for cell in notebooks.read_source(path).cells
        for sentence in sentences(cell.source)
    }
    assert [line for line in reasoned if line not in told] == []
