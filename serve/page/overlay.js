// The masks over the picture: colours, drawing, and what lies under the pointer.

import { rasterise } from "./rle.js";

const LONGEST_SIDE = 1600;
const HUES = [16, 205, 145, 265, 45, 325, 175, 95, 235, 0];

/** The colour of target k, the same in words, legend and mask. */
export function colourOf(index) {
  const lightness = 56 - 8 * (Math.floor(index / HUES.length) % 3);
  return { hue: HUES[index % HUES.length], saturation: 88, lightness };
}

export function cssColour(index) {
  const { hue, saturation, lightness } = colourOf(index);
  return `hsl(${hue} ${saturation}% ${lightness}%)`;
}

export class Overlay {
  /** @param {HTMLCanvasElement} canvas lies exactly over the picture */
  constructor(canvas) {
    this.canvas = canvas;
    this.layers = [];
    this.opacity = 0.55;
    this.isOn = true;
    this.highlighted = null;
  }

  /** Forgets all masks and takes the size of a new picture. */
  reset(width, height) {
    const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
    this.canvas.width = Math.max(1, Math.round(width * scale));
    this.canvas.height = Math.max(1, Math.round(height * scale));
    this.layers = [];
    this.highlighted = null;
    this.draw();
  }

  setTargets(targets) {
    this.layers = [];
    for (const target of targets) this.addTarget(target);
    this.highlighted = null;
    this.draw();
  }

  addTarget(target) {
    const { width, height } = this.canvas;
    const bits = rasterise(target.mask, width, height);
    this.layers.push({ target, bits, image: paint(bits, width, height, target.index), isVisible: true });
    this.draw();
  }

  setVisible(index, isVisible) {
    for (const layer of this.layers) if (layer.target.index === index) layer.isVisible = isVisible;
    this.draw();
  }

  isVisible(index) {
    return this.layers.some((layer) => layer.target.index === index && layer.isVisible);
  }

  highlight(index) {
    if (this.highlighted === index) return;
    this.highlighted = index;
    this.draw();
  }

  /** The topmost target at a point given in 0..1 of the picture, smaller masks first; null for none. */
  targetAt(u, v) {
    if (!this.isOn) return null;
    const { width, height } = this.canvas;
    const x = Math.floor(u * width), y = Math.floor(v * height);
    if (x < 0 || y < 0 || x >= width || y >= height) return null;
    const hits = this.layers.filter((layer) => layer.isVisible && layer.bits[y * width + x]);
    hits.sort((a, b) => a.target.area - b.target.area);
    return hits.length ? hits[0].target.index : null;
  }

  /** The visible masks as one opaque shape. */
  drawShape(canvas) {
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    for (const { isVisible, image } of this.layers) if (isVisible) context.drawImage(image.fill, 0, 0, canvas.width, canvas.height);
  }

  draw(canvas = this.canvas) {
    const context = canvas.getContext("2d");
    if (canvas === this.canvas) context.clearRect(0, 0, canvas.width, canvas.height);
    if (!this.isOn) return;
    for (const layer of this.layers) {
      const isLit = this.highlighted === layer.target.index;
      if (!layer.isVisible && !isLit) continue;
      const dimmed = this.highlighted !== null && !isLit ? 0.25 : 1;
      context.globalAlpha = Math.min(1, (isLit ? Math.max(this.opacity, 0.5) * 1.35 : this.opacity) * dimmed);
      context.drawImage(layer.image.fill, 0, 0, canvas.width, canvas.height);
      context.globalAlpha = this.opacity > 0 || isLit ? dimmed : 0;
      context.drawImage(layer.image.edge, 0, 0, canvas.width, canvas.height);
    }
    context.globalAlpha = 1;
  }
}

/** Two pictures of a mask: its inside, and its outline. */
function paint(bits, width, height, index) {
  const [red, green, blue] = toRgb(colourOf(index));
  const fill = new ImageData(width, height), edge = new ImageData(width, height);
  const reach = Math.max(1, Math.round(Math.max(width, height) / 700));
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      if (!bits[at]) continue;
      fill.data.set([red, green, blue, 255], at * 4);
      const isEdge =
        x < reach || y < reach || x >= width - reach || y >= height - reach ||
        !bits[at - reach] || !bits[at + reach] || !bits[at - reach * width] || !bits[at + reach * width];
      if (isEdge) edge.data.set([red, green, blue, 255], at * 4);
    }
  }
  return { fill: toCanvas(fill), edge: toCanvas(edge) };
}

function toCanvas(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function toRgb({ hue, saturation, lightness }) {
  const s = saturation / 100, l = lightness / 100, a = s * Math.min(l, 1 - l);
  const channel = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (l - a * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}
