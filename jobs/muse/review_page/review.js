// The review page: one picture at a time, its pairs beside it, every decision sent at once.

import { Overlay } from "./overlay.js";
import { drawPair } from "./pair.js";

const $ = (id) => document.getElementById(id);
const overlay = new Overlay($("overlay"));
const state = { summary: null, split: null, position: 0, item: null, current: 0, editing: null };

async function call(path, body) {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  const response = await fetch(path, options);
  const content = await response.json();
  if (!response.ok) throw new Error(content.error ?? content.detail?.[0]?.msg ?? `HTTP ${response.status}`);
  return content;
}

function say(text, isBad = false) {
  const toast = $("toast");
  toast.textContent = text;
  toast.classList.toggle("is-bad", isBad);
  toast.hidden = false;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => (toast.hidden = true), isBad ? 8000 : 2500);
}

async function guarded(work) {
  try {
    return await work();
  } catch (error) {
    say(error.message, true);
    return null;
  }
}

async function loadSummary() {
  state.summary = await call("api/summary");
  const splits = Object.keys(state.summary.splits).filter((name) => state.summary.splits[name].pictures);
  if ($("split").childElementCount !== splits.length) $("split").replaceChildren(...splits.map((name) => new Option(name, name)));
  state.split ??= splits[0];
  $("split").value = state.split;
  const { pairs, decided } = state.summary.splits[state.split];
  $("progress").textContent = `${decided} of ${pairs} pairs decided`;
}

async function open(position) {
  const { pictures } = state.summary.splits[state.split];
  state.position = Math.max(0, Math.min(position, pictures - 1));
  state.item = await call(`api/items/${encodeURIComponent(state.split)}/${state.position}`);
  state.current = 0;
  state.editing = null;
  $("place").textContent = `${state.position + 1} / ${pictures}`;
  $("previous").disabled = state.position === 0;
  $("next").disabled = state.position === pictures - 1;
  $("source").textContent = `picture ${state.item.image_id} · ${state.item.license}`;
  $("figure").style.setProperty("--ratio", state.item.width / state.item.height);
  const picture = $("picture");
  picture.src = `api/pictures/${encodeURIComponent(state.split)}/${state.position}`;
  await picture.decode();
  overlay.reset(state.item.width, state.item.height);
  draw();
}

function draw() {
  const { item, current, editing } = state;
  $("pairs").replaceChildren(
    ...item.pairs.map((pair, place) =>
      drawPair(pair, { isCurrent: place === current, isEditing: place === editing }, {
        onPick: () => place !== state.current && choose(place),
        onEdit: () => edit(place),
        onCancel: () => edit(null),
        onDecide: (verdict, texts) => decide(place, verdict, texts),
        onLight: (index) => place === state.current && light(index),
      }),
    ),
  );
  overlay.setTargets(item.pairs[current].targets);
}

function choose(place) {
  state.current = Math.max(0, Math.min(place, state.item.pairs.length - 1));
  if (state.editing !== null && state.editing !== state.current) state.editing = null;
  draw();
}

function edit(place) {
  state.editing = place;
  if (place !== null) state.current = place;
  draw();
  $("pairs").querySelector("textarea")?.focus();
}

function light(index) {
  overlay.highlight(index);
  for (const word of $("pairs").querySelectorAll(".is-current .word")) {
    word.classList.toggle("is-lit", index !== null && Number(word.dataset.target) === index);
  }
}

async function decide(place, verdict, texts = {}) {
  const who = $("who").value.trim();
  if (!who) {
    $("who").focus();
    return say("Say who you are first: every decision carries a name.", true);
  }
  const pair = state.item.pairs[place];
  const body = { split: state.split, position: state.position, pair: pair.id, verdict, who, ...texts };
  await guarded(async () => {
    const saved = await call("api/decisions", body);
    pair.decision = { ...saved, ...texts };
    state.editing = null;
    state.current = Math.min(place + 1, state.item.pairs.length - 1);
    await loadSummary();
    draw();
    say(`${{ accept: "Accepted", reject: "Rejected", edit: "Edited" }[verdict]}, saved.`);
  });
  return null;
}

async function openUndecided() {
  const { pictures } = state.summary.splits[state.split];
  for (let step = 1; step <= pictures; step++) {
    const position = (state.position + step) % pictures;
    const item = await call(`api/items/${encodeURIComponent(state.split)}/${position}`);
    if (item.pairs.some((pair) => !pair.decision)) return open(position);
  }
  return say("Everything in this split is decided.");
}

function showTip(event) {
  const area = $("overlay").getBoundingClientRect();
  const [u, v] = [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
  const index = overlay.targetAt(u, v);
  light(index);
  const tip = $("tip");
  tip.hidden = index === null;
  if (index === null) return;
  tip.textContent = `${index + 1} ${state.item.pairs[state.current].targets[index].phrase}`;
  tip.style.left = `${100 * Math.max(0.15, Math.min(0.85, u))}%`;
  tip.style.top = `${100 * Math.max(0.12, v)}%`;
}

function onKey(event) {
  if (event.target.closest("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const does = {
    a: () => decide(state.current, "accept"),
    r: () => decide(state.current, "reject"),
    e: () => edit(state.current),
    j: () => choose(state.current + 1),
    k: () => choose(state.current - 1),
    ArrowRight: () => guarded(() => open(state.position + 1)),
    ArrowLeft: () => guarded(() => open(state.position - 1)),
  }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!does || !state.item) return;
  event.preventDefault();
  does();
}

$("previous").addEventListener("click", () => guarded(() => open(state.position - 1)));
$("next").addEventListener("click", () => guarded(() => open(state.position + 1)));
$("undecided").addEventListener("click", () => guarded(openUndecided));
$("split").addEventListener("change", () => guarded(async () => {
  state.split = $("split").value;
  await loadSummary();
  await open(0);
}));
$("apply").addEventListener("click", () => guarded(async () => {
  $("apply").disabled = true;
  try {
    const { pairs } = await call("api/apply", {});
    await loadSummary();
    await open(state.position);
    say(`Written back: ${Object.entries(pairs).map(([name, count]) => `${name} ${count}`).join(", ")} pairs.`);
  } finally {
    $("apply").disabled = false;
  }
}));
$("opacity").addEventListener("input", () => {
  overlay.opacity = Number($("opacity").value) / 100;
  overlay.draw();
});
$("overlay").addEventListener("mousemove", showTip);
$("overlay").addEventListener("mouseleave", () => {
  $("tip").hidden = true;
  light(null);
});
$("who").addEventListener("change", () => localStorage.setItem("pixellm-reviewer", $("who").value));
document.addEventListener("keydown", onKey);

guarded(async () => {
  await loadSummary();
  $("who").value = localStorage.getItem("pixellm-reviewer") || state.summary.who;
  overlay.opacity = 0.5;
  await open(0);
});
