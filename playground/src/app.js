// The page: what its controls do. Everything that computes is in worker.js.

import { Pad } from "./pad.js";
import { cells, isBlank, squarePicture, toBytes } from "./resample.js";
import { paint, showCurve, showWords, text, WordMap } from "./views.js";

const $ = (id) => document.getElementById(id);
const started = performance.now();
const state = {
  about: null, site: null, picture: null, weights: null, concept: null, tuned: 0, busy: false,
  wanted: false, thing: 0, times: {},
};
const map = new WordMap($("map"));
const pad = new Pad($("pad"), { colours: $("colours"), size: $("size"), clear: $("clear"), undo: $("undo") }, take);

// ---- the worker

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let number = 0;
worker.onmessage = ({ data: { id, progress, answer, error } }) => {
  const call = waiting.get(id);
  if (progress) return call.say(progress);
  waiting.delete(id);
  if (error === undefined) call.resolve(answer);
  else call.reject(new Error(error));
};
worker.onerror = (event) => {
  event.preventDefault();
  fail(`The part that computes could not be started (${event.message ?? "no module worker"}): use a browser of 2023 or newer.`);
};

function ask(action, request = {}, say = () => {}) {
  return new Promise((resolve, reject) => {
    waiting.set(++number, { resolve, reject, say });
    worker.postMessage({ id: number, action, ...request });
  });
}

// ---- telling

function tell(message, share = null) {
  $("status-text").textContent = message;
  $("progress").hidden = share === null;
  $("progress").value = share ?? 0;
}

function fail(message) {
  const memory = /memory|bad_alloc|allocation|RangeError/i.test(message);
  $("error").textContent = memory
    ? "The memory is used up: close other tabs and programs, then reload this page." : message;
  $("error").hidden = false;
  tell("Something went wrong; see above.");
}

function fine() {
  $("error").hidden = true;
}

// ---- a thing comes in

async function take(pixels) {
  if (!state.about) return;
  fine();
  for (const button of $("things").children) button.setAttribute("aria-pressed", "false");
  if (pixels === null) return forget("Draw a thing on the white square.");
  const { picture, mask } = squarePicture(pixels.rgba, pixels.width, pixels.height, state.about.resolution);
  if (isBlank(picture)) return forget("The picture is blank: draw a thing on it.");
  const [, h, w] = state.about.latent_shape;
  await learn(picture, mask && cells(mask, state.about.resolution, h, w));
}

function forget(message) {
  state.thing++;
  Object.assign(state, { concept: null, picture: null });
  controls();
  tell(message);
}

async function learn(picture, weights) {
  const mine = ++state.thing;
  worker.postMessage({ action: "stop" });
  Object.assign(state, { picture, weights, tuned: 0 });
  const start = performance.now();
  try {
    tell("Looking at the picture …");
    const concept = await ask("predict", { picture });
    if (mine !== state.thing) return;  // another thing has come since
    state.times.predict = performance.now() - start;
    state.concept = concept;
    showConcept(true);
    $("film").replaceChildren();
    $("curve").replaceChildren();
    draw();
  } catch (error) {
    fail(error.message);
  }
  controls();
}

function showConcept(anew) {
  showWords($("words"), state.concept.near);
  map.move(state.concept.at, state.concept.near, anew);
  $("version").textContent = state.tuned ? `tuned, ${state.tuned} steps` : "predicted, not tuned";
}

async function open(file) {
  fine();
  try {
    const image = await createImageBitmap(file);
    const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
    if (Math.min(image.width, image.height) < 16) throw new Error("small");
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const { data } = context.getImageData(0, 0, image.width, image.height);
    pad.show(image);
    await take({ rgba: data, width: image.width, height: image.height });
  } catch (error) {
    const why = error.message === "small" ? "is smaller than 16 pixels: take a larger one."
      : "is no picture that this browser can read: use PNG, JPEG or WebP.";
    fail(`${file.name ?? "What was pasted"} ${why}`);
  }
}

// ---- pictures go out

function options() {
  return {
    prompt: $("prompt").value.trim(),
    seed: Math.min(999999, Math.max(0, Math.trunc($("seed").valueAsNumber || 0))),
    alpha: $("alpha").valueAsNumber,
    guidance: $("guidance").valueAsNumber,
    parts: document.querySelector("[name=parts]:checked").value,
  };
}

