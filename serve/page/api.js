// Talking to the service: the served model, and a streamed answer.

/** An error whose message is meant for the person in front of the page. */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const KEY = "pixellm-key";

/** Keeps an API key for this tab. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

function headers(extra = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...extra, Authorization: `Bearer ${key}` } : extra;
}

/** The default model, and what the service offers besides: {model, features}. */
export async function service() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await errorOf(response);
  const { data, features } = await response.json();
  return { model: data[0], features: features ?? {} };
}

/** Sends verdicts about an answer. */
export async function sendFeedback(body) {
  const response = await fetch("v1/feedback", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
  });
  if (!response.ok) throw await errorOf(response);
}

/**
 * Asks a question about a picture and hands on what comes:
 * onText(words), onTarget(target), and resolves with {id, finishReason, modelVersion}.
 */
export async function ask({ model, imageUrl, history, prompt, signal, onText, onTarget }) {
  const picture = { type: "image_url", image_url: { url: imageUrl } };
  const turns = [...history.flatMap(({ question, answer }) => [user(question), { role: "assistant", content: answer }]), user(prompt)];
  turns[0].content = [picture, { type: "text", text: turns[0].content }];
  let response;
  try {
    response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify({ model, messages: turns, stream: true, mask_format: "rle" }),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The service cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await errorOf(response);
  let id = null, finishReason = null, isDone = false;
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") {
      isDone = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    id = chunk.id;
    for (const { delta, finish_reason: reason } of chunk.choices) {
      if (delta.content) onText(delta.content);
      for (const target of delta.segmentation?.targets ?? []) onTarget(target);
      finishReason = reason ?? finishReason;
    }
  }
  if (!isDone) throw new ApiError("The answer broke off: the service or the connection went away.");
  return { id, finishReason, modelVersion: response.headers.get("X-Model-Version") };
}

function user(content) {
  return { role: "user", content };
}

async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
  }
}

async function errorOf(response) {
  let message = `The service answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not our error object: a proxy in between
  }
  return new ApiError(message, { status: response.status, retryAfter: response.headers.get("Retry-After") });
}
