// The random numbers of `dte_lab.common.random.stream` and of torch on a CPU, so that a seed draws
// here what it draws in Python: numpy's SeedSequence, then Mersenne Twister (MT19937).

/** CRC-32 of a text's UTF-8 bytes, as zlib has it. */
export function crc32(text) {
  let crc = ~0;
  for (const byte of new TextEncoder().encode(text)) {
    crc ^= byte;
    for (let k = 0; k < 8; k++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  }
  return ~crc >>> 0;
}

function words(value) {  // an integer from 0 up -> its 32-bit words, lowest first
  const found = [];
  for (let rest = BigInt(value); rest > 0n || !found.length; rest >>= 32n) {
    found.push(Number(rest & 0xffffffffn));
  }
  return found;
}

/** The first 64 bits of numpy.random.SeedSequence(entropy), as [low, high]. */
export function seedSequence(entropy) {
  const source = entropy.flatMap(words), pool = [0, 0, 0, 0];
  let hash = 0x43b0d7e5;
  const hashed = (value) => {
    value ^= hash;
    hash = Math.imul(hash, 0x931e8875);
    value = Math.imul(value, hash);
    return (value ^ (value >>> 16)) >>> 0;
  };
  const mix = (x, y) => {
    const mixed = (Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y)) | 0;
    return (mixed ^ (mixed >>> 16)) >>> 0;
  };
  for (let i = 0; i < 4; i++) pool[i] = hashed(source[i] ?? 0);
  for (let i = 0; i < 4; i++) {
    for (let j = 0; j < 4; j++) if (i !== j) pool[j] = mix(pool[j], hashed(pool[i]));
  }
  for (let i = 4; i < source.length; i++) {
    for (let j = 0; j < 4; j++) pool[j] = mix(pool[j], hashed(source[i]));
  }
  hash = 0x8b51f9dd;
  return [0, 1].map((i) => {
    let value = pool[i] ^ hash;
    hash = Math.imul(hash, 0x58f38ded);
    value = Math.imul(value, hash);
    return (value ^ (value >>> 16)) >>> 0;
  });
}

/** torch.Generator on a CPU. */
export class Generator {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const last = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, last) + i;
    }
    this.next = 624;
  }

  /** 32 random bits. */
  bits() {
    const s = this.state;
    if (this.next === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7fffffff);
        s[i] = s[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.next = 0;
    }
    let y = s[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  /** torch.rand(n): n numbers in [0, 1). */
  rand(n) {
    return Float32Array.from({ length: n }, () => (this.bits() & 0xffffff) / 2 ** 24);
  }

  /** torch.randn of n numbers, at least 16: Box and Muller's, in blocks of 16 as torch has it. */
  randn(n) {
    const x = this.rand(n);
    const fill = (start) => {
      for (let i = start; i < start + 8; i++) {
        const radius = Math.sqrt(-2 * Math.log(1 - x[i])), angle = 2 * Math.PI * x[i + 8];
        x[i] = radius * Math.cos(angle);
        x[i + 8] = radius * Math.sin(angle);
      }
    };
    for (let start = 0; start + 16 <= n; start += 16) fill(start);
    if (n % 16) {  // the last 16 anew
      x.set(this.rand(16), n - 16);
      fill(n - 16);
    }
    return x;
  }

  /** torch.randperm(n). */
  randperm(n) {
    const order = Array.from({ length: n }, (_, i) => i);
    for (let i = 0; i < n - 1; i++) {
      const j = i + (this.bits() % (n - i));
      [order[i], order[j]] = [order[j], order[i]];
    }
    return order;
  }
}

/** A generator for one use of a seed. */
export function stream(seed, ...use) {
  const whole = BigInt.asUintN(64, BigInt(seed));
  const [low, high] = seedSequence([whole, ...use.map((u) => typeof u === "string" ? crc32(u) : u)]);
  return new Generator(((low >>> 1) | (high << 31)) >>> 0);  // torch reads the lower 32 bits
}
