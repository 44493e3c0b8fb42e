// One pair as a card: read, or being edited. Markers are {seg} in the data and [1], [2], … in the editor.

import { cssColour } from "./overlay.js";

const MARKER = "{seg}";

/** The answer as a person edits it: the k-th marker as [k]. */
export function toNumbered(answer) {
  let number = 0;
  return answer.replaceAll(MARKER, () => `[${++number}]`);
}

/** Back from the editor: the answer with {seg}, and which of the pair's targets its markers stand for, in order. */
export function fromNumbered(text) {
  const kept = [];
  const answer = text.replace(/\[(\d+)\]/g, (_, number) => {
    kept.push(Number(number) - 1);
    return MARKER;
  });
  return { answer, kept };
}

/** @param handlers {onDecide(verdict, edit), onEdit(), onCancel(), onLight(index | null), onPick()} */
export function drawPair(pair, { isCurrent, isEditing }, handlers) {
  const card = element("li", "pair");
  card.dataset.pair = pair.id;
  card.classList.toggle("is-current", isCurrent);
  if (pair.decision) card.classList.add(`is-${pair.decision.verdict}`);
  card.addEventListener("click", handlers.onPick);
  card.append(...(isEditing ? editor(pair, handlers) : reading(pair, handlers)));
  return card;
}

/** An edit that the dataset does not hold yet. */
function pendingEdit({ decision }) {
  return decision?.verdict === "edit" && !decision.is_applied ? decision : null;
}

function reading(pair, handlers) {
  const edit = pendingEdit(pair);
  const kept = edit ? edit.kept_targets : pair.targets.map((_, place) => place);
  const phrases = edit ? edit.phrases : pair.targets.map((target) => target.phrase);
  const question = element("p", "question", edit ? edit.question : pair.question);
  const answer = element("p", "answer");
  const pieces = (edit ? edit.answer : pair.answer).split(MARKER);
  pieces.forEach((piece, place) => {
    if (place >= kept.length) return answer.append(piece);
    const phrase = phrases[place];
    const at = piece.toLowerCase().lastIndexOf(phrase.toLowerCase());
    const start = at >= 0 && !piece.slice(at + phrase.length).trim() ? at : piece.trimEnd().lastIndexOf(" ") + 1;
    answer.append(piece.slice(0, start), word(piece.slice(start).trim(), kept[place], handlers));
  });
  const classes = pair.targets.map((target, place) => `${place + 1} ${target.category}`).join(" · ");
  return [question, answer, element("p", "classes", classes), actions(pair, handlers)];
}

function word(text, index, handlers) {
  const button = element("button", "word", text);
  button.type = "button";
  button.style.setProperty("--colour", cssColour(index));
  button.dataset.target = index;
  button.append(element("sup", "", String(index + 1)));
  for (const [event, value] of [["mouseenter", index], ["focus", index], ["mouseleave", null], ["blur", null]]) {
    button.addEventListener(event, () => handlers.onLight(value));
  }
  return button;
}

function actions(pair, handlers) {
  const row = element("div", "actions");
  for (const [name, verdict] of [["Accept", "accept"], ["Reject", "reject"]]) {
    const button = element("button", verdict, name);
    button.type = "button";
    button.setAttribute("aria-pressed", String(pair.decision?.verdict === verdict));
    button.addEventListener("click", () => handlers.onDecide(verdict));
    row.append(button);
  }
  const edit = element("button", "edit", "Edit");
  edit.type = "button";
  edit.addEventListener("click", handlers.onEdit);
  row.append(edit);
  if (pair.decision) {
    const { verdict, who, when } = pair.decision;
    const past = { accept: "accepted", reject: "rejected", edit: "edited" }[verdict];
    row.append(element("span", "verdict", `${past} by ${who}, ${new Date(when).toLocaleString()}`));
  }
  return row;
}

function editor(pair, handlers) {
  const edit = pendingEdit(pair);
  const form = element("form", "editor");
  const question = area("Question", edit ? edit.question : pair.question);
  let number = 0;
  const answerText = edit ? edit.answer.replaceAll(MARKER, () => `[${edit.kept_targets[number++] + 1}]`) : toNumbered(pair.answer);
  const answer = area("Answer", answerText);
  const phrases = pair.targets.map((target, place) => {
    const label = element("label", "target");
    label.style.setProperty("--colour", cssColour(place));
    const input = element("input");
    input.type = "text";
    const at = edit ? edit.kept_targets.indexOf(place) : -1;
    input.value = at >= 0 ? edit.phrases[at] : target.phrase;
    input.setAttribute("aria-label", `Description of ${place + 1}`);
    label.append(element("b", "", `${place + 1} ${target.category}`), input);
    return { label, input };
  });
  const hint = element("p", "hint", "Each [number] is a mask; take one out to drop its target, move it to reorder.");
  const save = element("button", "save", "Save");
  save.type = "submit";
  const cancel = element("button", "", "Cancel");
  cancel.type = "button";
  cancel.addEventListener("click", handlers.onCancel);
  const buttons = element("div", "actions");
  buttons.append(save, cancel);
  form.append(question.label, answer.label, hint, ...phrases.map(({ label }) => label), buttons);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { answer: text, kept } = fromNumbered(answer.input.value);
    const chosen = kept.map((place) => phrases[place]?.input.value ?? "");
    handlers.onDecide("edit", { question: question.input.value, answer: text, kept_targets: kept, phrases: chosen });
  });
  return [form];
}

function area(name, text) {
  const label = element("label", "", name);
  const input = element("textarea");
  input.rows = 3;
  input.value = text;
  label.append(input);
  return { label, input };
}

function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}
