// Adam (Kingma and Ba 2015) as torch.optim.AdamW without weight decay has it.

export class Adam {
  constructor(size, rate, betas = [0.9, 0.99], eps = 1e-8) {
    Object.assign(this, { rate, betas, eps, count: 0 });
    this.mean = new Float32Array(size);
    this.square = new Float32Array(size);
  }

  /** Move `x` against `gradient`, in place; factor: of the rate. */
  step(x, gradient, factor = 1) {
    const [b1, b2] = this.betas;
    this.count += 1;
    const size = (this.rate * factor) / (1 - b1 ** this.count);
    const root = Math.sqrt(1 - b2 ** this.count);
    for (let i = 0; i < x.length; i++) {
      const g = gradient[i];
      this.mean[i] += (1 - b1) * (g - this.mean[i]);
      this.square[i] = b2 * this.square[i] + (1 - b2) * g * g;
      x[i] -= (size * this.mean[i]) / (Math.sqrt(this.square[i]) / root + this.eps);
    }
  }
}

/** The factor of the rates at a step from 0: `TuneConfig.rate_at`. */
export function rateAt(step, numSteps, constantSteps) {
  if (constantSteps === null || step < constantSteps) return 1;
  return (numSteps - step) / (numSteps - constantSteps);
}

/** What a step of tuning sees besides the picture: `draw_batch`, for one picture and one prompt. */
export function drawBatch(generator, batchSize, latentSize, T) {
  generator.randperm(batchSize);  // which picture, which prompt: there is one of each
  generator.randperm(batchSize);
  const bins = generator.rand(batchSize);
  const timesteps = Int32Array.from(bins, (u, i) => {
    const at = Math.fround(Math.fround(Math.fround(i + u) / batchSize) * T);
    return Math.min(Math.floor(at), T - 1);
  });
  return { timesteps, noise: generator.randn(batchSize * latentSize) };
}
