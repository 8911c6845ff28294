// Draws the hits of a model, and the lines between the lists of two.
import { h, count } from "./dom.js";

const BEFORE = 90, SHOWN = 360, NARROW = 220; // characters of a closed hit: before its chunk, and in all

export function sideOf(side, other, wanted) {
  const { info, hits, error, busy, task } = side;
  const list = h("ol", { class: "hits" }, ...(hits ?? []).map((hit, i) => hitOf(hit, i, other, wanted)));
  const heading = !other ? h("h2", { class: "hidden" }, "Hits") : h("header", {},
    h("h2", {}, info.model),
    h("p", { class: "note" }, facts(info)), h("p", { class: "note" }, task ? `Instruction: ${task}` : "No instruction"));
  const empty = hits && !hits.length && !error ? h("p", { class: "note" }, "No document passes these filters.") : null;
  return h("section", { class: "side", "aria-busy": String(busy), "aria-label": `Hits of ${info.model}` },
    heading, error && problem(error, wanted.again, wanted.stop), error ? null : empty ?? list);
}

export const facts = (info) =>
  `${count(info.documents, "document")}${info.chunks === info.documents ? "" : ` in ${count(info.chunks, "chunk")}`}, ${info.dimension} dimensions, ${info.precision}`;

// With `stop`, the page is about to ask again by itself, if the server wants that.
export function problem(error, again, stop = null) {
  const waits = stop && error.wait, useless = error.status >= 400 && error.status < 500 && error.status !== 429;
  const button = (name, act) => h("button", { type: "button", onclick: act }, name);
  return h("div", { class: "error", role: "alert" },
    h("p", {}, error.message + (waits ? ` Asking again in ${count(error.wait, "second")} (${error.turn}).` : "")),
    waits ? button("Stop", stop) : useless ? null : button("Try again", again));
}

function hitOf(hit, i, other, wanted) {
  const place = other?.busy ? -1 : (other?.hits?.findIndex((each) => each.id === hit.id) ?? -1);
  const shared = place < 0 ? null : h("p", { class: "shared" }, `rank ${place + 1} with ${other.info.model}`);
  const text = h("div", { class: "text" }, ...pieces(hit, false, other));
  const toggle = () => {
    const open = title.getAttribute("aria-expanded") !== "true";
    title.setAttribute("aria-expanded", String(open));
    text.classList.toggle("open", open);
    text.replaceChildren(...pieces(hit, open, other));
    if (open && text.scrollHeight > text.clientHeight) text.tabIndex = 0; // scrolls by keys, too
    else text.removeAttribute("tabindex");
    const mark = text.querySelector("mark");
    text.scrollTop = open && mark ? mark.offsetTop - text.offsetTop - 48 : 0;
  };
  const title = h("button", { type: "button", class: "title", "aria-expanded": "false", onclick: toggle }, hit.title || hit.id);
  const values = Object.entries(hit.metadata ?? {}).filter(([, value]) => value !== null).map(([column, value]) =>
    h("li", {}, h("button", { type: "button", class: "chip", title: "Filter by this value", onclick: () => wanted.filter(column, value) }, `${column}: ${value}`)));
  const chips = values.length ? h("ul", { class: "chips" }, ...values) : null;
  return h("li", { class: "hit", "data-id": hit.id },
    h("span", { class: "rank", "aria-hidden": "true" }, String(i + 1)),
    h("div", { class: "body" }, h("h3", {}, title), shared, text, chips),
    h("span", { class: "score", title: "Cosine of the query and the best chunk" }, h("span", { class: "hidden" }, "score "), hit.score.toFixed(3)));
}

// The text of a hit with its chunk marked; closed, only what surrounds the beginning of the chunk.
// `start` and `end` count code points, as Python does; JavaScript's own indices count UTF-16 units.
function pieces({ text, start, end }, open, narrow) {
  const letters = Array.from(text), size = letters.length;
  const cut = (from, to) => letters.slice(from, Math.max(from, to)).join("");
  const from = open || start <= BEFORE ? 0 : start - BEFORE, to = open ? size : Math.min(size, from + (narrow ? NARROW : SHOWN));
  let before = cut(from, start), chunk = cut(start, Math.min(end, to)), after = cut(end, to);
  if (from > 0) before = "… " + before.replace(/^\S*\s+/, "");
  if (to < size && after) after = after.replace(/\s+\S*$/, "") + " …";
  else if (to < size) chunk = chunk.replace(/\s+\S*$/, "") + " …";
  const partial = start > 0 || end < size; // the mark of a whole document would say nothing
  return [before, partial ? h("mark", {}, chunk) : chunk, after];
}

// Lines between the places of the same document in two lists; they follow when a hit opens.
export function connect(svg, [left, right]) {
  const at = svg.getBoundingClientRect(), rows = (side) => [...side.querySelectorAll(".hit")];
  const middle = (row) => row.querySelector(".title").getBoundingClientRect();
  svg.replaceChildren();
  if (!at.width || [left, right].some((side) => side.getAttribute("aria-busy") === "true")) return;
  for (const row of rows(left)) {
    const same = rows(right).find((each) => each.dataset.id === row.dataset.id);
    if (!same) continue;
    const [a, b] = [middle(row), middle(same)].map((box) => box.top + Math.min(box.height, 24) / 2 - at.top);
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    line.setAttribute("d", `M0 ${a} C${at.width / 2} ${a} ${at.width / 2} ${b} ${at.width} ${b}`);
    line.dataset.id = row.dataset.id;
    svg.append(line);
  }
}

// Marks a document in both lists, and its line.
export function point(panel, id) {
  for (const each of panel.querySelectorAll("[data-id]")) each.classList.toggle("pointed", each.dataset.id === id);
}
