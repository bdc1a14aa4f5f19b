// Tiles as pixels: the mean of the tiles over every pixel, as mil/look/drawing.py has it, and their colours.

const LONGEST = 4096;
const PARTS = 8;

/** The step of the tiles' own grid where they lie on one, else a part of a tile. */
function stepOf(coords, side) {
  const axis = (offset) => {
    const values = [...new Set(coords.filter((_, i) => i % 2 === offset))].sort((a, b) => a - b);
    if (values.length < 2) return { low: values[0] ?? 0, step: side, values };
    let step = Infinity;
    for (let i = 1; i < values.length; i++) step = Math.min(step, values[i] - values[i - 1]);
    const span = values[values.length - 1] - values[0];
    return { low: values[0], step: span / Math.round(span / step), values };
  };
  const [across, down] = [axis(0), axis(1)];
  const step = Math.min(across.step, down.step);
  const parts = Math.round(side / step);
  const onGrid = ({ low, values }) => values.every((value) => Math.abs((value - low) / step - Math.round((value - low) / step)) < 0.1);
  const fits = parts >= 1 && parts <= PARTS && Math.abs(side / step - parts) < 0.02;
  return fits && onGrid(across) && onGrid(down) ? step : side / PARTS;
}

export class Raster {
  constructor(layer) {
    this.layer = layer;
    const { coords, side, n } = layer;
    let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
    for (let i = 0; i < n; i++) {
      left = Math.min(left, coords[2 * i]);
      top = Math.min(top, coords[2 * i + 1]);
      right = Math.max(right, coords[2 * i] + side);
      bottom = Math.max(bottom, coords[2 * i + 1] + side);
    }
    [this.left, this.top] = [left, top];
    this.step = Math.max(stepOf(coords, side), Math.max(right - left, bottom - top) / LONGEST);
    this.width = Math.max(1, Math.ceil((right - left) / this.step - 1e-3));
    this.height = Math.max(1, Math.ceil((bottom - top) / this.step - 1e-3));
    this.canvas = document.createElement("canvas");
    [this.canvas.width, this.canvas.height] = [this.width, this.height];
    this.#boxes(coords, side, n);
    this.#index(coords, side, n);
  }

  /** Pixels whose centre is in a tile; of a tile without any the one that holds its own centre. */
  #boxes(coords, side, n) {
    const { step } = this;
    this.boxes = new Int32Array(4 * n);
    for (let i = 0; i < n; i++) {
      for (const axis of [0, 1]) {
        const low = coords[2 * i + axis] - (axis ? this.top : this.left);
        let first = Math.ceil(low / step - 0.5 - 1e-6);
        let end = Math.ceil((low + side) / step - 0.5 - 1e-6);
        if (end <= first) [first, end] = [Math.floor((low + side / 2) / step), Math.floor((low + side / 2) / step) + 1];
        this.boxes[4 * i + axis] = Math.max(0, first);
        this.boxes[4 * i + 2 + axis] = Math.min(axis ? this.height : this.width, end);
      }
    }
  }

  #index(coords, side, n) {
    this.cells = new Map();
    for (let i = 0; i < n; i++) {
      const key = `${Math.floor(coords[2 * i] / side)},${Math.floor(coords[2 * i + 1] / side)}`;
      if (!this.cells.has(key)) this.cells.set(key, []);
      this.cells.get(key).push(i);
    }
  }

  /** Tiles that hold a point of the slide. */
  at(x, y) {
    const { coords, side } = this.layer;
    const [column, row] = [Math.floor(x / side), Math.floor(y / side)];
    const near = [];
    for (const i of [column - 1, column]) for (const j of [row - 1, row]) near.push(...(this.cells.get(`${i},${j}`) ?? []));
    return near.filter((t) => x >= coords[2 * t] && x < coords[2 * t] + side && y >= coords[2 * t + 1] && y < coords[2 * t + 1] + side);
  }

  /** Colour the pixels. colours: 768 numbers; tiles below `least` are left out. */
  paint(values, colours, [low, high], least) {
    const { width, height, boxes } = this;
    const sums = new Float32Array(width * height);
    const counts = new Uint16Array(width * height);
    for (let i = 0; i < values.length; i++) {
      const value = values[i];
      if (!(value >= least)) continue;
      const [left, top, right, bottom] = [boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]];
      for (let y = top; y < bottom; y++) {
        for (let x = left; x < right; x++) {
          sums[y * width + x] += value;
          counts[y * width + x]++;
        }
      }
    }
    const image = new ImageData(width, height);
    const pixels = image.data;
    const span = Math.max(high - low, 1e-12);
    for (let i = 0; i < counts.length; i++) {
      if (!counts[i]) continue;
      const share = (sums[i] / counts[i] - low) / span;
      const place = 3 * Math.min(255, Math.max(0, Math.round(share * 255)));
      pixels[4 * i] = colours[place];
      pixels[4 * i + 1] = colours[place + 1];
      pixels[4 * i + 2] = colours[place + 2];
      pixels[4 * i + 3] = 255;
    }
    this.canvas.getContext("2d").putImageData(image, 0, 0);
  }
}
