// Pictures as dte_lab/common/images.py makes them: the centre square, resized as Pillow does
// (antialiased bicubic, rounded after each direction), on white, in [-1, 1].

function cubic(x) {  // Keys' with a = -0.5
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

function windows(from, to) {  // for each new pixel: the first old one, and integer weights
  const scale = from / to, wide = Math.max(scale, 1), support = 2 * wide;
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5));
    const w = [];
    for (let k = first; k < end; k++) w.push(cubic((k - centre + 0.5) / wide));
    const sum = w.reduce((a, b) => a + b, 0);
    return { first, weights: w.map((x) => roundAway((x / sum) * 2 ** 22)) };
  });
}

function roundAway(x) {
  return x < 0 ? -Math.round(-x) : Math.round(x);
}

function along(pixels, count, channels, from, to, stride, across) {
  // one direction: `count` lines whose pixels lie `stride` apart, lines `across` apart
  const out = new Uint8ClampedArray((pixels.length / from) * to);
  const [outStride, outAcross] = stride === channels ? [channels, to * channels] : [stride, across];
  windows(from, to).forEach(({ first, weights }, i) => {
    for (let line = 0; line < count; line++) {
      for (let c = 0; c < channels; c++) {
        let sum = 2 ** 21, at = line * across + first * stride + c;
        for (const w of weights) {
          sum += w * pixels[at];
          at += stride;
        }
        out[line * outAcross + i * outStride + c] = Math.min(255, Math.max(0, Math.floor(sum / 2 ** 22)));
      }
    }
  });
  return out;
}

/** Bytes (height, width, channels) -> (newHeight, newWidth, channels). */
export function resize(pixels, width, height, newWidth, newHeight, channels) {
  if (newWidth !== width) {
    pixels = along(pixels, height, channels, width, newWidth, channels, width * channels);
  }
  if (newHeight !== height) {
    pixels = along(pixels, newWidth, channels, height, newHeight, newWidth * channels, channels);
  }
  return pixels;
}

/**
 * RGBA bytes of a picture -> {picture, mask}: (3, side, side) in [-1, 1] and (side, side) in [0, 1],
 * null where the picture is opaque. Transparent parts become white.
 */
export function squarePicture(rgba, width, height, side) {
  const short = Math.min(width, height);
  const left = (width - short) >> 1, top = (height - short) >> 1;
  const rgb = new Uint8ClampedArray(short * short * 3), alpha = new Uint8ClampedArray(short * short);
  let opaque = true;
  for (let y = 0, i = 0; y < short; y++) {
    for (let x = 0; x < short; x++, i++) {
      const at = ((top + y) * width + left + x) * 4, a = rgba[at + 3];
      for (let c = 0; c < 3; c++) rgb[3 * i + c] = Math.round((rgba[at + c] * a) / 255 + 255 - a);
      alpha[i] = a;
      opaque &&= a === 255;
    }
  }
  const small = resize(rgb, short, short, side, side, 3), n = side * side;
  const picture = new Float32Array(3 * n);
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) picture[c * n + i] = small[3 * i + c] / 127.5 - 1;
  }
  const mask = opaque ? null : Float32Array.from(resize(alpha, short, short, side, side, 1), (a) => a / 255);
  return { picture, mask };
}

/** A mask (side, side) -> the mean in each of (h, w) cells. */
export function cells(mask, side, h, w) {
  const out = new Float32Array(h * w), tall = side / h, wide = side / w;
  for (let i = 0; i < side * side; i++) {
    const row = Math.floor(Math.floor(i / side) / tall), column = Math.floor((i % side) / wide);
    out[row * w + column] += mask[i] / (tall * wide);
  }
  return out;
}

/** (3, side, side) in [-1, 1] -> RGBA bytes. */
export function toBytes(picture) {
  const n = picture.length / 3, rgba = new Uint8ClampedArray(4 * n).fill(255);
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) rgba[4 * i + c] = Math.round((picture[c * n + i] + 1) * 127.5);
  }
  return rgba;
}

/** Whether all pixels of (3, side, side) are almost the same colour. */
export function isBlank(picture) {
  const n = picture.length / 3;
  return [0, 1, 2].every((c) => {
    const channel = picture.subarray(c * n, (c + 1) * n);
    return (Math.max(...channel) - Math.min(...channel)) * 127.5 <= 4;
  });
}
