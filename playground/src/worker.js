// Everything that takes time, beside the page: one request after the other, answers by number.

import { joinPlanes, loadFiles } from "./load.js";
import { Method, nearest, place } from "./method.js";

let method, about, positions;

const actions = {
  /** Load what `tools.page build` made; says progress. Answers with what the page has to know. */
  async open({ base, device }, say) {
    const site = await (await fetch(new URL("site.json", base))).json();
    const gpu = device === "webgpu";
    const ort = await import(new URL(gpu ? site.runtime.webgpu : site.runtime.wasm, base).href);
    const runtime = site.runtime[gpu ? "webgpu_files" : "wasm_files"];
    const files = await loadFiles(base, { ...site.files, ...runtime }, site.version,
      (done, total) => say({ loaded: done, total }));
    const read = (name) => JSON.parse(new TextDecoder().decode(files[name]));
    about = read("model.json");
    positions = site.positions;
    files["weights.bin"] = joinPlanes(files["weights.bin"], about.weights.half_bytes);
    ort.env.wasm.wasmPaths = { mjs: new URL(site.runtime[gpu ? "webgpu_glue" : "wasm_glue"], base).href };
    ort.env.wasm.wasmBinary = files["runtime.wasm"].buffer;
    ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
    ort.env.logLevel = "error";
    method = new Method(ort, about, read("tokenizer.json"), files, [device]);
    for (const name of ["encode", "encoder", "words", "text", "unet", "decode"]) {
      say({ preparing: name });
      await method.ready(name);
    }
    return { about, site, threads: ort.env.wasm.numThreads };
  },

  /** The tuning graph, which is not needed at first. */
  async prepareTuning() {
    await method.ready("tune");
  },

  async predict({ picture }) {
    return withWords(await method.predict(picture));
  },

  async draw({ concept, options }, say) {
    return method.draw(concept, options, (done, total) => say({ done, total }));
  },

  /** Tune; after each step says the losses, the words and a picture of `preview`, if one is asked. */
  async tune({ concept, picture, weights, steps, preview }, say) {
    stopped = false;
    const tuned = await method.tune(concept, picture, weights, steps, async (state) => {
      const seen = await withWords({ v: state.v, offsets: state.offsets });
      const drawn = preview && await method.draw(seen, preview);
      say({ step: state.step, terms: state.terms, near: seen.near, at: seen.at, drawn });
      await new Promise((go) => setTimeout(go));  // lets a request to stop in
      return !stopped;
    });
    return withWords(tuned);
  },

  /** How many tokens of a prompt do not fit. */
  async check({ prompt }) {
    const { cut, slots } = method.tokenizer.prompt(prompt);
    return { cut, found: slots.includes(0) };
  },
};

let stopped = false, queue = Promise.resolve();

async function withWords(concept) {
  const { similarity } = await method.words(concept.v);
  const near = nearest(similarity, 6).map(([row, cosine]) => ({ row, word: about.words[row], cosine }));
  return { ...concept, near, at: positions && place(similarity, positions) };
}

self.onmessage = ({ data: { id, action, ...request } }) => {
  if (action === "stop") {
    stopped = true;
    return;
  }
  queue = queue.then(async () => {
    try {
      const answer = await actions[action](request, (progress) => self.postMessage({ id, progress }));
      self.postMessage({ id, answer });
    } catch (error) {
      self.postMessage({ id, error: error?.message ?? String(error) });
    }
  });
};
