// The page: one picture, a conversation about it, and masks tied to the words that name them.

import { ApiError, ask, sendFeedback, service, useKey } from "./api.js";
import { Overlay, cssColour } from "./overlay.js";
import { saveCutout, savePng, saveRle } from "./saving.js";
import { renderAnswer } from "./words.js";

const $ = (id) => document.getElementById(id);
const overlay = new Overlay($("overlay"));
const MOST_EARLIER = 12;

const state = {
  model: null,
  features: {},
  picture: null, // {url, name, width, height, turns, messages}
  earlier: [], // pictures asked about in this tab, this one included
  turns: [], // {question, answer, targets, element, isComplete}
  shown: null, // the turn whose masks are on the picture
  abort: null, // while an answer is coming
};

// ---------------------------------------------------------------- picture

async function takePicture(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) return say(`“${file.name}” is not a picture. Choose a JPEG, PNG or WebP file.`);
  stop();
  const url = await readAsDataUrl(file);
  const image = $("picture");
  image.src = url;
  try {
    await image.decode();
  } catch {
    return say(`This browser cannot show “${file.name}”. It may be damaged; try a JPEG or PNG.`);
  }
  const name = file.name.replace(/\.[^.]*$/, "") || "picture";
  const picture = { url, name, width: image.naturalWidth, height: image.naturalHeight, turns: [], messages: [] };
  state.earlier = [picture, ...state.earlier].slice(0, MOST_EARLIER);
  showPicture(picture);
}

/** Puts a picture with its conversation on the page; what was there stays in the history. */
function showPicture(picture) {
  if (state.picture) state.picture.messages = [...$("messages").children];
  state.picture = picture;
  state.turns = picture.turns;
  $("picture").src = picture.url;
  $("messages").replaceChildren(...picture.messages);
  $("drop").hidden = $("examples").hidden = true;
  $("figure").style.setProperty("--ratio", String(picture.width / picture.height));
  $("figure").hidden = $("tools").hidden = false;
  $("hint").hidden = picture.turns.length > 0;
  overlay.reset(picture.width, picture.height);
  state.shown = null;
  if (picture.turns.length) show(picture.turns.at(-1));
  showLegend();
  showHistory();
  enable();
  $("prompt").focus();
}

function showHistory() {
  $("history").hidden = state.earlier.length < 2;
  $("history").replaceChildren(
    ...state.earlier.map((picture) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-label", `${picture.name}, ${picture.turns.length} question${picture.turns.length === 1 ? "" : "s"}`);
      if (picture === state.picture) button.setAttribute("aria-current", "true");
      const image = document.createElement("img");
      image.src = picture.url;
      image.alt = "";
      button.append(image);
      button.addEventListener("click", () => {
        if (picture === state.picture) return;
        stop();
        showPicture(picture);
      });
      return button;
    }),
  );
}

async function takeExample(button) {
  const response = await fetch(button.querySelector("img").src);
  await takePicture(new File([await response.blob()], `${button.dataset.example}.jpg`, { type: "image/jpeg" }));
  $("prompt").value = button.dataset.question;
  fitPrompt();
}

function readAsDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// ---------------------------------------------------------------- conversation

async function askNow() {
  const question = $("prompt").value.trim();
  if (!question || !state.picture || state.abort) return;
  $("prompt").value = "";
  fitPrompt();
  $("hint").hidden = true;
  const turn = addTurn(question);
  await answer(turn);
}

function addTurn(question) {
  const asked = item("question");
  asked.textContent = question;
  const element = item("answer is-coming");
  const words = document.createElement("p");
  words.className = "words";
  element.append(words);
  const turn = { question, answer: "", targets: [], element, words, isComplete: false, id: null, version: null };
  element.addEventListener("click", (event) => {
    if (!event.target.closest("button")) show(turn);
  });
  state.turns.push(turn);
  return turn;
}

async function answer(turn) {
  const history = state.turns.filter((other) => other !== turn && other.isComplete);
  state.abort = new AbortController();
  show(turn);
  enable();
  try {
    const { id, finishReason, modelVersion } = await ask({
      model: state.model?.id,
      imageUrl: state.picture.url,
      history,
      prompt: turn.question,
      signal: state.abort.signal,
      onText: (words) => {
        turn.answer += words;
        refresh(turn);
      },
      onTarget: (target) => {
        turn.targets.push(target);
        if (state.shown === turn) overlay.addTarget(target);
        refresh(turn);
      },
    });
    turn.isComplete = turn.answer.trim() !== "";
    note(turn, finishReason === "length" ? "The answer was cut at the length limit." : "");
    Object.assign(turn, { id, version: modelVersion });
    if (modelVersion) turn.element.title = `model version ${modelVersion}`;
    if (state.features.feedback && turn.targets.length) offerFeedback(turn);
    if (!turn.answer.trim()) note(turn, "The model had nothing to say to this.");
  } catch (error) {
    if (error.name === "AbortError") note(turn, "Stopped.");
    else fail(turn, error);
    if (error.status === 401) askForKey();
  } finally {
    turn.element.classList.remove("is-coming");
    state.abort = null;
    refresh(turn);
    showHistory();
    enable();
  }
}

