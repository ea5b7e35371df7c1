// A chat with the served model, and a view of its canvas. Text from the model enters the document as text only, never as HTML.

import { Pictures, thumbnail } from "./pictures.js";

/**
 * A canvas after one denoising step, as the server sends it.
 * @typedef {{block: number, step: number, temperature: number, cells: string[], entropy: number[], accepted: number[]}} Draft
 */

/**
 * A draft with two more fields: which cells were taken back so far in this block, and the mean entropy.
 * @typedef {Draft & {takenBack: boolean[], mean: number}} Frame
 */

/**
 * The reply so far.
 * @typedef {{reasoning: string, content: string, toolCalls: {id?: string, name: string, arguments: string}[]}} Reply
 */

/** Lower ends of the colour classes e0 to e7, in nats. */
const LEVELS = [0, 0.01, 0.03, 0.1, 0.3, 1, 2, 4];

/** A newline breaks the row of cells only below this entropy, in nats. Newlines of pure noise would make the rows jump. */
const SURE = 0.3;

/** Milliseconds: how long a replay shows a step, and the time per step below which a run was too fast to watch. */
const REPLAY_PACE = 140;
const TOO_FAST = 60;

const KEY = "mlx-diffgemma-api-key";

/** What the boxed Sudoku model reads: one character per cell, row by row. It was not trained on other text. */
const SUDOKU = { model: "sudoku", prompt: "32......4...4..3..6.214..1.........3", boxes: { 4: [2, 2], 6: [2, 3], 9: [3, 3] } };

/** Tokens that are not text. The server sends some of them by name and some as empty strings. */
const SPECIAL = /^$|^<(pad|eos|bos|unk|mask|unused\d+|\|[a-z_"]+\|?|[a-z_]+\|)>$/;
const WHITE = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };

/** @param {string} id */
const at = (id) => document.getElementById(id);

/** An element with a class and a text. */
function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** @param {number} entropy in nats */
const level = (entropy) => LEVELS.findLastIndex((least) => entropy >= least);

/** A token's text as the page shows it: white space alone would be invisible, so it becomes symbols. */
const visible = (token) => (/^\s+$/.test(token) ? token.replace(/[ \n\t\r]/g, (character) => WHITE[character]) : token || "∅");

// ---- The server

/** An error from the server, with its status, or 0 if the stream had already begun. */
class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The data of each event of a stream. Chunks may split an event, a line or a character. */
async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null); // a proxy's error page is not JSON
  const wait = response.headers.get("Retry-After");
  const message = answer?.error?.message ?? `the server answered with status ${response.status}`;
  throw new ApiError(wait ? `${message} (retry after ${wait} s)` : message, response.status);
}

/** The chunks of a streamed chat completion. Throws ApiError if the server refuses the request or the stream ends early. */
async function* completion(body, signal) {
  const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    yield chunk;
  }
  throw new ApiError("the stream ended before the reply was complete");
}

