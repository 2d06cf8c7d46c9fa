"""The page: personalise in a browser. Built from the shipped weights into a folder for any host.

    python -m tools.page build [FOLDER] [--backbone DIR]     by default build/page
    python -m tools.page serve [FOLDER]                      on loopback, and print the address
    python -m tools.page measure [FOLDER]                    in headless Chromium, results/page.json

What is built holds the sources in playground/, the model as ONNX graphs (dte_lab/onnx_parts), the
words' map, thirty things, and ONNX Runtime Web from npm, in a fixed version. Needs the extras page
and notebooks (UMAP). The same weights and versions give the same bytes.
"""

import argparse
import gzip
import hashlib
import json
import shutil
import tarfile
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from dte_lab import DTEPipeline
from dte_lab.common.command import run_command
from dte_lab.common.errors import DTEError, reason_of
from dte_lab.common.files import naming, write_atomically
from dte_lab.common.images import save_png
from dte_lab.common.settings import check_whole
from dte_lab.onnx_parts.export import ABOUT_FILE, export_onnx
from dte_lab.onnx_parts.graphs import WEIGHT_FILE
from dte_lab.world.captions import scene_words
from dte_lab.world.scenes import PLACES, render
from dte_lab.world.sprites import unseen_things
from dte_lab.world.wide import fetch_package
from tools.built import check_ours, put

ROOT = Path(__file__).parents[1]
SOURCES, SITE = ROOT / "playground", ROOT / "build" / "page"
MARK = "site.json"  # what is built, with a version
RUNTIME = "onnxruntime-web", "1.30.0", (
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)  # fmt: skip
# ONNX Runtime for each kind of device: its entry, its glue, and the WebAssembly that both load.
DEVICES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs",
               "ort-wasm-simd-threaded.asyncify.wasm"),
}  # fmt: skip
COLOURED = ("blue", "yellow")  # of the scenes that are one colour
HEADERS = {  # what lets WebAssembly use threads
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}


def build(
    folder: Path,
    pipe: DTEPipeline | str = "small",
    cache: Path | None = None,
    exported: Path | None = None,
) -> Path:
    """Write the site to a folder, in the place of what was there; returns it.

    pipe: or the name of its backbone. cache: where packages from npm are kept. exported: what
    `export_onnx` wrote of the pipeline, if it is there already. Raises DTEError where the scheduler
    is another than the page's, and for a folder that holds something else; OSError without the
    network, the first time.
    """
    check_ours(folder, MARK)
    if isinstance(pipe, str):
        pipe = DTEPipeline.from_pretrained(pipe)
    check_scheduler(pipe)
    with tempfile.TemporaryDirectory() as temporary:
        built, plain = Path(temporary, "page"), Path(temporary, "onnx")
        with naming(built):
            shutil.copytree(SOURCES, built)
        if exported is None:
            export_onnx(pipe, plain)
        write_site(built, pipe, exported or plain, cache or ROOT / "build" / "npm")
        put(built, folder)
    return folder


def write_site(folder: Path, pipe: DTEPipeline, exported: Path, cache: Path) -> None:
    """What a page has besides its sources."""
    files = model_files(exported, folder) | runtime_files(folder, cache)
    names = things(folder / "things.png", pipe.backbone.resolution)
    site = {
        "files": {name: size for name, size in files.items() if "/" not in name},
        "runtime": {device: f"runtime/{entry}" for device, (entry, _, _) in DEVICES.items()},
        "things": {"file": "things.png", "names": names, "side": pipe.backbone.resolution,
                   "first": 0},
        "scenes": [scene_words(scene) for scene in (*PLACES, *COLOURED)],
        "positions": map_positions(pipe),
    }  # fmt: skip
    for device, (_, glue, binary) in DEVICES.items():
        site["runtime"][f"{device}_glue"] = f"runtime/{glue}"
        site["runtime"][f"{device}_files"] = {"runtime.wasm": files[f"runtime/{binary}"]}
    licences = [ROOT / "NOTICE", ROOT / "LICENSE", *sorted((ROOT / "LICENSES").iterdir())]
    texts = [path.read_text() for path in licences if "WordNet" not in path.name]
    texts += ["ONNX Runtime", *(path.read_text() for path in runtime_licences())]
    write_atomically(folder / "licences.txt", ("\n" + "=" * 80 + "\n").join(texts).encode())
    site["version"] = version_of(folder)
    write_atomically(folder / MARK, json.dumps(site, indent=1).encode())


def check_scheduler(pipe: DTEPipeline) -> None:
    """Raise DTEError where playground/src/scheduler.js is not the backbone's scheduler."""
    config = pipe.backbone.scheduler.config
    wanted = {
        "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
        "timestep_spacing": "trailing", "final_sigmas_type": "zero", "thresholding": False,
    }  # fmt: skip
    for key, value in wanted.items():
        if config[key] != value:
            raise DTEError(f"The page samples with {key} {value!r} alone, not {config[key]!r}.")