/** Draw what is asked for now; while a picture is drawn, only the last wish is kept. */
async function draw() {
  if (!state.concept) return;
  state.wanted = true;
  if (state.busy) return;
  state.busy = true;
  controls();
  while (state.wanted && state.concept) {
    state.wanted = false;
    await drawOnce(state.concept, options());
  }
  state.busy = false;
  controls();
}

async function drawOnce(concept, wish) {
  const tuned = state.tuned, start = performance.now();
  try {
    const { cut, found } = await ask("check", { prompt: wish.prompt });
    if (!wish.prompt.includes("S*")) throw new Error("Write S* where your thing goes, for example: S* on the beach.");
    if (!found) throw new Error("The prompt is too long: S* lies behind what the model reads. Make it shorter.");
    fine();
    $("now").classList.add("busy");
    const picture = await ask("draw", { concept, options: wish }, ({ done, total }) =>
      tell(`Drawing, step ${done} of ${total}`, done / total));
    state.times.draw = performance.now() - start;
    state.times.first ??= performance.now() - started;
    show(toBytes(picture), wish, tuned, cut);
    tell(`Drawn in ${(state.times.draw / 1000).toFixed(1)} s.`);
  } catch (error) {
    fail(error.message);
  }
  $("now").classList.remove("busy");
}

let shown = null;

function show(rgba, wish, tuned, cut) {
  if (shown) {
    const figure = document.createElement("figure");
    figure.setAttribute("role", "listitem");
    figure.append(paint(document.createElement("canvas"), shown.rgba, shown.label), text("figcaption", shown.label));
    $("before").prepend(figure);
    while ($("before").children.length > 10) $("before").lastChild.remove();
  }
  const what = { both: "", word: ", word alone", weights: ", weights alone" }[wish.parts];
  const label = `${wish.prompt}, seed ${wish.seed}${what}${tuned ? `, tuned ${tuned}` : ""}`;
  shown = { rgba, label };
  state.shown = { rgba, wish, tuned };
  paint($("picture"), rgba, label);
  $("caption").textContent = cut ? `${label} (the last ${cut} tokens were not read)` : label;
}

// ---- tuning

async function tune() {
  const steps = state.about.tuning.num_steps, mine = state.thing, losses = [], start = performance.now();
  state.tuning = true;
  controls();
  fine();
  $("film").replaceChildren();
  tell("Making the gradients ready …");
  try {
    const preview = { ...options(), steps: 8 };
    if (!preview.prompt.includes("S*")) preview.prompt = "S*";
    const concept = await ask("tune", { concept: state.concept, picture: state.picture, weights: state.weights, steps, preview },
      ({ step, terms, near, at, drawn }) => {
        if (mine !== state.thing) return;
        losses.push(terms[0]);
        showCurve($("curve"), losses, steps);
        showWords($("words"), near);
        map.move(at, near, false);
        const canvas = paint(document.createElement("canvas"), toBytes(drawn), `After step ${step + 1}`);
        const item = document.createElement("div");
        item.setAttribute("role", "listitem");
        item.append(canvas);
        $("film").append(item);
        tell(`Tuning, step ${step + 1} of ${steps}`, (step + 1) / steps);
      });
    if (mine === state.thing) {
      state.times.tune = performance.now() - start;
      Object.assign(state, { concept, tuned: state.tuned + losses.length, losses });
      showConcept(false);
      draw();
    }
  } catch (error) {
    fail(error.message);
  }
  state.tuning = false;
  controls();
}

// ---- controls

function controls() {
  const ready = Boolean(state.concept) && !state.tuning;
  $("draw").disabled = !state.concept;
  $("tune").disabled = !ready;
  $("stop").hidden = !state.tuning;
  for (const chip of $("scenes").children) {
    chip.setAttribute("aria-pressed", chip.dataset.prompt === $("prompt").value.trim());
  }
}

