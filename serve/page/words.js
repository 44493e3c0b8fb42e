// An answer's words, with each [k] tied to the words before it that name target k.

import { cssColour } from "./overlay.js";

const MARKER = /\[(\d+)\]/g;

/** Splits text into plain pieces and {index, words} pieces; words may be empty. */
export function pieces(text, targets) {
  const phrases = new Map(targets.map((target) => [target.index, target.phrase]));
  const found = [];
  let start = 0, expected = 1;
  for (const match of text.matchAll(MARKER)) {
    if (Number(match[1]) !== expected) continue;
    const index = expected++ - 1;
    let before = text.slice(start, match.index);
    const phrase = (phrases.get(index) ?? "").trim();
    const trimmed = before.trimEnd();
    let words = "";
    if (phrase && trimmed.toLowerCase().endsWith(phrase.toLowerCase())) {
      words = trimmed.slice(trimmed.length - phrase.length);
      before = trimmed.slice(0, trimmed.length - phrase.length);
    }
    found.push(before, { index, words });
    start = match.index + match[0].length;
  }
  found.push(text.slice(start));
  return found.filter((piece) => piece !== "");
}

/** Fills an element with the answer; each target becomes a button with data-target = its index. */
export function renderAnswer(element, text, targets) {
  const done = new Set(targets.map((target) => target.index));
  element.replaceChildren(
    ...pieces(text, targets).map((piece) => {
      if (typeof piece === "string") return document.createTextNode(piece);
      const button = document.createElement("button");
      button.type = "button";
      button.className = "word";
      button.dataset.target = piece.index;
      button.style.setProperty("--colour", cssColour(piece.index));
      button.disabled = !done.has(piece.index);
      button.setAttribute("aria-label", `${piece.words || "target"}, mask ${piece.index + 1}: show or hide`);
      const number = document.createElement("sup");
      number.textContent = piece.index + 1;
      button.append(piece.words, number);
      return button;
    }),
  );
}
