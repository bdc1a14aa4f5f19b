// A layer's bytes (see mil/viewer/layers.py): places of the tiles and half floats of every member's scores.

let table = null;

function halves() {
  if (table) return table;
  table = new Float32Array(65536);
  for (let code = 0; code < 65536; code++) {
    const exponent = (code >> 10) & 31;
    const part = code & 1023;
    const value = exponent ? 2 ** (exponent - 15) * (1 + part / 1024) : 2 ** -14 * (part / 1024);
    table[code] = exponent === 31 ? Number.NaN : code & 32768 ? -value : value;
  }
  return table;
}

export class Layer {
  constructor(bytes) {
    const length = new DataView(bytes).getUint32(0, true);
    Object.assign(this, JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, length))));
    this.coords = new Int32Array(bytes, 4 + length, 2 * this.n);
    this.codes = new Uint16Array(bytes, 4 + length + 8 * this.n);
    this.kept = new Map();
  }

  get scored() {
    return this.codes.length > 0;
  }

  has(member) {
    return member === "all" || this.members.includes(Number(member));
  }

  /** Rows of the members that are meant: all that held the slide out, or one. */
  rows(member) {
    const wanted = member === "all" ? this.honest : [Number(member)];
    return wanted.map((each) => this.members.indexOf(each)).filter((row) => row >= 0);
  }

  row(row, scale) {
    const codes = this.codes.subarray(row * this.n, (row + 1) * this.n);
    if (scale === "percentile") return percentiles(codes);
    const values = halves();
    return Float32Array.from(codes, (code) => values[code] * this.unit);
  }

  /** Scores on a scale: the mean over members of their scores, or of their percentiles. */
  values(member, scale) {
    const key = `${member} ${scale}`;
    if (!this.kept.has(key)) this.kept.set(key, mean(this.rows(member).map((row) => this.row(row, scale)), this.n));
    return this.kept.get(key);
  }

  /** The standard deviation over members of one tile's raw score; null of one member. */
  sd(member, tile) {
    const rows = this.rows(member);
    if (rows.length < 2) return null;
    const values = rows.map((row) => halves()[this.codes[row * this.n + tile]] * this.unit);
    const middle = values.reduce((a, b) => a + b, 0) / values.length;
    return Math.sqrt(values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1));
  }
}

function mean(rows, n) {
  const sum = new Float32Array(n);
  for (const row of rows) for (let i = 0; i < n; i++) sum[i] += row[i];
  return sum.map((value) => value / Math.max(1, rows.length));
}

/** Percent of the slide's other tiles that score lower, ties counting half. */
export function percentiles(codes) {
  const n = codes.length;
  if (n === 1) return Float32Array.of(50);
  const ordered = Uint16Array.from(codes, (code) => (code === 32768 ? 32768 : code & 32768 ? ~code : code | 32768));
  const counts = new Uint32Array(65537);
  for (const code of ordered) counts[code + 1]++;
  for (let i = 1; i <= 65536; i++) counts[i] += counts[i - 1];
  return Float32Array.from(ordered, (code) => ((counts[code] + (counts[code + 1] - counts[code] - 1) / 2) / (n - 1)) * 100);
}

export function range(values, scale, signed) {
  if (scale === "percentile") return [0, 100];
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (!signed) return [low, high];
  const end = Math.max(Math.abs(low), Math.abs(high)) || 1;
  return [-end, end];
}
