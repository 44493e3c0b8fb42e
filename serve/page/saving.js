// What can be taken away: the picture with its masks, the masks as run lengths, the things cut out.

/** The picture as it is shown, at its own size. */
export function savePng({ name, width, height }, picture, overlay) {
  const canvas = blank(width, height);
  canvas.getContext("2d").drawImage(picture, 0, 0, width, height);
  overlay.draw(canvas);
  canvas.toBlob((blob) => save(blob, `${name}-masks.png`), "image/png");
}

/** The visible things' pixels; everything else is clear. */
export function saveCutout({ name, width, height }, picture, overlay) {
  const canvas = blank(width, height);
  overlay.drawShape(canvas);
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "source-in";
  context.drawImage(picture, 0, 0, width, height);
  canvas.toBlob((blob) => save(blob, `${name}-cutout.png`), "image/png");
}

/** The answer with every mask as COCO run lengths. */
export function saveRle({ name, width, height }, model, turn) {
  const record = {
    picture: { name, width, height },
    model,
    question: turn?.question ?? null,
    text: turn?.answer ?? null,
    targets: turn?.targets ?? [],
  };
  save(new Blob([JSON.stringify(record, null, 1)], { type: "application/json" }), `${name}-masks.json`);
}

function blank(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