function fail(turn, error) {
  if (!(error instanceof ApiError)) console.error(error);
  const box = document.createElement("div");
  box.className = "error";
  box.setAttribute("role", "alert");
  const text = document.createElement("p");
  text.textContent = error instanceof ApiError ? error.message : `Something went wrong on this page: ${error.message}`;
  const again = document.createElement("button");
  again.type = "button";
  again.textContent = "Try again";
  again.addEventListener("click", () => {
    if (state.abort) return;
    box.remove();
    turn.answer = "";
    turn.targets = [];
    turn.element.classList.add("is-coming");
    answer(turn);
  });
  box.append(text, again);
  turn.element.append(box);
  box.scrollIntoView({ block: "nearest" });
}

/** One line under an answer: were its masks right? Hidden masks count as wrong. */
function offerFeedback(turn) {
  const line = document.createElement("p");
  line.className = "note feedback";
  line.append("Are these masks right? ");
  const choice = (label, verdictOf) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.addEventListener("click", async () => {
      const targets = turn.targets.map((target) => ({ ...pick(target), ...verdictOf(target) }));
      const { url: image } = state.picture;
      try {
        await sendFeedback({ answer_id: turn.id, model_version: turn.version, image, prompt: turn.question, text: turn.answer, targets });
        line.textContent = "Thank you, noted.";
      } catch (error) {
        line.textContent = `Not noted: ${error.message}`;
      }
    });
    return button;
  };
  const right = (target) => ({ verdict: "right", mask: target.mask });
  const wrong = () => ({ verdict: "wrong" });
  line.append(choice("All right", right), " ", choice("Hidden ones are wrong", (target) => (isHidden(turn, target) ? wrong() : right(target))));
  line.append(" ", choice("All wrong", wrong));
  turn.element.append(line);
}

function pick({ index, phrase }) {
  return { index, phrase };
}

function isHidden(turn, { index }) {
  return state.shown === turn && !overlay.isVisible(index);
}

function askForKey() {
  const dialog = $("key-dialog");
  if (!dialog.open) dialog.showModal();
}

function note(turn, text) {
  if (!text) return;
  const line = document.createElement("p");
  line.className = "note";
  line.textContent = text;
  turn.element.append(line);
}

/** A message from the page itself. */
function say(text) {
  const box = item("answer");
  const inner = document.createElement("div");
  inner.className = "error";
  inner.setAttribute("role", "alert");
  inner.textContent = text;
  box.append(inner);
  box.scrollIntoView({ block: "nearest" });
}

function item(className) {
  const element = document.createElement("li");
  element.className = className;
  $("messages").append(element);
  return element;
}

function stop() {
  state.abort?.abort();
}

// ---------------------------------------------------------------- words and masks

function show(turn) {
  state.shown = turn;
  overlay.setTargets(turn.targets);
  for (const other of state.turns) other.element.classList.toggle("is-shown", other === turn);
  showLegend();
}

function refresh(turn) {
  renderAnswer(turn.words, turn.answer, turn.targets);
  for (const button of turn.words.querySelectorAll(".word")) tie(button, turn);
  if (state.shown === turn) showLegend();
  turn.element.scrollIntoView({ block: "nearest" });
}

/** Hovering or focusing lights the mask, pressing shows or hides it. */
function tie(element, turn) {
  const index = Number(element.dataset.target);
  const light = () => {
    if (state.shown !== turn) show(turn);
    highlight(index);
  };
  element.addEventListener("pointerenter", light);
  element.addEventListener("focus", light);
  element.addEventListener("pointerleave", () => highlight(null));
  element.addEventListener("blur", () => highlight(null));
  element.addEventListener("click", () => {
    if (state.shown !== turn) show(turn);
    overlay.setVisible(index, !overlay.isVisible(index));
    marks();
  });
}

function highlight(index) {
  overlay.highlight(index);
  marks();
}

/** Brings words and legend in line with what the picture shows. */
function marks() {
  const scope = [$("legend"), ...(state.shown ? [state.shown.words] : [])];
  for (const element of scope.flatMap((parent) => [...parent.querySelectorAll("[data-target]")])) {
    const index = Number(element.dataset.target);
    element.classList.toggle("is-lit", overlay.highlighted === index);
    element.classList.toggle("is-off", !overlay.isVisible(index));
    element.setAttribute("aria-pressed", String(overlay.isVisible(index)));
  }
}

function showLegend() {
  const focused = document.activeElement?.closest?.("#legend [data-target]")?.dataset.target;
  const targets = state.shown?.targets ?? [];
  const total = state.picture ? state.picture.width * state.picture.height : 1;
  $("legend").replaceChildren(
    ...targets.map((target) => {
      const line = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.target = target.index;
      button.style.setProperty("--colour", cssColour(target.index));
      const name = document.createElement("span");
      name.textContent = target.phrase || `target ${target.index + 1}`;
      const figures = document.createElement("small");
      figures.textContent = `${Math.round(target.score * 100)} % sure · ${share(target.area / total)} of the picture`;
      button.append(name, figures);
      tie(button, state.shown);
      line.append(button);
      return line;
    }),
  );
  marks();
  if (focused !== undefined) $("legend").querySelector(`[data-target="${focused}"]`)?.focus();
}