/** Add a chunk's delta to a reply. */
function extend(reply, delta) {
  reply.reasoning += delta.reasoning_content ?? "";
  reply.content += delta.content ?? "";
  for (const part of delta.tool_calls ?? []) {
    const call = (reply.toolCalls[part.index] ??= { id: part.id, name: "", arguments: "" });
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
}

/** A reply as a message of the conversation. */
function asMessage(reply) {
  const calls = reply.toolCalls.map((call) => ({
    id: call.id,
    type: "function",
    function: { name: call.name, arguments: call.arguments },
  }));
  return { role: "assistant", content: reply.content, ...(calls.length && { tool_calls: calls }) };
}

// ---- The run: its frames, and how they are drawn

/** All frames of a run, in order. */
class Film {
  /** @type {Frame[]} */
  frames = [];
  #accepted = []; // for each cell, the token that was last accepted in this block

  /** @param {Draft} draft */
  add(draft) {
    const before = this.frames.at(-1)?.block === draft.block ? this.frames.at(-1).takenBack : [];
    if (!before.length) this.#accepted = [];
    const takenBack = draft.cells.map((token, cell) => {
      const last = this.#accepted[cell];
      if (draft.accepted[cell]) this.#accepted[cell] = token;
      return before[cell] || (last !== undefined && last !== token);
    });
    const mean = draft.entropy.reduce((sum, value) => sum + value, 0) / draft.entropy.length;
    this.frames.push({ ...draft, takenBack, mean });
  }

  /** The text of the blocks before a frame's block. */
  before(index) {
    const block = this.frames[index].block;
    const ends = this.frames.filter((frame, place) => frame.block < block && this.frames[place + 1].block > frame.block);
    return ends.flatMap((frame) => frame.cells.filter((token) => !SPECIAL.test(token))).join("");
  }

  /** How many steps a block has so far. */
  steps(block) {
    return this.frames.findLast((frame) => frame.block === block).step;
  }
}

/** The cells on the page. They stay on the page; only those that differ from the frame change. */
class Canvas {
  #cells = [];
  #size = 0;
  #given = "";

  /** Lay the cells out for a prompt: as a grid if it is a Sudoku for the boxed model, else as lines of text. */
  layOut(model, prompt) {
    this.#given = model === SUDOKU.model ? prompt : "";
    this.#size = [4, 6, 9].find((size) => size * size === this.#given.length) ?? 0;
    if (this.#size) at("cells").dataset.size = this.#size;
    else delete at("cells").dataset.size;
    this.#cells = [];
    at("cells").replaceChildren();
  }

  /** @param {Frame} frame */
  draw(frame) {
    while (this.#cells.length < frame.cells.length) this.#append();
    this.#cells.forEach((cell, place) => {
      const token = frame.cells[place];
      const name = this.#className(frame, place);
      if (cell.token !== token) cell.node.textContent = visible(token);
      if (cell.name !== name) cell.node.className = name;
      cell.line.hidden = !(token.includes("\n") && frame.entropy[place] < SURE);
      Object.assign(cell, { token, name });
    });
  }

  #append() {
    const [node, line] = [element("span"), document.createElement("br")];
    at("cells").append(node, line);
    node.dataset.place = this.#cells.length;
    this.#cells.push({ node, line, token: null, name: null });
  }

  #className(frame, place) {
    const names = ["cell", `e${level(frame.entropy[place])}`];
    if (frame.accepted[place]) names.push("accepted");
    if (frame.takenBack[place]) names.push("back");
    if (SPECIAL.test(frame.cells[place])) names.push("special");
    if (this.#size && place < this.#size ** 2) names.push(...this.#gridNames(frame, place));
    return names.join(" ");
  }

  #gridNames(frame, place) {
    const [height, width] = SUDOKU.boxes[this.#size];
    const [row, column] = [Math.floor(place / this.#size) + 1, (place % this.#size) + 1];
    const names = this.#given[place] === frame.cells[place] ? ["given"] : [];
    if (column % width === 0 && column < this.#size) names.push("box-right");
    if (row % height === 0 && row < this.#size) names.push("box-below");
    return names;
  }
}

/** Show names and values as the children of a dl, which are changed in place. */
function list(node, values) {
  const entries = Object.entries(values).filter(([, value]) => value !== null);
  while (node.children.length > entries.length) node.lastElementChild.remove();
  entries.forEach(([name, value], place) => {
    if (!node.children[place]) {
      node.append(element("div"));
      node.children[place].append(element("dt"), element("dd"));
    }
    const [term, description] = node.children[place].children;
    if (term.textContent !== name) term.textContent = name;
    if (description.textContent !== value) description.textContent = value;
  });
}

const canvas = new Canvas();

/** What the stage shows: a film and one of its frames. */
const stage = {
  film: new Film(),
  shown: -1,
  timer: 0,

  reset(model, prompt) {
    this.pause();
    this.film = new Film();
    this.shown = -1;
    canvas.layOut(model, prompt);
    at("curve").replaceChildren();
    at("film").hidden = at("result").hidden = true;
    at("empty").hidden = false;
    at("step").disabled = at("play").disabled = true;
  },

  draw() {
    const { frames } = this.film;
    if (this.shown < 0) return;
    const frame = frames[this.shown];
    at("film").hidden = false;
    at("empty").hidden = true;
    canvas.draw(frame);
    this.drawCommitted(this.film.before(this.shown));
    this.drawCurve();
    const readout = {
      block: String(frame.block + 1),
      step: `${frame.step} of ${this.film.steps(frame.block)}`,
      temperature: frame.temperature.toFixed(2),
      accepted: `${frame.accepted.filter(Boolean).length} of ${frame.cells.length}`,
      "taken back": String(frame.takenBack.filter(Boolean).length),
      "mean entropy": `${frame.mean.toFixed(3)} nats`,
    };
    list(at("readout"), readout);
    const slider = at("step");
    slider.max = frames.length - 1;
    slider.value = this.shown;
    slider.setAttribute("aria-valuetext", Object.entries(readout).map((entry) => entry.join(" ")).join(", "));
  },

  /** Show the text before the canvas, scrolled to its end. */
  drawCommitted(text) {
    const node = at("committed");
    if (node.textContent === text) return;
    node.textContent = text;
    node.scrollTop = node.scrollHeight;
  },

  /** Draw one bar per step above the slider, as high as the mean entropy. */
  drawCurve() {
    const { frames } = this.film;
    const curve = at("curve");
    while (curve.children.length < frames.length) {
      const [bar, x] = [document.createElementNS(curve.namespaceURI, "line"), curve.children.length];
      const ends = { x1: x, x2: x, y1: 0, y2: -frames[x].mean };
      Object.entries(ends).forEach(([name, value]) => bar.setAttribute(name, value));
      curve.append(bar);
    }
    const [steps, top] = [Math.max(1, frames.length - 1), Math.max(0.1, ...frames.map((frame) => frame.mean))];
    curve.setAttribute("viewBox", `0 ${-top} ${steps} ${top}`);
    curve.setAttribute("stroke-width", Math.min(12, (0.7 * curve.clientWidth) / steps));
    [...curve.children].forEach((bar, place) => {
      bar.classList.toggle("odd", frames[place].block % 2 === 1);
      bar.classList.toggle("now", place === this.shown);
    });
  },

  show(index) {
    this.shown = index;
    schedule();
  },

  play() {
    this.show(this.shown < this.film.frames.length - 1 ? this.shown : 0);
    at("play").textContent = "Pause";
    this.timer = setInterval(() => {
      if (this.shown < this.film.frames.length - 1) this.show(this.shown + 1);
      else this.pause();
    }, REPLAY_PACE);
  },

  pause() {
    clearInterval(this.timer);
    this.timer = 0;
    at("play").textContent = "Replay";
  },

  /** After a run: enable the slider and the replay, and replay a run that was too fast to watch. */
  finish(milliseconds) {
    const count = this.film.frames.length;
    if (!count) return;
    at("step").disabled = at("play").disabled = false;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (!still && count > 1 && milliseconds < TOO_FAST * count) {
      this.shown = 0;
      this.play();
    }
  },
};

// ---- The conversation

/** The messages so far, and the turn that the reply is written into. `abort` is set during a request. */
const chat = { model: "", messages: [], turn: null, abort: null };

/** The images of the message that the user is writing. */
const pictures = new Pictures(at("pictures"), inform);

/** The user's message: a text, or images and a text. */
function asUserMessage(prompt, sent) {
  const images = sent.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: images.length ? [...images, { type: "text", text: prompt }] : prompt };
}

let frameRequest = 0;

/** Draw changes in the next animation frame. */
function schedule() {
  frameRequest ||= requestAnimationFrame(() => {
    frameRequest = 0;
    const turns = at("turns");
    const atEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 40; // else the user is reading further up
    stage.draw();
    chat.turn?.draw();
    if (atEnd) turns.scrollTop = turns.scrollHeight;
  });
}

/** One turn of the conversation on the page: the user's or the model's. */
class Turn {
  /** @type {Reply} */
  reply = { reasoning: "", content: "", toolCalls: [] };

  constructor(name, className, text = "", images = []) {
    this.node = element("article", `turn ${className}`);
    this.thought = element("details");
    this.thought.hidden = true;
    this.thought.append(element("summary", "", "Reasoning"), element("p"));
    this.answer = element("p", "answer");
    this.tools = element("div");
    this.reply.content = text;
    this.node.classList.toggle("puzzle", chat.model === SUDOKU.model);
    const list = element("ul", "pictures");
    list.append(...images.map(thumbnail));
    this.node.append(element("h2", "", name), ...(images.length ? [list] : []), this.thought, this.answer, this.tools);
    at("turns").append(this.node);
    this.draw();
  }

  draw() {
    const { reasoning, content, toolCalls } = this.reply;
    this.thought.hidden = !reasoning;
    if (this.answer.textContent !== content) this.answer.textContent = content;
    if (this.thought.lastChild.textContent !== reasoning) this.thought.lastChild.textContent = reasoning;
    this.tools.replaceChildren(...toolCalls.map((call) => element("pre", "", `${call.name}(${call.arguments})`)));
  }
}

function inform(message) {
  at("alert").textContent = message;
  at("alert").hidden = !message;
}

/** Show an error. If the API key is missing or wrong, ask for one. */
function report(error) {
  if (error.name === "AbortError") return;
  inform(error instanceof ApiError ? error.message : `The server cannot be reached: ${error.message}`);
  if (error.status !== 401) return;
  at("key-field").hidden = false;
  at("key").focus();
}

async function learnModel() {
  if (chat.model) return;
  const answer = await (await request("v1/models")).json();
  chat.model = answer.data[0].id;
  pictures.allowed = answer.data[0].input_modalities?.includes("image") ?? false;
  at("model").textContent = chat.model;
  at("add-picture").hidden = !pictures.allowed;
  if (chat.model !== SUDOKU.model) return;
  at("ask").elements.history.checked = false; // it was trained on one puzzle at a time
  if (!at("prompt").value) at("prompt").value = SUDOKU.prompt;
}

/** The body of a request. The server chooses what is left empty, except for the seed: the page must know it to the digit. */
function requestBody(form, messages) {
  const number = (name) => (form.elements[name].value === "" ? undefined : Number(form.elements[name].value));
  const mode = form.elements.mode.value;
  return {
    model: chat.model,
    messages: form.elements.history.checked ? messages : messages.slice(-1),
    stream: true,
    stream_options: { drafts: true, include_usage: true },
    mode,
    seed: number("seed") ?? crypto.getRandomValues(new Uint32Array(1))[0],
    max_tokens: number("max_tokens"),
    max_denoising_steps: mode === "diffusion" ? number("max_denoising_steps") : undefined,
    temperature: number("temperature"),
    chat_template_kwargs: form.elements.thinking.checked ? { enable_thinking: true } : undefined,
  };
}

function setRunning(running) {
  const focused = [at("start"), at("stop")].includes(document.activeElement);
  at("start").hidden = running;
  at("stop").hidden = !running;
  if (focused) at(running ? "stop" : "start").focus();
}

/** Send the prompt, and show the reply as it comes. A reply that ends early is kept. If there is none, the prompt comes back. */
async function ask() {
  const prompt = at("prompt").value;
  if (chat.abort || !prompt.trim()) return;
  chat.abort = new AbortController();
  inform("");
  setRunning(true);
  try {
    await learnModel();
    await converse(prompt);
  } catch (error) {
    report(error);
  } finally {
    chat.abort = null;
    setRunning(false);
  }
}

async function converse(prompt) {
  const { messages } = chat; // a new chat may begin before this one has stopped
  const images = pictures.take();
  const sent = new Turn("You", "yours", prompt, images);
  const turn = (chat.turn = new Turn(chat.model, "answered"));
  at("turns").scrollTop = at("turns").scrollHeight;
  turn.node.setAttribute("aria-live", "polite");
  turn.node.setAttribute("aria-busy", "true"); // screen readers wait until it is finished
  messages.push(asUserMessage(prompt, images));
  stage.reset(chat.model, prompt);
  at("prompt").value = "";
  const body = requestBody(at("ask"), messages);
  const started = performance.now();
  try {
    await receive(body, turn.reply, started);
  } finally {
    if (turn.reply.content || turn.reply.toolCalls.length) messages.push(asMessage(turn.reply));
    else takeBack(prompt, images, messages, [sent, turn]);
    turn.draw();
    turn.node.setAttribute("aria-busy", "false");
    stage.finish(performance.now() - started);
    schedule();
  }
}

/** Undo a turn that had no reply. */
function takeBack(prompt, images, messages, turns) {
  messages.pop();
  turns.forEach((turn) => turn.node.remove());
  if (messages !== chat.messages) return;
  at("prompt").value ||= prompt;
  pictures.putBack(images);
}

async function receive(body, reply, started) {
  const facts = { usage: null, diffgemma: null, finish: null, seed: body.seed };
  for await (const chunk of completion(body, chat.abort.signal)) {
    const { draft, ...rest } = chunk.diffgemma ?? {};
    if (draft) {
      stage.film.add(draft);
      stage.shown = stage.film.frames.length - 1;
    }
    if (Object.keys(rest).length) facts.diffgemma = rest;
    facts.usage = chunk.usage ?? facts.usage;
    for (const choice of chunk.choices) {
      extend(reply, choice.delta);
      facts.finish = choice.finish_reason ?? facts.finish;
    }
    schedule();
  }
  showFacts(facts, (performance.now() - started) / 1000);
}

function showFacts({ usage, diffgemma, finish, seed }, seconds) {
  const steps = diffgemma?.denoising_steps?.[0] ?? [];
  const total = steps.reduce((sum, count) => sum + count, 0);
  list(at("figures"), {
    "tokens per forward": diffgemma ? diffgemma.tokens_per_forward.toFixed(1) : null,
    "denoising steps": steps.length > 1 ? `${steps.join(" + ")} = ${total}` : steps.length ? String(total) : null,
    tokens: usage ? String(usage.completion_tokens) : null,
    "prompt tokens": usage ? String(usage.prompt_tokens) : null,
    seconds: seconds.toFixed(seconds < 10 ? 2 : 0),
    "finish reason": finish,
    seed: String(seed),
    "shown too early": diffgemma?.unsettled ? String(diffgemma.unsettled) : null,
    "ignored options": diffgemma?.ignored?.length ? diffgemma.ignored.join(", ") : null,
  });
  at("reuse").onclick = () => {
    at("seed").value = seed;
    at("options").open = true;
    at("seed").focus();
  };
  at("result").hidden = false;
  at("empty").hidden = true;
}

function newChat() {
  chat.abort?.abort();
  chat.messages = [];
  chat.turn = null;
  at("turns").replaceChildren();
  stage.reset(chat.model, "");
  inform("");
  at("prompt").focus();
}

/** Show the place, token and entropy of the cell under the pointer, as its title. */
function describe(event) {
  const place = event.target.dataset?.place;
  const frame = stage.film.frames[stage.shown];
  if (place === undefined || !frame) return;
  const token = JSON.stringify(frame.cells[place]);
  event.target.title = `position ${Number(place) + 1}: ${token}, ${frame.entropy[place]} nats`;
}

function listen() {
  const form = at("ask");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  form.addEventListener("invalid", () => (at("options").open = true), true); // the browser cannot point at a hidden field
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  form.elements.mode.addEventListener("change", () => {
    at("max-steps").disabled = form.elements.mode.value !== "diffusion";
  });
  at("key").addEventListener("change", () => {
    sessionStorage.setItem(KEY, at("key").value);
    inform("");
    learnModel().catch(report);
  });
  at("stop").addEventListener("click", () => chat.abort?.abort());
  at("new-chat").addEventListener("click", newChat);
  at("step").addEventListener("input", () => {
    stage.pause();
    stage.show(Number(at("step").value));
  });
  at("play").addEventListener("click", () => (stage.timer ? stage.pause() : stage.play()));
  at("cells").addEventListener("pointerover", describe);
}

at("scale").append(...LEVELS.map((least, place) => element("span", `cell e${place}`, String(least))));
listen();
pictures.listen(at("add-picture"), at("picture-files"), at("prompt"));
learnModel().catch(report);
