// The page: its state lies in the address, so that a search can be shared; a search is run by Enter or a changed setting.
import { $, h, count } from "./dom.js";
import { ask, useKey } from "./api.js";
import { connect, facts, point, problem, sideOf } from "./hits.js";
import { makeMap } from "./map.js";

const SIGNS = ["=", "!=", ">=", "<=", ">", "<"];
let sides = [], state = {}, running = null;

function read() {
  const said = new URLSearchParams(location.search);
  const k = Math.round(Number(said.get("k"))) || 10;
  return {
    q: said.get("q") ?? "", task: said.get("task"), k: Math.min(Math.max(k, 1), 100), where: said.getAll("where"),
    both: said.has("both"), view: said.get("view") === "map" ? "map" : "hits", colour: said.get("colour"),
  };
}

function write(how) {
  const said = new URLSearchParams();
  if (state.q) said.set("q", state.q);
  if (state.task !== null) said.set("task", state.task);
  if (state.k !== 10) said.set("k", state.k);
  for (const each of state.where) said.append("where", each);
  if (state.both) said.set("both", "");
  if (state.view === "map") said.set("view", "map");
  if (state.colour) said.set("colour", state.colour);
  const address = location.pathname + (said.size ? `?${said}` : "");
  if (address !== location.pathname + location.search) history[how](null, "", address);
}

function change(what) {
  Object.assign(state, what);
  write("pushState");
  fill();
  search();
}

// ---- the form

function fill() {
  const own = sides[0].info.task ?? "";
  $("query").value = state.q;
  $("task").value = state.task ?? own;
  $("task").placeholder = "none: the query is read as documents are";
  $("reset").hidden = state.task === null;
  $("k").value = state.k;
  $("both").checked = state.both;
  $("conditions").replaceChildren(...state.where.map((each) => h("li", {}, h("button",
    { type: "button", class: "chip on", "aria-label": `Remove filter ${named(each)}`, onclick: () => drop(each) }, `${named(each)} ×`))));
  for (const name of ["hits", "map"]) {
    const here = state.view === name;
    $(name).hidden = !here;
    $(`tab-${name}`).setAttribute("aria-selected", String(here));
    $(`tab-${name}`).tabIndex = here ? 0 : -1;
  }
  document.title = state.q ? `${state.q} - Embedwright search` : "Embedwright search";
}

function drop(condition) {
  change({ where: state.where.filter((each) => each !== condition) });
  $("value").focus();
}

// A condition lies in the address as a list of its parts, which any value fits into; or as a text, typed there by hand.
const written = (...parts) => JSON.stringify(parts);
const named = (condition) => { const { column, operator, value } = sent(condition); return column ? `${column} ${operator} ${value}` : condition; };

function sent(condition) {
  try {
    const [column, operator, value] = JSON.parse(condition);
    return { column, operator, value };
  } catch { return condition; }
}

function filter(column, value) {
  const condition = written(column, "=", value);
  if (!state.where.includes(condition)) change({ where: [...state.where, condition] });
  $("conditions").lastElementChild.firstElementChild.focus(); // what was clicked is drawn anew
}

function typedFilter() {
  const value = $("value").value.trim();
  if (!value) return [];
  $("value").value = "";
  return [written($("column").value, $("sign").value, value)];
}

function submit(event) {
  event?.preventDefault();
  const task = $("task").value.trim(), own = sides[0].info.task ?? "";
  const more = typedFilter().filter((each) => !state.where.includes(each));
  change({ q: $("query").value.trim(), task: task === own ? null : task, k: Number($("k").value), where: [...state.where, ...more], both: $("both").checked });
}

// ---- searching

const shown = () => (state.both && sides[1] ? sides : sides.slice(0, 1));

// A busy server is asked again by the page itself, each time later, and no more than TRIES times in a row.
const TRIES = 5;
let tries = 0, timer = null;
const begin = (byItself) => { clearTimeout(timer); if (!byItself) tries = 0; };
const delay = (error) => Object.assign(error, { wait: tries < TRIES && error.wait ? Math.max(error.wait, 2 ** tries) : 0, turn: `${tries + 1} of ${TRIES}` });
const later = (act, wait) => { if (wait) { tries += 1; timer = setTimeout(() => act(true), 1000 * wait); } };

function stop() {
  clearTimeout(timer);
  for (const side of sides) if (side.error) side.error.wait = 0;
  draw();
}

async function search(byItself = false) {
  begin(byItself);
  running?.abort();
  const own = running = new AbortController(), began = performance.now();
  for (const side of sides) Object.assign(side, { busy: Boolean(state.q), error: null }, state.q ? {} : { hits: null });
  draw();
  if (!state.q) return;
  const body = { query: state.q, k: state.k, where: state.where.map(sent) };
  await Promise.all(shown().map(async (side) => {
    try {
      const [found] = (await ask(`${side.base}search`, { ...body, task: state.task ?? (side.info.task ? null : "") }, own.signal)).data;
      Object.assign(side, { hits: found.hits, task: found.task });
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.status === 401) { wantKey(); return; }
      Object.assign(side, { error: delay(error), hits: null });
    }
    side.busy = false;
    if (own === running) draw(Math.round(performance.now() - began));
  }));
  if (own === running) later(search, Math.max(...shown().map((side) => side.error?.wait ?? 0)));
}

const lines = document.createElementNS("http://www.w3.org/2000/svg", "svg");
lines.setAttribute("aria-hidden", "true");
lines.classList.add("lines");
const watch = new ResizeObserver(() => connect(lines, [...$("hits").querySelectorAll(".side")]));