function share(part) {
  return part === 0 ? "nothing" : part < 0.001 ? "< 0.1 %" : `${(part * 100).toFixed(part < 0.1 ? 1 : 0)} %`;
}

function pointAt(event) {
  const box = $("overlay").getBoundingClientRect();
  const u = (event.clientX - box.left) / box.width, v = (event.clientY - box.top) / box.height;
  const index = overlay.targetAt(u, v);
  highlight(index);
  const tip = $("tip");
  const target = state.shown?.targets.find((candidate) => candidate.index === index);
  tip.hidden = !target;
  if (!target) return;
  tip.textContent = target.phrase || `target ${target.index + 1}`;
  tip.style.setProperty("--colour", cssColour(target.index));
  tip.style.left = `${Math.min(Math.max(u * 100, 8), 92)}%`;
  tip.style.top = `${v * 100}%`;
}

// ---------------------------------------------------------------- controls

function enable() {
  const isBusy = state.abort !== null;
  $("form").classList.toggle("is-busy", isBusy);
  $("prompt").disabled = !state.picture;
  $("prompt").placeholder = state.picture ? "What should be found?" : "Choose a picture first";
  $("send").disabled = !state.picture;
  $("send").setAttribute("aria-label", isBusy ? "Stop" : "Ask");
}

function fitPrompt() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 160)}px`;
}

async function connect() {
  try {
    Object.assign(state, await service());
    const version = state.model.version === "folder" ? "" : ` · version ${state.model.version}`;
    $("model-name").textContent = `${state.model.id}${version}`;
    $("model").classList.add("is-up");
  } catch (error) {
    if (error.status === 401) {
      $("model-name").textContent = "needs a key";
      return askForKey();
    }
    $("model-name").textContent = "not reachable";
    setTimeout(connect, 3000);
  }
}

function setUp() {
  $("file").addEventListener("change", (event) => {
    takePicture(event.target.files[0]);
    event.target.value = "";
  });
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    state.abort ? stop() : askNow();
  });
  $("prompt").addEventListener("input", fitPrompt);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      askNow();
    }
  });
  $("opacity").addEventListener("input", (event) => {
    overlay.opacity = event.target.value / 100;
    overlay.draw();
  });
  $("toggle-all").addEventListener("click", toggleAll);
  $("save-png").addEventListener("click", () => savePng(state.picture, $("picture"), overlay));
  $("save-json").addEventListener("click", () => saveRle(state.picture, state.model, state.shown));
  $("save-cutout").addEventListener("click", () => saveCutout(state.picture, $("picture"), overlay));
  for (const button of $("examples").querySelectorAll("button")) button.addEventListener("click", () => takeExample(button));
  $("key-dialog").addEventListener("close", () => {
    if ($("key-dialog").returnValue !== "ok" || !$("key").value) return;
    useKey($("key").value.trim());
    $("key").value = "";
    connect();
  });
  $("overlay").addEventListener("pointermove", pointAt);
  $("overlay").addEventListener("pointerdown", pointAt);
  $("overlay").addEventListener("pointerleave", () => {
    $("tip").hidden = true;
    highlight(null);
  });
  document.addEventListener("keydown", pressed);
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files][0];
    if (file) {
      event.preventDefault();
      takePicture(file);
    }
  });
  setUpDropping();
}

function toggleAll() {
  overlay.isOn = !overlay.isOn;
  $("toggle-all").setAttribute("aria-pressed", String(overlay.isOn));
  $("toggle-all").textContent = overlay.isOn ? "Masks on" : "Masks off";
  overlay.draw();
}

/** Keys that work anywhere but in a field: M, 1 to 9, /; Escape works everywhere. */
function pressed(event) {
  if (event.key === "Escape") return stop();
  if (event.target.closest("textarea, input, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && state.picture) {
    event.preventDefault();
    $("prompt").focus();
  } else if (event.key.toLowerCase() === "m" && state.picture) {
    toggleAll();
  } else if (/^[1-9]$/.test(event.key)) {
    const index = Number(event.key) - 1;
    overlay.setVisible(index, !overlay.isVisible(index));
    marks();
  }
}

function setUpDropping() {
  let depth = 0;
  const hasFiles = (event) => [...event.dataTransfer.types].includes("Files");
  document.addEventListener("dragenter", (event) => {
    if (hasFiles(event)) $("curtain").hidden = ++depth === 0;
  });
  document.addEventListener("dragleave", (event) => {
    if (hasFiles(event)) $("curtain").hidden = --depth === 0;
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    $("curtain").hidden = true;
    takePicture(event.dataTransfer.files[0]);
  });
}

setUp();
connect();
