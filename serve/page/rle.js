// COCO's compressed run-length code: the same text that pycocotools reads.

/** Lengths of the runs, alternating outside and inside, down the columns. */
export function unpackCounts(text) {
  const counts = [];
  let position = 0;
  while (position < text.length) {
    let value = 0, shift = 0, more = true;
    while (more) {
      const code = text.charCodeAt(position++) - 48;
      value |= (code & 0x1f) << shift;
      more = (code & 0x20) !== 0;
      shift += 5;
      if (!more && code & 0x10) value |= -1 << shift;
    }
    if (counts.length > 2) value += counts[counts.length - 2];
    counts.push(value);
  }
  return counts;
}

/**
 * A mask as one byte per pixel, rows first, drawn at width × height whatever its own size is
 * (large pictures need not be unpacked in full to be shown).
 */
export function rasterise({ size: [maskHeight, maskWidth], counts }, width, height) {
  const ends = [];
  let total = 0;
  for (const count of unpackCounts(counts)) ends.push((total += count));
  const bits = new Uint8Array(width * height);
  let run = 0;
  for (let x = 0; x < width; x++) {
    const column = Math.min(maskWidth - 1, Math.floor(((x + 0.5) * maskWidth) / width)) * maskHeight;
    while (run > 0 && ends[run - 1] > column) run--;
    for (let y = 0; y < height; y++) {
      const offset = column + Math.min(maskHeight - 1, Math.floor(((y + 0.5) * maskHeight) / height));
      while (ends[run] <= offset) run++;
      bits[y * width + x] = run & 1;
    }
  }
  return bits;
}