function draw(took = null) {
  const two = shown().length > 1;
  const wanted = { filter, stop, again: () => search() };
  const drawn = shown().map((side, i) => sideOf(side, two ? sides[1 - i] : null, wanted));
  watch.disconnect();
  $("hits").classList.toggle("two", two);
  if (!state.q) $("hits").replaceChildren(start());
  else $("hits").replaceChildren(...(two ? [drawn[0], lines, drawn[1]] : drawn));
  if (two && state.q) drawn.forEach((each) => watch.observe(each));
  $("status").textContent = said(took);
  map.mark(shown());
}

function said(took) {
  if (!state.q) return "";
  if (shown().some((side) => side.busy)) return "Searching…";
  if (shown().some((side) => !side.hits)) return "";
  const [one, other] = shown().map((side) => side.hits.map((hit) => hit.id));
  const time = took === null ? "" : ` in ${took.toLocaleString("en")} ms`;
  if (!other) return count(one.length, "hit") + time;
  return `${one.filter((id) => other.includes(id)).length} of ${count(one.length, "hit")} are in both lists${took === null ? "" : `, ${took.toLocaleString("en")} ms`}`;
}

const start = () => h("div", { class: "start" },
  h("p", {}, "Type a question and press Enter. Each hit shows the chunk of its document that is nearest to the query, by the cosine of their vectors."),
  h("p", { class: "note" }, h("kbd", {}, "/"), " goes to the query, ",
    h("kbd", {}, "↑"), h("kbd", {}, "↓"), " move through the hits, ", h("kbd", {}, "Enter"), " opens one, ", h("kbd", {}, "Esc"), " goes back."));

// ---- keys

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select, textarea"), here = document.activeElement;
  const columns = [...$("hits").querySelectorAll(".side")].map((side) => [...side.querySelectorAll(".title")]);
  const column = columns.findIndex((titles) => titles.includes(here)), row = column < 0 ? -1 : columns[column].indexOf(here);
  let to = null;
  if (event.key === "/" && !typing) to = $("query");
  else if (state.view !== "hits") return;
  else if (event.key === "ArrowDown" && here === $("query")) to = columns[0]?.[0];
  else if (row < 0) return;
  else if (event.key === "ArrowDown") to = columns[column][row + 1];
  else if (event.key === "ArrowUp") to = row ? columns[column][row - 1] : $("query");
  else if (event.key === "ArrowRight" || event.key === "ArrowLeft") to = columns[1 - column]?.[Math.min(row, columns[1 - column].length - 1)];
  else if (event.key === "Escape") to = $("query");
  if (!to) return;
  event.preventDefault();
  to.focus();
  to.closest(".hit")?.scrollIntoView({ block: "nearest" });
  if (to === $("query")) to.select();
}

// ---- opening

const map = makeMap($("map"), (colour) => { state.colour = colour; write("replaceState"); });

function look(view) {
  state.view = view;
  write("replaceState");
  fill();
  if (view === "map") map.show(sides, state.colour);
}

function wantKey() {
  $("key-wrong").textContent = $("key-form").hidden ? "" : "The server does not take this key.";
  $("key-form").hidden = false;
  $("open").hidden = true;
  $("facts").textContent = "";
  $("key").select();
}

async function open(byItself = false) {
  begin(byItself);
  try {
    const bases = (await ask("page/sides.json")).bases;
    sides = await Promise.all(bases.map(async (base) => ({ base, info: await ask(`${base}index`), hits: null, busy: false, error: null })));
  } catch (error) {
    if (error.status === 401) wantKey();
    else {
      const show = () => $("facts").replaceChildren(problem(error, () => open(), () => { clearTimeout(timer); error.wait = 0; show(); }));
      delay(error);
      show();
      later(open, error.wait);
    }
    return;
  }
  const { info } = sides[0];
  $("key-form").hidden = true;
  $("open").hidden = false;
  $("model").textContent = info.model;
  $("facts").textContent = facts(info);
  $("both-label").hidden = !sides[1];
  $("second").textContent = sides[1] ? sides[1].info.model : "";
  const columns = Object.keys(info.metadata);
  $("filters").hidden = !columns.length;
  $("column").replaceChildren(...columns.map((name) => h("option", {}, name)));
  $("sign").replaceChildren(...SIGNS.map((sign) => h("option", {}, sign)));
  fill();
  search();
  if (state.view === "map") map.show(sides, state.colour);
  else if (!state.q) $("query").focus(); // a shared search opens without a phone's keyboard over it
}

state = read();
$("form").addEventListener("submit", submit);
for (const id of ["task", "k", "both"]) $(id).addEventListener("change", () => $("form").requestSubmit());
$("add").addEventListener("click", () => $("form").requestSubmit());
$("reset").addEventListener("click", () => { change({ task: null }); $("task").focus(); });
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); useKey($("key").value); open(); });
for (const name of ["hits", "map"]) $(`tab-${name}`).addEventListener("click", () => look(name));
document.querySelector(".tabs").addEventListener("keydown", (event) => {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  look(state.view === "map" ? "hits" : "map");
  $(`tab-${state.view}`).focus();
});
for (const kind of ["pointerover", "focusin"]) {
  $("hits").addEventListener(kind, (event) => point($("hits"), event.target.closest(".hit")?.dataset.id));
}
document.addEventListener("keydown", keys);
addEventListener("popstate", () => { state = read(); fill(); search(); if (state.view === "map") map.show(sides, state.colour); });
open();
