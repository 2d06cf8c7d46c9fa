// The method of dte_lab on ONNX Runtime: predict, tune, draw, as DTEPipeline does them in torch.

import { Adam, Muon, drawBatch, rateAt } from "./optimizers.js";
import { stream } from "./random.js";
import { guided, Scheduler } from "./scheduler.js";
import { Tokenizer } from "./tokenizer.js";

const SAYS_NOTHING = "thing";  // as in dte_lab/evaluation/methods.py

export class Method {
  /** ort: ONNX Runtime; about: model.json; files: {name: bytes} of the graphs and of the weights. */
  constructor(ort, about, tokenizer, files, providers) {
    Object.assign(this, { ort, about, files, providers });
    this.tokenizer = new Tokenizer(tokenizer, about.tokens);
    this.sessions = {};
    this.latentSize = about.latent_shape.reduce((a, b) => a * b);
  }

  /** Make a graph ready to run; it stays so. */
  ready(name) {
    this.sessions[name] ??= this.ort.InferenceSession.create(this.files[`${name}.onnx`], {
      executionProviders: this.providers,
      externalData: [{ path: "weights.bin", data: this.files["weights.bin"] }],
    });
    return this.sessions[name];
  }

  /** Inputs by name as typed arrays -> outputs by name as typed arrays. */
  async run(name, inputs) {
    const session = await this.ready(name), feeds = {};
    for (const [key, [type, shape]] of Object.entries(this.about.parts[name].inputs)) {
      feeds[key] = new this.ort.Tensor(type, inputs[key], shape);
    }
    const found = await session.run(feeds);
    return Object.fromEntries(Object.entries(found).map(([key, value]) => [key, value.data]));
  }

  /** What the encoder makes of a picture (3, side, side) in [-1, 1]: {v, offsets}. */
  async predict(picture, seed = 0) {
    const [n] = this.about.parts.encoder.inputs.noise[1];
    const noise = stream(seed, "static features").randn(n * this.latentSize);
    const { v_star: v, offsets } = await this.run("encoder", { picture, noise });
    return { v, offsets };
  }

  /** {similarity, v_hard}: cosines of v* to all words, and the embedding of the nearest. */
  words(v) {
    return this.run("words", { v_star: v });
  }

  async states(text, v) {
    const { ids, slots } = this.tokenizer.prompt(text);
    return (await this.run("text", { ids, slots, v_star: v })).states;
  }

  /**
   * A picture (3, side, side) in [-1, 1] of {v, offsets} and a prompt with S*.
   * parts: "both", "word" (no offsets) or "weights" (a word that says nothing instead of v*).
   * onStep: called with the number of steps done and of all.
   */
  async draw(concept, { prompt, seed, alpha, guidance, parts = "both", steps = 25, noise = null },
             onStep = () => {}) {
    const { v } = concept, { v_hard: hardWord } = await this.words(v);
    const offsets = parts === "word" ? new Float32Array(concept.offsets.length) : concept.offsets;
    const { placeholder } = this.about.tokens;
    const asked = parts === "weights" ? prompt.replaceAll(placeholder, SAYS_NOTHING) : prompt;
    const plain = await this.states("", v);
    const soft = join(plain, await this.states(asked, v));
    const hard = join(plain, await this.states(asked, hardWord));
    const scheduler = new Scheduler(this.about, steps);
    let x = noise ?? stream(seed, "initial noise").randn(this.latentSize);
    for (const [i, t] of scheduler.timesteps.entries()) {
      const blend = Array.isArray(alpha)
        ? alpha[1] + ((alpha[0] - alpha[1]) * t) / this.about.alphas_cumprod.length : alpha;
      const { output } = await this.run("unet", {
        latents: join(x, x), timestep: Int32Array.of(t), soft, hard, offsets,
        alpha: Float32Array.of(blend, blend),
      });
      x = scheduler.step(x, guided(output, guidance), i);
      onStep(i + 1, scheduler.timesteps.length);
    }
    return (await this.run("decode", { latents: x })).picture;
  }

  /**
   * Tune {v, offsets} on a picture: num_steps of Adam on v, of Muon on the offsets; returns a new one.
   * weights: (h, w), where in the latent the thing is. onStep: called after each step with
   * {step, terms, v, offsets}; when it returns false, tuning ends.
   */
  async tune(concept, picture, weights, numSteps, onStep = () => {}, seed = 0) {
    const about = this.about.tuning, [, h, w] = this.about.latent_shape;
    const v = Float32Array.from(concept.v), offsets = Float32Array.from(concept.offsets);
    const { latents } = await this.run("encode", { picture });
    const { ids, slots } = this.tokenizer.prompt(about.prompt);
    const generator = stream(seed, "tuning");
    const ofV = new Adam(v.length, about.token_learning_rate, about.betas, about.eps);
    const matrices = this.about.offsets.flatMap(([, dIn, rank, dOut]) => [[dIn, rank], [rank, dOut]]);
    const ofOffsets = new Muon(matrices, about.offset_learning_rate);
    for (let step = 0; step < numSteps; step++) {
      const T = this.about.alphas_cumprod.length;
      const { timesteps, noise } = drawBatch(generator, about.batch_size, this.latentSize, T);
      const found = await this.run("tune", {
        v_star: v, offsets, latents, noise, timesteps, ids, slots,
        weights: weights ?? new Float32Array(h * w).fill(1),
      });
      if (!found.terms.every(Number.isFinite)) {
        throw new Error("Tuning stopped: the loss is no longer finite. Take another picture.");
      }
      const factor = rateAt(step, about.constant_steps);
      ofV.step(v, found.v_star_gradient, factor);
      ofOffsets.step(offsets, found.offsets_gradient, factor);
      const state = { step, terms: Array.from(found.terms), v: v.slice(), offsets: offsets.slice() };
      if (await onStep(state) === false) break;
    }
    return { v, offsets };
  }
}

function join(a, b) {
  const both = new Float32Array(a.length + b.length);
  both.set(a);
  both.set(b, a.length);
  return both;
}

/** The k words nearest to v*, by their cosines: [[row, cosine], ...]. */
export function nearest(similarity, k) {
  return Array.from(similarity, (c, row) => [row, c]).sort((a, b) => b[1] - a[1]).slice(0, k);
}

/** Where v* stands on the map of words: the mean of its nearest words' places (word_map.py). */
export function place(similarity, positions, k = 8, temperature = 0.05) {
  const near = nearest(similarity, k), best = near[0][1];
  const weights = near.map(([, c]) => Math.exp((c - best) / temperature));
  const sum = weights.reduce((a, b) => a + b);
  return [0, 1].map((axis) => near.reduce((at, [row], i) => at + (weights[i] / sum) * positions[row][axis], 0));
}
