// Wires the socket to films, figures and controls.
import { draw_chunks, draw_map } from "./charts.js";
import { Film } from "./film.js";
import { Keys } from "./keys.js";
import { Recorder } from "./record.js";
import { Voice } from "./voice.js";

const element = (id) => document.getElementById(id);
const SIDES = ["fast", "dense"];
const SHOWN_CHUNKS = 48;
const TRAIL = 400;
const LATENCIES = 200;
const TRIES = 6;
const FULL = 1013; // how a server says so
const NOTICE_MS = 2500;
const ANOTHER = 1000; // rooms behind that of the entrance
const state = { chunks: [], trail: [], waiting: [], latencies: [], number: 0, ready: [], memory: [], tries: 0 };
const hash = new URLSearchParams(location.hash.slice(1));
// Links to a walk are shared, a token is not: it stays in this tab.
if (hash.has("token")) sessionStorage.setItem("token", hash.get("token"));
let socket = null;
let films = null;
const LOST = "the film was lost with its visit";

const number = (value, digits = 1) => (value == null ? "–" : value.toFixed(digits));
// Whether it could be sent.
const send = (data) => {
  const open = socket?.readyState === 1;
  if (open) socket.send(JSON.stringify(data));
  return open;
};

function enter(room, walk, ticket, tries = 0) {
  clearTimeout(state.coming_back);
  film_lost(LOST);
  socket?.close();
  Object.assign(state, { chunks: [], trail: [], waiting: [], latencies: [], memory: [], camera: null });
  Object.assign(state, { fast: null, dense: null, db: null, next: null, tries });
  const own = new WebSocket(`${location.protocol.replace("http", "ws")}//${location.host}/socket`);
  own.binaryType = "arraybuffer";
  own.addEventListener("open", () => {
    const first = { do: "enter", token: sessionStorage.getItem("token") ?? "", walk: walk ?? "", ticket: ticket ?? "" };
    if (Number.isInteger(room)) first.room = room;
    own.send(JSON.stringify(first));
  });
  own.addEventListener("message", ({ data }) => {
    if (own !== socket) return;
    if (typeof data === "string") heard(JSON.parse(data));
    else seen(data);
  });
  own.addEventListener("close", ({ code, reason }) => {
    if (own !== socket) return;
    film_lost(LOST);
    state.full = code === FULL ? reason : "";
    if (ticket && !state.welcome) state.ticket = reason && !state.full ? "" : ticket;
    if (state.full && state.tries < TRIES) come_back(room, walk, ticket);
    else if (!reason && !state.gone && state.ticket && state.tries < TRIES) come_back(null, "", state.ticket);
    else state.gone ||= reason || "the server is gone";
    say_status();
  });
  state.gone = "";
  state.welcome = false;
  socket = own;
}

// Where a socket broke, it goes on from its latest chunk; where all places are taken, one may become free.
function come_back(...where) {
  state.gone = "";
  state.tries += 1;
  state.coming_back = setTimeout(() => enter(...where, state.tries), 250 * 2 ** state.tries);
}

function heard(told) {
  if (told.do === "welcome") welcome(told);
  else if (told.do === "status") Object.assign(state, { ready: told.ready, doing: told.doing, since: Date.now() });
  else if (told.do === "bye") state.gone = told.why;
  else if (told.do === "walk") show_link(told);
  else if (told.do === "heard") element("heard").textContent = told.words.length ? `heard: ${told.words.join(", ")}` : "nothing of this world was heard";
  else if (told.do === "film") fetch_film(told);
  else if (told.do === "forked") open_fork(told.ticket);
  else if (told.do === "refused") refused(told);
  say_status();
}

function refused({ what, why }) {
  console.warn(why);
  if (what === "listen") hush(why);
  else if (what === "film") {
    film_lost(why);
    state.next?.();
  }
  else if (what === "fork") notice(element("fork"), why, "fork in a new tab");
}

