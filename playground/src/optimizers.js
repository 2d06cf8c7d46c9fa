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

const [A, B, C] = [3.4445, -4.775, 2.0315], ITERATIONS = 5, MOMENTUM = 0.95;

/** Muon (Jordan et al. 2024) of matrices that lie row by row in one vector, as `MuonAdamW` has it. */
export class Muon {
  /** matrices: [[rows, columns], ...]. */
  constructor(matrices, rate) {
    Object.assign(this, { matrices, rate });
    this.momentum = new Float32Array(matrices.reduce((n, [rows, columns]) => n + rows * columns, 0));
  }

  /** Move `x` against `gradient`, in place; factor: of the rate. */
  step(x, gradient, factor = 1) {
    let start = 0;
    for (const [rows, columns] of this.matrices) {
      const end = start + rows * columns, momentum = this.momentum.subarray(start, end);
      const update = gradient.slice(start, end);
      for (let i = 0; i < update.length; i++) {
        momentum[i] += (1 - MOMENTUM) * (update[i] - momentum[i]);
        update[i] += MOMENTUM * (momentum[i] - update[i]);  // Nesterov
      }
      const size = 0.2 * Math.sqrt(Math.max(rows, columns)) * this.rate * factor;
      orthogonal(update, rows, columns).forEach((v, i) => { x[start + i] -= size * v; });
      start = end;
    }
  }
}

/** About U V^T of a matrix with decomposition U S V^T, by Newton-Schulz. */
function orthogonal(matrix, rows, columns) {
  if (rows > columns) {
    const wide = orthogonal(transposed(matrix, rows, columns), columns, rows);
    return transposed(wide, columns, rows);
  }
  const norm = Math.sqrt(matrix.reduce((sum, v) => sum + v * v, 0)) + 1e-7;
  let x = matrix.map((v) => v / norm);
  for (let i = 0; i < ITERATIONS; i++) {
    const gram = product(x, transposed(x, rows, columns), rows, columns, rows);
    const square = product(gram, gram, rows, rows, rows);
    const moved = product(gram.map((v, j) => B * v + C * square[j]), x, rows, rows, columns);
    x = x.map((v, j) => A * v + moved[j]);
  }
  return x;
}

function transposed(matrix, rows, columns) {
  return matrix.map((_, i) => matrix[(i % rows) * columns + Math.floor(i / rows)]);
}

/** (n, m) times (m, k). */
function product(p, q, n, m, k) {
  const found = new Float32Array(n * k);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < m; j++) {
      const factor = p[i * m + j];
      for (let l = 0; l < k; l++) found[i * k + l] += factor * q[j * k + l];
    }
  }
  return found;
}

/** The factor of the rates at a step from 0: `TuneConfig.rate_at`. */
export function rateAt(step, constantSteps) {
  return Math.min(1, constantSteps / (step + 1));
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