def model_files(exported: Path, folder: Path) -> dict[str, dict]:
    """Pack an exported model: {name: {file, bytes}}."""
    about, files = json.loads((exported / ABOUT_FILE).read_text()), {}
    for path in sorted(exported.iterdir()):
        data = path.read_bytes()
        if path.name == WEIGHT_FILE:
            data = split_planes(data, about["weights"]["half_bytes"])
        files[path.name] = pack(folder, f"model/{path.name}", data)
    return files


def split_planes(data: bytes, half_bytes: int) -> bytes:
    """All low bytes of the fp16 numbers, then all high bytes, which pack well (load.js joins)."""
    halves = np.frombuffer(data[:half_bytes], np.uint8).reshape(-1, 2)
    return halves.T.tobytes() + data[half_bytes:]


def pack(folder: Path, name: str, data: bytes) -> dict:
    """Write a file, compressed, since few hosts compress what they do not know."""
    data = gzip.compress(data, 9, mtime=0)
    write_atomically(folder / f"{name}.gz", data)
    return {"file": f"{name}.gz", "bytes": len(data)}


def runtime_files(folder: Path, cache: Path) -> dict[str, dict]:
    """ONNX Runtime Web in `folder`/runtime: {name: {file, bytes}} of what is packed."""
    name, version, integrity = RUNTIME
    files = {}
    with tarfile.open(fetch_package(name, version, integrity, cache)) as archive:
        for entry, glue, binary in DEVICES.values():
            for member in (entry, glue, binary):
                data = archive.extractfile(f"package/dist/{member}").read()
                if member.endswith(".wasm"):
                    files[f"runtime/{member}"] = pack(folder, f"runtime/{member}", data)
                else:
                    write_atomically(folder / "runtime" / member, data)
    return files


def runtime_licences() -> list[Path]:
    """Those of ONNX Runtime and of what is in it: npm's package lacks them, PyPI's has them."""
    folder = Path(find_spec("onnxruntime").origin).parent
    return [folder / "LICENSE", folder / "ThirdPartyNotices.txt"]


def things(path: Path, side: int) -> list[str]:
    """Thirty things on white that neither base model nor encoder has seen, side by side."""
    chosen = unseen_things()
    names = [name for name, _ in chosen]
    pictures = [render(name, style, "white", 0) for name, style in chosen]
    row = Image.fromarray(np.concatenate(pictures, axis=1))
    save_png(row if row.height == side else row.resize((side * len(names), side)), path)
    return names


def map_positions(pipe: DTEPipeline) -> list[list[float]]:
    """Places of the words in the unit square; a circle, where they are too few for a map."""
    from dte_lab.evaluation.word_map import word_positions

    embeddings = pipe.prompt_encoder.table.embeddings
    if (n := len(embeddings)) < 60:
        angle = np.arange(n) * 2 * np.pi / n
        positions = np.stack([np.cos(angle), np.sin(angle)], axis=1) / 2 + 0.5
    else:  # mostly by rank, and without the margins, so that no island far away squeezes the rest
        positions = word_positions(embeddings)
        low, high = np.quantile(positions, (0.05, 0.95), axis=0)
        positions = ((positions - low) / (high - low)).clip(0, 1)
        ranks = positions.argsort(axis=0).argsort(axis=0) / (n - 1)
        positions = 0.25 * positions + 0.75 * ranks
    return np.round(positions, 4).tolist()


def version_of(folder: Path) -> str:
    """Of all files, by their content: the browser keeps those of one version."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARK):
        whole.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def check_page(folder: Path) -> None:
    """Raise DTEError for a folder without what `build` writes."""
    if not (folder / MARK).is_file():
        raise DTEError(f"{folder} holds no page: python -m tools.page build")


class Handler(SimpleHTTPRequestHandler):
    """Files, with the headers that let WebAssembly use threads; the page alone keeps them."""

    headers_sent = HEADERS
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript", ".js": "text/javascript",
    }  # fmt: skip

    def end_headers(self) -> None:
        for name, value in (self.headers_sent | {"Cache-Control": "no-cache"}).items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


def serve(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server on loopback, running in a thread; `shutdown` ends it. port: 0 for a free one.

    Raises DTEError for a port that cannot be used.
    """
    check_whole("port", port, 0, 65535)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(folder)))
    except OSError as error:
        raise DTEError(f"port {port} cannot be used ({reason_of(error)}).") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("build", "serve", "measure"))
    parser.add_argument("folder", nargs="?", type=Path, default=SITE)
    parser.add_argument("--backbone", default="small")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args(arguments)
    if given.action == "build":
        build(given.folder, given.backbone)
        size = sum(path.stat().st_size for path in given.folder.rglob("*") if path.is_file())
        print(f"wrote {size / 1e6:.1f} MB to {given.folder}; see it: python -m tools.page serve")
    elif given.action == "serve":
        check_page(given.folder)
        server = serve(given.folder, given.port)
        print(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)")
        threading.Event().wait()
    else:
        from tools.page_measure import measure

        path = ROOT / "results" / "page.json"
        write_atomically(path, (json.dumps(measure(given.folder), indent=1) + "\n").encode())
        print(path.read_text())


if __name__ == "__main__":
    run_command(main)