// Says something on a button for a moment.
function notice(button, text, label) {
  button.textContent = text;
  clearTimeout(button.notice);
  button.notice = setTimeout(() => (button.textContent = label), NOTICE_MS);
}

function welcome(told) {
  Object.assign(state, { world: told, ticket: told.ticket, welcome: true, tries: 0 });
  element("title").textContent = `· ${told.title}`;
  element("room").value = told.room;
  element("room").max = told.rooms - 1;
  films ??= Object.fromEntries(SIDES.map((side) => [side, new Film(element(side), 1000 / told.fps)]));
  const groups = Object.entries(told.words).map(([name, group], i) =>
    choices(name, group, told.said[i], (word) => {
      state.number += 1;
      expect();
      send({ do: "say", number: state.number, words: [word] });
    }));
  element("words").replaceChildren(...groups);
  const presets = choices("preset", told.presets, told.preset, (preset) => {
    element("preset-name").textContent = preset;
    send({ do: "choose", preset });
  });
  presets.id = "presets";
  element("presets").replaceWith(presets);
  element("preset-name").textContent = told.preset;
  element("fork").hidden = !told.ticket;
  element("another").hidden = told.rooms < 2;
  // Browsers give a microphone to this machine's own pages and to those behind TLS.
  element("spoken").hidden = !told.voice || !navigator.mediaDevices;
  if (voice.on && told.voice) send({ do: "listen", on: true });
  else if (voice.on) hush("nobody listens here");
  if (!element("compare").checked) send({ do: "compare", on: false });
  element("how").textContent = how(told);
  if (keys.held.size || keys.thumb.some(Boolean)) keys.send(); // held while the socket was being opened
}

function choices(name, all, said, chosen) {
  const set = document.createElement("fieldset");
  set.className = "group";
  const legend = document.createElement("legend");
  legend.textContent = name;
  set.append(legend);
  for (const text of all) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = button.dataset.choice = text;
    button.addEventListener("click", () => {
      press(set, text);
      chosen(text);
    });
    set.append(button);
  }
  press(set, said);
  return set;
}

function press(set, text) {
  for (const button of set.querySelectorAll("button"))
    button.setAttribute("aria-pressed", String(button.dataset.choice === text));
}

function how({ beside, threads, chunk_frames, fps }) {
  const cores = `${threads} ${threads > 1 ? "threads" : "thread"}`;
  const shared = beside
    ? `Each side computes in a lane of its own with ${cores}, so the left one never waits for the right one.`
    : `Both sides share the device and take turns by chunk, with ${cores}.`;
  return `${shared} A chunk is ${chunk_frames} frames under one camera; the left side takes what you ask when its chunk ` +
    `begins, and is not shown faster than ${fps} frames a second. “If alone here” is ${chunk_frames} frames over the time ` +
    "of its median chunk, model and decoding. The right side gets the same cameras, and takes the newest where it is too " +
    "slow. A still view is not made again.";
}

function seen(data) {
  const length = new DataView(data).getUint32(0);
  const told = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  const pixels = new Uint8Array(data, 4 + length);
  const [frames, rows, columns] = told.shape;
  const drawn = told.side === "fast" && told.do === "chunk" ? () => answered(told.number) : null;
  films[told.side].add(frames, rows, columns, pixels, drawn);
  if (told.do === "chunk") chunk(told);
  if (told.side === "fast") {
    state.camera = told.camera;
    state.trail.push(told.camera);
    state.trail.splice(0, state.trail.length - TRAIL);
  }
  redraw();
}

