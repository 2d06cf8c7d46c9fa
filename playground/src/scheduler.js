// DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), as diffusers' DPMSolverMultistepScheduler
// runs it with timestep_spacing "trailing", solver_type "midpoint" and final_sigmas_type "zero".

export class Scheduler {
  /** about: model.json. */
  constructor(about, numSteps) {
    const abar = about.alphas_cumprod, T = abar.length, config = about.scheduler;
    const lambda = abar.map((a) => 0.5 * Math.log(a / (1 - a)));  // falls with t
    const last = lambda.filter((l) => l >= (config.lambda_min_clipped ?? -Infinity)).length;
    this.timesteps = [];
    for (let i = 0, t = last; t > 0; i++, t = last - (i * T) / numSteps) {
      this.timesteps.push(halfToEven(t) - 1);
    }
    const sigmas = this.timesteps.map((t) => Math.sqrt((1 - abar[t]) / abar[t]));
    this.sigmas = Float32Array.from([...sigmas, 0]);
    this.prediction = about.prediction_type;
    this.lowerAtEnd = config.lower_order_final && this.timesteps.length < 15;
    this.before = null;  // the last step's estimate of the picture
  }

  /** x_t, the UNet's output and the number of the step -> x of the next step. */
  step(x, output, i) {
    const [alpha, sigma] = parts(this.sigmas[i]), [alphaT, sigmaT] = parts(this.sigmas[i + 1]);
    const clean = Float32Array.from(x, (value, k) => this.prediction === "epsilon"
      ? (value - sigma * output[k]) / alpha
      : alpha * value - sigma * output[k]);
    const lambda = (a, s) => Math.log(a) - Math.log(s);
    const h = lambda(alphaT, sigmaT) - lambda(alpha, sigma);  // infinite at the end
    const gain = -alphaT * Math.expm1(-h);
    let next = Float32Array.from(x, (value, k) => (sigmaT / sigma) * value + gain * clean[k]);
    if (this.before && i < this.timesteps.length - 1) {
      const [alphaB, sigmaB] = parts(this.sigmas[i - 1]);
      const r = (lambda(alpha, sigma) - lambda(alphaB, sigmaB)) / h;
      next = next.map((value, k) => value + (0.5 * gain * (clean[k] - this.before[k])) / r);
    }
    this.before = clean;
    return next;
  }
}

function parts(sigma) {  // of a ratio sigma_t / alpha_t, with alpha^2 + sigma^2 = 1
  const alpha = 1 / Math.sqrt(sigma * sigma + 1);
  return [alpha, sigma * alpha];
}

function halfToEven(x) {  // numpy's round
  const down = Math.floor(x);
  if (x - down !== 0.5) return Math.round(x);
  return down % 2 ? down + 1 : down;
}

/** Classifier-free guidance on the two halves [unconditional, conditional]; below 1 it is 1. */
export function guided(output, scale) {
  const n = output.length / 2, s = Math.max(scale, 1);
  return Float32Array.from({ length: n }, (_, i) => output[i] + s * (output[i + n] - output[i]));
}
