// What is shown of v*, of tuning, and of the pictures.

/** The nearest words with their cosines, as bars. */
export function showWords(list, near) {
  list.replaceChildren(...near.map(({ word, cosine }) => {
    const item = document.createElement("li"), bar = document.createElement("i");
    bar.style.width = `${Math.max(2, 100 * cosine)}%`;
    item.append(text("span", word), bar, text("span", cosine.toFixed(2)));
    return item;
  }));
}

/** The map of words: positions in the unit square, the path of v*, and names of what is near. */
export class WordMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.path = [];
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  words(words, positions) {
    Object.assign(this, { names: words, positions });
    this.landmarks = [];  // words that are far from each other
    positions.forEach(([x, y], row) => {
      if (words[row].length < 4) return;
      const far = ([u, v]) => Math.hypot(u - x, (v - y) * 1.6) > 0.24;
      if (this.landmarks.every((other) => far(positions[other]))) this.landmarks.push(row);
    });
    this.draw();
  }

  /** anew: begin a new path there; otherwise go on to there. */
  move(at, near, anew) {
    this.near = near;
    this.path = anew ? [at] : [...this.path, at];
    const names = near.slice(0, 3).map((n) => n.word).join(", ");
    this.canvas.setAttribute("aria-label", `Map of words: v* stands between ${names}`);
    this.draw();
  }

  draw() {
    const { canvas } = this, ratio = devicePixelRatio, w = canvas.clientWidth, h = canvas.clientHeight;
    if (!this.positions || !w) return;
    canvas.width = w * ratio;
    canvas.height = h * ratio;
    const c = canvas.getContext("2d"), style = getComputedStyle(canvas);
    const [ink, soft, dot, accent, card] = ["ink", "soft", "dot", "accent", "card"]
      .map((name) => style.getPropertyValue(`--${name}`));
    const at = ([x, y]) => [14 + x * (w - 60), 12 + y * (h - 24)];
    c.scale(ratio, ratio);
    c.fillStyle = dot;
    for (const place of this.positions) {
      const [x, y] = at(place);
      c.beginPath();
      c.arc(x, y, 1.6, 0, 7);
      c.fill();
    }
    const taken = [];
    const here = this.path.length ? at(this.path.at(-1)) : [-99, -99];
    const label = (row, colour, bold) => {
      const [left, y] = at(this.positions[row]), name = this.names[row];
      const x = bold && Math.hypot(left - here[0], y - here[1]) < 14 ? here[0] + 8 : left;
      c.font = `${bold ? "600 " : ""}11px system-ui, sans-serif`;
      const box = [x + 4, y - 7, c.measureText(name).width + 4, 13];
      if (taken.some(([a, b, d, e]) => box[0] < a + d && a < box[0] + box[2] && box[1] < b + e && b < box[1] + box[3])) return;
      taken.push(box);
      c.lineWidth = 3;
      c.strokeStyle = card;
      c.strokeText(name, x + 5, y + 3.5);
      c.fillStyle = colour;
      c.fillText(name, x + 5, y + 3.5);
    };
    taken.push([here[0] - 8, here[1] - 10, 16, 20]);
    for (const { row } of this.near ?? []) label(row, ink, true);
    for (const row of this.landmarks) label(row, soft, false);
    if (!this.path.length) return;
    c.strokeStyle = accent;
    c.lineWidth = 2;
    c.beginPath();
    this.path.map(at).forEach(([x, y], i) => i ? c.lineTo(x, y) : c.moveTo(x, y));
    c.stroke();
    star(c, here, accent, card);
  }
}

function star(c, [x, y], fill, edge) {
  c.beginPath();
  for (let i = 0; i < 12; i++) {
    const r = i % 2 ? 4 : 9.5, angle = (i * Math.PI) / 6 - Math.PI / 2;
    c.lineTo(x + r * Math.cos(angle), y + r * Math.sin(angle));
  }
  c.closePath();
  Object.assign(c, { fillStyle: fill, strokeStyle: edge, lineWidth: 1.5 });
  c.stroke();
  c.fill();
}

/** The losses so far, of `count` steps in all. */
export function showCurve(svg, losses, count) {
  const width = svg.clientWidth || 320, right = width - 8;
  svg.setAttribute("viewBox", `0 0 ${width} 84`);
  const low = Math.min(...losses), high = Math.max(...losses), span = Math.max(high - low, 1e-3);
  const points = losses.map((y, i) => [34 + (i * (right - 34)) / Math.max(count - 1, 1), 12 + (52 * (high - y)) / span]);
  const path = points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  const dots = points.map(([x, y]) => `<circle cx="${x}" cy="${y}" r="2.5"/>`).join("");
  svg.innerHTML = `<line x1="34" y1="68" x2="${right}" y2="68"/><path d="${path}"/>${dots}
    <text x="0" y="16">${high.toFixed(2)}</text><text x="0" y="68">${low.toFixed(2)}</text>
    <text x="${right}" y="81" text-anchor="end">step ${losses.length} of ${count}</text><text x="34" y="81">loss</text>`;
  svg.setAttribute("aria-label", `Loss of tuning, step ${losses.length} of ${count}: ${losses[0].toFixed(3)} at first, now ${losses.at(-1).toFixed(3)}`);
}

/** RGBA bytes of a square picture on a canvas. */
export function paint(canvas, rgba, label) {
  const side = Math.sqrt(rgba.length / 4);
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(new ImageData(rgba, side), 0, 0);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  return canvas;
}

export function text(tag, content) {
  const element = document.createElement(tag);
  element.textContent = content;
  return element;
}