function chunk(told) {
  const { side } = told;
  let entry = state.chunks.find((one) => one.chunk === told.chunk);
  if (!entry) state.chunks.push((entry = { chunk: told.chunk }));
  entry[side] = told;
  state.chunks.splice(0, state.chunks.length - SHOWN_CHUNKS);
  state[side] = told;
  element(`${side}-shown`).textContent = told.shown_fps == null ? element(`${side}-shown`).textContent : number(told.shown_fps);
  element(`${side}-own`).textContent = number(told.own_fps);
  if (side === "fast") {
    state.memory = told.memory;
    element("read").textContent = `${told.read} of ${told.memory.length} frames`;
    element("why").textContent = told.why;
    const fieldsets = element("words").querySelectorAll("fieldset");
    told.words.forEach((word, i) => press(fieldsets[i], word));
    if (told.replays) press(element("presets"), told.preset);
  } else {
    element("behind").textContent = `${told.behind}, ${told.missed}`;
    if (told.db != null) state.db = told.db;
  }
  say_result();
  say_status();
}

function say_result() {
  const { fast, dense, db } = state;
  if (!fast?.own_fps) return;
  const line = element("result");
  const part = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
  if (!dense?.own_fps || !element("compare").checked) {
    line.replaceChildren(part("b", "lipass"), ` can make ${number(fast.own_fps)} frames a second here.`);
    return;
  }
  const ratio = fast.own_fps / dense.own_fps;
  line.replaceChildren(
    part("b", "lipass"), ` makes a chunk ${number(ratio)}x as fast as `, part("i", "torch.compile alone"),
    db == null ? "." : `, ${number(db, 0)} dB apart.`,
  );
}

// From an input to the first frame that follows it.
function expect() {
  state.waiting.push([state.number, performance.now()]);
}

function answered(newest) {
  const now = performance.now();
  for (const [, asked] of state.waiting.filter(([number]) => number <= newest)) state.latencies.push(now - asked);
  state.waiting = state.waiting.filter(([number]) => number > newest);
  state.latencies.splice(0, state.latencies.length - LATENCIES);
  const sorted = [...state.latencies].sort((a, b) => a - b);
  if (!sorted.length) return;
  const at = (share) => Math.round(sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))]);
  element("latency").replaceChildren(`${at(0.5)} / ${at(0.95)} `, Object.assign(document.createElement("small"), { textContent: "ms" }));
}

function say_status() {
  const missing = SIDES.filter((side) => !state.ready.includes(side));
  const line = element("status");
  line.classList.toggle("bad", Boolean(state.gone));
  const seconds = Math.round((Date.now() - (state.since ?? Date.now())) / 1000);
  const doing = state.doing ? `${state.doing}${seconds > 1 ? `, ${seconds} s` : ""}` : "";
  const again = state.ticket ? "Any key goes on from here." : "Reload to enter again.";
  if (!state.gone && state.tries && !state.welcome)
    line.textContent = state.full ? `Waiting for a place: ${state.full}.` : "The connection broke; going on from the latest chunk.";
  else line.textContent = state.gone ? `Ended: ${state.gone}. ${again}` : doing || (state.fast?.replays ? `replaying a walk, ${state.fast.replays} chunks left; any key takes over` : "");
  for (const side of SIDES) {
    const waits = missing.includes(side) ? (side === "fast" || state.ready.includes("fast") ? "being compiled, runs as it is" : "not compiled yet, runs as it is") : "";
    element(`${side}-veil`).textContent = state.gone ? "ended" : waits || (side === "dense" ? lag() : "");
  }
}

// The right picture may be older than the left one: said on it, while somebody walks.
function lag() {
  if (!element("compare").checked) return "not running";
  const { fast, dense } = state;
  const chunks = fast && dense ? fast.chunk - dense.chunk : 0;
  return chunks > 0 ? `${chunks} ${chunks > 1 ? "chunks" : "chunk"} behind` : "";
}

function address(told) {
  const link = new URL(location.href);
  link.hash = new URLSearchParams(told).toString();
  return link.href;
}

function show_link({ room, walk }) {
  const link = address({ room, walk });
  history.replaceState(null, "", link);
  navigator.clipboard?.writeText(link).catch(() => {});
  notice(element("link"), "link is in the address bar", "link to this walk");
}