function wire() {
  const outputs = () => {
    for (const id of ["alpha", "guidance"]) {
      $(`${id}-value`).textContent = $(id).valueAsNumber.toFixed(id === "alpha" ? 2 : 1);
    }
  };
  $("alpha").value = [state.about.alpha_blend].flat()[0];
  $("guidance").value = state.about.guidance_scale;
  outputs();
  for (const id of ["alpha", "guidance"]) {
    $(id).oninput = outputs;
    $(id).onchange = draw;
  }
  $("seed").onchange = draw;
  $("next").onclick = () => { $("seed").value = options().seed + 1; draw(); };
  for (const radio of document.querySelectorAll("[name=parts]")) radio.onchange = draw;
  $("ask").onsubmit = (event) => { event.preventDefault(); controls(); draw(); };
  $("prompt").oninput = controls;
  $("tune").onclick = tune;
  $("stop").onclick = () => worker.postMessage({ action: "stop" });
  $("scenes").append(...state.site.scenes.map((scene) => {
    const chip = Object.assign(text("button", scene), { type: "button" });
    chip.dataset.prompt = `S* ${scene}`;
    chip.onclick = () => { $("prompt").value = chip.dataset.prompt; controls(); draw(); };
    return chip;
  }));
  $("file").onchange = () => { if ($("file").files[0]) open($("file").files[0]); $("file").value = ""; };
  $("drop").ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
  $("drop").ondragleave = () => $("drop").classList.remove("over");
  $("drop").ondrop = (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
    else fail("What was dropped is no file: save the picture first, then drop it.");
  };
  document.onpaste = (event) => {
    const file = [...event.clipboardData.files].find((f) => f.type.startsWith("image/"));
    if (file) open(file);
  };
}

async function things(base) {
  const { file, names, side } = state.site.things;
  const image = await createImageBitmap(await (await fetch(new URL(file, base))).blob());
  names.forEach((name, i) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side });
    canvas.getContext("2d").drawImage(image, i * side, 0, side, side, 0, 0, side, side);
    const button = Object.assign(document.createElement("button"), { type: "button", title: name });
    button.setAttribute("aria-label", name);
    button.setAttribute("aria-pressed", "false");
    canvas.setAttribute("aria-hidden", "true");
    button.append(canvas);
    button.onclick = async () => {
      pad.show(canvas);
      const { data } = canvas.getContext("2d").getImageData(0, 0, side, side);
      const taken = take({ rgba: data, width: side, height: side });
      button.setAttribute("aria-pressed", "true");
      await taken;
    };
    $("things").append(button);
  });
}

// ---- start

const SIMD = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11]);

function lacking() {
  if (location.protocol === "file:") return "This page must come from a web server: run python -m tools.page serve, and open the address that it prints.";
  if (!globalThis.WebAssembly) return "This browser has no WebAssembly, or it is switched off: allow it, or use another browser.";
  if (!WebAssembly.validate(SIMD)) return "This browser has no WebAssembly SIMD: use Chrome 91, Firefox 89, Safari 16.4 or newer.";
  if (!globalThis.DecompressionStream) return "This browser cannot unpack the model: use Chrome 80, Firefox 113, Safari 16.4 or newer.";
  return null;
}

async function start() {
  const missing = lacking();
  if (missing) return fail(missing);
  const base = new URL("./", location.href).href;
  const device = new URLSearchParams(location.search).get("device") === "webgpu" ? "webgpu" : "wasm";
  try {
    const found = await ask("open", { base, device }, ({ loaded, total, preparing }) => preparing
      ? tell(`Making the model ready: ${preparing}`)
      : tell(`Loading ${(loaded / 1e6).toFixed(0)} of ${(total / 1e6).toFixed(0)} MB, kept for the next visit`, loaded / total));
    Object.assign(state, { about: found.about, site: found.site });
    state.times.ready = performance.now() - started;
    map.words(found.about.words, found.site.positions);
    wire();
    await things(base);
    const threads = device === "wasm" ? `WebAssembly, ${found.threads} thread${found.threads > 1 ? "s" : ""}` : "WebGPU";
    $("about").textContent = `Computed with ${threads}. `;
    if (navigator.gpu || device === "webgpu") {
      const link = text("a", device === "wasm" ? "Use WebGPU instead" : "Use WebAssembly instead");
      link.href = device === "wasm" ? "?device=webgpu" : "?";
      $("about").append(link);
    }
    await $("things").children[found.site.things.first].onclick();
    await ask("prepareTuning");
  } catch (error) {
    fail(error.message);
  }
}

globalThis.playground = { state, take, pad, ask };  // for tests
start();