// A new tab has no storage of this one, so a fork is told the token; links to walks are not.
function open_fork(ticket) {
  const token = sessionStorage.getItem("token");
  open(address(token ? { ticket, token } : { ticket }), "_blank", "noopener");
}

let asked = false;
function redraw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    draw_map(element("map"), state.world?.plan, state.memory, state.camera, state.trail);
    draw_chunks(element("chunks"), state.chunks, SHOWN_CHUNKS);
  });
}

const keys = new Keys({
  stage: element("stage"), pad: element("pad"), knob: element("knob"), keys: element("keys"),
  ask: (controls) => {
    if (state.gone && state.ticket) enter(null, "", state.ticket);
    state.number += 1;
    if (Object.values(controls).some(Boolean)) expect();
    send({ do: "move", number: state.number, ...controls });
  },
});
element("room").addEventListener("change", ({ target }) => {
  target.blur();
  go_to(Math.max(0, Math.min(target.valueAsNumber || 0, Number(target.max))));
});
element("another").addEventListener("click", () => {
  const { entrance, rooms } = state.world;
  go_to((entrance + 1 + Math.floor(Math.random() * Math.min(ANOTHER, rooms - 1))) % rooms);
});
const voice = new Voice((audio) => socket?.readyState === 1 && state.welcome && socket.send(audio));
element("speak").addEventListener("click", async () => {
  if (voice.on) {
    hush();
    send({ do: "listen", on: false });
    return;
  }
  try {
    await voice.start();
    say_voice("say words of this world, such as room at night in fog");
    send({ do: "listen", on: true });
  } catch (error) {
    hush(`the microphone cannot be used: ${error.message}`);
  }
});

function hush(why) {
  voice.stop();
  say_voice(why);
}

function say_voice(text = element("heard").textContent) {
  element("speak").setAttribute("aria-pressed", String(voice.on));
  element("speak").textContent = voice.on ? "stop listening" : "speak";
  element("heard").textContent = text;
}

element("fork").addEventListener("click", () => send({ do: "fork" }));
element("link").addEventListener("click", () => send({ do: "walk" }));
const recorder = new Recorder(SIDES.map(element), (film, ending) => {
  state.film = film;
  const name = `walk-${state.world.room}.${ending}`;
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(film), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
});
// The server makes mp4 where it can, of one visit; else the browser makes what it can.
element("record").addEventListener("click", () => {
  if (recorder.on) recorder.stop();
  else if (state.filmed) state.filmed = !send({ do: "film", on: false });
  else if (state.world?.films) state.filmed = send({ do: "film", on: true });
  else recorder.start();
  say_record();
});

function say_record(text) {
  const on = Boolean(state.filmed || recorder.on);
  const label = on ? "end the film" : "record a film";
  element("record").setAttribute("aria-pressed", String(on));
  notice(element("record"), text ?? label, label);
}

function fetch_film({ ticket, frames }) {
  const address = `film/${ticket}`;
  state.film = frames && address;
  if (frames) Object.assign(document.createElement("a"), { href: address, download: `walk-${state.world.room}.mp4` }).click();
  else say_record("nothing moved, so there is no film");
  state.next?.();
}

function film_lost(why) {
  if (!state.filmed) return;
  state.filmed = false;
  say_record(why);
}

// The film of a visit is fetched before another visit begins.
function go_to(room) {
  if (!state.filmed) return enter(room);
  element("record").click();
  state.next = () => enter(room);
}
element("compare").addEventListener("change", ({ target }) => {
  send({ do: "compare", on: target.checked });
  say_status();
});
addEventListener("resize", redraw);
setInterval(say_status, 1000);
// A ticket opens a fork once; reloaded, the page begins anew.
if (hash.has("ticket")) history.replaceState(null, "", address({}));
enter(hash.has("room") ? Number(hash.get("room")) : null, hash.get("walk"), hash.get("ticket"));
window.lipass = state;
